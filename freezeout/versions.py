"""What differs between the versions of torch that are supported, in one place."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adagrad, Optimizer
from torch.utils._pytree import TreeSpec
from torch.utils.hooks import RemovableHandle

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
_ASKS_FOR_NUMBERS = VERSION < (2, 11)
_FORGETS_REQUIRES_GRAD = VERSION < (2, 13)  # 2.12 was not tried
_NUMBER, _ALWAYS_CALLED = -1, -2  # torch's own start at zero


class Structure:
    """The structure of arguments, as a key: torch 2.7's own hashes the lists in it, and fails."""

    __slots__ = ("_tree",)

    def __init__(self, tree: TreeSpec) -> None:
        self._tree = tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._tree == other._tree

    def __hash__(self) -> int:
        return hash((self._tree.num_nodes, self._tree.num_leaves))


@contextmanager
def no_grad() -> Iterator[None]:
    """`torch.no_grad()` for passes within the user's autocast. There torch 2.7 keeps the weights
    that it casts, also where the model enters autocast by itself once more, and in the training
    pass that comes next they get no gradients."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()


def numbered_alike(handle: RemovableHandle, always_called: bool = False) -> RemovableHandle:
    """The hook, under a number that is the same in all modules. A graph of a block asks for the
    number of a hook that is always called, and before torch 2.11 of one that takes keyword
    arguments: equal blocks would not share it."""
    hooks = handle.hooks_dict_ref()
    number = _ALWAYS_CALLED if always_called else _NUMBER
    if (_ASKS_FOR_NUMBERS or always_called) and hooks is not None and number not in hooks:
        beside = [there for ref in handle.extra_dict_ref if (there := ref()) is not None]
        for numbered in (hooks, *(there for there in beside if handle.id in there)):
            numbered[number] = numbered.pop(handle.id)
        handle.id = number
    return handle


def called_by_compiler(function: Callable[[], None]) -> Callable[[], None]:
    """For what is to be said where `torch.compile` traces a call of the function: it is called
    then, and is no part of the graph."""
    # What torch.compiler.assume_constant_result() sets, which would import the compiler.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Whether torch.export runs. torch's own function of that name is true to torch.compile, too,
    before torch 2.13."""
    return bool(torch.compiler._is_exporting_flag)


@called_by_compiler
def guard_hooks() -> None:
    """Called where `torch.compile` traces the model. Before torch 2.13 a graph is not compiled anew
    when a parameter stops requiring a gradient: it goes on with all of the backward pass, and
    nothing is saved. But freezing puts hooks on modules too, which a graph can be told to watch."""
    if _FORGETS_REQUIRES_GRAD:
        torch._dynamo.config.skip_nnmodule_hook_guards = False


def make_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters the state without which a step would fail.

    Optimizers make it in the first step that needs it, but Adagrad, up to torch 2.11 at least,
    makes it when it is built: what a freeze has dropped would not come back."""
    if not isinstance(optimizer, Adagrad) or not _adagrad_makes_state_when_built():
        return
    wanted = {parameter for parameter in parameters if not optimizer.state.get(parameter)}
    initial = optimizer.defaults["initial_accumulator_value"]
    for group in optimizer.param_groups:
        missing = [parameter for parameter in group["params"] if parameter in wanted]
        if missing:
            new = Adagrad(missing, initial_accumulator_value=initial, fused=group["fused"])
            for parameter in missing:
                optimizer.state[parameter] = new.state[parameter]


@cache
def _adagrad_makes_state_when_built() -> bool:
    return bool(Adagrad([torch.zeros(1)]).state)


_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters

# What says whether each forward pass takes rank 0's buffers: by another name from torch 2.13 on.
SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)


def ddp_options(ddp: DistributedDataParallel) -> dict[str, Any]:
    """Those of a DistributedDataParallel's options that not every version has."""
    same = ("skip_all_reduce_unused_params", "batched_grad_copy", SYNC_BUFFERS)
    options = {name: getattr(ddp, name) for name in same if name in _DDP_OPTIONS}
    if "bucket_cap_mb_list" in _DDP_OPTIONS:
        options["bucket_cap_mb_list"] = [n / 2**20 for n in ddp.bucket_bytes_cap_list] or None
    return options
