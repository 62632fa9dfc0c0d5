"""The command `freezeout train` on a small run, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from freezeout.cli import main

EPOCHS, STEPS_PER_EPOCH, LAYERS = 4, 23, 7
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH
FILES = ("checkpoint.pt", "config.json", "metrics.jsonl", "model.safetensors", "savings.json")
TIMES = ("seconds", "step_seconds", "images_per_second")

# Dropout, so that torch's generator matters; a layer freezes in every epoch.
_SMALL = {
    "model": "densenet",
    "depth": 10,
    "growth": 4,
    "dropout": 0.1,
    "dataset": "digits",
    "validate": "test",
    "epochs": EPOCHS,
    "batch_size": 64,
    "t_0": 0.4,
    "how_scale": "squared",
    "device": "cpu",
    "precision": "fp32",
}
# The command, which sends itself a signal when it is about to do something for the n-th time: to
# count a step (its weights are updated), or to rename a temporary file to the name given.
_SIGNALLED = """
import os, signal, sys
from freezeout.cli import main
from freezeout.freezer import FreezeOut

number, moment, left = signal.Signals[sys.argv.pop(1)], sys.argv.pop(1), int(sys.argv.pop(1))

def watch(owner, name, counts):
    function = getattr(owner, name)
    def watched(*args):
        global left
        left -= counts(*args)
        if left == 0 and counts(*args):
            os.kill(os.getpid(), number)
        return function(*args)
    setattr(owner, name, watched)

if moment == "step":
    watch(FreezeOut, "step", lambda *args: True)
else:
    watch(os, "replace", lambda source, target: str(target).endswith(moment))
main()
"""


def options(**changes: Any) -> list[str]:
    """The small run's options, changed: a bool is a flag, None leaves an option out."""
    words = []
    for name, value in (_SMALL | changes).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """`freezeout train ...` in this process. What `main` does not turn into a line is raised."""
    capsys.readouterr()
    status: Any = 0
    try:
        main(["train", *map(str, arguments)])
    except SystemExit as end:
        status = end.code
    assert isinstance(status, int)
    return Outcome(status, *capsys.readouterr())


def process(*arguments: object, at: tuple[str, str, int] | None = None) -> list[str]:
    """The words that start `freezeout train ...`; `at`: a signal's name, a moment, and its n."""
    command = ["-m", "freezeout"] if at is None else ["-c", _SIGNALLED, *map(str, at)]
    return [sys.executable, *command, "train", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """One thread, so that two runs may share two processors and are bit-identical."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **changes}


def run_process(
    *arguments: object,
    at: tuple[str, str, int] | None = None,
    cwd: Path | None = None,
    **variables: str,
) -> Outcome:
    """`freezeout train ...` in a process of its own."""
    result = subprocess.run(
        process(*arguments, at=at),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=120,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics without the times, which alone may differ between two equal runs."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def differences(folder: Path, reference: Path) -> list[str]:
    """What tells a finished run from another, times aside; empty: they are bit-identical."""
    found = []
    if (names := sorted(os.listdir(folder))) != sorted(os.listdir(reference)):
        return [f"{folder} holds {names}"]
    rows = read_timeless(folder)
    if (epochs := [row["epoch"] for row in rows]) != list(range(1, len(rows) + 1)):
        found.append(f"metrics.jsonl has epochs {epochs}")
    for mine, theirs in zip(rows, expected := read_timeless(reference), strict=False):
        for name in theirs:
            if mine[name] != theirs[name]:
                found.append(f"epoch {theirs['epoch']}, {name}: {mine[name]}, not {theirs[name]}")
    if len(rows) != len(expected):
        found.append(f"{len(rows)} epochs, not {len(expected)}")
    weights, others = read_weights(folder), read_weights(reference)
    if weights.keys() != others.keys():
        found.append("other weights")
    else:
        found += [name for name in others if not torch.equal(weights[name], others[name])]
    return found
