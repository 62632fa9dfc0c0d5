"""Make training PyTorch networks cheaper by progressively freezing their layers (FreezeOut).

Importing this package imports neither torch nor any extra: names that need torch are loaded when
they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import FreezeOutError
from .plan import Frozen, Plan, Timeline
from .schedule import Schedule

if TYPE_CHECKING:
    from .cache import PrefixCache
    from .freezer import FreezeOut, thaw
    from .layers import Layer, find_layers

__version__ = "0.1.0"
__all__ = [
    "FreezeOut",
    "FreezeOutError",
    "Frozen",
    "Layer",
    "Plan",
    "PrefixCache",
    "Schedule",
    "Timeline",
    "find_layers",
    "thaw",
]

_HOME = {
    "FreezeOut": "freezer",
    "thaw": "freezer",
    "Layer": "layers",
    "PrefixCache": "cache",
    "find_layers": "layers",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
