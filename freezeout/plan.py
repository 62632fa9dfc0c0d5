"""What trains when: `Plan`, the `Timeline` that it gives, and `Frozen`: frozen from the start.

A plan is configuration: when layers are frozen, and at what rate they train until then. Bound to
the layers of a model and to the length of a run it gives a timeline: the steps at which the number
of frozen layers changes. The paper's `Schedule` is one plan; a class of your own may be another.
Everything here needs the standard library only.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from .errors import InvalidType, InvalidValue
from .values import fraction, plain, whole_number

Change = tuple[int, int]


@dataclass(frozen=True)
class Timeline:
    """How many layers, from the first, are frozen at each step of a run.

    Args:
        num_layers: n, at least 1.
        total_steps: T, updates in the whole run; None: not known beforehand.
        changes: (step, number of frozen layers from then on), the first one at step 0, steps
            rising and below T, numbers in 0 ... n - 1: something must be left to train. The number
            may rise and fall.

    "Step" is the number of updates made so far, so update number s, from 0, is made with
    `num_frozen(s)` layers frozen.

    >>> line = Timeline(3, 1000, ((0, 0), (512, 1), (729, 2)))
    >>> line.num_frozen(511), line.num_frozen(512)
    (0, 1)
    >>> line.counts()
    [512, 217, 271]
    >>> line.freeze_steps
    (512, 729, 1000)
    """

    num_layers: int
    total_steps: int | None
    changes: tuple[Change, ...] = ((0, 0),)

    def __post_init__(self) -> None:
        total = self.total_steps
        total = None if total is None else whole_number("total_steps", total)
        object.__setattr__(self, "num_layers", whole_number("num_layers", self.num_layers))
        object.__setattr__(self, "total_steps", total)
        try:
            changes = tuple(
                (whole_number("step", step, 0), whole_number("frozen", k, 0))
                for step, k in self.changes
            )
        except (TypeError, ValueError) as error:
            raise InvalidValue(
                f"changes must be pairs (step, number of frozen layers), got {self.changes!r}"
            ) from error
        object.__setattr__(self, "changes", changes)
        if not changes or changes[0][0] != 0:
            raise InvalidValue(f"the first change must be at step 0, got {changes!r}")
        for (before, _), (after, _) in pairwise(changes):
            if after <= before:
                raise InvalidValue(f"changes must come at rising steps, but {after} <= {before}")
        if self.total_steps is not None and changes[-1][0] >= max(1, self.total_steps):
            raise InvalidValue(
                f"a change at step {changes[-1][0]} is after the run's {self.total_steps} steps"
            )
        for step, depth in changes:
            if depth >= self.num_layers:
                raise InvalidValue(
                    f"{depth} of {self.num_layers} layers frozen at step {step}: at most "
                    f"{self.num_layers - 1} can be, something must be left to train"
                )

    @classmethod
    def of(
        cls,
        num_layers: int,
        total_steps: int | None,
        changes: Iterable[Change],
        freeze_every: int = 1,
    ) -> "Timeline":
        """The timeline of changes at any steps: each is moved up to a multiple of `freeze_every`,
        of several at one step the last counts, and those at the run's end or later are left out.

        >>> Timeline.of(3, 100, [(0, 1), (31, 2), (100, 0)], freeze_every=10).changes
        ((0, 1), (40, 2))
        """
        whole_number("freeze_every", freeze_every)
        at: dict[int, int] = {0: 0}
        for step, depth in sorted(changes, key=lambda change: change[0]):
            moved = -(-step // freeze_every) * freeze_every
            if total_steps is None or moved < total_steps:
                at[moved] = depth
        kept: list[Change] = []
        for step in sorted(at):
            if not kept or kept[-1][1] != at[step]:
                kept.append((step, at[step]))
        return cls(num_layers, total_steps, tuple(kept))

    # --- what happens when --------------------------------------------------------------

    def num_frozen(self, step: int) -> int:
        """How many layers are frozen once `step` updates have been made."""
        return self.changes[bisect_right(self._steps, step) - 1][1]

    def next_change(self, step: int) -> Change | None:
        """The first change after `step`: (step, number of frozen layers); None: there is none."""
        following = bisect_right(self._steps, step)
        return self.changes[following] if following < len(self.changes) else None

    def is_over(self, step: int) -> bool:
        """Whether all updates of the run have been made."""
        return self.total_steps is not None and step >= self.total_steps

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.changes)

    @cached_property
    def freeze_steps(self) -> tuple[int | None, ...]:
        """For each layer, the step at which it is first frozen; if it never is, T (or None, where
        T is not known)."""
        return tuple(
            next((step for step, depth in self.changes if depth > layer), self.total_steps)
            for layer in range(self.num_layers)
        )

    def ends(self, step: int) -> tuple[int | None, ...]:
        """For each layer that trains in update number `step`, the step at which it is frozen next
        (it may have been frozen before, and thawed): T, or None where T is not known, if it is not.
        For each that is frozen then, 0."""
        made: dict[int, tuple[int | None, ...]] = self.__dict__.setdefault("_ends", {})
        at = bisect_right(self._steps, step)
        if at not in made:
            frozen, following = self.changes[at - 1][1], self.changes[at:]
            made[at] = (0,) * frozen + tuple(
                next((s for s, depth in following if depth > layer), self.total_steps)
                for layer in range(frozen, self.num_layers)
            )
        return made[at]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Every number of frozen layers that occurs, rising."""
        return tuple(sorted({depth for _, depth in self.changes}))

    @property
    def rises(self) -> bool:
        """Whether layers that are frozen stay frozen."""
        return all(after > before for (_, before), (_, after) in pairwise(self.changes))

    def counts(self, start: int = 0, end: int | None = None) -> list[int]:
        """How many of the updates number `start` ... `end` - 1 (None: all) are made with k layers
        frozen, for k = 0 ... n - 1. InvalidValue where the run's length has to be known and is not.

        >>> Timeline(3, None, ((0, 1), (4, 2))).counts(end=10)
        [0, 4, 6]
        """
        end = self.total_steps if end is None else end
        if end is None:
            raise InvalidValue("how many steps the run has is not known: give total_steps")
        counts = [0] * self.num_layers
        edges = [*self.changes, (max(end, self.changes[-1][0]), 0)]
        for (begin, depth), (until, _) in pairwise(edges):
            counts[depth] += max(0, min(until, end) - max(begin, start))
        return counts

    # --- others made of it --------------------------------------------------------------

    def changed(self, step: int, depth: int) -> "Timeline":
        """With `depth` layers frozen from `step` on, and what was planned after that. A planned
        rise does not thaw, a planned fall is obeyed.

        >>> Timeline(4, 100, ((0, 0), (40, 1), (80, 3))).changed(20, 2).changes
        ((0, 0), (20, 2), (80, 3))
        """
        past = [(at, k) for at, k in self.changes if at < step]
        now, planned = depth, self.num_frozen(step)
        following: list[Change] = []
        for at, k in self.changes[bisect_right(self._steps, step) :]:
            now = max(now, k) if k > planned else k
            planned = k
            following.append((at, now))
        return Timeline.of(self.num_layers, self.total_steps, [*past, (step, depth), *following])

    def behind(self, count: int) -> "Timeline":
        """That of a model with `count` more layers in front, all of them always frozen."""
        changes = tuple((step, depth + count) for step, depth in self.changes)
        return Timeline(self.num_layers + count, self.total_steps, changes)

    def without(self, count: int) -> "Timeline":
        """That of the layers after the first `count`."""
        made: dict[int, Timeline] = self.__dict__.setdefault("_without", {})
        if count not in made:
            changes = [(step, max(0, depth - count)) for step, depth in self.changes]
            made[count] = Timeline.of(self.num_layers - count, self.total_steps, changes)
        return made[count]


