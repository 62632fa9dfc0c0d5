"""What freezing saved: seconds, from the durations of steps, and bytes.

What is compared with is a run that trains every layer. Where such steps have been measured, the
saving is measured; where none were, because layers are frozen from the start, or too few at some
depth, it is predicted from the layers' counted FLOPs: a trained layer's backward pass counts twice
its forward pass, a frozen layer runs forward only, and where a cache serves not at all.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .clock import Laps
from .layers import Layer

_SAMPLES = 64  # durations kept of each kind of step, for medians
_ENOUGH = 5  # durations that make a median

Kind = tuple[int, bool]  # layers frozen, and whether a cache served what they compute


class StepTimes:
    """Seconds between two calls of `FreezeOut.step()`, of the device's own time on CUDA: by the
    number of frozen layers, and by whether a cache served. Those of one process, unless its
    `state()` is loaded in another.

    Attributes:
        since: the step of the run from which on they were taken.
        counts: how many steps of each kind were made.
        served: whether a cache serves in the step that goes on.
    """

    def __init__(self, since: int = 0) -> None:
        self.since = since
        self.counts: dict[Kind, int] = {}
        self._seconds: dict[Kind, deque[float]] = {}
        self._laps = Laps()
        self.served = False

    def record(self, depth: int, device: torch.device) -> None:
        """A step has been made with `depth` layers frozen."""
        kind = depth, self.served
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self._laps.mark(kind, device)
        self._harvest()
        self.served = False

    def _harvest(self) -> None:
        for kind, seconds in self._laps.ended():
            self._seconds.setdefault(kind, deque(maxlen=_SAMPLES)).append(seconds)

    def state(self) -> dict[str, Any]:
        """Plain values, for who wants the times of a whole run, in whatever processes."""
        self._harvest()
        kinds = [
            [depth, served, count, list(self._seconds.get((depth, served), ()))]
            for (depth, served), count in self.counts.items()
        ]
        return {"since": self.since, "kinds": kinds}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` returned."""
        self.since = state["since"]
        for depth, served, count, seconds in state["kinds"]:
            self.counts[depth, served] = count
            self._seconds[depth, served] = deque(seconds, maxlen=_SAMPLES)

    def median(self, kind: Kind, least: int = 1) -> float | None:
        """Seconds of such a step; None: fewer than `least` have been measured."""
        self._harvest()
        seconds = self._seconds.get(kind, ())
        return median(seconds) if len(seconds) >= least else None

    def by_depth(self) -> dict[int, tuple[int, float | None]]:
        """For each number of frozen layers: the steps, and the median of their seconds, served or
        not; None before there were two in a row."""
        self._harvest()
        found: dict[int, tuple[int, float | None]] = {}
        for depth in sorted({depth for depth, _ in self.counts}):
            kinds = [kind for kind in self.counts if kind[0] == depth]
            seconds = [value for kind in kinds for value in self._seconds.get(kind, ())]
            count = sum(self.counts[kind] for kind in kinds)
            found[depth] = count, median(seconds) if seconds else None
        return found


@dataclass(frozen=True)
class SecondsSaved:
    """Seconds that freezing saved.

    Attributes:
        seconds: of the steps that were timed.
        share: of what these would have taken with every layer trained.
        is_predicted: whether counted FLOPs stand in for some step that was not measured.
    """

    seconds: float
    share: float
    is_predicted: bool


@dataclass(frozen=True)
class BytesSaved:
    """Bytes that frozen layers do not take in a step, each None if it is not known.

    Attributes:
        gradients: of the frozen layers' parameters.
        optimizer_state: if it were to their parameters as it is to the trained ones.
        activations: kept for the backward pass, for a batch of the size last seen, as counted in
            one forward pass on the example inputs.
    """

    gradients: int
    optimizer_state: int | None
    activations: int | None


def relative_cost(layers: Sequence[Layer], kind: Kind) -> float | None:
    """Counted FLOPs of one step for one item; None if they are not known."""
    costs = [layer.cost for layer in layers]
    if not costs or any(cost is None for cost in costs):
        return None
    forward = [cost.flops for cost in costs if cost is not None]
    depth, served = kind
    return 3 * sum(forward[depth:]) + (0.0 if served else sum(forward[:depth]))


def seconds_saved(times: StepTimes, layers: Sequence[Layer]) -> SecondsSaved | None:
    """What freezing saved in the steps that were timed; None while too little is known, or where
    no saving shows."""
    if not any(kind != (0, False) for kind in times.counts):
        return None
    known = {
        kind: seconds
        for kind in times.counts
        if (seconds := times.median(kind, _ENOUGH)) is not None
    }
    cost = {kind: relative_cost(layers, kind) for kind in {(0, False), *times.counts}}
    full, is_predicted = known.get((0, False)), False
    if full is None:
        measured = [kind for kind in known if cost[kind]]
        if not measured or cost[0, False] is None:
            return None
        kind = max(measured, key=times.counts.__getitem__)
        full = known[kind] * (cost[0, False] or 0.0) / (cost[kind] or 1.0)
        is_predicted = True
    saved = 0.0
    for kind, count in times.counts.items():
        seconds = known.get(kind)
        if seconds is None:
            share = cost[kind]
            if share is None or not cost[0, False]:
                # No more than with fewer layers frozen.
                shallower = [k for k in known if k <= kind]
                seconds = known[max(shallower)] if shallower else full
            else:
                seconds = full * share / (cost[0, False] or 1.0)
                is_predicted = is_predicted or kind != (0, False)
        saved += count * (full - seconds)
    if saved <= 0:
        return None
    return SecondsSaved(saved, saved / (full * sum(times.counts.values())), is_predicted)


def bytes_saved(
    frozen: Sequence[Layer], states: Sequence[tuple[int, int]], rows: int
) -> BytesSaved:
    """What the frozen layers do not take. `states`: of each optimizer, bytes of state, and of the
    parameters that it holds it for; `rows`: items in a batch."""
    gradients = sum(p.numel() * p.element_size() for layer in frozen for p in layer.parameters)
    state, of = (sum(each) for each in zip(*states, strict=True))
    costs = [layer.cost for layer in frozen]
    kept = [c.saved_bytes for c in costs if c is not None and c.saved_bytes is not None]
    return BytesSaved(
        gradients,
        round(gradients * state / of) if of else None,
        round(sum(kept) * rows) if rows and len(kept) == len(frozen) else None,
    )
