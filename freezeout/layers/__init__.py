"""Layers: groups of modules and parameters that freeze together, in execution order."""

from .find import find_layers, given_layers
from .layer import Layer
from .order import OrderCheck
from .trace import ExampleInputs, Trace

__all__ = ["ExampleInputs", "Layer", "OrderCheck", "Trace", "find_layers", "given_layers"]