@runtime_checkable
class Plan(Protocol):
    """What trains when. Subclass it and write `timeline`; the rest has defaults.

    >>> class Halfway(Plan):
    ...     def timeline(self, num_layers, total_steps, freeze_every=1):
    ...         changes = [(total_steps // 2, num_layers - 1)]
    ...         return Timeline.of(num_layers, total_steps, changes, freeze_every)
    >>> Halfway().timeline(3, 10).counts()
    [5, 0, 5]
    """

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        """When how many of `num_layers` layers are frozen, in a run of `total_steps` updates.

        Args:
            num_layers: the layers that the plan is for. Layers in front of them in which nothing
                trains whatever the plan says are not counted.
            total_steps: None: not known; InvalidValue if the plan needs it.
            freeze_every: change only after steps that are multiples of this.
        """
        raise NotImplementedError

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        """The multiplier of each layer's learning rate for update number `step`, from 0; without
        a rule of the plan's own 1, and 0 for frozen layers."""
        frozen = timeline.num_frozen(step)
        return (0.0,) * frozen + (1.0,) * (timeline.num_layers - frozen)

    def resolved(self, layers: Sequence[Collection[str]], given: int = 0) -> "Plan":
        """The plan for the layers of a model, where it depends on more than their number.

        Args:
            layers: for each layer, the names of its modules, as in `named_modules()`.
            given: so many of them, the first ones, are frozen whatever the plan says: what is
                returned is for the layers after them.
        """
        return self

    def describe(self) -> dict[str, Any]:
        """Plain values that tell this plan from another; checkpoints hold them."""
        return {"plan": type(self).__name__, **plain(vars(self))}


