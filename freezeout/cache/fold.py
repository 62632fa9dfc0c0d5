"""Frozen norms folded into the convolutions in front of them, while frozen layers are computed.

In evaluation mode a BatchNorm is a scale and a shift a channel, which a convolution can do with
other weights. `torch.fx` finds the pairs and makes them one, in a copy; the model stays as it is.
Results differ in the last bits.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from ..layers import Layer
from .plan import overridden, restore

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedPrefix:
    """The frozen modules of a model that can be folded, and their copies."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[nn.Module, nn.Module | None] = {}

    @contextmanager
    def __call__(self, frozen: Sequence[Layer], called: Set[nn.Module]) -> Iterator[None]:
        """Inside, frozen modules that the others call compute with folded norms. `called`:
        modules that have to be called themselves, not inside a copy of another."""
        inside = {module for layer in frozen for module in layer.modules}
        kept = []
        for module in self._outermost(self._model, inside, called):
            folded = self._folded(module)
            if folded is not None and module._compiled_call_impl is None:
                kept.append((module, overridden(module, folded.forward)))
        try:
            yield
        finally:
            for module, before in reversed(kept):
                restore(module, before)

    def forget(self) -> None:
        """The weights were changed."""
        self._copies.clear()

    def _outermost(
        self, module: nn.Module, frozen: set[nn.Module], called: Set[nn.Module]
    ) -> Iterator[nn.Module]:
        parts = list(module.modules())
        if (
            type(module).forward is not nn.Module.forward
            and all(part in frozen for part in parts)
            and not any(part in called for part in parts[1:])
        ):
            yield module
        else:
            for child in module.children():
                yield from self._outermost(child, frozen, called)

    def _folded(self, module: nn.Module) -> nn.Module | None:
        """A copy with fewer norms; None where there is nothing to fold, or it cannot be traced."""
        if module not in self._copies:
            self._copies[module] = None
            norms = _count(module, _NORMS)
            if norms and _count(module, _CONVS):
                try:
                    # The copy outlives the call, which may be in inference mode.
                    with torch.inference_mode(False), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        folded = fuse(_bare(module))
                except Exception:  # torch.fx raises anything on what it cannot trace
                    return None
                if _count(folded, _NORMS) < norms:
                    self._copies[module] = folded
        return self._copies[module]


def _count(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    return sum(isinstance(part, kinds) for part in module.modules())


def _bare(module: nn.Module) -> nn.Module:
    """A copy without hooks, in evaluation mode."""
    bare = copy.deepcopy(module)
    for part in bare.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part.training = False
    return bare
