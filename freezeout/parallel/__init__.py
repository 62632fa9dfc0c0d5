"""Freezing beside torch's own engines: DDP and `torch.compile`."""

from .compiled import compile_layers
from .ddp import rewrap

__all__ = ["compile_layers", "rewrap"]
