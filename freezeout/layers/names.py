"""Layers written down as names, as a checkpoint can hold them, and read again.

The names are those of the model without wrappers: `0.weight`, also where `torch.compile` or
DistributedDataParallel says `_orig_mod.0.weight` or `module.0.weight`. So a run's state does not
depend on what the model, or a part of it, was wrapped in.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from ..errors import CheckpointError
from .layer import Layer

Part = TypeVar("Part", nn.Module, nn.Parameter)

# What wrappers call the module that they wrap; models of a user's own are seldom so called.
_WRAPPED = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "_forward_module",  # Lightning Fabric
)
# And classes of wrappers, whoever's, that call it `module`, which anybody might.
_PARALLEL = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "AveragedModel")


def _is_wrapped(parent: nn.Module, name: str) -> bool:
    """Whether the child of that name is what the parent, a wrapper, stands in for."""
    return name in _WRAPPED or (
        name == "module" and any(kind.__name__ in _PARALLEL for kind in type(parent).__mro__)
    )


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, or if it is a wrapper, what it wraps."""
    for name, child in module._modules.items():
        if child is not None and _is_wrapped(module, name):
            return innermost(child)
    return module


def plain_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module's name, as in `named_modules()` if nothing were wrapped: a wrapper has the name
    of what it wraps, and comes before it."""
    names: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if module in names:
            return
        names[module] = name
        for key, child in module._modules.items():
            if child is not None:
                visit(child, name if _is_wrapped(module, key) else _joined(name, key))

    visit(model, "")
    return names


def plain_parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter's name, as in `named_parameters()` if nothing were wrapped."""
    names: dict[nn.Parameter, str] = {}
    for module, name in plain_names(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, _joined(name, key))
    return names


def without_wrappers(name: str) -> str:
    """The name without the parts that may be a wrapper's, whether they are or not: of two names of
    the same module, written down with other wrappers around it, this is the same.

    >>> without_wrappers("module._orig_mod.blocks.0._checkpoint_wrapped_module.weight")
    'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in (*_WRAPPED, "module"))


def module_named(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, with wrappers' parts or without; None: there is none."""
    modules = {plain: module for module, plain in reversed(plain_names(model).items())}
    return {**modules, **dict(model.named_modules())}.get(name)


def to_names(model: nn.Module, layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Each layer as a dictionary of plain values: plain names of its modules and parameters in
    `model`."""
    modules = plain_names(model)
    parameters = plain_parameter_names(model)
    return [
        {
            "name": layer.name,
            "modules": list(dict.fromkeys(modules[module] for module in layer.modules)),
            "parameters": [parameters[parameter] for parameter in layer.parameters],
            "boundary": list(dict.fromkeys(modules[module] for module in layer.boundary)),
            "writes": [[modules[module], name] for module, name in layer.writes],
            "readers": [modules[module] for module in layer.readers],
        }
        for layer in layers
    ]


def from_names(model: nn.Module, written: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """The layers that `to_names` has written down, of a model that is built the same way, whatever
    it was wrapped in then, or is now. A wrapper goes with what it wraps.

    Raises:
        CheckpointError: the model has no module or parameter of a name.
    """
    modules, parameters = _Named(plain_names(model)), _Named(plain_parameter_names(model))
    return [
        Layer(
            modules.plain(layer["name"]) or "model",
            dict.fromkeys(module for name in layer["modules"] for module in modules.of(name)),
            [parameter for name in layer["parameters"] for parameter in parameters.of(name)],
            # What a wrapper wraps is called through it, and may be compiled with it.
            dict.fromkeys(modules.of(name)[0] for name in layer["boundary"]),
            writes=[(modules.of(name)[-1], own) for name, own in layer.get("writes", ())],
            readers=[modules.of(name)[-1] for name in layer.get("readers", ())],
        )
        for layer in written
    ]


class _Named(Generic[Part]):
    """Modules or parameters by their plain names, or by names of other wrappings."""

    def __init__(self, names: Mapping[Part, str]) -> None:
        self._parts: dict[str, list[Part]] = {}
        for part, name in names.items():
            self._parts.setdefault(name, []).append(part)
        self._plain: dict[str, list[str]] = {}
        for name in self._parts:
            self._plain.setdefault(without_wrappers(name), []).append(name)

    def plain(self, name: str) -> str:
        """The name that it has here; the same if there is none, or no telling which."""
        here = [name] if name in self._parts else self._plain.get(without_wrappers(name), [])
        return here[0] if len(here) == 1 else name

    def of(self, name: str) -> list[Part]:
        """What has the name: one, but for wrappers around it, which come first."""
        try:
            return self._parts[self.plain(name)]
        except KeyError as error:
            raise CheckpointError(
                f"the checkpoint is of another model: this one has no {name!r}"
            ) from error


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
