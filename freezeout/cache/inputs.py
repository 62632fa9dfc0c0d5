"""One batch as the model takes it: its samples, how to cut it, and a checksum of each sample."""

import math
from collections.abc import Collection
from enum import Enum
from functools import cached_property, lru_cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from ..errors import InvalidType, InvalidValue
from ..versions import Structure
from .placeholders import Placeholders, Unservable, unreadable

_LOOKED_AT = 32 << 10  # bytes of a sample that its checksum covers: all, or evenly spread
_FEW = 5  # samples that stand for a batch: a number that few sizes inside a model have
_CHANNELS = 64  # of each token of a sequence that are looked at: all, or evenly spread
_MASK = "attention_mask"
_NOT_WRITTEN = Tensor, int, float, str, Enum, type, FunctionType, torch.nn.Module
_LABELS = ("labels", "label", "label_ids", "targets", "target", "next_sentence_label")


class Batch:
    """The arguments of one call. A tensor whose first size is the number of ids has a row for
    each sample; any other is the same for all.

    Attributes:
        size: samples.
        lengths: true length of each sample's sequence, (B,), where an `attention_mask` (B, T)
            says so; None otherwise.
        is_padded: whether some sequence is shorter than T.
        alike: places of tensors that are the same for all; `shared` says which are known to be,
            whatever their size.
        kind: equal for two batches that differ in the number of samples and in values only.
        family: equal for two batches that may differ in sizes as well.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        size: int,
        rows: list[bool] | None = None,
        shared: Collection[int] = (),
    ) -> None:
        self.args, self.kwargs, self.size = args, kwargs, size
        pairs, self._tree = tree_flatten_with_path((args, kwargs))
        self._names = [str(getattr(path[-1], "key", "")) if path else "" for path, _ in pairs]
        self._leaves = [leaf for _, leaf in pairs]
        # Which of them have a row for each sample; in a part of a batch, those that have in it.
        self._rows = rows or [
            isinstance(leaf, Tensor)
            and leaf.ndim > 0
            and leaf.shape[0] == size
            and place not in shared
            for place, leaf in enumerate(self._leaves)
        ]
        self.lengths: Tensor | None = None
        self.time = 0  # T, where there are lengths
        self.left_padded = self.is_padded = False
        mask = kwargs.get(_MASK)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == size:
            self._read_mask(mask)
        structure = Structure(self._tree)
        self.kind = (structure, tuple(map(self._sized, self._leaves, self._rows)))
        self.family = (structure, tuple(map(_unsized, self._leaves)))

    def _read_mask(self, mask: Tensor) -> None:
        mask = mask.detach().cpu() != 0
        self.time = mask.shape[1]
        self.lengths = mask.sum(1)
        expected = torch.arange(self.time)[None] < self.lengths[:, None]
        self.left_padded = not torch.equal(expected, mask)
        self.is_padded = not bool(expected.all())

    @staticmethod
    def _sized(leaf: Any, has_rows: bool) -> Any:
        if isinstance(leaf, Tensor):
            shape = leaf.shape[1:] if has_rows else leaf.shape
            return has_rows, tuple(shape), leaf.dtype, leaf.device, leaf.requires_grad
        return _plain(leaf)

    @property
    def requires_grad(self) -> bool:
        """Whether any argument does."""
        return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in self._leaves)

    @property
    def has_rows(self) -> bool:
        """Whether any argument has a row for each sample."""
        return any(self._rows)

    @property
    def alike(self) -> set[int]:
        return {
            place
            for place, (leaf, has_rows) in enumerate(zip(self._leaves, self._rows, strict=True))
            if isinstance(leaf, Tensor) and not has_rows
        }

    def check_objects(self) -> None:
        """Unservable if an argument is an object, which a model may write into."""
        for leaf in self._leaves:
            if hasattr(leaf, "__dict__") and not isinstance(leaf, _NOT_WRITTEN):
                raise Unservable(
                    f"an argument is a {type(leaf).__name__}, which the model may write into (a "
                    "key-value cache, say)"
                )

    def copied(self) -> "Batch":
        """The same call with copies of its tensors, for a check: a model may write into them."""
        return self._with([leaf.clone() if type(leaf) is Tensor else leaf for leaf in self._leaves])

    def rows(self, chosen: Any) -> "Batch":
        """The same call with some of the samples only, given by their places."""
        index = torch.as_tensor(np.asarray(chosen), dtype=torch.int64)
        leaves = [
            leaf.index_select(0, index.to(leaf.device)) if has_rows else leaf
            for leaf, has_rows in zip(self._leaves, self._rows, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self._tree)
        return Batch(args, kwargs, len(index), self._rows)

    @cached_property
    def few(self) -> "Batch":
        """Some of the samples, the shortest and the longest sequence first: enough for what does
        not depend on how many there are, or on their values."""
        return self._first(_FEW)

    @cached_property
    def pair(self) -> "Batch":
        """The first two of them."""
        return self._first(2)

    def _first(self, count: int) -> "Batch":
        if self.size <= count:
            return self
        ends = [0, 1]
        if self.lengths is not None:
            ends = [int(self.lengths.argmin()), int(self.lengths.argmax())]
        return self.rows(list(dict.fromkeys([*ends, *range(count)]))[:count])

    @cached_property
    def shared(self) -> dict[tuple[Any, ...], Any]:
        """What all samples share: the place and shape of each tensor without rows, and a checksum
        of its values; the place of each number, and itself. Unservable for a sparse tensor."""
        found: dict[tuple[Any, ...], Any] = {}
        leaves = zip(self._names, self._leaves, self._rows, strict=True)
        for place, (name, leaf, has_rows) in enumerate(leaves):
            if _is_number(leaf):
                found[(place,)] = leaf
            elif isinstance(leaf, Tensor) and not has_rows and name not in _LABELS:
                if leaf.layout is not torch.strided:
                    raise Unservable(f"an argument is a tensor of {leaf.layout}")
                sums = thinned_sums(leaf.detach().reshape(1, -1))
                found[place, *leaf.shape] = int(sums)
        return found

    def name(self, place: int) -> str:
        """Of an argument, as a user knows it."""
        return repr(self._names[place]) if self._names[place] else "without a name"

    def hidden(self, place: int, placeholders: Placeholders) -> "Batch":
        """The same call, but the argument at this place raises as soon as its value is used."""
        leaves = self._leaves
        leaf = leaves[place]
        hidden = placeholders.like(leaf) if isinstance(leaf, Tensor) else unreadable(leaf)
        return self._with([*leaves[:place], hidden, *leaves[place + 1 :]])

    @property
    def has_labels(self) -> bool:
        return any(
            has_rows and name in _LABELS
            for name, has_rows in zip(self._names, self._rows, strict=True)
        )

    def with_labels_turned(self) -> "tuple[Batch, Batch] | None":
        """Two samples with other labels than each other, and the same with their labels exchanged;
        None where all labels are alike."""
        for name, leaf, has_rows in zip(self._names, self._leaves, self._rows, strict=True):
            if has_rows and name in _LABELS:
                others = (leaf != leaf[:1]).reshape(self.size, -1).any(1).nonzero()
                if len(others):
                    pair = self.rows([0, int(others[0])])
                    turned = [
                        leaf.flip(0) if is_row and label in _LABELS else leaf
                        for label, leaf, is_row in zip(
                            pair._names, pair._leaves, pair._rows, strict=True
                        )
                    ]
                    return pair, pair._with(turned)
        return None

    def with_other_padding(self) -> "Batch":
        """The same call, other values in the padding: those of each sample's first token."""
        assert self.lengths is not None
        leaves = list(self._leaves)
        outside = torch.arange(self.time)[None] >= self.lengths[:, None]  # (B, T)
        for i, (name, leaf, has_rows) in enumerate(
            zip(self._names, self._leaves, self._rows, strict=True)
        ):
            is_sequence = has_rows and leaf.ndim > 1 and leaf.shape[1] == self.time
            if is_sequence and "mask" not in name and name not in _LABELS:
                where = outside.to(leaf.device).reshape(*outside.shape, *[1] * (leaf.ndim - 2))
                leaves[i] = torch.where(where, leaf[:, :1], leaf)
        return self._with(leaves)

    def _with(self, leaves: list[Any]) -> "Batch":
        args, kwargs = tree_unflatten(leaves, self._tree)
        return Batch(args, kwargs, self.size, self._rows)

    def checksums(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(B,): one number a sample, of the inputs' bits; labels do not count, nor does padding."""
        total = torch.zeros(self.size, dtype=torch.int64)
        for name, leaf, has_rows in zip(self._names, self._leaves, self._rows, strict=True):
            if has_rows and name not in _LABELS:
                sums = _row_sums(leaf.detach(), self.lengths, self.time)
                total = 32 * total.to(sums.device, non_blocking=not total.is_cuda) + sums
        return total.cpu().numpy()  # the one wait for a device


def check_ids(ids: Any, num_samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids as an array (B,). InvalidValue, InvalidType unless integers in 0..num_samples-1."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise InvalidType(
            "ids must be integers, one for each sample of the batch, got "
            f"{array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= num_samples:
        wrong = low if low < 0 else high
        raise InvalidValue(
            f"id {wrong} is out of range: num_samples={num_samples} allows 0..{num_samples - 1}"
        )
    return array


def _row_sums(
    leaf: Tensor,  # (B, ...)
    lengths: Tensor | None,
    time: int,
) -> Tensor:
    """(B,) int64: sums of the bits, each weighted by its place."""
    if lengths is not None and leaf.ndim >= 2 and leaf.shape[1] == time:
        inside = torch.arange(time)[None] < lengths[:, None]
        inside = inside.to(leaf.device, non_blocking=True)
        flat = leaf.flatten(2) if leaf.ndim > 2 else leaf[:, :, None]
        flat = flat[:, :, :: -(-flat.shape[2] // _CHANNELS) or 1]
        bits = (_bits(flat.contiguous()) * inside[:, :, None]).flatten(1)
        weights = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C1 * 2 + 1
        return (bits * weights).sum(1)
    return thinned_sums(leaf)


def thinned_sums(leaf: Tensor) -> Tensor:
    """(B,): of a part of each row, if it is large."""
    # This is done in each step of training, so with words of 32 bits, which processors multiply
    # several at a time, in the order in which they lie in memory.
    words, multipliers = _words(_thinned(leaf))
    products = words * multipliers
    products ^= products >> 15  # or equal changes of two highest bits would cancel out
    return products.sum(1)


def _thinned(leaf: Tensor) -> Tensor:
    """Every second element along its longest dimension, and so on until a row is short enough; a
    view, so that what is left out is not copied either."""
    while leaf[:1].numel() * leaf.element_size() > _LOOKED_AT:
        longest = max(range(1, leaf.ndim), key=leaf.shape.__getitem__)
        leaf = leaf[(slice(None),) * longest + (slice(None, None, 2),)]
    return leaf


def _words(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """(B, words) int32, each row's bytes, four in a word, and what to multiply each word with: it
    depends on the place in the tensor, not in memory."""
    if not leaf.numel():
        return leaf.new_zeros(len(leaf), 0, dtype=torch.int32), _multipliers(
            torch.Size([0]), leaf.device
        )
    channels_last = leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
    if channels_last and leaf.element_size() == 4:
        flat = leaf.permute(0, 2, 3, 1).reshape(len(leaf), -1)
        return flat.view(torch.int32), _multipliers(leaf.shape[1:], leaf.device)
    flat = leaf.reshape(len(leaf), -1).contiguous().view(torch.uint8)
    if missing := -flat.shape[1] % 4:
        flat = torch.nn.functional.pad(flat, (0, missing))
    words = flat.view(torch.int32)
    return words, _multipliers(words.shape[1:], leaf.device)


@lru_cache(maxsize=16)
def _multipliers(shape: torch.Size, device: torch.device) -> Tensor:
    """(words,) int32: odd, and another one for each place, so that order counts. `shape`: of the
    words; (C, H, W): they stand in the order (H, W, C)."""
    count = math.prod(shape)
    numbers = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B2) + np.uint32(1)
    if len(shape) == 3:
        numbers = numbers.reshape(shape).transpose(1, 2, 0).reshape(-1)
    with torch.inference_mode(False):
        return torch.from_numpy(numbers.view(np.int32)).to(device)


def _bits(tensor: Tensor) -> Tensor:
    """Each element's bits as int64, mixed."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(-2)
    if tensor.is_floating_point():
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        tensor = tensor.view(whole[tensor.element_size()])
    return _mixed(tensor.to(torch.int64))


def _mixed(words: Tensor) -> Tensor:
    """So that their sum depends on all of the bits."""
    mixed = words * 0x2545F4914F6CDD1D
    return mixed ^ (mixed >> 29)


def _unsized(leaf: Any) -> Any:
    return (leaf.ndim, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else _plain(leaf)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def _plain(leaf: Any) -> Any:
    if _is_number(leaf):
        return type(leaf)
    if isinstance(leaf, np.ndarray):
        return np.ndarray, leaf.shape, leaf.dtype, leaf.tobytes()
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), Itself(leaf)
    return type(leaf), leaf


class Itself:
    """An object as a key: it equals itself alone, and is held, so that no other takes its
    address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
