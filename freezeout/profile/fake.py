"""Models and inputs without memory: what counting needs, and all that it needs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


@contextmanager
def faked(model: nn.Module, inputs: Any, device: torch.device) -> Iterator[Any]:
    """Inside: `model`, built on the meta device, as if it were on `device`; gives the inputs.

    Plain meta tensors have no device of their own, so autocast and the choice of attention's
    kernel would pass them by; fake ones take both as on `device`, and no memory either. The
    model's parameters are replaced for good, tied ones by tied ones, and so are buffers and other
    tensors that modules hold. Constants elsewhere, as of the model's file, are taken as they are.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), _unlogged():
        memo: dict[Tensor, Tensor] = {}
        for module in model.modules():
            attributes: list[dict[str, Any]] = [
                module._parameters,
                module._buffers,
                vars(module),
            ]
            for own in attributes:
                for name, value in own.items():
                    if isinstance(value, Tensor):
                        own[name] = _fake(value, device, memo)
        yield tree_map_only(Tensor, lambda tensor: _fake(tensor, device, memo), inputs)


@contextmanager
def _unlogged() -> Iterator[None]:
    """An operation that fails is raised; torch would log its traceback as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _fake(tensor: Tensor, device: torch.device, memo: dict[Tensor, Tensor]) -> Tensor:
    if tensor not in memo:
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            like = nn.Parameter(like, requires_grad=tensor.requires_grad)
        memo[tensor] = like
    return memo[tensor]
