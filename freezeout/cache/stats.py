"""What a cache has done, in numbers."""

from dataclasses import dataclass, fields


@dataclass
class CacheStats:
    """What the cache has done since it was made, or since the last `take()`.

    Attributes:
        hits: samples whose stored activation was served as it was.
        advanced: samples taken on from an earlier depth.
        misses: samples computed from the input.
        bypassed: samples of batches that the cache had no part in.
        read_seconds, write_seconds: spent on the store (on CUDA of its time, added a batch later).
        check_seconds: spent on plans and on comparing with the real forward pass.
    """

    hits: int = 0
    advanced: int = 0
    misses: int = 0
    bypassed: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    check_seconds: float = 0.0

    def take(self) -> "CacheStats":
        """A copy, everything here back at zero."""
        copy = CacheStats(**vars(self))
        for field in fields(self):
            setattr(self, field.name, field.default)
        return copy


class Spared:
    """What computing frozen layers takes a sample, by their number, and how many samples did
    without."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._samples: dict[int, int] = {}
        self._hits: dict[int, int] = {}
        self.cost = 0.0  # seconds of reading, writing and checks

    def computed(self, depth: int, start: int, samples: int, seconds: float) -> None:
        """The layers from `start` to `depth` took so long, of so many samples."""
        before = self._a_sample(start)
        if before is not None:
            self._seconds[depth] = self._seconds.get(depth, 0.0) + seconds + samples * before
            self._samples[depth] = self._samples.get(depth, 0) + samples

    def served(self, depth: int, samples: int) -> None:
        self._hits[depth] = self._hits.get(depth, 0) + samples

    def _a_sample(self, depth: int) -> float | None:
        if depth and depth in self._samples:
            return self._seconds[depth] / self._samples[depth]
        return None if depth else 0.0

    @property
    def hits(self) -> int:
        return sum(self._hits.values())

    @property
    def seconds(self) -> float | None:
        """That computing what was served would have taken; None: not known."""
        each = [(hits, self._a_sample(depth)) for depth, hits in self._hits.items()]
        known = [hits * seconds for hits, seconds in each if seconds is not None]
        return sum(known) if len(known) == len(each) else None
