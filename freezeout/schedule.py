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
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args

from .errors import InvalidType, InvalidValue
from .plan import Frozen, Plan, Timeline
from .values import fraction, plain, whole_number

HowScale = Literal["linear", "squared", "cubic"]
POWERS: dict[str, int] = {"linear": 1, "squared": 2, "cubic": 3}
STEEP = 10.0  # starting rates above this multiple of the base rate earn a warning

# 0.8**3 * 1000 is 512.0000000000001 in floating point and must count as 512.
_ROUNDING = 1 - 1e-12


@dataclass(frozen=True, init=False)
class Schedule(Plan):
    """Freeze times and learning-rate factors of every layer: the paper's plan.

    Args:
        t_0: linear time at which the first layer freezes, a fraction in (0, 1], *before* it is
            raised to `how_scale`'s power: the default 0.8, cubed, freezes it at 0.512 of the run.
            1 is plain cosine annealing: no layer freezes.
        how_scale: "linear", "squared" or "cubic" (the default): the power of the linear times.
        scale_lr: start layer i at alpha / t_i, so that every layer's learning rate has the same
            integral over the run, alpha / 2.
        times: explicit freeze times, one fraction in [0, 1] a layer, never decreasing and ending
            in 1, in place of `t_0` and `how_scale`, which are None then. A layer of time 0 is
            frozen from the start.

    The defaults are the paper's recommendation. A run of `total_steps` steps updates the weights
    at steps 0 ... total_steps - 1, so "step" is also the number of updates already made.

    >>> Schedule().freeze_steps(num_layers=3, total_steps=1000)
    (512, 729, 1000)
    >>> Schedule(t_0=0.5, how_scale="linear").freeze_times(3)
    (0.5, 0.75, 1.0)
    >>> plan = Schedule(t_0=1)
    >>> plan.factors(500, plan.timeline(num_layers=2, total_steps=1000))
    (0.5, 0.5)
    """

    t_0: float | None = 0.8
    how_scale: HowScale | None = "cubic"
    scale_lr: bool = True
    times: tuple[float, ...] | None = None

    def __init__(
        self,
        t_0: float | None = None,
        how_scale: HowScale | None = None,
        scale_lr: bool = True,
        times: Sequence[float] | None = None,
    ) -> None:
        if times is not None:
            if t_0 is not None or how_scale is not None:
                raise InvalidValue("give either times or t_0 and how_scale, not both")
            times = _checked_times(times)
        else:
            t_0 = fraction("t_0", 0.8 if t_0 is None else t_0)
            how_scale = "cubic" if how_scale is None else how_scale
            if how_scale not in get_args(HowScale):
                raise InvalidValue(
                    f"how_scale must be 'linear', 'squared' or 'cubic', got {how_scale!r}"
                )
        if not isinstance(scale_lr, bool):
            raise InvalidType(f"scale_lr must be True or False, got {scale_lr!r}")
        for name, value in zip(
            ("t_0", "how_scale", "scale_lr", "times"),
            (t_0, how_scale, scale_lr, times),
            strict=True,
        ):
            object.__setattr__(self, name, value)

    def freeze_times(self, num_layers: int) -> tuple[float, ...]:
        """Freeze times t_i, fractions of the run in [0, 1], never decreasing; the last is 1."""
        n = whole_number("num_layers", num_layers)
        if self.times is not None:
            if len(self.times) != n:
                raise InvalidValue(
                    f"times has {len(self.times)} entries for {n} layers (those that are frozen "
                    "by hand, or from the start, are not counted)"
                )
            return self.times
        assert self.t_0 is not None
        assert self.how_scale is not None
        t_0, power = self.t_0, POWERS[self.how_scale]
        linear = (t_0 + (1 - t_0) * i / (n - 1) for i in range(n - 1))
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
        return tuple(min(total, math.ceil(f / every) * every) for f in steps)

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        """When how many layers are frozen (see `Plan`), from `freeze_steps`."""
        if total_steps is None:
            raise InvalidValue(
                "a Schedule freezes at shares of the run, so total_steps must be given; a plan "
                "that does not need it is Frozen(...)"
            )
        steps = self.freeze_steps(num_layers, total_steps, freeze_every)
        changes = [(step, layer + 1) for layer, step in enumerate(steps)]
        return Timeline.of(num_layers, total_steps, changes)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        """The multiplier of each layer's learning rate for update number `step`, from 0 (eq. 1).

        The time t_i in eq. 1, and in the scaling, is the whole-step one, f_i / total_steps.
        """
        total, ends = timeline.total_steps, timeline.ends(step)
        assert total is not None
        frozen = timeline.num_frozen(step)
        return (0.0,) * frozen + tuple(
            factor(step, total if end is None else end, total, self.scale_lr)
            for end in ends[frozen:]
        )

    def describe(self) -> dict[str, Any]:
        """Plain values, for checkpoints (see `Plan`)."""
        return {"plan": "Schedule", **plain(asdict(self))}


