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
