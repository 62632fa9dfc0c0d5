"""What the studies share: the order of their runs, their folders, and the columns of a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from freezeout.lab.config import TrainConfig
from freezeout.lab.runs import Run

SEEDS = (0, 1, 2)
HEAD = ("arm", "steps", "test error, mean (lowest to highest)", "seconds", "saved")


def in_turn(
    arms: Mapping[str, TrainConfig], out: Path, made: Callable[[TrainConfig, Path], Run]
) -> dict[str, list[Run]]:
    """Seed after seed, all arms of a seed in turn, so that a machine whose speed drifts slows all
    arms alike. `made` trains the configuration into the folder, if its run is not there yet."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for seed in SEEDS:
        for name, config in arms.items():
            folder = out / name.replace(",", "").replace(" ", "-").lower() / f"seed{seed}"
            runs[name].append(made(replace(config, seed=seed), folder))
    return runs


def cells(name: str, runs: Sequence[Run], ordinary: Sequence[Run]) -> tuple[str, ...]:
    """The arm's line, under `HEAD`: medians of seconds, saved of the ordinary arm's."""
    errors = [run.error for run in runs if run.error is not None]
    seconds = median(run.seconds for run in runs)
    usual = median(run.seconds for run in ordinary)
    return (
        name,
        str(runs[0].total_steps),
        f"{mean(errors):.2%} ({min(errors):.2%} to {max(errors):.2%})",
        f"{seconds:.1f}",
        f"{1 - seconds / usual:.1%}",
    )


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """As Markdown; the first line is the head."""
    head, *rest = lines
    for line in (head, ["---"] * len(head), *rest):
        print(f"| {' | '.join(line)} |")
