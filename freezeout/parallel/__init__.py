"""Freezing beside torch's own engines: DDP and `torch.compile`."""

from .compiled import compile_layers
from .ddp import check_ranks_agree, rewrap

__all__ = ["check_ranks_agree", "compile_layers", "rewrap"]
