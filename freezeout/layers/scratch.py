"""Forward passes that leave no mark on a model, and when two tensors are the same."""

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@contextmanager
def scratch(model: nn.Module) -> Iterator[None]:
    """Forward passes that leave no mark: buffers and generators are put back, and a backward pass
    that is still to come from before is not disturbed."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    python, numpy = random.getstate(), np.random.get_state()
    with random_state_kept(model):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            with torch.no_grad():
                for module, name, buffer, kept in buffers:
                    module._buffers[name] = buffer
                    # Norms change theirs without a new version; frozen ones keep the old.
                    if buffer is None or kept is None or isinstance(buffer, FakeTensor):
                        continue
                    if not buffer.is_meta and not equal(buffer, kept):
                        # A backward pass that is still to come may have saved it.
                        with _unsafe_preserve_version_counter(buffer):
                            buffer.copy_(kept)


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