def read_plan(description: Mapping[str, Any]) -> Plan:
    """The plan that `describe()` has described, if it is a `Schedule` or a `Frozen`; or, of a
    mapping without a "plan", the Schedule with these arguments.

    >>> read_plan({"plan": "Frozen", "first": 2, "then": {"t_0": 0.5}})
    Frozen(first=2, then=Schedule(t_0=0.5, how_scale='cubic', scale_lr=True, times=None))
    """
    options = dict(description)
    kind = options.pop("plan", "Schedule")
    kinds: dict[str, type[Schedule | Frozen]] = {"Schedule": Schedule, "Frozen": Frozen}
    if kind not in kinds:
        raise InvalidValue(
            f"a plan of the kind {kind!r} cannot be made from a description; give it"
        )
    if kind == "Frozen" and options.get("then") is not None:
        options["then"] = read_plan(options["then"])
    try:
        return kinds[kind](**options)
    except TypeError as error:
        if isinstance(error, InvalidType):
            raise
        raise InvalidValue(f"{dict(description)!r} describes no {kind}: {error}") from error


def refuse_options(what: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """InvalidType if there are `unknown` keyword arguments: whoever `what` is, it has those that
    are `known`; and a plan's are given in a plan.

    >>> refuse_options("FreezeOut", {"t_0": 0.5}, ["schedule"])
    Traceback (most recent call last):
    freezeout.errors.InvalidType: FreezeOut has no option 't_0': give schedule=Schedule(t_0=0.5)
    """
    for name in unknown:
        for plan in (Schedule, Frozen):
            own = [each.name for each in fields(plan)]
            if name in own:
                said = ", ".join(f"{k}={v!r}" for k, v in unknown.items() if k in own)
                advice = f"give schedule={plan.__name__}({said})"
                break
        else:
            known = [each for each in known if each not in ("self", "unknown")]
            near = get_close_matches(name, known, n=1)
            advice = f"is it {near[0]!r}?" if near else f"it has {', '.join(known)}"
        raise InvalidType(f"{what} has no option {name!r}: {advice}")


def factor(step: int, freeze_step: int, total_steps: int, scale_lr: bool) -> float:
    """Eq. 1 for one layer: 0.5 * (1 + cos(pi * step / f)), times total_steps / f when scaled.

    >>> factor(0, 500, 1000, scale_lr=True), factor(500, 500, 1000, scale_lr=True)
    (2.0, 0.0)
    """
    if step >= freeze_step:
        return 0.0
    scale = total_steps / freeze_step if scale_lr else 1.0
    return 0.5 * scale * (1 + math.cos(math.pi * step / freeze_step))


def _checked_times(times: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(times, Iterable):
        raise InvalidType(f"times must be a sequence of fractions, got {times!r}")
    checked = tuple(fraction(f"times[{i}]", t, zero=True) for i, t in enumerate(times))
    if not checked or checked[-1] != 1:
        raise InvalidValue(f"times must end in 1 (the last layer never freezes), got {checked}")
    for i, (before, after) in enumerate(pairwise(checked)):
        if after < before:
            raise InvalidValue(f"times must not decrease, but times[{i + 1}] = {after} < {before}")
    return checked
