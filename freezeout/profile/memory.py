"""Peak memory of a training step at each depth, predicted from steps on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers import Layer
from .seconds import evenly_spaced, interpolated, unfrozen

_ALIKE = 0.05  # share of the peak by which what is interpolated may differ from depth to depth


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step's tensors.

    Attributes:
        fixed: parameters, buffers and the optimizer's state: what a larger batch leaves alone.
        activations: kept for backward.
        peak: the most that is alive at once, the batch and passing results included.
    """

    fixed: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Memory:
    """A training step's memory with the first k layers frozen, k = 0 ... n - 1."""

    steps: tuple[StepMemory, ...]

    def batch_growth(self, depth: int) -> float:
        """By what factor the batch may grow at `depth` for the peak to be what it was with no
        layer frozen: all but `fixed` grows with the batch."""
        start, now = self.steps[0], self.steps[depth]
        return (start.peak - now.fixed) / max(1, now.peak - now.fixed)


def predict_memory(
    step: Callable[[], object],
    model: nn.Module,
    layers: Sequence[Layer],
    optimizer: Optimizer,
    batch: Any,
    saved_bytes: Sequence[int],
    *,
    depths: int = 5,
) -> Memory:
    """The memory of one training step at every depth, from steps with a copy without memory.

    At each depth the peak is the sum of what is exact, parameters, optimizer state and
    activations, and of the rest: results on the way. The rest is known where a step was made, and
    interpolated between two such depths if it is about the same at both.

    Args:
        step: makes one training step: forward, backward, update, `zero_grad`.
        model, layers, optimizer: the copy, its n layers, none of them frozen, and an optimizer
            of the kind that will be used. The optimizer loses its state.
        batch: the step's tensors, in any structure.
        saved_bytes: activations at each depth, from `count_step`.
        depths: at how many depths a step is made at least.
    """
    step()
    tensors = [*model.parameters(), *model.buffers()]
    batch = [value for value in tree_leaves(batch) if _is_tensor(value)]
    states = dict(optimizer.state)

    def stand_at(depth: int) -> list[Tensor]:
        """Freeze; returns all that is there before a step."""
        unfreeze()
        optimizer.state.clear()
        optimizer.state.update(states)
        for layer in layers[:depth]:
            layer.freeze()
            for parameter in layer.parameters:
                optimizer.state.pop(parameter, None)
        state = tree_leaves([list(values.values()) for values in optimizer.state.values()])
        return [*tensors, *filter(_is_tensor, state)]

    with unfrozen(layers) as unfreeze:
        fixed = [_bytes(stand_at(depth)) for depth in range(len(layers))]

        def rest(depth: int) -> float:
            peak = peak_bytes(step, [*stand_at(depth), *batch])
            return float(peak - fixed[depth] - saved_bytes[depth])

        known = {depth: rest(depth) for depth in evenly_spaced(len(layers), depths)}
        gaps = list(pairwise(sorted(known)))
        while gaps:
            low, high = gaps.pop()
            between = (low + high) // 2
            least = fixed[high] + saved_bytes[high] + known[high]
            if between > low and abs(known[low] - known[high]) > _ALIKE * least:
                known[between] = rest(between)
                gaps += [(low, between), (between, high)]
    optimizer.state.clear()
    return Memory(
        tuple(
            StepMemory(each, saved, round(each + saved + other))
            for each, saved, other in zip(
                fixed, saved_bytes, interpolated(known, len(layers)), strict=True
            )
        )
    )


def peak_bytes(step: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """The most bytes of tensors that are alive at once during a call of `step`, on any device,
    the meta device too.

    Args:
        step: one training step.
        resident: tensors that are there before it: parameters, buffers, optimizer state, batch.
    """
    alive = _Alive()
    for tensor in resident:
        alive.add(tensor)
    with alive:
        step()
    return alive.peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations make, until each is freed. (torch's own MemTracker
    takes no model with frozen parameters: it puts a gradient hook on each.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._bytes = 0
        self.peak = 0

    def add(self, value: Any) -> None:
        if not _is_tensor(value):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self._bytes -= size

        # Python's object of a storage lives as long as the storage.
        self._storages[key] = weakref.ref(storage, freed)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for value in tree_leaves(given):
            self.add(value)
        return given


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
