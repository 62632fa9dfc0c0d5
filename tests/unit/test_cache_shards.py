"""Fixed parts of a data set for each of several processes."""

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from freezeout.cache import with_ids
from freezeout.errors import InvalidValue


def loader(rank: int, count: int = 31, *, drop_last: bool = False, **options: bool) -> Any:
    data = TensorDataset(torch.arange(count))
    sampler: Any = DistributedSampler(data, 3, rank, drop_last=drop_last, **options)
    return DataLoader(data, 2, sampler=sampler, drop_last=drop_last)


def epochs(numbered: Any, sampler: Any, count: int = 3) -> list[list[int]]:
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append([number for _, ids in numbered for number in ids.tolist()])
    return found


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_process_keeps_its_samples(drop_last: bool) -> None:
    seen = []
    for rank in range(3):
        given = loader(rank, drop_last=drop_last)
        numbered = with_ids(given)
        assert len(numbered) == len(given)
        found = epochs(numbered, given.sampler)
        assert all(len(set(order)) == len(order) for order in found)
        if not drop_last:
            assert set(found[0]) == set(found[1]) == set(found[2])
            assert len(found[0]) == 11
        assert found[0] != found[1]
        assert found == epochs(with_ids(given), given.sampler)  # by the epoch's number
        seen.append(set().union(*found))
    assert len(set.union(*seen)) == (30 if drop_last else 31)
    assert sum(map(len, seen)) == (30 if drop_last else 33)  # two come twice


def test_the_loader_itself_deals_out_as_before() -> None:
    given = loader(0)
    before = [batch[0].tolist() for batch in given]
    with_ids(given)
    assert [batch[0].tolist() for batch in given] == before


def test_what_is_no_random_dealing_stays() -> None:
    still = loader(1, shuffle=False)
    weighted = DataLoader(
        still.dataset, 2, sampler=WeightedRandomSampler([1.0] * 11, 11, replacement=True)
    )
    own = DataLoader(
        still.dataset, batch_sampler=BatchSampler(SequentialSampler(range(11)), 2, False)
    )
    for given in (still, weighted, own):
        assert with_ids(given).batch_sampler is given.batch_sampler
    dealt = loader(1)
    assert with_ids(dealt, keep_sampler=True).batch_sampler is dealt.batch_sampler
    assert with_ids(dealt).batch_sampler is not dealt.batch_sampler


def test_accelerates_shuffle_is_replaced() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    data = TensorDataset(torch.arange(11))
    for split in (False, True):
        parts = [
            data_loader.prepare_data_loader(
                DataLoader(data, 4, shuffle=True),
                torch.device("cpu"),
                num_processes=2,
                process_index=rank,
                split_batches=split,
            )
            for rank in range(2)
        ]
        seen = []
        for part in parts:
            numbered = with_ids(part)
            assert numbered.total_batch_size == part.total_batch_size
            orders = [[n for _, ids in numbered for n in ids.tolist()] for _ in range(3)]
            assert orders[0] != orders[1]
            assert set(orders[0]) == set(orders[1]) == set(orders[2])
            assert len(orders[0]) == 6
            seen.append(set(orders[0]))
        assert set.union(*seen) == set(range(11))


def test_a_part_is_not_divided_once_more() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    for given in (loader(0), with_ids(loader(0))):
        twice = data_loader.prepare_data_loader(
            given, torch.device("cpu"), num_processes=3, process_index=0
        )
        with pytest.raises(InvalidValue, match="gives each process its part"):
            with_ids(twice)
