"""Whether frozen weights are those that they were: in another process, and in this one."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..layers import Layer
from ..layers.scratch import equal


def tensors_of(layer: Layer) -> list[Tensor]:
    """What decides a frozen layer's results: its parameters and buffers."""
    buffers = [b for m in layer.modules for b in m._buffers.values() if b is not None]
    return [*layer.parameters, *buffers]


def _options(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module was built with, as far as plain values tell: strides, numbers of heads. Not
    its rate of dropout, which is without effect where it is frozen."""
    if isinstance(module, _DropoutNd):
        return []
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if name[:1] != "_" and name != "training" and _is_plain(value)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


class Fingerprints:
    """SHA-256 of the first layers' weights and options, one a depth, each computed once."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._found: list[bytes] = [b""]

    def at(self, depth: int) -> str:
        """Of the first `depth` layers, which are frozen."""
        while len(self._found) <= depth:
            digest = hashlib.sha256(self._found[-1])
            layer = self._layers[len(self._found) - 1]
            digest.update(layer.name.encode())
            for module in layer.modules:
                digest.update(repr((type(module).__qualname__, _options(module))).encode())
            for tensor in tensors_of(layer):
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
            self._found.append(digest.digest())
        return self._found[depth].hex()

    def forget(self) -> None:
        """The weights were changed."""
        self._found = [b""]


class Watch:
    """Whether the tensors of frozen layers are those that they were.

    A version counts changes in place, but for a norm's statistics (those of frozen ones do not
    change) and for what is done through `.data`. A buffer may be another tensor after each pass,
    and before torch 2.13 DistributedDataParallel writes what they hold into all buffers in each.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        self.forget()

    def forget(self) -> None:
        """What has been seen does not count any more."""
        self.frozen = 0  # layers, at the last look
        self._freezes: list[int] = []  # how often each of them has been frozen
        # Each parameter, where in the model it stands, its place in memory, its version.
        self._places: list[tuple[Mapping[str, Tensor | None], str, Tensor, int, int]] = []
        # Each buffer, what it held, and the version that did.
        self._buffers: list[tuple[Tensor, Tensor, int]] = []

    def have_changed(self, frozen: int) -> bool:
        """Whether any has since the last look; `frozen`: how many layers are now. A layer that has
        been thawed and frozen again counts as changed: fused optimizers leave versions alone."""
        freezes = [layer.freezes for layer in self._layers[:frozen]]
        changed = (
            freezes[: self.frozen] != self._freezes[:frozen]
            or any(
                home.get(name) is not parameter
                or parameter.data_ptr() != place
                or _version(parameter) != version
                for home, name, parameter, place, version in self._places
            )
            or any(
                _version(buffer) != version and not equal(buffer, held)
                for buffer, held, version in self._buffers
            )
        )
        if changed or frozen != self.frozen:
            self.frozen, self._freezes = frozen, freezes
            tensors = {tensor for layer in self._layers[:frozen] for tensor in tensors_of(layer)}
            self._places = [
                (module._parameters, name, parameter, parameter.data_ptr(), _version(parameter))
                for module in self._model.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter in tensors
            ]
            self._buffers = [
                (tensor, tensor.detach().clone(), _version(tensor))
                for tensor in tensors
                if not isinstance(tensor, nn.Parameter)
            ]
        return changed


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # those have none
