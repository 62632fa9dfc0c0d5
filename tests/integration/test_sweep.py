"""`freezeout sweep`, as real processes: finished, killed, stopped, given cells that cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from freezeout.lab.report import style, write_report
from freezeout.lab.runs import find_run_folders, read_run
from tests.command import differences, environment, read_checkpoint, read_rows, read_weights

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")

GROUP = "wrn-10-1-digits"
ORDINARY, FROZEN, RIVAL = (
    f"{GROUP}/{arm}/seed0"
    for arm in ("ordinary-3-epochs", "cubic-scaled-0.5", "cubic-0.5-equal-time")
)
_STUDY = """
models = ["wrn-10-1"]
datasets = ["digits"]
strategies = ["cubic scaled 0.5", "cubic scaled 3"]  # the second cannot be
seeds = [0]
epochs = 3
batch_size = 100
validate = "test"
precision = "fp32"
devices = ["cpu"]
"""
FAILED = "wrn-10-1 on digits, cubic-scaled-3, seed 0: t_0 must be in (0, 1], got 3.0"
_TIMES = ("seconds", "seconds_median", "time_saved", "equal_time_steps")


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    """`freezeout sweep` of the study, into `home`."""
    study = home.with_suffix(".toml")
    study.write_text(_STUDY)
    command = [sys.executable, "-m", "freezeout", "sweep", str(study), "--out", str(home)]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,  # as a terminal does, whose Ctrl-C reaches the whole session
    )


def take_step_costs(home: Path, other: Path) -> None:
    """As if they had been measured: that takes seconds."""
    (home / GROUP).mkdir(parents=True)
    shutil.copy(other / GROUP / "step_costs.json", home / GROUP)


def finish(home: Path, *options: str) -> tuple[int, str, str]:
    """The same, to its end: its status, and what it said."""
    with start(home, *options) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.02)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file's content and when it was last written."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def status(home: Path) -> dict[str, str]:
    runs = json.loads((home / "sweep.json").read_text())["runs"]
    return {run["run"]: run["status"] for run in runs}


def timeless(value: Any) -> Any:
    """A report's numbers without times, and without what follows from them."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in (*_TIMES, "comparisons")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def report(home: Path) -> Any:
    page, _ = write_report(home)
    return json.loads((page.parent / "report.json").read_text())


