"""Networks of the package timm by name, with random weights, for 32x32 images.

timm is imported only when a model is asked for, and nothing is ever downloaded.
"""

import difflib
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...errors import InvalidValue
from ...words import first_line
from .chain import check_int, dropouts

IMAGE_SIZE = 32


def build_timm_model(name: str, *, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """timm's model `name`: (batch, 3, 32, 32) to logits (batch, num_classes), random weights.

    The image size is passed to architectures that take one; the others are built as they are.
    `dropout` is a probability, timm's `drop_rate`. InvalidValue if timm is missing or broken, the
    name is unknown (with close matches), an option is out of range, or the architecture cannot be
    built with it.
    """
    check_int("num_classes", num_classes, 2)
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes}
    if dropouts(dropout):
        options["drop_rate"] = dropout
    timm = _import_timm()
    # `is_model` knows registered architectures only, so "hf-hub:..." names, which download, fail.
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"close matches: {', '.join(close)}" if close else "see timm.list_models()"
        raise InvalidValue(f"timm has no model {name!r}; {hint}")
    try:
        try:
            model: nn.Module = timm.create_model(name, img_size=IMAGE_SIZE, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidValue(
            f"timm's {name} cannot be built for {IMAGE_SIZE}x{IMAGE_SIZE} images: {_line(error)}"
        ) from error
    return model


def _import_timm() -> ModuleType:
    try:
        import timm
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise InvalidValue("timm models need the package timm: pip install timm") from error
        raise InvalidValue(
            f"timm is installed but cannot be imported ({_line(error)}); "
            f"install the torchvision that belongs to torch {torch.__version__}"
        ) from error
    module: ModuleType = timm
    return module


def _line(error: Exception) -> str:
    return first_line(error) or type(error).__name__
