"""A whole run's training seconds beside the sum of its measured step costs.

    python -m benchmarks.run_against_steps

Nothing should be lost around the steps (batches, bookkeeping, freezing): claim within 5 %. Trains
a Wide ResNet 16-1 on digits with FreezeOut; before and after, the cost of a step is measured at
every depth. Repeated; medians.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from freezeout.cost import run_cost
from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job
from freezeout.lab.runs import METRICS
from freezeout.lab.train import train

from .timing import environment

CONFIG = TrainConfig(model="wrn", depth=16, widen_factor=1, dataset="digits", epochs=20)


def main() -> None:
    """Print run seconds, predicted seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    job = Job(CONFIG)
    total = job.total_steps(CONFIG.epochs)
    ratios = []
    with tempfile.TemporaryDirectory() as home:
        for i in range(args.rounds):
            before = job.step_costs()
            folder = train(replace(CONFIG, out=Path(home) / str(i)))
            after = job.step_costs()
            costs = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
            predicted = run_cost(costs, job.plan.timeline(len(costs), total).counts())
            rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
            seconds = sum(row["seconds"] for row in rows)
            ratios.append(seconds / predicted)
            print(f"run {seconds:.2f} s, sum of step costs {predicted:.2f} s")
    print(f"median ratio {median(ratios):.3f} (claim: within 0.95 ... 1.05); {environment()}")


if __name__ == "__main__":
    main()
