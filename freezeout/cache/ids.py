"""Numbers for the samples of any map-style data set, which the cache knows them by.

    loader = with_ids(DataLoader(dataset, batch_size=32, shuffle=True))
    for (x, y), ids in loader:
        ...

The number travels beside the item, not in it: items and batches are what they would be otherwise,
whatever they are, and no collate function can lose it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ..errors import InvalidType, InvalidValue
from .shards import fixed_shards

Loader = TypeVar("Loader")
_OWN = "dataset", "collate_fn", "lenient"
_NO_BATCHES = (
    "the DataLoader has batch_size=None: an item is a batch of its own, whose samples have no "
    "numbers; give it a batch_size, and a data set of single samples"
)


class Indexed(NamedTuple):
    """A batch, as the collate function made it, and its samples' numbers, (batch,)."""

    batch: Any
    ids: Tensor


class _Drawn:
    """What a data set gave for an index, or for several. No collate function but
    `IndexedDataset.collate` can do anything with it, so that none drops the numbers."""

    def __init__(self, items: Any, ids: list[int]) -> None:
        self.items, self.ids = items, ids


class IndexedDataset(Dataset[Any]):
    """A map-style data set whose items carry their numbers. Use it with its `collate`:

        data = IndexedDataset(dataset)
        loader = DataLoader(data, batch_size=32, shuffle=True, collate_fn=data.collate)
        for (x, y), ids in loader:
            ...

    Of a loader that there is already, `with_ids` makes one like it. Attributes of the data set are
    found here too.

    Args:
        dataset: has a length, and gives items by number: torch's, or one of Hugging Face's
            `datasets`.
        collate_fn: makes a batch of a list of items; None: torch's.
        lenient: where a sampler gives what is no number, the number is -1.

    Raises:
        InvalidType: for a data set that gives no items by number, or has no length.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any] | None = None,
        *,
        lenient: bool = False,
    ) -> None:
        _check(dataset)
        self.dataset, self.lenient = dataset, lenient
        self.collate_fn = default_collate if collate_fn is None else collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """An item as it is, for whoever looks at one; of several numbers, what loaders ask for."""
        if isinstance(index, Sequence | Tensor) and not isinstance(index, str):
            return _Drawn(self.dataset[index], [self._number(each) for each in index])
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """What torch's loaders ask for: a batch's items at once."""
        numbers = list(map(self._number, indices))
        if callable(getattr(self.dataset, "__getitems__", None)):
            return _Drawn(self.dataset.__getitems__(indices), numbers)
        return _Drawn([self.dataset[index] for index in indices], numbers)

    def collate(self, drawn: Any) -> Indexed:
        """The batch that the collate function makes of these items, and their numbers."""
        if not isinstance(drawn, _Drawn):
            raise InvalidType(
                "collate() takes what a loader draws from an IndexedDataset; this has no numbers"
            )
        return Indexed(self.collate_fn(drawn.items), torch.tensor(drawn.ids, dtype=torch.int64))

    def _number(self, index: Any) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            if self.lenient:
                return -1
            raise InvalidType(
                f"the sampler gives {index!r}, which is no sample's number: use one that gives "
                "integers"
            ) from None
        return number + len(self.dataset) if number < 0 else number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN:  # not there yet: unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            super().__setattr__(name, value)
        else:  # a worker opens its file there
            setattr(self.dataset, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.dataset, name)


def with_ids(loader: Loader, *, keep_sampler: bool = False) -> Loader:
    """A loader like this one, whose batches are pairs: the batch as before, and the numbers of
    its samples in `loader.dataset`. Samplers, workers and collate function are the same; the
    loader itself is left as it is.

    On several processes, what deals all samples out at random in each epoch (`DistributedSampler`,
    or a shuffled loader that Accelerate has prepared) gives each process a fixed part of them, in
    another order each epoch, so that its cache holds what it sees.

    Args:
        keep_sampler: have them dealt out anew all the same.

    Raises:
        InvalidType, InvalidValue: for what is no torch `DataLoader`, a data set as
            `IndexedDataset` refuses it, or a loader that makes no batches.
    """
    copied = copied_loader(loader)
    index_in_place(copied, keep_sampler=keep_sampler)
    return cast(Loader, copied)


def index_in_place(
    loader: Any, *, keep_sampler: bool = False, lenient: bool = False
) -> Callable[[], None]:
    """Make the loader itself do so, where another cannot take its place. Returns what undoes it.
    Raises as `with_ids` does. `lenient`: as of `IndexedDataset`."""
    while not isinstance(loader, DataLoader) or "base_dataloader" in vars(loader):
        if "base_dataloader" not in getattr(loader, "__dict__", {}):
            raise InvalidType(
                f"{type(loader).__name__} is no torch DataLoader: give a DataLoader, or the "
                "numbers of the samples yourself"
            )
        loader = loader.base_dataloader  # Accelerate's are around torch's
    shards = None if keep_sampler else fixed_shards(loader.batch_sampler)
    if isinstance(loader.dataset, IndexedDataset):
        return lambda: None
    data = IndexedDataset(loader.dataset, loader.collate_fn, lenient=lenient)
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        raise InvalidValue(_NO_BATCHES)
    own = vars(loader)  # the loader lets nobody set its data set
    begun = (each for name, each in own.items() if name != "_iterator")
    if any(isinstance(each, _BaseDataLoaderIter) for each in begun):
        raise InvalidValue(
            f"the {type(loader).__name__} has begun to draw its batches already: give it an "
            "IndexedDataset, and its collate, when it is built"
        )
    put = {"dataset": data, "collate_fn": data.collate, "_iterator": None}
    if shards is not None:
        put["batch_sampler"] = shards
    before = {name: own[name] for name in put} | {"_iterator": None}
    own.update(put)
    return lambda: own.update(before)


def copied_loader(loader: Any) -> Any:
    """A shallow copy, of a loader inside as well."""
    if not hasattr(loader, "__dict__"):
        return loader
    copied = object.__new__(type(loader))
    vars(copied).update(vars(loader))
    if "base_dataloader" in vars(copied):
        vars(copied)["base_dataloader"] = copied_loader(loader.base_dataloader)
    return copied


def _check(dataset: Any) -> None:
    """InvalidType for a data set whose samples have no numbers."""
    name = type(dataset).__name__
    numbered = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    if not numbered:
        raise InvalidType(
            f"{name} gives its items one after another, so that they have no numbers: use a "
            "map-style data set, with __getitem__ and __len__ (list(dataset), if it fits in memory)"
        )
    if isinstance(dataset, Mapping):
        raise InvalidType(f"{name} is a mapping of names: give one of its data sets")
    try:
        len(dataset)
    except (TypeError, NotImplementedError):
        raise InvalidType(
            f"{name} has no length, so that the number of samples is not known: give it __len__"
        ) from None
