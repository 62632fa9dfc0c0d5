"""Freezing beside torch's own engines: DDP and `torch.compile`."""

from .compiled import allow_stages, compile_layers
from .ddp import rewrap

__all__ = ["allow_stages", "compile_layers", "rewrap"]
