"""Layers written down as names, as a checkpoint can hold them, and read again."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .layer import Layer


def to_names(model: nn.Module, layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Each layer as a dictionary of plain values: paths of its modules and parameters in
    `model`, as in `named_modules()` and `named_parameters()`."""
    modules = {module: name for name, module in model.named_modules()}
    parameters = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {
            "name": layer.name,
            "modules": [modules[module] for module in layer.modules],
            "parameters": [parameters[parameter] for parameter in layer.parameters],
            "boundary": [modules[module] for module in layer.boundary],
            "writes": [[modules[module], name] for module, name in layer.writes],
            "readers": [modules[module] for module in layer.readers],
        }
        for layer in layers
    ]


def from_names(model: nn.Module, written: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """The layers that `to_names` has written down, of a model that is built the same way.

    Raises:
        CheckpointError: the model has no module or parameter of a name.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    try:
        return [
            Layer(
                layer["name"],
                [modules[name] for name in layer["modules"]],
                [parameters[name] for name in layer["parameters"]],
                [modules[name] for name in layer["boundary"]],
                writes=[(modules[name], own) for name, own in layer.get("writes", ())],
                readers=[modules[name] for name in layer.get("readers", ())],
            )
            for layer in written
        ]
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint is of another model: this one has no {error.args[0]!r}"
        ) from error