@dataclass(frozen=True, repr=False)
class Frozen(Plan):
    """The first layers are frozen from the start; the others train, or follow another plan.

    Give one of these:

        Frozen(5)                        # the first five layers
        Frozen(all_but_last=2)           # all but the last two
        Frozen(share=0.5)                # half of the layers, rounded down
        Frozen(up_to="encoder.layer.3")  # up to this module, the layer that it ends in included
        Frozen(5, then=Schedule())       # the others anneal and freeze by the paper's schedule

    Args:
        first: number of layers, from the first.
        all_but_last: number of layers that are not frozen.
        share: of the layers, a fraction in [0, 1).
        up_to: a module's name, as in `model.named_modules()`.
        then: plan of the other layers, which counts only these; None: they train to the end, at
            the rate that the optimizer has. Then `total_steps` need not be known.

    Layers that were frozen by hand before (`requires_grad_(False)`) count among the first ones.

    >>> Frozen(2).timeline(num_layers=5, total_steps=None).changes
    ((0, 2),)
    """

    first: int | None = None
    all_but_last: int | None = None
    share: float | None = None
    up_to: str | None = None
    then: Plan | None = None

    def __post_init__(self) -> None:
        ways = {name: getattr(self, name) for name in _WAYS}
        given = {name: value for name, value in ways.items() if value is not None}
        if len(given) != 1:
            raise InvalidValue(
                f"Frozen takes one of {', '.join(_WAYS)}, got {' and '.join(given) or 'none'}"
            )
        (name, value), *_ = given.items()
        if name == "share":
            value = fraction(name, value, zero=True, one=False)
        elif name == "up_to":
            if not isinstance(value, str):
                raise InvalidType(f"up_to must be a module's name, got {value!r}")
        else:
            value = whole_number(name, value, minimum=0 if name == "first" else 1)
        object.__setattr__(self, name, value)
        check_plan("then", self.then)

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        """See `Plan`. InvalidValue if there are too few layers."""
        count = self._count(num_layers)
        left = num_layers - count
        if self.then is None:
            whole_number("freeze_every", freeze_every)
            return Timeline(left, total_steps).behind(count)
        return self.then.timeline(left, total_steps, freeze_every).behind(count)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        """See `Plan`: those of `then`, and 0 for the first layers."""
        if self.then is None:
            return super().factors(step, timeline)
        count = self._count(timeline.num_layers)
        return (0.0,) * count + tuple(self.then.factors(step, timeline.without(count)))

    def __repr__(self) -> str:
        said = [f"{name}={value!r}" for name, value in vars(self).items() if value is not None]
        return f"Frozen({', '.join(said)})"

    def resolved(self, layers: Sequence[Collection[str]], given: int = 0) -> "Frozen":
        """See `Plan`. InvalidValue if there is no module of the name `up_to`, or too few layers."""
        if self.up_to is None:
            count = self._count(len(layers))
        else:
            count = self._index_of(self.up_to, layers) + 1
            self._check(count, len(layers))
        then = self.then and self.then.resolved(layers[count:], max(0, given - count))
        first = max(0, count - given)
        return replace(self, first=first, all_but_last=None, share=None, up_to=None, then=then)

    def describe(self) -> dict[str, Any]:
        """See `Plan`."""
        said = {name: value for name in _WAYS if (value := getattr(self, name)) is not None}
        return {"plan": "Frozen", **said, "then": self.then and self.then.describe()}

    def _count(self, num_layers: int) -> int:
        if self.first is not None:
            count = self.first
        elif self.all_but_last is not None:
            count = num_layers - self.all_but_last
        elif self.share is not None:
            count = math.floor(self.share * num_layers * (1 + 1e-12))  # 0.29 * 100 counts as 29
        else:
            raise InvalidValue(f"up_to={self.up_to!r} names a module, and no model is known")
        self._check(count, num_layers)
        return count

    def _check(self, count: int, num_layers: int) -> None:
        if 0 <= count < num_layers:
            return
        said = next(f"{n}={v!r}" for n in _WAYS if (v := getattr(self, n)) is not None)
        raise InvalidValue(
            f"Frozen({said}) does not go with {num_layers} layers: 0 to {num_layers - 1} of them "
            "can be frozen, something must be left to train"
        )

    @staticmethod
    def _index_of(name: str, layers: Sequence[Collection[str]]) -> int:
        """Of the last layer that the module, or a part of it, is in."""
        found = [
            i
            for i, modules in enumerate(layers)
            if any(each == name or each.startswith(name + ".") for each in modules)
        ]
        if not found or not name:
            every = [each for modules in layers for each in modules]
            near = get_close_matches(name, every, n=3)
            hint = f"; is it {' or '.join(map(repr, near))}?" if near else ""
            raise InvalidValue(
                f"up_to={name!r} is no module of the model (a name from named_modules()){hint}"
            )
        return found[-1]


