"""Forward passes that leave no mark on a model, and when two tensors are the same."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .flow import memory_of


@contextmanager
def scratch(model: nn.Module, watched: bool = False) -> Iterator[None]:
    """Forward passes that leave no mark: buffers and generators are put back, and a backward pass
    that is still to come from before is not disturbed.

    So are the parameters that embeddings with `max_norm` write; others that a forward pass writes,
    if it is `watched`: operation by operation, which takes time.
    """
    modules = list(model.modules())
    own_places: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (own, dict(own)) for each in modules for own in (each._parameters, each._buffers)
    ]
    kept = _Kept()
    for module, own, _, tensor in places_of(modules):
        if own is module._buffers or getattr(module, "max_norm", None) is not None:
            kept.add(tensor)
    weights = [(p, p.detach(), memory_of(p)) for p in model.parameters()] if watched else []
    python, numpy = random.getstate(), np.random.get_state()
    with random_state_kept(model):
        try:
            with _WriteListener(kept, weights) if watched else nullcontext():
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for own, before in own_places:
                if [*own] != [*before] or any(own[name] is not before[name] for name in own):
                    own.clear()
                    own.update(before)
            for parameter, alias, memory in weights:
                if memory_of(parameter) != memory:
                    parameter.data = alias
            kept.put_back()


class _Kept:
    """Copies of tensors, to be put back, with the versions that they had."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, tuple[Tensor, AbstractContextManager[Any]]] = {}

    def add(self, tensor: Tensor) -> None:
        """Copy a tensor as it is now, unless that has been done."""
        if tensor not in self._copies:
            version: AbstractContextManager[Any] = (
                nullcontext() if tensor.is_inference() else _unsafe_preserve_version_counter(tensor)
            )
            self._copies[tensor] = tensor.detach().clone(), version

    def put_back(self) -> None:
        for tensor, (copy, version) in self._copies.items():
            # A backward pass that is still to come may have saved it.
            with torch.no_grad(), version:
                # Norms change theirs without a new version; frozen ones keep the old.
                if not has_no_values(tensor) and not equal(tensor, copy):
                    if tensor.shape != copy.shape:
                        tensor.resize_(copy.shape)
                    tensor.copy_(copy)


class _WriteListener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps a parameter when an operation is about to write it: copies of all of them would take
    as much memory as the model."""

    supports_higher_order_operators = True

    def __init__(self, kept: _Kept, weights: Iterable[tuple[Tensor, Tensor, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._of_memory: dict[Any, list[Tensor]] = {}
        for parameter, _, memory in weights:
            self._of_memory.setdefault(memory, []).append(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    for parameter in self._of_memory.get(memory_of(value), ()):
                        self._kept.add(parameter)
        return func(*args, **(kwargs or {}))


def places_of(
    modules: Iterable[nn.Module],
) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """Each parameter and buffer: the module, the dictionary of its own that it stands in, its name
    there, and the tensor."""
    for module in modules:
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield module, own, name, tensor


def state_of(tensor: Tensor) -> Any:
    """What changes when a tensor is written, for the most part."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, memory_of(tensor), tensor.shape


def has_no_values(tensor: Tensor) -> bool:
    """Whether it is a tensor without memory, to count on."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Random state, on the CPU and the model's devices, as before afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cpu"}:
            numbers = [d.index for d in devices if d.type == kind]
            stack.enter_context(
                torch.random.fork_rng(numbers, device_type=kind if kind != "cpu" else "cuda")
            )
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """A compiled module would run its graph, or compile one, unseen by the listener."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def generators(model: nn.Module) -> list[bytes]:
    """The state of every generator that a forward pass may draw from."""
    states = [torch.get_rng_state().numpy().tobytes(), *foreign_generators()]
    if any(parameter.is_cuda for parameter in model.parameters()):
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def foreign_generators() -> list[bytes]:
    """Those of them that are not torch's: Python's and numpy's."""
    numpy: Any = np.random.get_state()
    return [repr(random.getstate()).encode(), numpy[1].tobytes() + repr(numpy[2:]).encode()]


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, where a NaN equals a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return (one.is_floating_point() or one.is_complex()) and bool(
        ((one == other) | (one.isnan() & other.isnan())).all()
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same samples agree, up to the order of summation: the norm
    of the difference is at most 1e-5 of the norm in fp32 on a CPU."""
    if one.dtype != other.dtype or not (one.is_floating_point() or one.is_complex()):
        return one.dtype == other.dtype and torch.equal(one, other)
    if equal(one, other):
        return True
    bound = 1e-5 if one.device.type == "cpu" else 1e-2  # TF32
    if one.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(one.device.type):
        bound = 3e-2
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= bound * torch.maximum(one.norm(), other.norm()))
