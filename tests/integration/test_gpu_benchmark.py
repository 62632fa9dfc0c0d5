"""`python -m benchmarks.gpu`, which is made for machines that are at hand now and then, must run
when one is: here every part in small, on the CPU, in processes of their own."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from benchmarks.gpu.__main__ import PARTS
from tests.integration.processes import process


def benchmark(out: Path, *arguments: str) -> CompletedProcess[str]:
    return process("-m", "benchmarks.gpu", out, *arguments, seconds=500)


def tiny(out: Path, part: str) -> CompletedProcess[str]:
    ended = benchmark(out, "--tiny", "--device", "cpu", "--parts", part)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_in_small(part: str, tmp_path: Path) -> None:
    tiny(tmp_path, part)
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert result["environment"]["tiny"]
    assert result["cases"]
    assert all(case["rows"] for case in result["cases"].values())
    assert "|---|" in (tmp_path / f"{part}.md").read_text().replace(" ", "")


def test_a_part_goes_on_with_the_cases_that_are_not_done(tmp_path: Path) -> None:
    tiny(tmp_path, "cache")
    file = tmp_path / "cache.json"
    before = json.loads(file.read_text())
    lost = next(iter(before["cases"]))
    first = before["cases"].pop(lost)
    file.write_text(json.dumps(before))
    assert f"{len(before['cases']) + 1} cases, 1 to run" in tiny(tmp_path, "cache").stdout
    after = json.loads(file.read_text())["cases"]
    assert len(after.pop(lost)["rows"]) == len(first["rows"])
    assert after == before["cases"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "device 'tpu' is not there"),
        (["--data", "nowhere.npz"], "--data nowhere.npz: no such file"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--parts", "slow"], "invalid choice: 'slow'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    ended = benchmark(tmp_path / "out", *arguments)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
