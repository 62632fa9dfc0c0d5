"""`torch.compile` beside freezing.

Compiled as a whole, a model needs a new graph at each freeze, and torch silently stops compiling
after eight. Compiled layer by layer, equal blocks share their graphs, frozen or not:

    compile_layers(freezer)
"""

from typing import Any

from torch import nn

from ..freezer import FreezeOut


def compile_layers(freezer: FreezeOut, **options: Any) -> None:
    """Compile the model's layers one by one, so that equal blocks share graphs.

    A block needs at most three graphs (trained, trained behind frozen ones, frozen), however
    many equal blocks there are and however many freeze; frozen ones take their place as they
    freeze. What stands between layers runs uncompiled.

    Args:
        freezer: over the model; call this before training, and not on a compiled model.
        options: for `torch.compile`, such as `mode="max-autotune"` or `fullgraph=True`.
    """
    for module in blocks(freezer):
        module.compile(**options)


def blocks(freezer: FreezeOut) -> list[nn.Module]:
    """The modules that are called from outside every layer: innermost of each boundary."""
    boundary = {module for layer in freezer.layers for module in layer.boundary}
    return [
        module
        for layer in freezer.layers
        for module in layer.boundary
        if module is not freezer.model
        and not any(child in boundary for child in module.children())
        and next(module.parameters(), None) is not None
    ]