_WAYS = ("first", "all_but_last", "share", "up_to")

# Graphs of a run, where each number of frozen layers is compiled anew and the user has not said how
# often. Of what the default schedule saves with a freeze for each of 25 to 150 layers, seven keep
# nine tenths; with five graphs it would be eight tenths.
STAGES = 8


def check_plan(name: str, value: object) -> None:
    """InvalidType unless the value is a plan, or None."""
    if value is not None and (isinstance(value, type) or not isinstance(value, Plan)):
        if isinstance(value, type):
            got = f"{value.__name__}, a class"
        else:
            got = f"{type(value).__name__} {value!r}"
        raise InvalidType(f"{name} must be a plan, such as Schedule(...) or Frozen(...), got {got}")


def in_stages(plan: Plan, num_layers: int, total_steps: int | None, stages: int) -> Timeline:
    """A plan's timeline with at most so many numbers of frozen layers (two or more), for frameworks
    that compile a graph for each. If the plan has more, layers wait for each other: `freeze_every`
    is then the smallest that will do, in hundredths of the steps up to the last change.

    >>> from freezeout import Schedule
    >>> len(Schedule().timeline(25, 1000).depths)
    25
    >>> in_stages(Schedule(), 25, 1000, stages=4).changes
    ((0, 0), (630, 7), (756, 14), (882, 20))
    """
    timeline = plan.timeline(num_layers, total_steps)
    last = timeline.changes[-1][0]
    unit = max(1, last // 100)
    for freeze_every in range(unit, last + unit, unit):
        if len(timeline.depths) <= stages:
            break
        timeline = plan.timeline(num_layers, total_steps, freeze_every)
    return timeline


def bound(
    plan: Plan,
    layers: Sequence[Collection[str]],
    given: int,
    total_steps: int | None,
    freeze_every: int | None,
    stages: int = STAGES,
) -> tuple[Plan, Timeline]:
    """The plan for the layers of a model (see `Plan.resolved`), what the user froze included; and
    its timeline. InvalidValue if the plan does not go with them, or contradicts itself.

    `freeze_every` None: as in `in_stages`, at most `stages` of them.
    """
    resolved = plan.resolved(layers, given)
    if given:
        resolved = Frozen(given, then=resolved)
    if freeze_every is None:
        timeline = in_stages(resolved, len(layers), total_steps, stages)
    else:
        timeline = resolved.timeline(len(layers), total_steps, freeze_every)
    if (timeline.num_layers, timeline.total_steps) != (len(layers), total_steps):
        raise InvalidValue(
            f"the plan {plan} gave a timeline of {timeline.num_layers} layers and "
            f"{timeline.total_steps} steps, for {len(layers)} and {total_steps}"
        )
    return resolved, timeline


def factors_of(plan: Plan, step: int, timeline: Timeline) -> tuple[float, ...]:
    """`plan.factors`; InvalidValue unless there is one for each layer."""
    factors = tuple(plan.factors(step, timeline))
    if len(factors) != timeline.num_layers:
        raise InvalidValue(
            f"the plan {plan} gave {len(factors)} factors for {timeline.num_layers} layers"
        )
    return factors


def progress(timeline: Timeline, step: int) -> list[str]:
    """For summaries: what is frozen once `step` updates have been made, and whether there should
    have been more.

    >>> progress(Timeline(4, 20, ((0, 1), (10, 3))), 12)
    ['froze 3 of 4 layers, 1 of them from the start', 'made 12 of 20 steps']
    """
    start, total = timeline.num_frozen(0), timeline.total_steps
    said = [f"froze {timeline.num_frozen(step)} of {timeline.num_layers} layers"]
    if start:
        said[0] += f", {start} of them from the start"
    if total is not None and step < total:
        said.append(f"made {step} of {total} steps")
    return said


def layer_table(timeline: Timeline, layers: Sequence[tuple[str, int]]) -> str:
    """A table of layers, given by name and number of parameters, with the step at which each is
    frozen.

    >>> print(layer_table(Timeline(3, 20, ((0, 1), (10, 2))), [("a", 9), ("b", 1200), ("c", 5)]))
    layer    parameters  freezes at
    a                 9       start
    b             1,200          10
    c                 5       never
    """
    width = max(len("layer"), *(len(name) for name, _ in layers))
    lines = [f"{'layer':<{width}}  {'parameters':>12}  {'freezes at':>10}"]
    for (name, count), step in zip(layers, timeline.freeze_steps, strict=True):
        when = "start" if step == 0 else "never" if step == timeline.total_steps else str(step)
        lines.append(f"{name:<{width}}  {count:>12,}  {when:>10}")
    return "\n".join(lines)


def given_layers_are(names: Sequence[str]) -> str:
    """For warnings: that the layers which the user froze are frozen from the start.

    >>> given_layers_are(["stem", "block.0", "block.1"])
    "the layers in which nothing trains (3: 'stem' to 'block.1') are frozen from the start"
    """
    ends = " to ".join(dict.fromkeys(map(repr, (names[0], names[-1]))))
    return f"the layers in which nothing trains ({len(names)}: {ends}) are frozen from the start"
