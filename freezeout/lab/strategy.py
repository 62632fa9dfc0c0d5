"""A strategy of a study, in words: 'cubic scaled 0.8 cached 4 views'."""

import re
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidValue
from ..schedule import POWERS

_FORM = re.compile(
    r"(?P<how_scale>\w+) (?P<scaling>scaled|unscaled)(?: (?P<t_0>[0-9.eE+-]+))?"
    r"(?P<cached> cached(?: (?P<views>[0-9]+) views?)?)?"
)


@dataclass(frozen=True)
class Strategy:
    """How layers freeze, and whether what they compute is cached."""

    how_scale: str
    scale_lr: bool
    t_0: float | None = None  # None: the study's
    cached: bool = False
    views: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """The strategy of that name. InvalidValue if it cannot be read.

        >>> Strategy.parse("cubic scaled")
        Strategy(how_scale='cubic', scale_lr=True, t_0=None, cached=False, views=None)
        >>> Strategy.parse("linear unscaled 0.5 cached 4 views").name
        'linear unscaled 0.5 cached 4 views'
        """
        found = _FORM.fullmatch(" ".join(text.split()))
        try:
            if found is None or found["how_scale"] not in POWERS:
                raise ValueError
            return cls(
                how_scale=found["how_scale"],
                scale_lr=found["scaling"] == "scaled",
                t_0=None if found["t_0"] is None else float(found["t_0"]),
                cached=found["cached"] is not None,
                views=None if found["views"] is None else int(found["views"]),
            )
        except ValueError:
            raise InvalidValue(
                f"strategies has {text!r}; a strategy is linear, squared or cubic, then scaled or "
                "unscaled, then, if it has one of its own, t_0, then cached if frozen layers are "
                "to be, with a number of views or not: 'cubic scaled 0.8', 'cubic scaled 0.8 "
                "cached 4 views'"
            ) from None

    def at(self, t_0: float) -> "Strategy":
        """With this t_0, unless it has one of its own."""
        return self if self.t_0 is not None else replace(self, t_0=t_0)

    @property
    def name(self) -> str:
        """What `parse` reads."""
        words = [self.how_scale, "scaled" if self.scale_lr else "unscaled"]
        if self.t_0 is not None:
            words.append(f"{self.t_0:.12g}")
        return " ".join(words + self._cache_words)

    @property
    def cost_name(self) -> str:
        """Equal for strategies whose runs take the same time: scaled or not, layers freeze at the
        same steps."""
        return " ".join([self.how_scale, f"{self.t_0:.12g}", *self._cache_words])

    @property
    def _cache_words(self) -> list[str]:
        if not self.cached:
            return []
        views = [] if self.views is None else [str(self.views), "view" + "s" * (self.views != 1)]
        return ["cached", *views]

    @property
    def options(self) -> dict[str, Any]:
        """Of `TrainConfig`."""
        options: dict[str, Any] = {
            "how_scale": self.how_scale,
            "scale_lr": self.scale_lr,
            "t_0": self.t_0,
        }
        if self.cached:
            options |= {"cache": "auto", "views": self.views}
        return options
