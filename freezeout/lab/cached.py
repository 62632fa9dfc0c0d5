"""The cache in a lab run: which view of the images an epoch has, and what the metrics say."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..cache import PrefixCache
from .job import Job


class CachedRun:
    """A run's cache, between the job's batches and its model.

    Augmentation is random until an epoch begins with layers frozen that are cached; from that
    epoch on the images have their views, in turn. That epoch is a function of the plan, so that a
    resumed run has the same images.
    """

    def __init__(self, job: Job, cache: PrefixCache) -> None:
        self._job, self.cache = job, cache
        self._ids: tuple[int, Tensor] | None = None  # an epoch, and its order

    def prepare(self) -> None:
        """Measure and choose, in a new run."""
        x, _, _ = next(self._job.batches(0, 0))
        with self._job.autocast():
            self.cache.prepare(x)

    @property
    def first_epoch(self) -> float:
        """From which on the images have views."""
        timeline, depths = self.cache.freezer.timeline, self.cache.depths
        if not depths:
            return math.inf
        begins = (step for step, depth in timeline.changes if depth >= depths[0])
        return -(-next(begins, math.inf) // self._job.steps_per_epoch)

    def view(self, epoch: int) -> int | None:
        """Which view of each image the epoch has; None: one that does not come again."""
        if not self._job.config.augment:
            return 0
        first = self.first_epoch
        return int(epoch - first) % self.cache.views if epoch >= first else None

    def net(self, epoch: int, batch: int) -> Callable[[Tensor], Tensor]:
        """What to call with the images of a batch."""
        if self._ids is None or self._ids[0] != epoch:
            self._ids = epoch, self._job.ids(epoch)
        size = self._job.config.batch_size
        ids = self._ids[1][batch * size : (batch + 1) * size]
        return partial(self.cache, ids=ids, view=self.view(epoch))

    @property
    def progress(self) -> str:
        """How much is stored, for the live line."""
        keys = self.cache.num_samples * self.cache.views
        return f"  cached {self.cache.num_held / keys:.0%}" if self.cache.num_held else ""

    def row(self) -> dict[str, Any]:
        """For the epoch's line of metrics."""
        stats = self.cache.stats.take()
        return {
            "cache_hits": stats.hits,
            "cache_advanced": stats.advanced,
            "cache_misses": stats.misses,
            "cache_bypassed": stats.bypassed,
            "cache_bytes": self.cache.bytes_held,
            "cache_seconds": stats.read_seconds + stats.write_seconds + stats.check_seconds,
        }

    @property
    def stays(self) -> str | None:
        """What a run leaves for others, and how to look after it."""
        folder = self._job.cache_folder
        return None if folder is None else f"the cache stays there: freezeout cache list {folder}"

    def describe(self) -> str:
        """One line for whoever starts a run."""
        depths = self.cache.depths
        if not depths:
            return f"cache: off ({self.cache.off or 'no depth fits'})"
        keys = self.cache.num_samples * self.cache.views
        views = f", {self.cache.views} views an image" if self._job.config.augment else ""
        return (
            f"cache: up to {self.cache.record_bytes * keys / 1e9:.3g} GB at {len(depths)} of "
            f"{len(self.cache.freezer.layers) - 1} depths{views}"
        )
