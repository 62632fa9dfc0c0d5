"""Freezing beside torch's own engines: DDP and `torch.compile`."""

from .compiled import allow_stages, compile_layers
from .ddp import check_ranks_agree, rewrap

__all__ = ["allow_stages", "check_ranks_agree", "compile_layers", "rewrap"]
