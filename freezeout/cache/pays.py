"""Where a cache pays: seconds of the frozen layers against seconds of reading their output."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..clock import seconds_of, wait
from ..layers import Layer
from ..layers.scratch import scratch, uncompiled
from ..versions import no_grad
from .inputs import Batch
from .store import ALIGNMENT, Keys, Store, memory_available

_ROUNDS = 3
_LONG = 0.1  # seconds
_FORWARDS = 4  # passes that checking one depth takes
# Seconds of a batch that depend neither on bytes nor on layers, measured on two CPU cores:
_SERVING = 8e-4  # checksums, looking up what is held, the pass with placeholders
_STORING = 2e-3  # finding room, and passes of their own where other samples are held already


@dataclass(frozen=True)
class Survey:
    """Of one batch, for each depth 0 ... n - 1.

    Attributes:
        seconds: of the first k layers, forward.
        sizes: bytes of one sample's activation behind them, by type; None: it has no row a
            sample, or nothing is called there.
    """

    seconds: list[float]
    sizes: list[dict[torch.dtype, int] | None]

    def bytes_at(self, depth: int, dtype: torch.dtype | None) -> int | None:
        """Of one sample's record."""
        found = self.sizes[depth]
        if found is None:
            return None
        total = 0
        for own, size in found.items():
            if dtype is not None and own.is_floating_point and dtype.itemsize < own.itemsize:
                size = size // own.itemsize * dtype.itemsize
            total += size
        return total


@dataclass
class _Event:
    module: nn.Module
    parent: "_Event | None"
    sizes: dict[torch.dtype, int] | None = None
    end: float = 0.0
    takes_results: bool = False


def survey(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    device: torch.device,
    timed: bool = True,
) -> Survey:
    """Run the model a few times, in evaluation mode and leaving no mark on it; if it is not
    `timed`, once, on a few of the samples."""
    passes = [_by_depth(*_events(model, batch.few, device), layers)]
    end = time.perf_counter() + _LONG
    for number in range(_ROUNDS if timed else 0):
        # A pass that takes long has little noise. On accelerators the first is not like the rest.
        if number and device.type == "cpu" and time.perf_counter() > end:
            break
        passes.append(_by_depth(*_events(model, batch, device), layers))
    seconds = [median(each[0][k] for each in passes[1:] or passes) for k in range(len(layers))]
    # A little timing noise must not make a deeper frontier cheaper.
    for k in range(1, len(seconds)):
        seconds[k] = max(seconds[k], seconds[k - 1])
    return Survey(seconds, passes[-1][1])


