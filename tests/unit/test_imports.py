"""What imports what: `import freezeout` is light, and imports run one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import freezeout

PACKAGE = Path(freezeout.__file__).parent

# Each part may import those in front of it (docs/design.md).
ORDER = [
    {"errors", "atomic", "words"},
    {"values"},
    {"plan"},
    {"schedule"},
    {"cost"},
    {"clock", "versions"},
    {"layers", "parts"},
    {"optimizers", "checks", "savings", "planned"},
    {"trial"},
    {"freezer"},
    {"parallel", "cache", "profile"},
    {"integrations"},
    {"lab"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
# Where the public names live.
HOME = {
    "FreezeOut": "freezer",
    "FreezeOutError": "errors",
    "Frozen": "plan",
    "Plan": "plan",
    "Timeline": "plan",
    "thaw": "freezer",
    "Layer": "layers",
    "PrefixCache": "cache",
    "Schedule": "schedule",
    "find_layers": "layers",
    "__version__": "errors",
}
STANDARD_LIBRARY_ONLY = {"errors", "atomic", "words", "values", "plan", "schedule", "cost"}
# They plan and read runs, and leave the training to other processes.
PLANNING = {
    ("lab", name)
    for name in (
        "config",
        "runs",
        "equal_time",
        "study",
        "strategy",
        "forecast",
        "sweep",
        "sweep_display",
        "display",
        "signals",
    )
}
# Adapters without torch: of this package they import nothing that has it.
NO_TORCH = {("integrations", name) for name in ("jax", "jax_order", "keras", "keras_layers")}
WITHOUT_TORCH = {*STANDARD_LIBRARY_ONLY, "integrations"}
MAY_USE_EXTRAS = {"integrations", "lab", "cli", "__main__"}


def imports(file: Path, root: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in it; `root` holds freezeout."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offences(root: Path) -> list[str]:
    """Every import in root/freezeout that the order does not allow."""
    found = []
    for file in sorted((root / "freezeout").rglob("*.py")):
        inside = file.relative_to(root / "freezeout").with_suffix("").parts
        part = inside[0]
        if part == "__init__":
            continue  # it has the public names, and loads them when they are used
        for name in imports(file, root):
            top, *rest = name.split(".")
            if top != "freezeout":
                light = part in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names
                extra = part not in MAY_USE_EXTRAS and top not in {
                    "torch",
                    "numpy",
                    *sys.stdlib_module_names,
                }
                no_torch = inside in NO_TORCH | PLANNING or inside[:2] == ("lab", "report")
                if light or extra or (no_torch and top == "torch"):
                    found.append(f"{'/'.join(inside)} imports {name}")
                continue
            other = HOME.get(rest[0], rest[0])
            allowed = other == part or RANK.get(other, len(ORDER)) < RANK.get(part, -1)
            allowed = allowed and (inside not in NO_TORCH or other in WITHOUT_TORCH)
            reports = rest[:2] == ["lab", "report"] or rest[:3] == ["lab", "__init__", "report"]
            is_report = inside[:2] == ("lab", "report")
            if not allowed or (reports and not is_report and inside != ("cli",)):
                found.append(f"{'/'.join(inside)} imports {name}")
    return found


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


def test_importing_freezeout_loads_neither_torch_nor_numpy_nor_any_extra() -> None:
    code = "import sys; old = {*sys.modules}; import freezeout; print(*({*sys.modules} - old))"
    tops = {name.split(".")[0] for name in run(code).split()}
    assert "freezeout" in tops
    assert tops - {"freezeout"} <= sys.stdlib_module_names


def test_the_schedule_and_the_cost_work_without_torch_and_numpy() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from freezeout import Schedule; from freezeout.cost import saving\n"
        "print(Schedule().freeze_steps(3, 1000), saving([2.0, 1.0], (5, 5)))"
    )
    assert run(code) == "(512, 729, 1000) 0.25\n"


def test_public_names_load_torch_when_they_are_used() -> None:
    code = (
        "import sys, freezeout; assert 'torch' not in sys.modules\n"
        "freezeout.FreezeOut, freezeout.Layer, freezeout.find_layers\n"
        "assert 'torch' in sys.modules; print(*dir(freezeout))"
    )
    assert run(code).split() == sorted(freezeout.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(freezeout, "freeze_everything")


def test_imports_run_one_way() -> None:
    assert offences(PACKAGE.parent) == []


def test_the_check_of_imports_can_fail(tmp_path: Path) -> None:
    files = {
        "layers/find.py": "from ..freezer import FreezeOut",
        "freezer.py": "from freezeout.lab import train",
        "schedule.py": "import torch",
        "cost.py": "from . import layers",
        "cache.py": "def later():\n    import rich",
        "profile.py": "from freezeout import Schedule, FreezeOut",  # allowed
        "optimizers.py": "from freezeout import FreezeOut",
        "lab/train.py": "from .report import write",
        "lab/report/__init__.py": "from ...cli import main",
        "lab/report/page.py": "from . import style\nimport torch",
        "integrations/jax.py": "import jax, torch",
        "integrations/keras.py": "from ..schedule import Schedule\nfrom ..freezer import FreezeOut",
        "cli.py": "from .lab.report import write",  # allowed
        "helpers.py": "from .errors import InvalidValue",  # a part that has no place yet
    }
    for name, text in files.items():
        file = tmp_path / "freezeout" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert offences(tmp_path) == [
        "cache imports rich",
        "cost imports freezeout.layers",
        "freezer imports freezeout.lab.train",
        "helpers imports freezeout.errors.InvalidValue",
        "integrations/jax imports torch",
        "integrations/keras imports freezeout.freezer.FreezeOut",
        "lab/report/__init__ imports freezeout.cli.main",
        "lab/report/page imports torch",
        "lab/train imports freezeout.lab.report.write",
        "layers/find imports freezeout.freezer.FreezeOut",
        "optimizers imports freezeout.FreezeOut",
        "schedule imports torch",
    ]
