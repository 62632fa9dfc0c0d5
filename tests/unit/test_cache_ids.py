"""Every batch comes with its samples' numbers, whatever an item is and however it is loaded."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

from freezeout.cache import Indexed, IndexedDataset, with_ids
from freezeout.cache.ids import index_in_place
from freezeout.errors import InvalidType, InvalidValue

COUNT = 10


@dataclass
class Item:
    x: Tensor


class Items(Dataset[Any]):
    """Item i is made of the number 10 * i."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes = ["a", "b"]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        x = torch.tensor(10 * range(COUNT)[i])
        return {
            "tensor": x,
            "tuple": (x, -x),
            "list": [x, -x],
            "mapping": {"x": x, "id": -x},
            "object": Item(x),
        }[self.kind]


class Together(Items):
    """As Hugging Face's data sets: a batch's items are asked for at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Table(Items):
    """A list of indices gives a whole batch."""

    def __getitem__(self, index: Any) -> Any:
        return 10 * torch.as_tensor(index)


def collate(items: list[Any]) -> Any:
    return [item.x for item in items] if isinstance(items[0], Item) else default_collate(items)


def values(batch: Any) -> list[int]:
    if isinstance(batch, dict):
        batch = batch["x"]
    elif isinstance(batch, list) and batch[0].ndim:
        batch = batch[0]
    return [int(x) for x in batch]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping", "object"])
@pytest.mark.parametrize("make", [Items, Together])
def test_the_batch_is_as_before_and_has_its_numbers(kind: str, make: Any) -> None:
    def batches(number: bool) -> list[Any]:
        torch.manual_seed(0)
        loader = DataLoader(make(kind), batch_size=3, shuffle=True, collate_fn=collate)
        return list(with_ids(loader) if number else loader)

    plain, numbered = batches(False), batches(True)
    assert [type(each.batch) for each in numbered] == [type(each) for each in plain]
    assert [values(each.batch) for each in numbered] == [values(each) for each in plain]
    assert [(10 * each.ids).tolist() for each in numbered] == [values(each) for each in plain]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "num_workers": 2, "persistent_workers": True},
        {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * COUNT, 20)},
        {"batch_size": 4, "sampler": RandomSampler(range(COUNT), replacement=True)},
        {"batch_size": 4, "sampler": [-1, 2, -3]},
        {"batch_sampler": [[1, 2], [5], [-1]]},
        {"batch_size": None, "sampler": BatchSampler(range(COUNT), 4, False)},
    ],
)
def test_any_sampler_and_workers(options: dict[str, Any]) -> None:
    data: Any = Table("tensor") if options.get("batch_size", 0) is None else Items("tensor")
    loader = with_ids(DataLoader(data, **options))
    for _ in range(2):
        for batch, ids in loader:
            assert ids.min() >= 0
            assert batch.tolist() == (10 * ids).tolist()


def test_the_loader_itself_stays_as_it_is_and_the_data_set_is_seen_through() -> None:
    loader: Any = DataLoader(Items("tuple"), batch_size=4)
    numbered = with_ids(loader)
    assert isinstance(next(iter(loader)), list)
    assert isinstance(next(iter(numbered)), Indexed)
    assert numbered.dataset.classes == ["a", "b"]
    assert isinstance(next(iter(with_ids(numbered))).batch, list)
    assert len(pickle.loads(pickle.dumps(numbered.dataset))) == COUNT


def test_a_part_of_an_indexed_data_set_keeps_its_numbers() -> None:
    data = IndexedDataset(Items("tensor"))
    loader = DataLoader(Subset(data, [7, 2, 4]), batch_size=3, collate_fn=data.collate)
    batch, ids = next(iter(loader))
    assert (batch.tolist(), ids.tolist()) == ([70, 20, 40], [7, 2, 4])
    # Items that are asked for one by one come as they are, without numbers.
    both: Any = ConcatDataset([Subset(data, [7, 2]), Subset(data, [4])])
    with pytest.raises(InvalidType, match="this has no numbers"):
        next(iter(DataLoader(both, batch_size=3, collate_fn=data.collate)))


def test_who_looks_at_an_item_or_sets_an_attribute_finds_the_data_set() -> None:
    """A worker opens its file there."""
    data = IndexedDataset(items := Items("tensor"))
    assert torch.equal(data[3], items[3])
    data.file = "opened"
    assert vars(items)["file"] == "opened"
    assert "file" not in vars(data)
    del data.file
    assert "file" not in vars(items)


def test_a_loader_that_draws_from_an_iterator_of_its_own_is_refused() -> None:
    """As timm's MultiEpochsDataLoader, which makes it once for all epochs: it would go on with what
    has no numbers."""

    class Once(DataLoader[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.iterator = super().__iter__()

        def __iter__(self) -> Any:
            return self.iterator

    with pytest.raises(InvalidValue, match="the Once has begun to draw its batches already"):
        with_ids(Once(Items("tensor"), batch_size=2))
    data = IndexedDataset(Items("tensor"))
    batch, ids = next(iter(Once(data, batch_size=2, collate_fn=data.collate)))
    assert batch.tolist() == (10 * ids).tolist()


def test_a_sampler_without_numbers_may_be_lived_with() -> None:
    class Keys(Items):
        def __getitem__(self, i: Any) -> Any:
            return super().__getitem__(int(i))

    order = ["3", "1"]
    loader: Any = DataLoader(Keys("tensor"), batch_size=2, sampler=order)
    with pytest.raises(InvalidType, match="'3', which is no sample's number"):
        next(iter(with_ids(loader)))
    index_in_place(loader, lenient=True)
    assert next(iter(loader)).ids.tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_a_collate_function_that_would_drop_the_numbers_fails(kind: str) -> None:
    data = IndexedDataset(Items(kind))
    with pytest.raises((TypeError, AttributeError)):
        next(iter(DataLoader(data, batch_size=2)))
    with pytest.raises(InvalidType, match="this has no numbers"):
        data.collate([torch.ones(2)])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


class Endless(Dataset[Any]):
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (Stream(), "Stream gives its items one after another.*map-style"),
        (iter([1]), "gives its items one after another.*map-style"),
        (Endless(), "Endless has no length.*__len__"),
        ({"train": [1]}, "give one of its data sets"),
    ],
)
def test_samples_without_numbers_are_refused(dataset: Any, says: str) -> None:
    with pytest.raises(InvalidType, match=says) as error:
        IndexedDataset(dataset)
    assert "\n" not in str(error.value)


def test_loaders_that_make_no_batches_are_refused() -> None:
    with pytest.raises(InvalidValue, match="batch_size=None"):
        with_ids(DataLoader(Items("tensor"), batch_size=None))
    with pytest.raises(InvalidType, match="no torch DataLoader"):
        with_ids([1, 2])
    tuples: Any = [[(1, 0.5), (2, 0.1)]]
    with pytest.raises(InvalidType, match="no sample's number"):
        next(iter(with_ids(DataLoader(Items("tensor"), batch_sampler=tuples))))
