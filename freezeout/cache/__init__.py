"""Frozen layers that cost nothing: their last output, kept for each sample and served."""

from .files import check_folder
from .prefix import CacheStats, PrefixCache

__all__ = ["CacheStats", "PrefixCache", "check_folder"]
