"""The processes of a run: one, or as many as torchrun has started.

    torchrun --nproc-per-node 4 -m freezeout train --model wrn

Rank 0 writes files and prints; every rank computes its share of each batch. With one process,
nothing here does anything.
"""

import gc
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import FreezeOutError
from ..freezer import FreezeOut
from ..parallel.ddp import check_equal, check_ranks_agree, rewrap, take_from_rank_0
from ..versions import SYNC_BUFFERS

T = TypeVar("T")


class Ranks:
    """How many processes train together, which of them this is, and what they do together.

    Every method but `share` and `reseed` is called by all ranks at the same point.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self.is_first = rank == 0
        self._failed = False  # an error has been made known to all

    # --- work, and its errors -------------------------------------------------------------

    def each(self, work: Callable[[], T]) -> T:
        """What `work` gives here. An error on one rank is raised on every rank."""
        if self.size == 1:
            return work()
        error: FreezeOutError | OSError | None = None
        try:
            result = work()
        except (FreezeOutError, OSError) as mine:
            if self._failed:
                raise
            error = mine
        said = self.gather(None if error is None else str(error))
        self._failed = any(said)
        if error is not None:
            raise error
        for rank, message in enumerate(said):
            if message is not None:
                raise FreezeOutError(f"{message} (rank {rank})" if rank else message)
        return result

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it."""
        result = self.each(work if self.is_first else lambda: None)
        if self.size == 1:
            return result  # type: ignore[return-value]
        box = [result]
        dist.broadcast_object_list(box, group_src=0)
        return box[0]  # type: ignore[return-value]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """What `work` gives here, when rank 0 has done it: a download is made once."""
        if self.size == 1:
            return work()
        early = self.each(work if self.is_first else lambda: None)
        late = self.each(work if not self.is_first else lambda: None)
        return early if self.is_first else late  # type: ignore[return-value]

    # --- numbers --------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int) -> int:
        """The largest rank's number. Cheap: one integer, and no accelerator is waited for."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors added up."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """InvalidValue, naming the first that differs, unless all ranks have the same values."""
        check_equal(values)

    def check_agree(self, freezer: FreezeOut) -> None:
        """InvalidValue unless all ranks have the same schedule, layers and step."""
        check_ranks_agree(freezer)

    # --- the model and its batches --------------------------------------------------------

    def share(self, count: int) -> tuple[slice, float]:
        """This rank's part of a batch of `count` images, and the weight of its mean loss.

        The mean over ranks of weight times mean loss is the batch's mean loss. A rank for which
        there is no image takes the first, with weight 0, so that it takes part in the reduction.

        >>> Ranks().share(50), Ranks(rank=1, size=2).share(5)
        ((slice(0, 50, None), 1.0), (slice(2, 5, None), 1.2))
        >>> Ranks(rank=0, size=2).share(1)
        (slice(0, 1, None), 0.0)
        """
        first, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        if first == end:
            return slice(0, 1), 0.0
        return slice(first, end), (end - first) * self.size / count

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call for a loss whose gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        # Each rank keeps its own BatchNorm statistics until they are asked for, or frozen.
        options: dict[str, Any] = {SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)

    def rewrap(self, net: nn.Module) -> nn.Module:
        """What to call in place of `net`, which `wrap` gave, once layers have been frozen."""
        return rewrap(net) if isinstance(net, DistributedDataParallel) else net

    def take_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers, such as BatchNorm statistics, on every rank."""
        if self.size > 1:
            take_from_rank_0(model.buffers())

    def reseed(self, seed: int) -> None:
        """Let each rank's dropout draw its own masks; rank 0's are those of a single process."""
        if self.rank > 0:
            digest = hashlib.sha256(f"{seed} rank {self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8]) >> 1)


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that torchrun has started, in a process group while the context lasts; a single
    one without torchrun. Of an error that all ranks raise, rank 0 alone should speak."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    # Of tensors on the CPU too, so that asking about signals does not wait for the accelerator.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with warnings.catch_warnings():
            if not ranks.is_first:
                warnings.simplefilter("ignore")
            yield ranks
    except (FreezeOutError, OSError) as error:
        if not ranks.is_first:
            error.is_said_elsewhere = True  # type: ignore[union-attr]
            time.sleep(1)  # once one rank has ended, torchrun ends the others
        raise
    finally:
        # The group's end waits for its threads. On torch 2.7 it holds Python's lock meanwhile,
        # and a thread that has yet to let go of the last tensor needs that.
        time.sleep(0.1)
        dist.destroy_process_group()
        gc.collect()  # its threads end with the last reference, which a cycle may hold
