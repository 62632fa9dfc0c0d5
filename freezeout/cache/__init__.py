"""Frozen layers that cost nothing: their last output, kept for each sample and served."""

from .files import check_folder
from .prefix import PrefixCache
from .stats import CacheStats

__all__ = ["CacheStats", "PrefixCache", "check_folder"]
