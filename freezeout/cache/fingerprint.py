"""Fingerprints of frozen weights."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers import Layer


def tensors_of(layer: Layer) -> list[Tensor]:
    """What decides a frozen layer's results: its parameters and buffers."""
    buffers = [b for m in layer.modules for b in m._buffers.values() if b is not None]
    return [*layer.parameters, *buffers]


class Fingerprints:
    """SHA-256 of the first layers' weights, one a depth, each computed once."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._found: list[bytes] = [b""]

    def at(self, depth: int) -> str:
        """Of the first `depth` layers, which are frozen."""
        while len(self._found) <= depth:
            digest = hashlib.sha256(self._found[-1])
            layer = self._layers[len(self._found) - 1]
            digest.update(layer.name.encode())
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
    change) and for what is done through `.data`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        self.frozen = 0  # layers, at the last look
        # Each tensor, where in the model it stands, and its place in memory.
        self._seen: list[tuple[Mapping[str, Tensor | None], str, Tensor, int]] = []
        self._versions = 0

    def have_changed(self, frozen: int) -> bool:
        """Whether any has since the last look; `frozen`: how many layers are now."""
        changed = self._versions != sum(tensor._version for _, _, tensor, _ in self._seen) or any(
            home.get(name) is not tensor or tensor.data_ptr() != place
            for home, name, tensor, place in self._seen
        )
        if changed or frozen != self.frozen:
            self.frozen = frozen
            self._seen = self._places()
            self._versions = sum(tensor._version for _, _, tensor, _ in self._seen)
        return changed

    def forget(self) -> None:
        """What has been seen does not count any more."""
        self.frozen, self._seen, self._versions = 0, [], 0

    def _places(self) -> list[tuple[Mapping[str, Tensor | None], str, Tensor, int]]:
        layers = self._layers[: self.frozen]
        parameters = {parameter for layer in layers for parameter in layer.parameters}
        frozen = {module for layer in layers for module in layer.modules}
        return [
            (home, name, tensor, tensor.data_ptr())
            for module in self._model.modules()
            for home in (module._parameters, module._buffers)
            for name, tensor in home.items()
            if tensor is not None
            and (module in frozen if home is module._buffers else tensor in parameters)
        ]
