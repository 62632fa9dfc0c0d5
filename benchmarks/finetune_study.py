"""Does freezing pay when a pretrained network is fine-tuned?

    python -m benchmarks.finetune_study AG_NEWS.csv.gz OUT_DIR   # from the root; goes on if stopped
    freezeout report OUT_DIR

The pretrained MiniLM (6 blocks, 22M parameters) learns to tell four kinds of news, by a plain
PyTorch loop: AdamW, 5e-5 annealed by a cosine, bf16 autocast, batches of 32. Arms: full
fine-tuning; FreezeOut with two schedules; the second with the cache too; and for each an ordinary
run shortened to its time (lab/equal_time.py). All arms of a seed are trained in turn, each run in
a process of its own.

A run's folder has the form of `freezeout train`'s. Seconds in it are the process's CPU seconds:
runs have one thread, so that on a machine that does nothing else these are the seconds that pass,
and other work on the machine does not count.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from freezeout.lab.config import TrainConfig
from freezeout.lab.equal_time import equal_time_steps
from freezeout.lab.runs import CONFIG, METRICS, Run, read_run

SEEDS = (0, 1, 2)
HEAD = ("arm", "steps", "test error, mean (lowest to highest)", "CPU seconds", "saved")
ITEMS, TEST, LONGEST, RATE = 1600, 1600, 64, 5e-5
BASE = TrainConfig(
    model="MiniLM",
    dataset="AG News",
    validate="test",
    augment=False,
    images=ITEMS,
    epochs=5,
    batch_size=32,
    lr=RATE,
    weight_decay=0.01,
    scale_lr=False,
    t_0=0.5,
    precision="bf16",
)
ORDINARY = replace(BASE, freezeout=False)
ARMS = {
    "full fine-tuning": ORDINARY,
    "linear": replace(BASE, how_scale="linear"),
    "cubic": BASE,
    "cubic with cache": replace(BASE, cache="ram"),
}


def train(config: TrainConfig, data: Path, folder: Path) -> None:
    """One run, into its folder."""
    import torch

    from freezeout import FreezeOut, PrefixCache
    from freezeout.lab.device import hardware

    from .minilm import Batches, classifier, error, read

    torch.set_num_threads(1)
    texts, labels = read(data)
    batches = Batches(texts[:ITEMS], labels[:ITEMS], LONGEST)
    test = Batches(texts[-TEST:], labels[-TEST:], LONGEST)
    torch.manual_seed(config.seed)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    total = config.steps or config.epochs * len(batches)
    freezer = cache = plain = None
    if config.freezeout:
        example = batches.inputs([0, 1])
        freezer = FreezeOut(
            model, optimizer, total, schedule=config.schedule, example_inputs=example
        )
        if config.cache != "off":
            cache = PrefixCache(freezer, batches.count)
    else:
        plain = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    saved = {
        "config": {**config.to_json(), "out": None},
        "resolved": {"total_steps": total, "precision": "bf16", "training_images": ITEMS},
        "hardware": hardware(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    rows: list[dict[str, Any]] = []
    step = epoch = 0
    while step < total:
        epoch += 1
        model.train()
        seconds, wrong, seen = [], 0, 0
        for inputs, targets, ids in batches.of(epoch, config.seed):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                if cache is not None:
                    output = cache(**inputs, labels=targets, ids=ids)
                else:
                    output = model(**inputs, labels=targets)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if freezer is not None:
                freezer.step()
            if plain is not None:
                plain.step()
            seconds.append(time.process_time() - began)
            wrong += int((output.logits.argmax(1) != targets).sum())
            seen += len(targets)
            step += 1
            if step == total:
                break
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held_out = None
        if step == total:
            with torch.autocast("cpu", torch.bfloat16):
                held_out = error(model, test)
        row = {
            "epoch": epoch,
            "step": step,
            "train_error": wrong / seen,
            "valid_error": held_out,
            "frozen_layers": freezer.num_frozen if freezer is not None else 0,
            "seconds": sum(seconds),
            "step_seconds": median(seconds),
            "peak_bytes": peak,
        }
        if cache is not None:
            row["cache_bytes"] = cache.bytes_held
        rows.append(row)
        print(row, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / CONFIG).write_text(json.dumps(saved, indent=2) + "\n")  # last: the run is whole


def made(data: Path, config: TrainConfig, folder: Path) -> Run:
    """The run in the folder, trained in a process of its own if it is not there."""
    if not (folder / CONFIG).exists():
        print(folder, flush=True)
        values = json.dumps(config.to_json())
        command = [sys.executable, "-m", "benchmarks.finetune_study", str(data), str(folder)]
        subprocess.run([*command, "--run", values], check=True)
    return read_run(folder)


def peak_bytes(runs: Iterable[Run]) -> float:
    """Median of the runs' peak memory in bytes."""
    lines = ((run.path / METRICS).read_text().splitlines()[-1] for run in runs)
    return median(float(json.loads(line)["peak_bytes"]) for line in lines)


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


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", default=None, help="train this configuration only (JSON)")
    args = parser.parse_args()
    if args.run is not None:
        train(TrainConfig.from_json(json.loads(args.run)), args.data, args.out)
        return
    make = partial(made, args.data)
    runs = in_turn(ARMS, args.out, make)
    full, *others = ARMS
    lengths = {name: equal_time_steps(runs[name], runs[full]) for name in others}
    shortened = {
        f"time of {name}": replace(ORDINARY, steps=round(steps))
        for name, steps in lengths.items()
        if steps is not None  # of this machine's runs
    }
    runs |= in_turn(shortened, args.out, make)
    lines = [
        (*cells(name, its, runs[full]), f"{peak_bytes(its) / 1e6:.0f} MB")
        for name, its in runs.items()
    ]
    print_table([(*HEAD, "peak memory"), *lines])


if __name__ == "__main__":
    main()
