"""Seconds that `freezeout report` takes for 200 runs.

    python -m benchmarks.report_of_many_runs

Claim: under 20 s. The runs are written, not trained: 2 networks, 4 strategies at 4 t_0, ordinary
runs of 5 lengths, 5 seeds, 100 epochs. In a process of its own, start included; median.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median

from freezeout.lab.study import Study, StudyOptions

from .timing import environment

STUDY = StudyOptions(
    models=("wrn-16-1", "vgg-16"),
    datasets=("cifar10",),
    strategies=("cubic scaled", "cubic unscaled", "linear scaled", "linear unscaled"),
    t_0=(0.3, 0.5, 0.7, 0.8),
    baselines=(90, 80, 70, 60),
    seeds=(0, 1, 2, 3, 4),
    equal_time=False,
    epochs=100,
    validate="test",
)
ROUNDS, STEPS = 3, 1000


def main() -> None:
    """Print the seconds."""
    with tempfile.TemporaryDirectory() as home:
        cells = Study.from_options(STUDY).cells()[:200]
        for number, cell in enumerate(cells):
            write_run(Path(home) / str(number), cell.config.to_json(), Random(number))
        seconds = []
        for _ in range(ROUNDS):
            before = time.perf_counter()
            subprocess.run([sys.executable, "-m", "freezeout", "report", home], check=True)
            seconds.append(time.perf_counter() - before)
    print(f"{len(cells)} runs: {median(seconds):.1f} s (claim: under 20 s); {environment()}")


def write_run(folder: Path, config: dict[str, object], random: Random) -> None:
    """A run folder with made-up metrics."""
    epochs = config["epochs"]
    assert isinstance(epochs, int)
    rows = [
        {
            "epoch": epoch,
            "step": epoch * STEPS,
            "train_error": 0.1,
            "valid_error": 0.2 + random.gauss(0, 0.01) + 0.5 / epoch,
            "frozen_layers": epoch // 15 if config["freezeout"] else 0,
            "seconds": 10.0,
            "step_seconds": 0.01 * random.uniform(0.9, 1.1),
        }
        for epoch in range(1, epochs + 1)
    ]
    resolved = {"epochs": epochs, "total_steps": epochs * STEPS, "precision": "bf16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config, "resolved": resolved}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
