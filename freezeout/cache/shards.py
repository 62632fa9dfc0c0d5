"""Several processes: each gets the same samples in every epoch, so that its cache holds what it
sees. torch's and Accelerate's samplers deal all samples out anew each time."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from ..errors import InvalidValue
from .placeholders import Unservable


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, nothing is sent to other processes: Unservable."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise Unservable(
                "the forward pass sends something to other processes (SyncBatchNorm, say), which "
                "do not check the same batch"
            )
        return func(*args, **kwargs or {})


def fixed_shards(batches: Any) -> BatchSampler | None:
    """A batch sampler like this one, in batches of the same size and number, whose samples are a
    fixed part of the data set; None for one that does not deal out samples at random. InvalidValue
    for one that divides a process's part once more."""
    if not isinstance(batches, BatchSampler):
        return None
    parts, rank, size = getattr(batches, "num_processes", 1), 0, batches.batch_size
    inner: Any = batches
    if parts > 1 and hasattr(batches, "batch_sampler"):  # Accelerate's, around torch's
        inner, rank = batches.batch_sampler, vars(batches)["process_index"]
        size //= parts if vars(batches)["split_batches"] else 1
    source = getattr(inner, "sampler", None)
    if inner is not batches and isinstance(source, Shard | DistributedSampler):
        raise InvalidValue(
            f"the loader's {type(source).__name__} gives each process its part, and Accelerate "
            "divides that once more: prepare a loader with shuffle=True, then number it"
        )
    if type(inner) is not BatchSampler or isinstance(source, Shard):
        return None
    if inner is batches and type(source) is DistributedSampler and source.shuffle:
        shard = Shard(source, source.num_replicas, source.rank, source.drop_last, source.seed)
    elif inner is not batches and _draws_each_once(source):
        shard = Shard(source, parts, rank, inner.drop_last, 0)
    else:
        return None
    sampler = BatchSampler(shard, size, inner.drop_last)
    # Accelerate asks for it, to know how many samples a step takes.
    sampler.num_processes = parts  # type: ignore[attr-defined]
    return sampler


def _draws_each_once(sampler: Any) -> bool:
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


class Shard(Sampler[int]):
    """One process's part of a data set: every `parts`-th sample of a fixed random order, in a new
    order each epoch. As with `DistributedSampler`, some samples come twice where the number of
    samples is no multiple of the number of processes, or the last ones are dropped.

    Args:
        source: the sampler in whose place it stands; a DistributedSampler's epoch counts.
        seed: of the order in which samples are dealt out; equal in all processes.
    """

    def __init__(self, source: Any, parts: int, rank: int, drop_last: bool, seed: int) -> None:
        self.source, self.epoch = source, 0
        self._seed = getattr(source, "initial_seed", seed)  # of the order in each epoch
        count = len(source.dataset if hasattr(source, "dataset") else source.data_source)
        dealt = torch.randperm(count, generator=_generator(seed, 0))
        each = count // parts if drop_last else -(-count // parts)
        dealt = dealt.repeat(-(-each * parts // max(1, count)))[: each * parts]
        self.samples = dealt[rank::parts]

    def set_epoch(self, epoch: int) -> None:
        """In which order they come; a source that counts epochs is told as well."""
        self.epoch = epoch
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        epoch = getattr(self.source, "epoch", self.epoch)
        order = torch.randperm(len(self.samples), generator=_generator(self._seed, epoch + 1))
        yield from self.samples[order].tolist()


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + number * 0x9E3779B97F4A7C15) % 2**63)
