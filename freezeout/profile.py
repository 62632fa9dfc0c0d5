"""What one training step costs at each depth, measured on the device at hand."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from .errors import InvalidValue
from .layers import Layer


def measure_step_costs(
    step: Callable[[], object],
    layers: Sequence[Layer],
    *,
    depths: int = 8,
    rounds: int = 5,
    warmup: int = 2,
    device: torch.device | None = None,
) -> list[float]:
    """Seconds of one training step with k layers frozen, for k = 0 ... n - 1.

    Args:
        step: makes one training step (forward, backward, update). It is called
            `warmup + depths * rounds` times, so give it a scratch copy of the model.
        layers: that copy's n layers, none of them frozen. They are frozen on the way, and are as
            they were afterwards.
        depths: how many depths are measured, evenly spaced; those between are interpolated.
        rounds: every round visits all measured depths once, so that a machine that slows down
            slows all of them; each depth's cost is its median.
        warmup: steps made and forgotten before the first.
        device: the accelerator to wait for around each step; None: there is none.
    """
    if rounds < 1 or depths < 1:
        raise InvalidValue(f"rounds and depths must be at least 1, got {rounds} and {depths}")
    last = len(layers) - 1
    measured = sorted({round(last * i / max(1, depths - 1)) for i in range(depths)})
    wait = _waiter(device)
    for _ in range(warmup):
        step()
    seconds: dict[int, list[float]] = {depth: [] for depth in measured}
    training = layers[-1].modules[0].training
    try:
        for _ in range(rounds):
            for depth in measured:
                for layer in layers[:depth]:
                    layer.freeze()
                wait()
                start = time.perf_counter()
                step()
                wait()
                seconds[depth].append(time.perf_counter() - start)
            _unfreeze(layers, training)
    finally:
        _unfreeze(layers, training)
    return _interpolated({depth: median(times) for depth, times in seconds.items()}, last)


def _unfreeze(layers: Sequence[Layer], training: bool) -> None:
    for layer in layers:
        layer.unfreeze(training)


def _waiter(device: torch.device | None) -> Callable[[], None]:
    if device is None or device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _interpolated(measured: dict[int, float], last: int) -> list[float]:
    depths = sorted(measured)
    costs = []
    for k in range(last + 1):
        after = next(depth for depth in depths if depth >= k)
        before = max(depth for depth in depths if depth <= k)
        share = (k - before) / (after - before) if after > before else 0.0
        costs.append(measured[before] * (1 - share) + measured[after] * share)
    return costs
