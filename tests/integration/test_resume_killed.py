"""Runs that are killed, by real signals to real processes, and go on as if they never had been."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from freezeout import Frozen, Schedule
from tests.command import (
    EPOCHS,
    FILES,
    LAYERS,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Outcome,
    differences,
    environment,
    options,
    process,
    read_checkpoint,
    read_rows,
    run_here,
    run_process,
)

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")

AT_ONCE = 2  # runs; each has one thread
KILLED = -9

T = TypeVar("T")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = run_process(*options(out=folder))
    assert (ended.status, ended.err) == (0, "")
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [STEPS_PER_EPOCH * (i + 1) for i in range(EPOCHS)]
    frozen = [row["frozen_layers"] for row in rows]
    assert len(set(frozen)) == EPOCHS  # the runs below are killed at several depths
    return folder


def together(work: Callable[[T], list[str]], items: Iterable[T]) -> list[str]:
    """What went wrong with each, of which a few are at work at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [problem for problems in pool.map(work, items) for problem in problems]


def finish(folder: Path, reference: Path, what: str) -> list[str]:
    """Resume the run to its end; what went wrong, or differs from the reference."""
    ended = run_process("--resume", folder)
    if ended.status != 0:
        return [f"{what}: resuming ended with {ended.status}: {ended.err}"]
    return [f"{what}: {difference}" for difference in differences(folder, reference)]


