"""Run folders as `freezeout train` writes them, without training: errors and times are given."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from freezeout.lab.config import TrainConfig

CONFIG = TrainConfig(
    model="wrn", depth=16, widen_factor=1, dataset="cifar10", validate="test", epochs=4
)
STEPS_PER_EPOCH = 100


def write_run(
    folder: Path,
    *,
    error: float | None = 0.2,
    step_seconds: Sequence[float] | float = 0.01,
    finished: bool = True,
    hardware: str = "a processor",
    ranks: int = 1,
    total_steps: int | None = None,
    savings: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A run of `CONFIG` with the options changed; `error` is that of its last epoch, and
    `step_seconds` is of all epochs or of each; `total_steps`: what --const-time made of them."""
    config = replace(CONFIG, **options)
    total = total_steps or config.steps or config.epochs * STEPS_PER_EPOCH
    ends = [*range(STEPS_PER_EPOCH, total, STEPS_PER_EPOCH), total]
    each = [step_seconds] * len(ends) if isinstance(step_seconds, float) else step_seconds
    timeline = config.plan.timeline(5, total)
    rows = []
    for epoch, (step, seconds) in enumerate(zip(ends, each, strict=True), 1):
        steps = step - (ends[epoch - 2] if epoch > 1 else 0)
        worse = 0.1 * (len(ends) - epoch)
        rows.append(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": 1.0,
                "train_error": 0.1 + worse,
                "valid_loss": None if error is None else 1.0,
                "valid_error": None if error is None else error + worse,
                "frozen_layers": timeline.num_frozen(step),
                "seconds": seconds * steps * 1.1,
                "step_seconds": seconds,
            }
        )
    resolved = {
        "epochs": len(ends),
        "total_steps": total,
        "frozen_from_start": timeline.num_frozen(0),
        "precision": "bf16",
        "prediction": None,
    }
    folder.mkdir(parents=True)
    saved = {
        "config": config.to_json(),
        "resolved": resolved,
        "hardware": hardware,
        "ranks": ranks,
    }
    (folder / "config.json").write_text(json.dumps(saved))
    lines = [json.dumps(row) + "\n" for row in rows[: None if finished else -1]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if savings is not None:
        (folder / "savings.json").write_text(json.dumps(savings))
    return folder


def write_study(home: Path, seeds: Sequence[int] = (0, 1, 2), worse: float = 0.01) -> Path:
    """Three arms: ordinary; cubic scaled 0.8, whose last two epochs take half the time; and an
    ordinary run of its time, 300 steps, by `worse` better than it in every seed, about."""
    for seed in seeds:
        bit = 0.001 * seed
        write_run(home / f"ordinary/seed{seed}", freezeout=False, error=0.18 + bit, seed=seed)
        times = (0.01, 0.01, 0.005, 0.005)
        write_run(home / f"cubic/seed{seed}", error=0.2 + 2 * bit, step_seconds=times, seed=seed)
        rival = home / f"rival/seed{seed}"
        write_run(rival, freezeout=False, steps=300, error=0.2 - worse + bit, seed=seed)
    return home
