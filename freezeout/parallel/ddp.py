"""DistributedDataParallel beside freezing.

DDP fixes which gradients it reduces when it is built. After a freeze it would wait for gradients
that never come, so it is built again over the same module, which takes milliseconds:

    if freezer.step():
        ddp = rewrap(ddp)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import InvalidType, InvalidValue


def rewrap(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """A new DDP over the same module, whose buckets hold what still requires gradients.

    Call it on every rank when `FreezeOut.step()` returns layers, after `zero_grad()`, and use
    what it returns in place of `ddp`, whose hooks are gone. Buffers become those of rank 0 on
    every rank: BatchNorm statistics, which each rank has kept for itself, are made equal at the
    moment they stop moving. A communication hook has to be registered again.

    Raises:
        InvalidType: `ddp` is no DistributedDataParallel.
        InvalidValue: the ranks disagree on which parameters are trained.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise InvalidType(f"rewrap() takes a DistributedDataParallel, got {type(ddp).__name__}")
    module, group = ddp.module, ddp.process_group
    check_ranks_agree(sum(p.requires_grad for p in module.parameters()), group, ddp.device)
    options: dict[str, Any] = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "process_group": group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        "forward_sync_buffers": ddp.forward_sync_buffers,
    }
    # The old reducer's hooks on the parameters go with it.
    del ddp.reducer
    for parameter in module.parameters():
        parameter.grad = None  # it may be a view into the old buckets
    wrapper = DistributedDataParallel(module, **options)
    wrapper.training = ddp.training
    return wrapper


def check_ranks_agree(
    number: int, group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> None:
    """InvalidValue unless every rank has the same number (of trained parameters, say)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    numbers = [int(each.item()) for each in every]
    if len(set(numbers)) > 1:
        raise InvalidValue(
            f"the ranks have {numbers} trained parameters: their schedules or steps differ"
        )