def process_is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    # One that nobody has waited for is over all the same.
    state = Path(f"/proc/{number}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def workers(home: Path) -> list[int]:
    """The processes that write a log in `home`."""
    logs = {str(path.resolve()) for path in home.rglob("*.log")}
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd/1") in logs:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep's folder. One of its cells cannot be, and the rest is made."""
    home = tmp_path_factory.mktemp("whole") / "sweep"
    ended, out, err = finish(home)
    assert ended == 2
    assert err.startswith(f"freezeout: 2 of 5 runs failed, the first being {FAILED}; the same")
    assert len(err.splitlines()) == 1
    assert "its length is unknown: no run of cubic-scaled-3 was finished" in out
    assert f"look at them with: freezeout report {home}" in out
    return home


def test_a_sweep_makes_every_run_that_can_be_made(whole: Path) -> None:
    runs = {str(p.relative_to(whole)): read_run(p) for p in find_run_folders(whole)}
    assert set(runs) == {ORDINARY, FROZEN, RIVAL}
    assert all(run.is_finished for run in runs.values())
    assert runs[ORDINARY].total_steps == runs[FROZEN].total_steps
    assert not runs[RIVAL].freezes
    assert runs[RIVAL].total_steps >= 1
    assert status(whole) == {
        ORDINARY: "finished",
        FROZEN: "finished",
        RIVAL: "finished",
        f"{GROUP}/cubic-scaled-3/seed0": "failed",
        f"{GROUP}/cubic-3-equal-time/seed0": "failed",
    }


def test_killed_in_the_middle_it_goes_on_and_ends_as_if_never_killed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "sweep"
    take_step_costs(home, whole)
    with start(home) as process:
        wait_until((home / FROZEN / "metrics.jsonl").exists, "the first epoch of the second run")
        (worker,) = workers(home)
        process.kill()
    # Its process does not outlive the sweep, and keeps what it has done.
    wait_until(lambda: not process_is_alive(worker), "the run's own end", seconds=60)
    assert len(read_rows(home / FROZEN)) < 3, "the run was faster than the kill"
    assert read_checkpoint(home / FROZEN)["freezer"]["step"] > 0
    before = files(home / ORDINARY)
    # As if it had been killed after the rival was begun. A rival's length depends on times, so
    # only one of the same length can be compared.
    (home / RIVAL).mkdir(parents=True)
    shutil.copy(whole / RIVAL / "config.json", home / RIVAL)

    ended, out, _ = finish(home)

    assert ended == 2  # the cell that cannot be
    assert "5 runs into" in out
    assert "1 of them finished before" in out
    assert files(home / ORDINARY) == before
    for run in (ORDINARY, FROZEN, RIVAL):
        assert differences(home / run, whole / run) == [], run
    monkeypatch.setattr(style, "save", lambda figure, path, title: "<svg></svg>")
    assert timeless(report(home)) == timeless(report(whole))

    # A third time there is nothing left to do.
    finished = {run: files(home / run) for run in (ORDINARY, FROZEN, RIVAL)}
    assert finish(home)[0] == 2
    assert {run: files(home / run) for run in (ORDINARY, FROZEN, RIVAL)} == finished


def test_a_stopped_sweep_saves_its_runs_and_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    home = tmp_path / "sweep"
    take_step_costs(home, whole)
    with start(home, "--strategies", "cubic scaled 0.5", "--epochs", "400") as process:
        run = home / ORDINARY.replace("-3-", "-400-")
        wait_until((run / "metrics.jsonl").exists, "the first epoch")
        with start(home) as other:  # one sweep a folder
            assert "another sweep is at work in" in other.communicate(timeout=120)[1]
            assert other.returncode == 2
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert err == f"freezeout: stopped; go on with: freezeout sweep {home}/sweep.toml\n"
    assert workers(home) == []
    state = read_checkpoint(run)
    assert state["freezer"]["step"] == state["epoch"] * 15 + state["batch"] > 0
    assert "stopped after step" in run.with_name("seed0.log").read_text()
    assert set(status(home).values()) == {"waiting"}


def test_a_folder_with_other_runs_is_refused(whole: Path, tmp_path: Path) -> None:
    home = shutil.copytree(whole, tmp_path / "sweep")
    ended, _, err = finish(home, "--batch-size", "50")
    assert ended == 2
    assert "holds a run with batch_size = 100, and the sweep asks for 50" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "quick", "study.toml"], "give either a file or --preset, not both"),
        (["study.toml"], "study.toml cannot be read: No such file or directory"),
        (["--strategies", "cubic"], "strategies has 'cubic'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "freezeout", "sweep", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("freezeout: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_strategies_with_layers_frozen_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, home = tmp_path / "study.toml", tmp_path / "sweep"
    study.write_text(
        _STUDY.replace(
            '["cubic scaled 0.5", "cubic scaled 3"]',
            '["cubic scaled 0.5 frozen 2", "frozen stem", "cubic scaled 0.5 frozen 9"]',
        ).replace("epochs = 3", "epochs = 2\nimages = 500\nequal_time = false")
    )
    command = [sys.executable, "-m", "freezeout", "sweep", str(study), "--out", str(home)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert ended.returncode == 2
    assert "1 of 4 runs failed" in ended.stderr
    assert "cubic-scaled-0.5-frozen-9, seed 0: Frozen(first=9) does not go with 5" in ended.stderr
    group = home / GROUP
    both, alone = (group / arm / "seed0" for arm in ("cubic-scaled-0.5-frozen-2", "frozen-stem"))
    # With 10 steps: the first of three others at step 2, where t_0 is cubed, then at 5.
    assert [row["frozen_layers"] for row in read_rows(both)] == [4, 4]
    assert [row["frozen_layers"] for row in read_rows(alone)] == [1, 1]
    weights = [read_weights(run) for run in (both, alone)]
    assert torch.equal(weights[0]["stem.weight"], weights[1]["stem.weight"])
    monkeypatch.setattr(style, "save", lambda figure, path, title: "<svg></svg>")
    arms = [arm["arm"] for each in report(home)["groups"] for arm in each["arms"]]
    assert arms == ["ordinary, full length", "cubic scaled 0.5 frozen 2", "frozen stem"]
