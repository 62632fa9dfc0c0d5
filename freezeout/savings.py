"""What freezing saved: seconds, from the durations of steps; computation, from counted FLOPs; and
bytes.

What is compared with is a run that trains every layer. Seconds are only told where such steps have
been measured: FLOPs do not tell what a step takes that also reads and augments its batch. Of FLOPs,
a trained layer's backward pass counts twice its forward pass, a frozen layer runs forward only, and
where a cache serves not at all.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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

    def median(self, *kinds: Kind, least: int = 1) -> float | None:
        """Seconds of steps of these kinds; None: fewer than `least` have been measured."""
        self._harvest()
        seconds = [value for kind in kinds for value in self._seconds.get(kind, ())]
        return median(seconds) if len(seconds) >= least else None

    def by_depth(self) -> dict[int, tuple[int, float | None]]:
        """For each number of frozen layers: the steps, and the median of their seconds, served or
        not; None before there were two in a row."""
        found: dict[int, tuple[int, float | None]] = {}
        for depth in sorted({depth for depth, _ in self.counts}):
            kinds = [kind for kind in self.counts if kind[0] == depth]
            found[depth] = sum(self.counts[kind] for kind in kinds), self.median(*kinds)
        return found


@dataclass(frozen=True)
class SecondsSaved:
    """Seconds that freezing saved.

    Attributes:
        seconds: of the steps that were timed; 0 where steps with frozen layers took as long.
        share: of what these would have taken with every layer trained.
    """

    seconds: float
    share: float


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


def flops_saved(counts: Mapping[Kind, int], layers: Sequence[Layer]) -> float | None:
    """The share of the FLOPs of that many steps of each kind that freezing left out; None if they
    are not counted."""
    costs = [layer.cost.flops for layer in layers if layer.cost is not None]
    if not any(counts.values()) or len(costs) < len(layers) or not sum(costs):
        return None
    left = sum(
        count * (3 * sum(costs[depth:]) + (0 if served else sum(costs[:depth])))
        for (depth, served), count in counts.items()
    )
    return 1 - left / (3 * sum(costs) * sum(counts.values()))


def seconds_saved(times: StepTimes) -> SecondsSaved | None:
    """What freezing saved in the steps that were timed; None while too few were: of those in which
    all layers trained, or of all others."""
    full = times.median((0, False), least=_ENOUGH)
    if full is None:
        return None
    saved = [
        count * (full - seconds)
        for served in (False, True)
        for count, seconds in _together(times, served)
    ]
    if not saved:
        return None
    seconds = max(sum(saved), 0.0)
    return SecondsSaved(seconds, seconds / (full * sum(times.counts.values())))


def _together(times: StepTimes, served: bool) -> Iterator[tuple[int, float]]:
    """How many steps with frozen layers there were, and seconds of one: kinds that are too rare
    together with those of more layers frozen, and the last ones with those of fewer."""
    group: list[Kind] = []
    seconds = None
    for kind in sorted(kind for kind in times.counts if kind[1] == served and kind != (0, False)):
        group.append(kind)
        if (known := times.median(*group, least=_ENOUGH)) is not None:
            seconds = known
            yield sum(times.counts[each] for each in group), seconds
            group = []
    if seconds is not None:
        yield sum(times.counts[each] for each in group), seconds


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
