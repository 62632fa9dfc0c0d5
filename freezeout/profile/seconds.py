"""What one training step costs at each depth, measured on the device at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, median

import torch

from ..clock import seconds_of
from ..errors import InvalidValue
from ..layers import Layer


def measure_step_costs(
    step: Callable[[], object],
    layers: Sequence[Layer],
    *,
    depths: int = 5,
    rounds: int = 5,
    warmup: int = 2,
    shape: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> list[float]:
    """Seconds of one training step with k layers frozen, for k = 0 ... n - 1.

    Args:
        step: makes one training step (forward, backward, update). It is called
            `warmup + 2 * depths * rounds` times, so give it a scratch copy of the model.
        layers: that copy's n layers, none of them frozen. They are frozen on the way, and are as
            they were afterwards.
        depths: how many depths are measured, evenly spaced; those between are interpolated.
        rounds: every round visits all measured depths once, so that a machine that slows down
            slows all of them; each depth's cost is its median. Each visit makes two steps and
            times the second: the first one after a change gets its memory anew.
        warmup: steps made and forgotten before the first.
        shape: n costs in another unit, such as counted FLOPs, that seconds between two measured
            depths follow; None: a straight line.
        device: the accelerator to wait for around each step; None: there is none.
    """
    if rounds < 1 or depths < 1:
        raise InvalidValue(f"rounds and depths must be at least 1, got {rounds} and {depths}")
    measured = evenly_spaced(len(layers), depths)
    for _ in range(warmup):
        step()
    seconds: dict[int, list[float]] = {depth: [] for depth in measured}
    with unfrozen(layers) as unfreeze:
        for _ in range(rounds):
            for depth in measured:
                for layer in layers[:depth]:
                    layer.freeze()
                step()
                seconds[depth].append(seconds_of(step, device))
            unfreeze()
    medians = {depth: median(times) for depth, times in seconds.items()}
    return interpolated(falling(medians), len(layers), shape)


@contextmanager
def unfrozen(layers: Sequence[Layer]) -> Iterator[Callable[[], None]]:
    """For a block that freezes layers: gives what unfreezes all of them, and does so in the end."""

    def unfreeze() -> None:
        for layer in layers:
            layer.unfreeze()

    try:
        yield unfreeze
    finally:
        unfreeze()


def evenly_spaced(num_layers: int, depths: int) -> list[int]:
    """At most `depths` of the depths 0 ... n - 1, the first and the last among them.

    >>> evenly_spaced(20, 4)
    [0, 6, 13, 19]
    """
    last = num_layers - 1
    return sorted({round(last * i / max(1, depths - 1)) for i in range(depths)})


def falling(measured: Mapping[int, float]) -> dict[int, float]:
    """The nearest values, by their squares, that do not rise with depth: a step with more layers
    frozen does no more work, so a rise is the machine's noise (isotonic regression, by pooling
    neighbours that rise).

    >>> falling({0: 4.0, 3: 5.0, 6: 1.0})
    {0: 4.5, 3: 4.5, 6: 1.0}
    """
    pools: list[list[float]] = []
    for depth in sorted(measured):
        pools.append([measured[depth]])
        while len(pools) > 1 and mean(pools[-2]) < mean(pools[-1]):
            rising = pools.pop()
            pools[-1] += rising
    values = (mean(pool) for pool in pools for _ in pool)
    return dict(zip(sorted(measured), values, strict=True))


def interpolated(
    measured: Mapping[int, float], num_layers: int, shape: Sequence[float] | None = None
) -> list[float]:
    """A value for every depth 0 ... n - 1: between two that were measured it goes from one to the
    other as `shape` does, or in a straight line.

    >>> interpolated({0: 4.0, 2: 2.0}, 3), interpolated({0: 4.0, 2: 2.0}, 3, shape=[100, 20, 0])
    ([4.0, 3.0, 2.0], [4.0, 2.4, 2.0])
    """
    depths = sorted(measured)
    values = []
    for k in range(num_layers):
        after = next(depth for depth in depths if depth >= k)
        before = max(depth for depth in depths if depth <= k)
        share = (k - before) / (after - before) if after > before else 0.0
        if shape is not None and shape[before] != shape[after]:
            share = (shape[before] - shape[k]) / (shape[before] - shape[after])
        values.append(measured[before] + share * (measured[after] - measured[before]))
    return values
