"""When each layer freezes, and by what factor its learning rate is multiplied until then.

FreezeOut (Brock, Lim, Ritchie and Weston, 2017, arXiv 1706.04983): layer i of n anneals its
learning rate over its own time t_i, a fraction of the run, and is frozen from then on:

    lr_i(t) = 0.5 * alpha_i * (1 + cos(pi * t / t_i))   for t < t_i, else 0          (eq. 1)
    t_i     = (t_0 + (1 - t_0) * i / (n - 1)) ** p,      p = 1, 2, 3
    alpha_i = alpha / t_i if scale_lr else alpha

(The first arXiv version printed eq. 1 without its factor one half.) Everything here is a pure
function of numbers and needs the standard library only.
"""

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, SupportsIndex, get_args

from .errors import InvalidType, InvalidValue

HowScale = Literal["linear", "squared", "cubic"]
POWERS: dict[str, int] = {"linear": 1, "squared": 2, "cubic": 3}
STEEP = 10.0  # starting rates above this multiple of the base rate earn a warning

# 0.8**3 * 1000 is 512.0000000000001 in floating point and must count as 512.
_ROUNDING = 1 - 1e-12


def whole_number(name: str, value: object, minimum: int = 1) -> int:
    """`value` as an int, or an error that says what is allowed (`True` is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidType(f"{name} must be a whole number, got {value!r}")
    number = operator.index(value)
    if number < minimum:
        raise InvalidValue(f"{name} must be at least {minimum}, got {number}")
    return number


@dataclass(frozen=True)
class Schedule:
    """Freeze times and learning-rate factors of every layer.

    Args:
        t_0: linear time at which the first layer freezes, a fraction in (0, 1], *before* it is
            raised to `how_scale`'s power: the default 0.8, cubed, freezes it at 0.512 of the run.
            1 is plain cosine annealing: no layer freezes.
        how_scale: "linear", "squared" or "cubic": the power of the linear times.
        scale_lr: start layer i at alpha / t_i, so that every layer's learning rate has the same
            integral over the run, alpha / 2.
        times: explicit freeze times, one fraction in (0, 1] a layer, never decreasing and ending
            in 1, in place of `t_0` and `how_scale`.

    The defaults are the paper's recommendation. A run of `total_steps` steps updates the weights
    at steps 0 ... total_steps - 1, so "step" is also the number of updates already made.

    >>> Schedule().freeze_steps(num_layers=3, total_steps=1000)
    (512, 729, 1000)
    >>> Schedule(t_0=0.5, how_scale="linear").freeze_times(3)
    (0.5, 0.75, 1.0)
    >>> Schedule(t_0=1).factors(step=500, num_layers=2, total_steps=1000)
    (0.5, 0.5)
    """

    t_0: float = 0.8
    how_scale: HowScale = "cubic"
    scale_lr: bool = True
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_fraction("t_0", self.t_0)
        if self.how_scale not in get_args(HowScale):
            raise InvalidValue(
                f"how_scale must be 'linear', 'squared' or 'cubic', got {self.how_scale!r}"
            )
        if not isinstance(self.scale_lr, bool):
            raise InvalidType(f"scale_lr must be True or False, got {self.scale_lr!r}")
        if self.times is not None:
            if (self.t_0, self.how_scale) != (Schedule.t_0, Schedule.how_scale):
                raise InvalidValue("give either times or t_0 and how_scale, not both")
            object.__setattr__(self, "times", _checked_times(self.times))

    def freeze_times(self, num_layers: int) -> tuple[float, ...]:
        """Freeze times t_i, fractions of the run in (0, 1], never decreasing; the last is 1."""
        n = whole_number("num_layers", num_layers)
        if self.times is not None:
            if len(self.times) != n:
                raise InvalidValue(f"times has {len(self.times)} entries for {n} layers")
            return self.times
        power = POWERS[self.how_scale]
        linear = (self.t_0 + (1 - self.t_0) * i / (n - 1) for i in range(n - 1))
        smallest = sys.float_info.min  # the power of a tiny t_0 must not become zero
        return (*(max(t**power, smallest) for t in linear), 1.0)

    def freeze_steps(
        self, num_layers: int, total_steps: int, freeze_every: int = 1
    ) -> tuple[int, ...]:
        """Freeze steps f_i: layer i is frozen once f_i updates have been made.

        f_i is t_i * total_steps rounded up to a whole number, then up to a multiple of
        `freeze_every`, and at most `total_steps`. A layer with f_i = total_steps, as the last
        one always has, is trained to the end and never frozen.
        """
        total = whole_number("total_steps", total_steps)
        every = whole_number("freeze_every", freeze_every)
        steps = (math.ceil(t * total * _ROUNDING) for t in self.freeze_times(num_layers))
        return tuple(min(total, math.ceil(max(1, f) / every) * every) for f in steps)

    def factors(
        self, step: int, num_layers: int, total_steps: int, freeze_every: int = 1
    ) -> tuple[float, ...]:
        """The multiplier of each layer's learning rate for update number `step`, from 0 (eq. 1).

        The time t_i in eq. 1, and in the scaling, is the whole-step one, f_i / total_steps.
        """
        s = whole_number("step", step, minimum=0)
        total = whole_number("total_steps", total_steps)
        return tuple(
            factor(s, f, total, self.scale_lr)
            for f in self.freeze_steps(num_layers, total, freeze_every)
        )

    def largest_factor(self, num_layers: int, total_steps: int, freeze_every: int = 1) -> float:
        """The largest multiplier at the start of the run: 1, or 1 / t_0's power when scaled."""
        return max(self.factors(0, num_layers, total_steps, freeze_every))


def factor(step: int, freeze_step: int, total_steps: int, scale_lr: bool) -> float:
    """Eq. 1 for one layer: 0.5 * (1 + cos(pi * step / f)), times total_steps / f when scaled.

    >>> factor(0, 500, 1000, scale_lr=True), factor(500, 500, 1000, scale_lr=True)
    (2.0, 0.0)
    """
    if step >= freeze_step:
        return 0.0
    scale = total_steps / freeze_step if scale_lr else 1.0
    return 0.5 * scale * (1 + math.cos(math.pi * step / freeze_step))


def _check_fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:  # also false for NaN
        raise InvalidValue(f"{name} must be in (0, 1], got {value}")
    return float(value)


def _checked_times(times: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(times, Iterable):
        raise InvalidType(f"times must be a sequence of fractions, got {times!r}")
    checked = tuple(_check_fraction(f"times[{i}]", t) for i, t in enumerate(times))
    if not checked or checked[-1] != 1:
        raise InvalidValue(f"times must end in 1 (the last layer never freezes), got {checked}")
    for i, (before, after) in enumerate(pairwise(checked)):
        if after < before:
            raise InvalidValue(f"times must not decrease, but times[{i + 1}] = {after} < {before}")
    return checked