def _events(model: nn.Module, batch: Batch, device: torch.device) -> tuple[float, list[_Event]]:
    events: list[_Event] = []
    running: list[_Event] = []
    results: dict[Any, Tensor] = {}

    batch = batch.copied()

    def place(tensor: Tensor) -> Any:
        return tensor.data_ptr(), tensor.shape

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        event = _Event(module, running[-1] if running else None)
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        event.takes_results = bool(taken) and all(place(tensor) in results for tensor in taken)
        running.append(event)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        event = running.pop()
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        rows = [tensor for tensor in tensors if tensor.ndim and tensor.shape[0] == batch.size]
        if rows:
            event.sizes = {}
            for tensor in rows:
                size = tensor.numel() // batch.size * tensor.element_size()
                event.sizes[tensor.dtype] = event.sizes.get(tensor.dtype, 0) + size
        results.update((place(tensor), tensor) for tensor in tensors)
        wait(device)
        event.end = time.perf_counter()
        events.append(event)

    with ExitStack() as stack:
        stack.enter_context(scratch(model))
        stack.enter_context(uncompiled())
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        for module in model.modules():
            for handle in (
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                module.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        wait(device)
        begin = time.perf_counter()
        with no_grad():
            model(*batch.args, **batch.kwargs)
    return begin, events


def _by_depth(
    begin: float, events: list[_Event], layers: Sequence[Layer]
) -> tuple[list[float], list[dict[torch.dtype, int] | None]]:
    number = {module: i for i, layer in enumerate(layers) for module in layer.modules}
    # The layer after which all of a module is frozen.
    whole = {
        event.module: max(number.get(part, len(layers)) for part in event.module.modules())
        for event in events
    }
    counted = {event.module: next(event.module.parameters(), None) is not None for event in events}
    seconds: list[float] = [0.0]
    sizes: list[dict[torch.dtype, int] | None] = [None]
    for depth in range(1, len(layers)):
        last: _Event | None = None
        for event in events:
            outermost = event.parent is None or whole.get(event.parent.module, depth) >= depth
            matters = counted[event.module] or (event.takes_results and last is not None)
            if whole[event.module] < depth and outermost and matters:
                last = event
        seconds.append(seconds[-1] if last is None else last.end - begin)
        sizes.append(None if last is None else last.sizes)
    return seconds, sizes


def measure_store(
    count: int,
    samples: int,
    place: torch.device,
    serve_on: torch.device,
    folder: Path | None,
    total: int,
) -> tuple[float, float, float]:
    """Seconds to read a batch of `samples` records of `count` bytes, to write it, and what the
    first write takes besides, into memory that is new.

    Args:
        place: where records lie.
        serve_on: where a batch is wanted.
        folder: of the files; None: there are none.
        total: bytes of all records: if the memory will not hold them, the disk is measured.
    """
    keys = np.random.default_rng(0).permutation(4 * samples)
    store = Store(len(keys), len(keys) * (count + ALIGNMENT), place, serve_on)
    store.reserve(store.budget)
    store.set_aside(keys, [count] * len(keys), [count] * len(keys))
    batches = np.split(keys, 4)
    rows = torch.ones(samples, count, dtype=torch.uint8, device=serve_on)

    def write(batch: Keys) -> None:
        store.write_rows(batch, rows, 1, batch)

    def times(work: Callable[[Keys], object]) -> float:
        return median([seconds_of(partial(work, batch), serve_on) for batch in batches])

    first, writing, reading = times(write), times(write), times(store.read_rows)
    first = max(0.0, first - writing)
    if folder is not None:
        with tempfile.TemporaryFile(dir=folder) as file:
            number = file.fileno()
            data = rows.cpu().numpy().data
            writing += _seconds(lambda: os.pwrite(number, data, 0), serve_on)
            if total > memory_available() // 2:
                os.fsync(number)
                reading += median([_from_disk(number, samples * count) for _ in range(_ROUNDS)])
    return reading, writing, first


def _from_disk(number: int, size: int) -> float:
    """Seconds to read an open file's bytes, which the system is told to keep no longer."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds_of(lambda: os.pread(number, size, 0), None)


def best_depths(
    seconds: Sequence[float],
    costs: Sequence[tuple[float, float, float] | None],
    visits: Sequence[float],
    batches: float,
) -> list[int]:
    """The depths at which to keep activations: each where moving on to it from the one before
    saves more than it costs, in the time that is left once it is frozen.

    Args:
        seconds: a batch's forward pass through the first k layers.
        costs: of a batch's activations there, as `measure_store`; None: they do not fit.
        visits: how often each sample will be seen once the first k layers are frozen.
        batches: how many batches all samples make.

    A sample is stored at its first visit and read at the others. Comparing with the real forward
    pass takes some four forward passes a depth, once.

    >>> best_depths([0.0, 0.010, 0.020, 0.021], [None, (1e-3, 1e-3, 0), (1e-3, 1e-3, 0), None],
    ...             [10] * 4, 100)
    [1, 2]
    >>> best_depths([0.0, 0.010], [None, (1e-3, 1e-3, 0)], [2, 1], 100)  # never seen again
    []
    >>> best_depths([0.0, 0.010], [None, (1e-3, 1e-3, 0)], [5, 4], 1)  # comparing costs more
    []
    >>> best_depths([0.0, 0.010], [None, (1e-3, 1e-3, 0.1)], [10, 9], 100)  # so does new memory
    []
    """
    chosen: list[int] = []
    saved = 0.0  # a batch, at the last depth chosen
    for depth in range(1, len(seconds)):
        cost = costs[depth]
        if cost is None:
            continue
        here = _saved(seconds[depth], cost)
        storing = batches * _stored(cost, not chosen) + _FORWARDS * max(seconds)
        if visits[depth] > 1 and batches * (visits[depth] - 1) * (here - saved) > storing:
            saved = here
            chosen.append(depth)
    return chosen


def why_none(
    seconds: Sequence[float],
    costs: Sequence[tuple[float, float, float] | None],
    visits: Sequence[float],
    batches: float,
) -> str:
    """Why `best_depths` finds none, at the depth where it is nearest to one.

    >>> why_none([0.0, 0.1], [None, (1e-3, 0.2, 0)], [3, 2], 20)
    'storing takes 4.4 s, and reading it in the one pass that is left would save 1.9 s; freeze \
earlier or train longer'
    >>> why_none([0.0, 0.001], [None, (0.003, 0.2, 0)], [3, 2], 20)
    'reading a batch takes 0.0038 s, and computing it 0.001 s'
    """
    found = []
    for depth, cost in enumerate(costs):
        if cost is not None and visits[depth] > 0:
            saves = batches * (visits[depth] - 1) * _saved(seconds[depth], cost)
            storing = batches * _stored(cost, True) + _FORWARDS * max(seconds)
            found.append((saves - storing, saves, storing, depth))
    if not found:
        return "it is never reached"
    _, saves, storing, depth = max(found)
    cost = costs[depth]
    assert cost is not None
    if _saved(seconds[depth], cost) <= 0:
        reading = cost[0] + _SERVING
        return f"reading a batch takes {reading:.2g} s, and computing it {seconds[depth]:.2g} s"
    passes = visits[depth] - 1
    left = "the one pass that is" if passes == 1 else f"the {passes:g} passes that are"
    return (
        f"storing takes {storing:.2g} s, and reading it in {left} left would save {saves:.2g} s; "
        "freeze earlier or train longer"
    )


def _saved(seconds: float, cost: tuple[float, float, float]) -> float:
    """By a batch that is read and not computed."""
    return 0.98 * seconds - cost[0] - _SERVING


def _stored(cost: tuple[float, float, float], is_first: bool) -> float:
    """Seconds of a batch; later records take the room of earlier ones."""
    _, writing, new = cost
    return writing + _STORING + (new if is_first else 0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    return median([seconds_of(work, device) for _ in range(1 + _ROUNDS)][1:])