def test_ten_runs_killed_at_random_steps_end_as_if_never_killed(
    reference: Path, tmp_path: Path
) -> None:
    """One in each tenth of the run, at a random step there; three are killed a second time."""

    def killed_and_resumed(tenth: int) -> list[str]:
        step = random.randint(tenth * TOTAL_STEPS // 10 + 1, (tenth + 1) * TOTAL_STEPS // 10)
        what, folder = f"killed at step {step}", tmp_path / str(tenth)
        first = run_process(*options(out=folder), at=("SIGKILL", "step", step))
        whole = (step - 1) // STEPS_PER_EPOCH
        if first.status != KILLED:
            return [f"{what}: ended with {first.status}: {first.err}"]
        if f"--resume {folder}" not in first.out:  # said beforehand: a killed run cannot
            return [f"{what}: said {first.out}"]
        saved = {path.name for path in folder.iterdir()}
        if saved != (set(FILES) - {"model.safetensors"} if whole else {"config.json"}):
            return [f"{what}: left {saved}"]
        if whole and read_checkpoint(folder)["freezer"]["step"] != whole * STEPS_PER_EPOCH:
            return [f"{what}: lost more than the work since the last epoch"]
        if tenth in (1, 4, 8):
            again = random.randint(1, TOTAL_STEPS - whole * STEPS_PER_EPOCH)
            what += f", and at step {again} from there"
            second = run_process("--resume", folder, at=("SIGKILL", "step", again))
            if second.status != KILLED:
                return [f"{what}: ended with {second.status}: {second.err}"]
        return finish(folder, reference, what)

    assert together(killed_and_resumed, range(10)) == []


def test_a_run_that_began_with_frozen_layers_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Killed in its first epoch, before the first checkpoint, and in its third."""
    whole = tmp_path / "whole"
    ended = run_process(*options(out=whole, frozen=3))
    assert (ended.status, ended.err) == (0, "")
    line = Frozen(3, then=Schedule(0.4, "squared")).timeline(LAYERS, TOTAL_STEPS)
    for row in read_rows(whole):
        assert row["frozen_layers"] == line.num_frozen(row["step"]) > 3

    def killed_and_resumed(step: int) -> list[str]:
        what, folder = f"killed at step {step}", tmp_path / str(step)
        first = run_process(*options(out=folder, frozen=3), at=("SIGKILL", "step", step))
        if first.status != KILLED:
            return [f"{what}: ended with {first.status}: {first.err}"]
        return finish(folder, whole, what)

    steps = [random.randint(n * STEPS_PER_EPOCH + 1, (n + 1) * STEPS_PER_EPOCH) for n in (0, 2)]
    assert together(killed_and_resumed, steps) == []
    # What was measured is of the whole run, whatever process made it.
    for folder in (whole, *(tmp_path / str(step) for step in steps)):
        savings = json.loads((folder / "savings.json").read_text())
        assert sum(each["steps"] for each in savings["depths"]) == TOTAL_STEPS


def test_killed_between_two_files_each_epoch_comes_once(reference: Path, tmp_path: Path) -> None:
    """A new checkpoint beside old metrics, no more than a checkpoint's temporary file, and all but
    the final weights."""
    moments = [("metrics.jsonl", EPOCHS), ("checkpoint.pt", 1), ("model.safetensors", 1)]

    def killed_and_resumed(moment: tuple[str, int]) -> list[str]:
        what, folder = f"killed before {moment}", tmp_path / "-".join(map(str, moment))
        first = run_process(*options(out=folder), at=("SIGKILL", *moment))
        if first.status != KILLED:
            return [f"{what}: ended with {first.status}: {first.err}"]
        if moment == ("metrics.jsonl", EPOCHS) and not (
            len(read_rows(folder)) == EPOCHS - 1 and read_checkpoint(folder)["epoch"] == EPOCHS
        ):
            return [f"{what}: the checkpoint is not ahead of the metrics"]
        return finish(folder, reference, what)

    assert together(killed_and_resumed, moments) == []


def test_a_stopped_run_keeps_every_step_and_goes_on_as_it_says(
    reference: Path, tmp_path: Path
) -> None:
    def stopped_and_resumed(step: int) -> list[str]:
        what, folder = f"stopped at step {step}", tmp_path / str(step)
        first = run_process(*options(out=folder), at=("SIGTERM", "step", step))
        advice = f"freezeout train --resume {folder}"
        line = f"freezeout: stopped after step {step}; go on with: {advice}\n"
        if (first.status, first.err) != (128 + signal.SIGTERM, line):
            return [f"{what}: ended with {first.status}: {first.err}"]
        state = read_checkpoint(folder)
        done = state["epoch"] * STEPS_PER_EPOCH + state["batch"]
        if not step == done == state["freezer"]["step"]:
            return [f"{what}: kept {done} steps"]
        return finish(folder, reference, what)

    within = random.randint(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH - 1)
    assert together(stopped_and_resumed, [within, 2 * STEPS_PER_EPOCH]) == []


def signalled(number: signal.Signals, folder: Path) -> Outcome:
    """A run that gets a signal from outside, at a random time after its start or an epoch."""
    for attempt in range(9):
        out = folder.with_name(f"{folder.name}-{attempt}")
        with subprocess.Popen(
            process(*options(out=out)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            heard, wanted = "", random.choice(["--resume", "epoch 1/", "epoch 2/"])
            for line in child.stdout:
                heard += line
                if wanted in line:
                    break
            time.sleep(random.uniform(0, 0.3))
            child.send_signal(number)
            heard += child.stdout.read()
            err = child.stderr.read()
        if child.returncode != 0:  # it was not faster than the signal
            out.rename(folder)
            return Outcome(child.returncode, heard, err)
    raise AssertionError("nine runs ended before the signal came")


def test_a_signal_from_outside_at_a_random_time(reference: Path, tmp_path: Path) -> None:
    def signalled_and_resumed(number: signal.Signals) -> list[str]:
        folder = tmp_path / number.name
        stopped = signalled(number, folder)
        what = f"{number.name} after {stopped.out}"
        expected = KILLED if number is signal.SIGKILL else 128 + number
        if stopped.status != expected:
            return [f"{what}: ended with {stopped.status}: {stopped.err}"]
        if number is not signal.SIGKILL:
            step = read_checkpoint(folder)["freezer"]["step"]
            if f"stopped after step {step};" not in stopped.err:
                return [f"{what}: kept {step} steps, said {stopped.err}"]
        return finish(folder, reference, what)

    assert together(signalled_and_resumed, [signal.SIGKILL, signal.SIGINT]) == []


def test_a_finished_run_that_is_resumed_stays_as_it_is_and_says_so(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(reference, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = run_here(capsys, "--resume", folder)
    assert (ended.status, ended.err) == (0, "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "go on with" not in ended.out  # there is nothing left to go on with
    assert re.search(r"finished|complete|already|ended|nothing", ended.out)
