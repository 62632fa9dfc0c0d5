"""docs/transfer.md runs as it stands, so do examples/own_plan.py and the README's first loop."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENT = (ROOT / "docs" / "transfer.md").read_text()
PLAN = ROOT / "examples" / "own_plan.py"


def blocks(text: str, language: str = "python") -> list[str]:
    """The blocks of code of this language, "": of none."""
    return [
        code
        for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        if name == language
    ]


def promised(code: str) -> list[str]:
    """What comments say that the print() calls before them print."""
    return re.findall(r"print\(.*\)  # (.*?)(?:: .*)?$", code, re.M)


@pytest.mark.filterwarnings("ignore:the layers in which nothing trains:UserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
def test_the_document_is_a_program_that_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": __name__}
    printed = []
    for number, code in enumerate(blocks(DOCUMENT)):
        exec(compile(code, f"block {number} of docs/transfer.md", "exec"), namespace)
        printed.append(capsys.readouterr().out)
        said = promised(code)
        assert printed[-1].splitlines()[: len(said)] == said, code
    table, epochs, *_ = blocks(DOCUMENT, "")
    assert table == printed[0]
    assert epochs in "".join(printed)
    assert len(printed) == 10


def test_a_plan_of_ones_own() -> None:
    source = PLAN.read_text()
    assert len(source.splitlines()) <= 40
    shown = next(code for code in blocks(DOCUMENT) if "class OneAnEpoch" in code)
    start = shown.index("@dataclass")
    assert shown[start : shown.index("\n\n\n", start)] in source
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PLAN)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert not done.stderr
    *epochs, summary = done.stdout.splitlines()
    frozen = [1, 2, 3, 4, 4]
    assert epochs == [f"epoch {i}: {k} of 5 layers frozen" for i, k in enumerate(frozen, 1)]
    assert summary.startswith("froze 4 of 5 layers; ")
    assert "65 KiB of gradients" in summary


def test_the_readmes_first_loop_runs_when_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks(README)[0], "README.md", "exec"), {"__name__": __name__})
    table = capsys.readouterr().out
    assert re.search(r"froze 4 of 5 layers; .* saved", table), table


def test_install_lines_name_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.findall(r"pip install ([^`\n)]*)", README)
    assert {"-e .", "-e '.[lab]'"} <= set(lines)
    for line in lines:
        found = re.fullmatch(r"-e (?:\.|'\.\[(.*)\]')", line)
        assert found, line
        extras = set((found[1] or "").split(",")) - {""}
        assert extras <= set(project["optional-dependencies"]), line
