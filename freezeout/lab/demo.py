"""The demonstration: an ordinary run, FreezeOut, and an ordinary run of FreezeOut's time.

    python -m freezeout.lab.demo        # or: make demo; about a minute on two cores

Trains a small Wide ResNet on scikit-learn's handwritten digits, three times each, and prints a
table of test error and training seconds.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from ..errors import FreezeOutError
from .config import TrainConfig
from .device import hardware
from .job import Job
from .runs import METRICS
from .train import train

SEEDS = (0, 1, 2)
ORDINARY = TrainConfig(
    model="wrn",
    depth=16,
    widen_factor=1,
    dataset="digits",
    validate="test",
    epochs=10,
    freezeout=False,
)


@dataclass(frozen=True)
class Result:
    """One run's outcome: test error (fraction), seconds of training alone, steps."""

    error: float
    seconds: float
    steps: int


def main() -> None:
    """Train the three arms and print the table."""
    home = _new_folder(Path("runs"))
    console = Console(highlight=False)
    job = Job(ORDINARY)
    console.print(
        f"Handwritten digits: {len(job.data.train_labels)} training and "
        f"{len(job.data.heldout_labels if job.data.heldout_labels is not None else ())} test "
        f"images; Wide ResNet 16-1; {job.precision} on {hardware(job.device)}\n"
    )
    arms: dict[str, list[Result]] = {"ordinary": [], "FreezeOut": [], "ordinary, shortened": []}

    def run(arm: str, seed: int, config: TrainConfig) -> None:
        name = arm.replace(", ", "-").lower()
        console.print(f"{arm}, seed {seed}", style="bold")
        arms[arm].append(
            _result(train(replace(config, seed=seed, out=home / f"{name}-seed{seed}")))
        )
        console.print()

    for seed in SEEDS:  # in turn, so that a machine that slows down slows both
        run("ordinary", seed, ORDINARY)
        run("FreezeOut", seed, replace(ORDINARY, freezeout=True))
    seconds = {arm: median(r.seconds for r in results) for arm, results in arms.items() if results}
    whole = arms["ordinary"][0].steps
    steps = round(whole * min(1.0, seconds["FreezeOut"] / seconds["ordinary"]))
    for seed in SEEDS:
        run("ordinary, shortened", seed, replace(ORDINARY, steps=steps))
    console.print(_table(arms))
    console.print(f"\nThe shortened run is the rival to beat. Run folders: {home}/")


def _table(arms: dict[str, list[Result]]) -> Table:
    table = Table("", "steps", "test error (three seeds)", "seconds", "time saved")
    full = median(r.seconds for r in arms["ordinary"])
    for arm, results in arms.items():
        errors = [r.error for r in results]
        seconds = median(r.seconds for r in results)
        table.add_row(
            arm,
            str(results[0].steps),
            f"{mean(errors):.2%}  ({min(errors):.2%} to {max(errors):.2%})",
            f"{seconds:.1f}",
            "" if arm == "ordinary" else f"{1 - seconds / full:.0%}",
        )
    return table


def _result(folder: Path) -> Result:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return Result(rows[-1]["valid_error"], sum(r["seconds"] for r in rows), rows[-1]["step"])


def _new_folder(parent: Path) -> Path:
    """demo, or the first of demo-2, demo-3, ... that does not exist: nothing is overwritten."""
    names = ("demo", *(f"demo-{n}" for n in range(2, 10_000)))
    return next(parent / name for name in names if not (parent / name).exists())


if __name__ == "__main__":
    try:
        main()
    except (FreezeOutError, OSError) as error:
        sys.exit(f"freezeout: {error}")
