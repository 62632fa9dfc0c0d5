"""Steps served from the cache beside steps of the trained layers alone, and the memory of steps:
their peak, and the largest batch that fits."""

import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from freezeout import FreezeOut, Plan, PrefixCache, Timeline

from ..cache_step import halves
from ..timing import interleaved
from .fast import Training
from .networks import LARGE, SHAPES, TINY, Language, Shape, Vision, loss_of
from .part import Case, Part, Row, Setup, Wrong

BATCHES = 4  # stored, and served in turn
STORES = ("device", "ram", "folder")
SERVED = ("ResNet-50", "ViT-B/16", "GPT-2 small")


def untied(shape: Shape) -> Shape:
    """A language model with an output matrix of its own: what is stored behind an embedding that
    still trains, as the output matrix, would not stay right, so the cache refuses it."""

    def build() -> nn.Module:
        model = shape.build()
        assert isinstance(model, Language)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        return model

    is_text = len(shape.inputs) == 2
    return replace(shape, name=f"{shape.name}, untied", build=build) if is_text else shape


def three_quarters(training: Training) -> tuple[int, int]:
    """Layers, and how many of them three quarters are."""
    with training.freezer(0) as freezer:
        number = len(freezer.layers)
    return number, round(0.75 * number)


def cut(
    model: nn.Module, freezer: FreezeOut, depth: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The first layers, and the others, as functions, which know of no cache."""
    if isinstance(model, nn.Sequential):
        return halves(model, freezer, depth)
    frozen = {module for layer in freezer.layers[:depth] for module in layer.modules}
    assert isinstance(model, Vision | Language)
    number = sum(block in frozen for block in model.blocks)

    def blocks(x: Tensor, chosen: Sequence[nn.Module]) -> Tensor:
        angles = None
        if isinstance(model, Language) and model.places is None:
            angles = model.angles[: x.shape[1]]
        for block in chosen:
            x = block(x, angles)
        return x

    def first(x: Tensor) -> Tensor:
        if isinstance(model, Vision):
            x = model.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat((model.token.expand(len(x), -1, -1), x), 1) + model.places
        else:
            x = model.tokens(x)
            if model.places is not None:
                x = x + model.places(torch.arange(x.shape[1], device=x.device))
        return blocks(x, list(model.blocks)[:number])

    def others(x: Tensor) -> Tensor:
        x = model.norm(blocks(x, list(model.blocks)[number:]))
        head: Tensor = model.head(x[:, 0] if isinstance(model, Vision) else x)
        return head

    return first, others


class Turns:
    """Training steps, each on the next of a few batches.

    Args:
        batches: inputs and labels.
        call: what gives the output for inputs and ids.
        freezer: to be told of each step.
    """

    def __init__(
        self,
        training: Training,
        batches: Sequence[tuple[Tensor, Tensor]],
        call: Callable[[Tensor, Tensor], Tensor],
        freezer: FreezeOut | None = None,
    ) -> None:
        self.training, self.batches, self.call, self.freezer = training, batches, call, freezer
        size = len(batches[0][1])
        self.ids = [torch.arange(i * size, (i + 1) * size) for i in range(len(batches))]
        self.turn = 0

    def loss(self, number: int) -> Tensor:
        """Of one of the batches."""
        x, y = self.batches[number]
        with self.training.autocast():
            return loss_of(lambda x: self.call(x, self.ids[number]), x, y)

    def step(self) -> None:
        """Forward, backward, update."""
        torch.autograd.backward(self.loss(self.turn))
        self.turn = (self.turn + 1) % len(self.batches)
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()
        if self.freezer is not None:
            self.freezer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def served(shape: Shape, setup: Setup) -> list[Row]:
    """A line for each store: all layers trained; three quarters of them frozen and run, frozen and
    served; and what remains then, on activations that are there already."""
    shape = untied(shape)
    whole, part = (Training(shape, setup, BATCHES * shape.batch) for _ in range(2))
    size = shape.batch
    batches = list(zip(torch.split(part.x, size), torch.split(part.y, size), strict=True))
    number, depth = three_quarters(part)
    with (
        part.freezer(depth) as freezer,
        tempfile.TemporaryDirectory(dir=setup.out) as folder,
        stores(freezer, BATCHES * size, depth, Path(folder)) as caches,
    ):
        first, others = cut(part.model, freezer, depth)
        computed = Turns(part, batches, lambda x, ids: part.model(x), freezer)
        with torch.no_grad(), part.autocast():
            given = [(first(x), y) for x, y in batches]
        alone = Turns(part, given, lambda x, ids: others(x), freezer)
        turns = {
            "full": Turns(whole, batches, lambda x, ids: whole.model(x)),
            "frozen": computed,
            "alone": alone,
        }
        for name, cache in caches.items():
            turns[name] = Turns(part, batches, partial(_called, cache), freezer)
            turns[name].steps(2 * BATCHES)  # stored, then compared with the real forward pass
            cache.stats.take()
        differences = {name: _difference(turns[name], computed) for name in caches}
        if _difference(alone, computed) > 0.01:
            raise Wrong("the trained layers alone are not what remains of the model")
        repeats, rounds = (2, 2) if setup.tiny else (5, 7)
        each = {name: partial(turn.steps, repeats) for name, turn in turns.items()}
        times = interleaved(each, rounds, 2, setup.device)
        seconds = {name: several / repeats for name, several in times.items()}
        rows: list[Row] = []
        for name, cache in caches.items():
            done = cache.stats.take()
            calls = (2 + rounds) * repeats * size + BATCHES * size
            if done.hits != calls or cache.refusals:
                raise Wrong(f"{name}: {done.hits} of {calls} served; {cache.refusals}")
            bytes_each = cache.bytes_held / cache.num_samples
            rows.append(
                {
                    "network": shape.name,
                    "batch": size,
                    "frozen": f"{depth} of {number}",
                    "store": name,
                    "all trained, ms": 1e3 * seconds["full"],
                    "frozen, ms": 1e3 * seconds["frozen"],
                    "served, ms": 1e3 * seconds[name],
                    "trained layers alone, ms": 1e3 * seconds["alone"],
                    "served / alone": seconds[name] / seconds["alone"],
                    "kB a sample": bytes_each / 1e3,
                    "read, GB/s": bytes_each
                    * size
                    / _read_seconds(cache, turns[name], 4 * repeats)
                    / 1e9,
                    "hits": f"{100 * done.hits / calls:g} %",
                    "loss differs by": differences[name],
                    "waits in a step": waits(turns[name].step, setup),
                    "waits alone": waits(alone.step, setup),
                }
            )
    return rows


def _called(cache: PrefixCache, x: Tensor, ids: Tensor) -> Tensor:
    output: Tensor = cache(x, ids=ids)
    return output


@contextmanager
def stores(
    freezer: FreezeOut, samples: int, depth: int, folder: Path
) -> Iterator[dict[str, PrefixCache]]:
    """A cache of each kind, by its name; closed at the end."""
    caches: dict[str, PrefixCache] = {}
    try:
        for name in STORES:
            where = folder / "store" if name == "folder" else name
            caches[name] = PrefixCache(freezer, samples, where=where, depths=[depth])
        yield caches
    finally:
        for cache in caches.values():
            cache.close()


def _difference(one: Turns, other: Turns) -> float:
    """The largest relative difference of two losses on the same batch, by the same weights."""
    found = 0.0
    for number in range(len(one.batches)):
        ours, theirs = (turns.loss(number).detach().item() for turns in (one, other))
        found = max(found, abs(ours - theirs) / abs(theirs))
    return found


def _read_seconds(cache: PrefixCache, turns: Turns, reads: int) -> float:
    """Of a batch. On a GPU a read is counted at the next one, so as many count as are made."""
    turns.step()
    cache.stats.take()
    turns.steps(reads)
    return cache.stats.take().read_seconds / reads


def waits(work: Callable[[], object], setup: Setup) -> int | None:
    """How often the host waits for the GPU, as far as torch can tell; None on a CPU."""
    if not setup.on_gpu:
        return None
    torch.cuda.synchronize(setup.device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in seen)


@dataclass(frozen=True)
class Room:
    """What memory is measured of.

    Attributes:
        start: the first batch that is tried.
        most: the largest one that is.
        allowed: bytes; of cards that more people have.
    """

    shape: Shape
    start: int
    most: int
    allowed: float


class _At(Plan):
    """Layers freeze after two steps."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline.of(num_layers, total_steps, [(2, self.depth)], freeze_every)


KINDS = ("all trained", "frozen", "frozen, served", "frozen after two steps")


def memory(room: Room, kind: str, setup: Setup) -> list[Row]:
    """Peak of a step, what is kept between steps, and the largest batch that fits; AdamW."""
    shape = untied(room.shape)
    training = Training(shape, setup)
    number, depth = three_quarters(training)
    if kind == "all trained":
        freezer = training.freezer(0)
    elif kind == "frozen after two steps":
        freezer = FreezeOut(
            training.model,
            training.optimizer,
            None,
            schedule=_At(depth),
            example_inputs=training.x[:2],
        )
    else:
        freezer = training.freezer(depth)
    with freezer:
        steps = Growing(training, freezer, depth if kind == "frozen, served" else None, room.most)
        steps.step()
        for _ in range(3):  # stored, and compared with the real forward pass
            steps.step()
        _emptied(setup)
        kept = torch.cuda.memory_allocated(setup.device) if setup.on_gpu else None
        steps.step()
        peak = torch.cuda.max_memory_allocated(setup.device) if setup.on_gpu else None
        row: Row = {
            "network": shape.name,
            "layers": kind,
            "frozen": f"{freezer.num_frozen} of {number}",
            "batch": shape.batch,
            "kept GB": None if kept is None else kept / 1e9,
            "peak GB": None if peak is None else peak / 1e9,
        }
        found: int | str | None = None
        if kind != "frozen after two steps":
            with allowed(room.allowed, setup):
                found = largest(partial(steps.fits, setup=setup), room.start, room.most)
            found = f"{found} or more" if found == room.most else found
        row |= {"largest batch": found, "in GB": room.allowed / 1e9}
        if steps.cache is not None:
            if steps.cache.refusals:
                raise Wrong("; ".join(steps.cache.refusals))
            steps.cache.close()
    return [row]


class Growing:
    """Training steps on batches of any size: a few samples again and again, by ids of their own.

    Args:
        depth: what is served from RAM; None: nothing.
        most: samples in a batch.
    """

    def __init__(
        self, training: Training, freezer: FreezeOut, depth: int | None, most: int
    ) -> None:
        self.training, self.freezer = training, freezer
        self.few = training.x, training.y
        most += len(training.x)  # what is stored is stored in batches of this size
        self.cache = None if depth is None else PrefixCache(freezer, most, depths=[depth])
        self._stored = 0

    def _call(self, x: Tensor, first: int = 0) -> Tensor:
        if self.cache is None:
            output: Tensor = self.training.model(x)
            return output
        return _called(self.cache, x, torch.arange(first, first + len(x)))

    def step(self) -> None:
        """Forward, backward, update."""
        torch.autograd.backward(self.training.loss(self._call))
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()
        self.freezer.step()

    def fits(self, batch: int, setup: Setup) -> bool:
        """Whether there is memory for two steps on so many samples."""
        try:
            self._take(batch)
            _emptied(setup)
            if not setup.on_gpu and batch > 11:
                raise torch.OutOfMemoryError("as if there were a limit")
            for _ in range(2):
                self.step()
            is_out = False
        except RuntimeError as error:  # a library may say it in words of its own
            if not isinstance(error, torch.OutOfMemoryError) and not any(
                word in str(error) for word in ("out of memory", "ALLOC_FAILED")
            ):
                raise
            is_out = True
        # Outside of the clause, which holds what the step has made.
        self.training.x, self.training.y = self.few
        self.training.optimizer.zero_grad()
        _emptied(setup)
        return not is_out

    def _take(self, batch: int) -> None:
        """A batch of that size, all of it stored."""
        x, y = self.few
        while self.cache is not None and self._stored < batch:
            self.training.loss(partial(self._call, first=self._stored))
            self._stored += len(x)
        index = torch.arange(batch, device=x.device) % len(x)
        self.training.x, self.training.y = x[index], y[index]
        if x.ndim == 4:
            self.training.x = self.training.x.contiguous(memory_format=torch.channels_last)


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest batch that fits, to one in twenty: doubled, then halfway between.

    >>> largest(lambda batch: batch <= 100, 1, 1000)
    98
    >>> largest(lambda batch: batch <= 7, 2, 1000), largest(lambda batch: batch <= 7, 8, 1000)
    (7, 7)
    >>> largest(lambda batch: True, 8, 20), largest(lambda batch: False, 8, 20)
    (20, 0)
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@contextmanager
def allowed(size: float, setup: Setup) -> Iterator[None]:
    """Inside, torch takes so many bytes of the GPU at most."""
    if not setup.on_gpu:
        yield
        return
    total = torch.cuda.get_device_properties(setup.device).total_memory
    _emptied(setup)
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), setup.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setup.device)


def _emptied(setup: Setup) -> None:
    """What nothing uses any more is given back; the peak starts anew."""
    if setup.on_gpu:
        gc.collect()
        torch.cuda.synchronize(setup.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def cases(setup: Setup) -> list[Case]:
    """Each network's steps; each kind of memory."""
    if setup.tiny:
        shapes = [TINY[0], TINY[2], TINY[3]]
        rooms = [Room(shape, 2, 16, 1e9) for shape in (TINY[2], TINY[4])]
    else:
        shapes = [shape for shape in SHAPES if shape.name in SERVED]
        rooms = [Room(LARGE["ViT-L/16"], 16, 1000, 24e9), Room(LARGE["Llama 1B"], 1, 60, 40e9)]
    found = [Case(shape.name, partial(served, shape, setup)) for shape in shapes]
    for room in rooms:
        found += [
            Case(f"{room.shape.name}, memory, {kind}", partial(memory, room, kind, setup))
            for kind in KINDS
        ]
    return found


PART = Part("cache", "Steps served from the cache, and memory", cases)
