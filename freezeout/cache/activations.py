"""The activations of a data set's samples, in a store, at the depths at which they were taken."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import Laps
from ..errors import CacheError, InvalidValue
from ..layers import Layer
from ..words import first_line
from .depths import Depths
from .files import FileStore
from .fingerprint import Fingerprints
from .inputs import Batch
from .layout import Layout
from .placeholders import Unservable
from .plan import Plan
from .stats import CacheStats, Spared
from .store import Damaged, Keys, Store


class Activations:
    """What is kept of each sample: bytes in the store, and how to make tensors of them.

    Args:
        dtype: of activations in store; None: the type they have.
        tell: is given what a user should know.
        model: its name, for a user.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequence[Layer],
        depths: Depths,
        dtype: torch.dtype | None,
        stats: CacheStats,
        tell: Callable[[str], None],
        model: str,
    ) -> None:
        self.store = store
        self._depths, self._dtype, self._stats, self._tell = depths, dtype, stats, tell
        self._laps = Laps()
        self.spared = Spared()
        self._layouts: dict[int, Layout] = {}
        self._fingerprints = Fingerprints(layers)
        self._about = {"model": model, "layers": [layer.name for layer in layers]}
        self.ready: set[int] = set()  # depths that the store was told of
        self._writes = True
        self._is_full = False

    def clear(self) -> None:
        """Drop all of them: they are of other weights."""
        self.store.clear()
        self.ready.clear()
        self._fingerprints.forget()

    def is_exact(self, depth: int) -> bool:
        """Whether they are stored as they were computed, and not in a shorter type."""
        return not self._layouts[depth].is_lossy

    def plan_for(self, plan: Plan, batch: Batch) -> None:
        """How this plan's tensors are stored. Unservable if they cannot be."""
        layout = Layout(plan, batch, self._dtype)
        known = self._layouts.setdefault(plan.depth, layout)
        if known.describe() != layout.describe():
            raise Unservable("what the frozen layers return has another shape than before")
        if plan.depth in self.ready:
            self._open(plan.depth)

    def begin(self, depth: int, batch: Batch, frozen: int) -> None:
        """Open the store for a depth, `frozen` layers being frozen. CacheError if it cannot be."""
        if depth in self.ready:
            return
        store = self.store
        if not store.is_reserved:
            longest = batch.time if batch.lengths is not None else 0
            try:
                store.reserve(self._depths.keys * self._depths.record_bytes(longest))
            except (RuntimeError, MemoryError) as error:  # of a device, or the computer
                raise CacheError(f"no memory for the cache: {first_line(error)}") from error
        # What other processes have left at earlier depths is gone on from.
        for each in range(1, min(depth, frozen + 1)):
            if each in self._depths and each not in self.ready:
                self._open(each)
        self._open(depth)

    def _open(self, depth: int) -> None:
        self.ready.add(depth)
        if isinstance(self.store, FileStore):
            device = self.store.serve_on.type
            computed = f"{device}, {precision(device)}, torch {torch.__version__}"
            layout = self._layouts.get(depth)
            about = self._about | {"depth": depth, "computed": computed}
            self.store.open_depth(
                depth,
                f"{self._fingerprints.at(depth)} {computed}",
                None if layout is None else layout.describe(),
                about,
            )

    def held(self, keys: Keys, numbers: Keys, inputs: Any, depth: int) -> Any:
        """The depth of each key's record, at most `depth`; 0 where there is none, or none of use.
        InvalidValue if a record is of another input."""
        if len(set(keys.tolist())) != len(keys):
            _check_repeated(numbers, keys, inputs)
        changed = np.flatnonzero(self.store.find(keys, inputs, depth))
        if len(changed):
            raise InvalidValue(
                f"the input of sample {numbers[changed[0]]} is not what it was when its "
                "activation was stored: the data set changed, ids name other samples than before, "
                "or augmentation is random (pass view=, of a finite set, or view=None)"
            )
        held = self.store.depths(keys).copy()
        for start in set(held.tolist()) - {0}:
            if start > depth or start not in self.ready:
                held[held == start] = 0
        return held

    def make_room(self, depth: int, batch: Batch, keys: Keys, held: Any) -> Any:
        """For which samples there is room. `held` becomes 0 for those whose record went."""
        if not self._writes:
            return np.zeros(batch.size, bool)
        layout, lengths = self._layouts[depth], _lengths(batch)
        sizes = {n: (layout.bytes_of(n), self._depths.record_bytes(n)) for n in set(lengths)}
        fits = held == depth
        rest = np.flatnonzero(~fits)
        needed, room = zip(*(sizes[lengths[i]] for i in rest.tolist()), strict=True)
        fits[rest] = self.store.set_aside(keys[rest], needed, room)
        held[self.store.depths(keys) == 0] = 0  # their room was too small
        if not fits.all():
            if not self._is_full:
                held = int((self.store.index["depth"] > 0).sum())
                self._tell(
                    f"the budget of {self.store.budget:,} bytes is used up with {held:,} of "
                    f"{len(self.store.index):,} samples stored; further ones are computed anew "
                    f"each time, {max(needed):,} bytes each"
                )
            self._is_full = True
        return fits

    def read(self, depth: int, batch: Batch, keys: Keys) -> list[Tensor]:
        """The frontier's tensors for these samples, all of which are held at that depth."""
        layout = self._layouts[depth]
        with self._timed("read_seconds"):
            if layout.is_ragged:
                return layout.from_records(self.store.read(keys), _lengths(batch), batch.time)
            return layout.from_rows(self.store.read_rows(keys))

    def write(
        self, depth: int, batch: Batch, keys: Keys, inputs: Any, fits: Any, tensors: list[Tensor]
    ) -> list[Tensor]:
        """Store what fits; returns the tensors as reading will give them. CacheError if they
        overflow the type that they are stored in."""
        layout = self._layouts[depth]
        if layout.overflows(tensors):
            raise CacheError("an activation is too large for fp16; use bf16 or fp32")
        rows = np.flatnonzero(fits)
        try:
            with self._timed("write_seconds"):
                if len(rows) and layout.is_ragged:
                    records = layout.to_records(tensors, _lengths(batch))
                    self.store.write(keys[rows], [records[i] for i in rows], depth, inputs[rows])
                elif len(rows):
                    whole = layout.to_rows(tensors)
                    chosen = whole
                    if len(rows) < len(whole):
                        chosen = whole[torch.from_numpy(rows).to(whole.device)]
                    self.store.write_rows(keys[rows], chosen, depth, inputs[rows])
        except OSError as error:
            self._writes = False
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            self._tell(f"cannot write to the cache: {what}; nothing more is stored")
        return layout.rounded(tensors)

    def lap(self, name: Any = None) -> None:
        """Counts the seconds since the last call, on CUDA later and those of the device: as a
        field of the stats, or as `Spared.computed` (depth, start, samples); None: as nothing."""
        self._laps.mark(name, self.store.serve_on)
        for lap, seconds in self._laps.ended():
            if isinstance(lap, tuple):
                depth, start, samples = lap
                self.spared.computed(depth, start, samples, seconds)
            elif lap is not None:
                setattr(self._stats, lap, getattr(self._stats, lap) + seconds)
                self.spared.cost += seconds

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.lap()
        yield
        self.lap(name)

    def emptied(self, plan: Plan, batch: Batch, tensors: list[Tensor]) -> list[Tensor]:
        """These tensors with padding empty as it will be read, and not rounded."""
        if not self._layouts[plan.depth].is_ragged:
            return tensors
        whole, lengths = Layout(plan, batch, None), _lengths(batch)
        return whole.from_records(whole.to_records(tensors, lengths), lengths, batch.time)

    def check_held(self, keys: Keys, depth: int) -> None:
        """Damaged unless all of them are still held at that depth: records may just have been
        dropped, because they are laid out in another way than this batch's."""
        if (self.store.depths(keys) != depth).any():
            raise Damaged

    def as_read(self, depth: int, batch: Batch, tensors: list[Tensor]) -> list[Tensor]:
        """What reading would give if these had been stored: rounded, padding empty."""
        layout = self._layouts[depth]
        if not layout.is_ragged:
            return layout.from_rows(layout.to_rows(tensors))
        lengths = _lengths(batch)
        return layout.from_records(layout.to_records(tensors, lengths), lengths, batch.time)


def precision(device: str) -> str:
    """What numbers a forward pass on this kind of device computes in, in words."""
    autocast = torch.is_autocast_enabled(device)
    words = f"autocast to {torch.get_autocast_dtype(device)}" if autocast else "no autocast"
    return f"{words}, products in {torch.get_float32_matmul_precision()}"


def _lengths(batch: Batch) -> list[int]:
    return [0] * batch.size if batch.lengths is None else batch.lengths.tolist()


def _check_repeated(numbers: Keys, keys: Keys, inputs: Any) -> None:
    seen: dict[int, int] = {}
    for number, key, value in zip(numbers.tolist(), keys.tolist(), inputs.tolist(), strict=True):
        if seen.setdefault(key, value) != value:
            raise InvalidValue(f"id {number} comes twice in this batch with different inputs")
