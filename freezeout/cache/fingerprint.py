"""Fingerprints of frozen weights."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

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
