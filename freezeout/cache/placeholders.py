"""Placeholders: what a frozen module hands back while it need not run.

A placeholder has shape, type and device, but no storage, and raises as soon as it meets a tensor
that has one. It is torch's `FakeTensor` without its permission to mix. A plain `meta` tensor would
not do: on the CPU, `real += meta` does nothing and `real @ meta` reads garbage, both silently.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_leaves

_DEEPEST = 4  # levels of foreign objects that are looked into


class Unservable(Exception):
    """The cache cannot stand in for the frozen layers here; the message says why."""


class Placeholders:
    """Makes placeholders, which may meet each other and no other tensor."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=False)

    def make(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        # They outlive the call, which may be in inference mode.
        with torch.inference_mode(False), self._mode:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def like(self, tensor: Tensor) -> Tensor:
        return self.make(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _refuse(self: Any, *others: Any) -> Any:
    raise Unservable("the value of a number was used")


_READING = (
    *("bool", "int", "float", "index", "complex", "hash", "str", "repr", "format", "round"),
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "trunc", "floor", "ceil"),
    *(
        side + name
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
        for side in ("", "r")
    ),
    *(side + name for name in ("and", "or", "xor", "lshift", "rshift") for side in ("", "r")),
)
_METHODS = {f"__{name}__": _refuse for name in _READING}
_Int = type("_Int", (int,), _METHODS)
_Float = type("_Float", (float,), _METHODS)


def unreadable(number: int | float) -> Any:
    """A number that raises when Python reads it. What compiled code reads of it is wrong."""
    if isinstance(number, int):
        return _Int(-3 * number - 7)
    return _Float(-3.1 * number - 7.3)


def tensors_within(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in a structure, also inside objects that it holds (a key-value cache, say)."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth < _DEEPEST and hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            yield from tensors_within(list(vars(leaf).values()), depth + 1)


def holds_placeholder(value: Any) -> bool:
    """Whether a placeholder stands anywhere in a structure."""
    return any(isinstance(tensor, FakeTensor) for tensor in tensors_within(value))


def reason_of(error: BaseException) -> str | None:
    """What an exception says about serving, if a placeholder or the plan raised it."""
    if isinstance(error, Unservable):
        return str(error)
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return "the forward pass reads values of what the frozen layers computed"
    if isinstance(error, UnsupportedFakeTensorException):
        return "an operation on what the frozen layers computed knows no placeholders"
    if isinstance(error, AssertionError) and "convert all Tensors to FakeTensors" in str(error):
        where = _operation(str(error))
        return (
            "a tensor from inside the frozen layers is used beyond them, by another way than "
            f"their last output (a skip connection, a mask or a tied weight; {where})"
        )
    if "FakeTensor" in str(error) or "not supported for tensor subclasses" in str(error):
        return "the forward pass reads values of what the frozen layers computed"
    return None


def _operation(message: str) -> str:
    _, _, found = message.partition("Found in ")
    return f"in {found.partition('(')[0].strip()}" if found else "in an operation"
