"""What the benchmarks share: interleaved timing, and a line about the machine."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median

import torch

from freezeout.lab.device import hardware


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Median seconds of each function, called in turn, so that a machine whose speed drifts
    slows all of them alike, and in the other order in every other round, since what ran before
    leaves its data in the processor's cache; the first `warmup` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in in_turn(functions, warmup + rounds):
        seconds[name].append(timed(functions[name], device))
    return {name: median(times[warmup:]) for name, times in seconds.items()}


def in_turn(names: Iterable[str], rounds: int) -> Iterator[str]:
    """All of them in each round, in the other order in every other one."""
    for number in range(rounds):
        yield from list(names)[:: 1 if number % 2 else -1]


def timed(function: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def environment(device: torch.device | None = None) -> str:
    """The hardware and torch's version."""
    return f"{hardware(device or torch.device('cpu'))}; torch {torch.__version__}"


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
