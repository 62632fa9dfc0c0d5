"""DistributedDataParallel beside freezing.

DDP fixes which gradients it reduces when it is built. After a freeze it would wait for gradients
that never come, so it is built again over the same module, which takes milliseconds:

    freezer = FreezeOut(model, optimizer, total_steps, example_inputs=x)
    check_ranks_agree(freezer)
    ...
        if freezer.step():
            ddp = rewrap(ddp)
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

# Imported once a process group exists, as DDP does, this takes the group for its default arguments
# and keeps it alive; gloo's threads then may abort the process at the interpreter's end.
import torch.distributed.nn.functional
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import FreezeOutError, InvalidType, InvalidValue
from ..freezer import FreezeOut
from ..versions import ddp_options

_MIB = 2**20


def rewrap(ddp: DistributedDataParallel, *, keep_hook: bool = True) -> DistributedDataParallel:
    """A new DDP over the same module, with the same options, whose buckets hold what still
    requires gradients.

    Call it on every rank when `FreezeOut.step()` returns layers, and use what it returns in place
    of `ddp`, which no longer works. Buffers of modules in evaluation mode become rank 0's on
    every rank: BatchNorm statistics, which each rank may have kept for itself, are made equal at
    the moment they stop moving.

    Args:
        ddp: the wrapper so far. Hooks registered on the wrapper itself stay behind with it.
        keep_hook: give the new wrapper the old one's communication hook and its state. False to
            register another, as for a state that remembers each bucket (PowerSGD's).

    Raises:
        InvalidType: `ddp` is no DistributedDataParallel.
        InvalidValue: the ranks disagree on which parameters are trained, or `ddp` has a prototype
            option that cannot be carried over.
        FreezeOutError: `ddp` has been rewrapped before; or a rank did not come, and the process
            group's timeout has passed.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise InvalidType(f"rewrap() takes a DistributedDataParallel, got {type(ddp).__name__}")
    if ddp.forward is _replaced:
        _replaced()
    _refuse_prototypes(ddp)
    module, group = ddp.module, ddp.process_group
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    try:
        check_equal(
            {"number of trained parameters": len(trained), "first of them": trained[:1]}, group
        )
        take_from_rank_0(_still_buffers(ddp), group)
    except RuntimeError as error:
        raise FreezeOutError(
            "rewrap() was not called on every rank: their schedules or steps differ "
            "(check_ranks_agree(freezer), before training, tells in what)"
        ) from error
    options: dict[str, Any] = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        # Parameters are equal, as DDP keeps them, and buffers have just been seen to.
        "init_sync": False,
        "process_group": group,
        # By default the first bucket is smaller than the others.
        "bucket_cap_mb": None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / _MIB,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        **ddp_options(ddp),
    }
    hooks = ddp._comm_hooks
    _take_apart(ddp)
    wrapper = DistributedDataParallel(module, **options)
    wrapper.training = ddp.training
    if keep_hook:
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
    return wrapper


def check_ranks_agree(freezer: FreezeOut, group: dist.ProcessGroup | None = None) -> None:
    """InvalidValue on every rank unless all have the same schedule, layers and step.

    Call it on every rank before training, and after loading a checkpoint. Ranks that freeze at
    different steps would otherwise wait for each other until the process group's timeout.
    """
    state = freezer.state_dict()
    layers = dict(enumerate(state.pop("layers")))
    names = {f"layer {i}": name for i, name in layers.items()}
    changes = state.pop("changes")  # last: what they follow from says more
    agreed = {**state.pop("plan"), **state, "layers": len(layers), **names, "changes": changes}
    check_equal(agreed, group)


def check_equal(values: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """InvalidValue on every rank, naming the first key, unless all ranks give equal values."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, dict(values), group=group)
    for rank, theirs in enumerate(every):
        for name in [*every[0], *theirs]:
            if name not in theirs or name not in every[0] or theirs[name] != every[0][name]:
                raise InvalidValue(
                    f"the ranks differ: {name} is {every[0].get(name)!r} on rank 0 and "
                    f"{theirs.get(name)!r} on rank {rank}"
                )


def take_from_rank_0(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Rank 0's values, on every rank."""
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, group=group, group_src=0)
            tensor.copy_(whole)


def _refuse_prototypes(ddp: DistributedDataParallel) -> None:
    """What leaves marks on the module that a second wrapper would make again."""
    for name, used in (
        ("mixed_precision (torch.autocast does the same)", ddp.mixed_precision is not None),
        ("delay_all_reduce_named_params", bool(ddp._delay_all_reduce_params)),
        (
            "an optimizer that runs in the backward pass",
            any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()),
        ),
    ):
        if used:
            raise InvalidValue(f"rewrap() cannot carry over {name}; build DDP without it")


def _still_buffers(ddp: DistributedDataParallel) -> Iterator[Tensor]:
    """Those of modules in evaluation mode, which the frozen ones are in for good."""
    for path, module in ddp.module.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if not module.training and name not in ddp.parameters_to_ignore:
                yield buffer


def _take_apart(ddp: DistributedDataParallel) -> None:
    """Take the old reducer's hooks off the parameters, and let its buckets go."""
    ddp._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    for handle in ddp._accum_grad_hooks:
        handle.remove()
    del ddp.reducer, ddp.logger  # the logger holds the reducer too
    ddp.forward = _replaced  # type: ignore[method-assign]


def _replaced(*args: Any, **kwargs: Any) -> None:
    raise FreezeOutError("this DistributedDataParallel has been replaced: use what rewrap() gave")
