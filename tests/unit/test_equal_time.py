"""The length of an ordinary run that takes as long as one with FreezeOut."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from freezeout.lab.equal_time import equal_time_steps
from freezeout.lab.runs import Run, read_run
from tests.run_folders import write_run

HALF = (0.01, 0.01, 0.005, 0.005)  # of four epochs of 100 steps: 300 ordinary steps in all


def runs(
    home: Path, times: Mapping[int, tuple[float, ...] | float], **options: object
) -> list[Run]:
    """One run a seed, whose epochs' steps take these seconds."""
    return [
        read_run(write_run(home / str(seed), seed=seed, step_seconds=each, **options))  # type: ignore[arg-type]
        for seed, each in times.items()
    ]


def steps(
    tmp_path: Path,
    arm: Mapping[int, tuple[float, ...] | float],
    ordinary: Mapping[int, tuple[float, ...] | float],
) -> float | None:
    return equal_time_steps(
        runs(tmp_path / "arm", arm), runs(tmp_path / "ordinary", ordinary, freezeout=False)
    )


def test_steps_of_half_the_cost_count_half(tmp_path: Path) -> None:
    assert steps(tmp_path, {0: HALF}, {0: 0.01}) == pytest.approx(300, abs=1e-9)


def test_without_any_saving_the_length_is_the_whole(tmp_path: Path) -> None:
    assert steps(tmp_path, {0: 0.03, 1: 0.03}, {0: 0.03, 1: 0.03}) == 400


def test_a_machine_that_slows_down_for_good_changes_nothing(tmp_path: Path) -> None:
    """Seed 1 and 2 are made when everything takes three times as long."""
    slow = tuple(3 * t for t in HALF)
    arm = {0: HALF, 1: slow, 2: slow}
    assert steps(tmp_path, arm, {0: 0.01, 1: 0.03, 2: 0.03}) == pytest.approx(300, abs=1e-9)


def test_one_disturbed_run_of_three_does_not_decide(tmp_path: Path) -> None:
    disturbed = tuple(5 * t for t in HALF)
    arm = {0: HALF, 1: disturbed, 2: HALF}
    ordinary = dict.fromkeys(arm, 0.01)
    assert steps(tmp_path, arm, ordinary) == pytest.approx(300, abs=1e-9)


def test_a_run_is_measured_by_the_ordinary_run_of_its_own_seed(tmp_path: Path) -> None:
    """One run is disturbed, and the machine has slowed down for another seed."""
    arm = {0: tuple(5 * t for t in HALF), 1: HALF, 2: tuple(3 * t for t in HALF)}
    assert steps(tmp_path, arm, {0: 0.01, 1: 0.01, 2: 0.03}) == pytest.approx(300, abs=1e-9)


def test_a_slow_spell_in_each_seed_in_another_epoch_does_not_decide(tmp_path: Path) -> None:
    arm = {
        seed: tuple(7 * t if epoch == seed else t for epoch, t in enumerate(HALF))
        for seed in range(3)
    }
    ordinary = dict.fromkeys(arm, (0.01, 0.01, 0.01, 0.09))
    assert steps(tmp_path, arm, ordinary) == pytest.approx(300, abs=1e-9)


def test_a_seed_without_its_ordinary_run_is_measured_by_the_others(tmp_path: Path) -> None:
    assert steps(tmp_path, {0: HALF, 1: HALF}, {0: 0.01}) == pytest.approx(300, abs=1e-9)


def test_the_last_epoch_may_be_shorter(tmp_path: Path) -> None:
    arm = runs(tmp_path / "arm", {0: (0.01, 0.01, 0.004)}, steps=250)
    ordinary = runs(tmp_path / "ordinary", {0: 0.01}, freezeout=False)
    assert equal_time_steps(arm, ordinary) == pytest.approx(220, abs=1e-9)


def test_a_run_is_measured_on_its_own_hardware_only(tmp_path: Path) -> None:
    """Seed 1 was made on hardware that takes three times as long, where seed 5 is ordinary."""
    slow = tuple(3 * t for t in HALF)
    arm = runs(tmp_path / "arm", {0: HALF}) + runs(tmp_path / "slow", {1: slow}, hardware="slow")
    ordinary = runs(tmp_path / "ordinary", {0: 0.01, 1: 0.01}, freezeout=False)
    ordinary += runs(tmp_path / "other", {5: 0.03}, freezeout=False, hardware="slow")
    assert equal_time_steps(arm, ordinary) == pytest.approx(300, abs=1e-9)
    # Without that one, seed 1 says nothing about the time.
    assert equal_time_steps(arm, ordinary[:2]) == pytest.approx(300, abs=1e-9)
    assert equal_time_steps(arm[1:], ordinary[:2]) is None


def test_processes_that_share_the_work_are_other_hardware(tmp_path: Path) -> None:
    arm = runs(tmp_path / "arm", {0: HALF}, ranks=4)
    ordinary = runs(tmp_path / "ordinary", {0: 0.01}, freezeout=False)
    assert arm[0].hardware == "a processor, 4 processes"
    assert equal_time_steps(arm, ordinary) is None
