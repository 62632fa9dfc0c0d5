"""Runs beside each other on one device, each in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from freezeout.lab.config import TrainConfig
from freezeout.lab.runs import METRICS, WEIGHTS, read_run

from .part import Unfinished

_POLL_SECONDS = 0.05
_SAVE_SECONDS = 30.0  # that a run may take to save where it stands


@dataclass
class _Worker:
    """A process, what it trains, and where what it says is kept."""

    config: TrainConfig
    log: Path
    said_before: int  # bytes, by processes before it
    process: subprocess.Popen[bytes]

    def said(self) -> list[str]:
        with open(self.log, "rb") as file:
            file.seek(self.said_before)
            return file.read().decode(errors="replace").strip().splitlines()


def train_beside(configs: Sequence[TrainConfig], threads: int, deadline: float) -> None:
    """Train all of `configs`, at once, to their ends; what was begun goes on where it stands.

    Unfinished at the deadline, of `time.monotonic()`, with everything saved; RuntimeError, with
    what the process said, if one fails.
    """
    workers: list[_Worker] = []
    try:
        workers += [_start(config, threads) for config in configs]
        while any(worker.process.poll() is None for worker in workers):
            if time.monotonic() >= deadline:
                raise Unfinished(f"stopped in {', '.join(_where(each) for each in configs)}")
            for worker in workers:
                _check(worker)
            time.sleep(_POLL_SECONDS)
    finally:
        _end(workers)
    for worker in workers:
        _check(worker)
        run = read_run(worker.config.folder)
        if not run.is_finished or not (run.path / WEIGHTS).exists():
            raise RuntimeError(f"{run.path} ended before its last step")


def _start(config: TrainConfig, threads: int) -> _Worker:
    folder = config.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "ab") as output:
        said_before = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "freezeout.lab.worker"],
            stdin=subprocess.PIPE,  # which is closed when this process ends: the worker ends too
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and its exit status says so
        process.stdin.write(json.dumps({"config": config.to_json()}).encode() + b"\n")
        process.stdin.flush()
    return _Worker(config, log, said_before, process)


def _check(worker: _Worker) -> None:
    """RuntimeError if the process has failed; its first line is the last that the process said."""
    if worker.process.poll():  # neither at work nor 0
        said = worker.said() or ["it said nothing"]
        raise RuntimeError(
            f"{worker.config.folder.name} ended with status {worker.process.returncode}: "
            f"{said[-1]}\n" + "\n".join(said[-30:-1])
        )


def _where(config: TrainConfig) -> str:
    """How many of its epochs a run has made."""
    metrics = config.folder / METRICS
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    return f"{config.folder.name} after epoch {done}"


def _end(workers: Sequence[_Worker]) -> None:
    """Ask the processes that are at work to save and stop, and wait until they have."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    last = time.monotonic() + _SAVE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        if worker.process.stdin is not None:
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
