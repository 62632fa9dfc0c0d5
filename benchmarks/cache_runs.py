"""Whole runs: how much of what costless frozen layers would save does the cache save?

    freezeout sweep results/cache/study.toml --data-dir DIR --out runs/cache
    python -m benchmarks.cache_runs runs/cache --data-dir DIR

The runs are those of the study, and what they save is what its report says: medians of step times,
against the ordinary run of the same seed. The saving if frozen layers cost nothing comes from step
costs and prefix seconds, measured here in several rounds. Claim: with one view the cache reaches
85 % of it (without a cache: about 60 %).
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median

from freezeout.cache.inputs import Batch
from freezeout.cache.pays import survey
from freezeout.cost import run_cost
from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job
from freezeout.lab.report.compare import group_runs
from freezeout.lab.runs import find_run_folders, read_run

from .timing import environment


def costless(job: Job) -> float:
    """The share of an ordinary run's time that is saved if frozen layers cost nothing."""
    costs = job.step_costs()
    scratch = deepcopy(job.model)
    freezer = job.freezer(scratch, job.optimizer(scratch), 1)
    x, _, _ = next(job.batches(0, 0))
    with job.autocast():
        prefix = survey(scratch, freezer.layers, Batch((x,), {}, len(x)), job.device).seconds
    total = job.total_steps(job.config.epochs)
    free = [max(0.0, cost - forward) for cost, forward in zip(costs, prefix, strict=True)]
    steps = job.config.schedule.freeze_steps(len(costs), total)
    return 1 - run_cost(free, steps, total) / (total * costs[0])


def main() -> None:
    """Print the share that each arm reaches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    runs = [read_run(folder) for folder in find_run_folders(args.runs)]
    (group,) = group_runs([run for run in runs if run.is_finished])
    values = {**group.freezing[0].runs[0].values, "cache": "off", "views": None}
    job = Job(replace(TrainConfig.from_json(values), data_dir=args.data_dir, out=None))
    shares = [costless(job) for _ in range(args.rounds)]
    possible = median(shares)
    print(
        f"costless frozen layers would save {possible:.1%} ({min(shares):.1%} to "
        f"{max(shares):.1%}); {environment()}"
    )
    for arm in group.freezing:
        assert arm.time_saved is not None
        print(f"{arm.label}: saves {arm.time_saved:.1%}, {arm.time_saved / possible:.0%} of it")
    print("claim: with one view >= 85 %")


if __name__ == "__main__":
    main()
