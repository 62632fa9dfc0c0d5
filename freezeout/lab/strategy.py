"""A strategy of a study, in words: 'cubic scaled 0.8 frozen 5 cached 4 views'."""

import re
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidValue
from ..schedule import POWERS
from .frozen import frozen_plan

_FORM = re.compile(
    r"(?:(?P<how_scale>\w+) (?P<scaling>scaled|unscaled)(?: (?P<t_0>[0-9.eE+-]+))?"
    r"(?: frozen (?P<frozen>\S+))?|frozen (?P<only_frozen>\S+))"
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
    frozen: str | None = None  # which layers are, from the start, as the option of `TrainConfig`

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """The strategy of that name. InvalidValue if it cannot be read.

        >>> Strategy.parse("cubic scaled")
        Strategy(how_scale='cubic', scale_lr=True, t_0=None, cached=False, views=None, frozen=None)
        >>> Strategy.parse("linear unscaled 0.5 frozen 2 cached 4 views").name
        'linear unscaled 0.5 frozen 2 cached 4 views'

        With layers frozen from the start alone, the others anneal to the end:

        >>> Strategy.parse("frozen 2").t_0
        1.0
        """
        found = _FORM.fullmatch(" ".join(text.split()))
        try:
            if found is None or found["how_scale"] not in (*POWERS, None):
                raise ValueError
            t_0 = "1" if found["only_frozen"] else found["t_0"]
            strategy = cls(
                how_scale=found["how_scale"] or "cubic",
                scale_lr=found["scaling"] != "unscaled",
                t_0=None if t_0 is None else float(t_0),
                cached=found["cached"] is not None,
                views=None if found["views"] is None else int(found["views"]),
                frozen=found["frozen"] or found["only_frozen"],
            )
        except ValueError:
            raise InvalidValue(
                f"strategies has {text!r}; a strategy is linear, squared or cubic, then scaled or "
                "unscaled, then, if it has one of its own, t_0, then frozen and which layers are "
                "from the start, then cached if frozen layers are to be, with a number of views or "
                "not: 'cubic scaled 0.8', 'cubic scaled 0.8 frozen 5 cached 4 views', 'frozen 5'"
            ) from None
        if strategy.frozen is not None:
            frozen_plan(strategy.frozen)
        return strategy if strategy.t_0 is None else strategy.at(strategy.t_0)

    def at(self, t_0: float) -> "Strategy":
        """With this t_0, unless it has one of its own."""
        own = t_0 if self.t_0 is None else self.t_0
        if own == 1 and self.frozen is not None:  # then all schedules are one
            return replace(self, t_0=own, how_scale="cubic", scale_lr=True)
        return replace(self, t_0=own)

    @property
    def name(self) -> str:
        """What `parse` reads."""
        words = [self.how_scale, "scaled" if self.scale_lr else "unscaled"]
        if self.t_0 is not None:
            words.append(f"{self.t_0:.12g}")
        return " ".join(self._with_others(words))

    @property
    def cost_name(self) -> str:
        """Equal for strategies whose runs take the same time: scaled or not, layers freeze at the
        same steps."""
        return " ".join(self._with_others([self.how_scale, f"{self.t_0:.12g}"]))

    def _with_others(self, schedule: list[str]) -> list[str]:
        """The schedule's words, if it freezes layers, and what else there is."""
        words = [] if self.frozen is not None and self.t_0 == 1 else schedule
        if self.frozen is not None:
            words = [*words, "frozen", self.frozen]
        if self.cached:
            words = [*words, "cached"]
            if self.views is not None:
                words += [str(self.views), "view" + "s" * (self.views != 1)]
        return words

    @property
    def options(self) -> dict[str, Any]:
        """Of `TrainConfig`."""
        options: dict[str, Any] = {
            "how_scale": self.how_scale,
            "scale_lr": self.scale_lr,
            "t_0": self.t_0,
            "frozen": self.frozen,
        }
        if self.cached:
            options |= {"cache": "auto", "views": self.views}
        return options
