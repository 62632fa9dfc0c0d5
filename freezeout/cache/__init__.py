"""Frozen layers that cost nothing: their last output, kept for each sample and served."""

from .files import check_folder
from .ids import Indexed, IndexedDataset, with_ids
from .prefix import PrefixCache
from .stats import CacheStats

__all__ = [
    "CacheStats",
    "Indexed",
    "IndexedDataset",
    "PrefixCache",
    "check_folder",
    "with_ids",
]
