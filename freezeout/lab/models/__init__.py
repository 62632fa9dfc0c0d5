"""The lab's networks by name: the three of the FreezeOut paper (arXiv 1706.04983), and timm's."""

from typing import Any

from torch import nn

from ...errors import InvalidValue
from .chain import Chain
from .densenet import DenseNet
from .timm_models import build_timm_model
from .vgg import VGG
from .wide_resnet import WideResNet

__all__ = ["VGG", "DenseNet", "WideResNet", "build_model", "build_timm_model", "model_layers"]

# Each name's class and the options that it takes beside num_classes and dropout.
_MODELS: dict[str, tuple[type[Chain], tuple[str, ...]]] = {
    "densenet": (DenseNet, ("depth", "growth")),
    "wrn": (WideResNet, ("depth", "widen_factor")),
    "vgg": (VGG, ("depth",)),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    depth: int | None = None,
    growth: int | None = None,
    widen_factor: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """The network `name` ("densenet", "wrn", "vgg" or "timm:NAME") with random weights.

    It maps (batch, 3, 32, 32) to logits (batch, num_classes), and is on torch's default device in
    torch's default memory format. None stands for the network's own default. InvalidValue for an
    unknown name, an option that the network does not have, and a value out of range.
    """
    options: dict[str, Any] = {"depth": depth, "growth": growth, "widen_factor": widen_factor}
    options = {option: value for option, value in options.items() if value is not None}
    is_timm = name.startswith("timm:")
    if not is_timm and name not in _MODELS:
        raise InvalidValue(f"model must be {', '.join(_MODELS)} or timm:NAME, got {name!r}")
    allowed = () if is_timm else _MODELS[name][1]
    for option in options:
        if option not in allowed:
            takes = ", ".join((*allowed, "num_classes", "dropout"))
            raise InvalidValue(f"{option} is not an option of {name}, which takes {takes}")
    options |= {"num_classes": num_classes, "dropout": dropout}
    if is_timm:
        return build_timm_model(name.removeprefix("timm:"), **options)
    return _MODELS[name][0](**options)


def model_layers(model: nn.Module) -> list[tuple[nn.Module, ...]] | None:
    """The modules of `model` that freeze together, in execution order, every parameter covered.

    None for a model that does not list them, such as timm's: their order takes a forward pass to
    find. (An attribute called `layers` is not enough: a Swin transformer has one, without its
    stem and head.)
    """
    return model.layers if isinstance(model, Chain) else None
