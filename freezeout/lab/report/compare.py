"""Runs grouped into arms, and arms compared with an ordinary run of the same time.

Runs are comparable if they train the same network on the same data with the same options (a
group) and, where they freeze layers, were asked for the same length. Of those, runs that differ in
nothing but the seed are an arm. An arm with FreezeOut is compared with an ordinary arm whose length
is near to its time (`equal_time.py`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median, quantiles, stdev

from ..equal_time import equal_time_steps
from ..runs import Run

CONFIDENCE = 0.95
# How far, in time, an ordinary run may be from one with FreezeOut and still be its rival.
_SAME_TIME = 0.03
# How much slower than others some epochs of an ordinary run may be before it is said.
_DISTURBED = 0.2


@dataclass(frozen=True)
class Arm:
    """Finished runs that differ in their seeds alone, and what they cost."""

    runs: tuple[Run, ...]  # by seed
    ordinary_steps: float | None  # that take as long as one run; None: unknown
    full_steps: int | None  # of the full-length ordinary run

    @property
    def freezes(self) -> bool:
        return self.runs[0].freezes

    @property
    def strategy(self) -> str:
        """ "ordinary", or the schedule in words without its t_0."""
        return self.runs[0].strategy

    @property
    def t_0(self) -> float:
        return float(self.runs[0].values["t_0"])

    @property
    def steps(self) -> int:
        return self.runs[0].total_steps

    @cached_property
    def label(self) -> str:
        """The arm in words, alone among its group's."""
        if self.freezes:
            return self.runs[0].label
        if self.steps == self.full_steps:
            return "ordinary, full length"
        return f"ordinary, {self.steps:,} steps"

    @cached_property
    def errors(self) -> dict[int, float]:
        """Held-out error (a fraction) by seed, of the runs that measured it."""
        return {run.seed: run.error for run in self.runs if run.error is not None}

    @property
    def mean(self) -> float | None:
        return mean(self.errors.values()) if self.errors else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation over seeds."""
        return stdev(self.errors.values()) if len(self.errors) > 1 else None

    @property
    def seconds(self) -> float:
        """Of training: the median over seeds."""
        return median(run.seconds for run in self.runs)

    @property
    def time_saved(self) -> float | None:
        """The share of the full-length ordinary run's time, from the medians of step times."""
        if self.ordinary_steps is None or self.full_steps is None:
            return None
        return 1 - self.ordinary_steps / self.full_steps


@dataclass(frozen=True)
class Difference:
    """Of two arms' errors, as fractions: positive means that the first is worse."""

    mean: float
    low: float | None  # the confidence interval; None: one value, or no spread, gives none
    high: float | None
    n: int  # differences of seeds, or the smaller arm's runs
    is_paired: bool

    @property
    def shows(self) -> str:
        """ "worse", "better", or "nothing"."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "nothing"
        return "worse" if self.low > 0 else "better"


@dataclass(frozen=True)
class Comparison:
    """An arm with FreezeOut beside the ordinary arm of its time."""

    arm: Arm
    rival: Arm | None
    to_rival: Difference | None
    to_full: Difference | None
    sentence: str  # what may be concluded


@dataclass(frozen=True)
class Group:
    """Comparable runs."""

    title: str
    subtitle: str
    is_test: bool  # the error is that of the test images
    arms: tuple[Arm, ...]  # ordinary ones first, the longest first of all
    full: Arm | None
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]  # what a reader must know

    @property
    def freezing(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.freezes)

    @property
    def ordinary(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if not arm.freezes)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Of the arms that freeze, each once."""
        return tuple(dict.fromkeys(arm.strategy for arm in self.freezing))

    def rival_of(self, arm: Arm) -> Arm | None:
        return next((c.rival for c in self.comparisons if c.arm is arm), None)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The groups of some finished runs, in the order of their titles and lengths."""
    problems: dict[object, list[Run]] = {}
    for run in runs:
        problems.setdefault(run.problem, []).append(run)
    titles = [_title(members[0]) for members in problems.values()]
    named = [
        (title if titles.count(title) == 1 else _long_title(members[0]), members)
        for members, title in zip(problems.values(), titles, strict=True)
    ]
    return [
        group
        for title, members in sorted(named, key=lambda pair: pair[0])
        for group in _groups(members, title)
    ]


def _groups(runs: Sequence[Run], title: str) -> Iterator[Group]:
    """Of comparable runs: one, or one for each length that those which freeze were asked for."""
    lengths = sorted({run.asked_steps for run in runs if run.freezes})
    if len(lengths) < 2:
        yield _group(runs, title)
        return
    for length in lengths:
        frozen = [run for run in runs if run.freezes and run.asked_steps == length]
        # An ordinary run that is longer than all is shown beside the longest.
        most = math.inf if length == lengths[-1] else length
        ordinary = [run for run in runs if not run.freezes and run.total_steps <= most]
        yield _group([*ordinary, *frozen], f"{title}, {_length(frozen[0])}")


def _length(run: Run) -> str:
    epochs = run.values["epochs"]
    if run.values["steps"] is not None:
        return f"{run.asked_steps:,} steps"
    return f"{epochs} epoch{'s' * (epochs != 1)}"


def difference(first: Arm, second: Arm) -> Difference | None:
    """Of the first arm's error to the second's, with its confidence interval.

    Student's t over the differences of runs with the same seed (they share initial weights and
    the order of images), if two or more seeds match; else Welch's, over the two arms.
    """
    a, b = first.errors, second.errors
    both = _common_seeds(first, second)
    if not a or not b:
        return None
    if len(both) > 1 or a.keys() == b.keys():
        each = [a[seed] - b[seed] for seed in both]
        spread = stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
        return _with_interval(mean(each), spread, len(each) - 1, len(each), True)
    n, m = len(a), len(b)
    centre = mean(a.values()) - mean(b.values())
    if min(n, m) < 2:
        return Difference(centre, None, None, min(n, m), False)
    u, v = stdev(a.values()) ** 2 / n, stdev(b.values()) ** 2 / m
    freedom = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1)) if u + v else 1.0
    return _with_interval(centre, (u + v) ** 0.5, freedom, min(n, m), False)


def _with_interval(
    centre: float, spread: float, freedom: float, n: int, is_paired: bool
) -> Difference:
    # Differences that are equal, up to how numbers are rounded, say nothing about their spread.
    if freedom < 1 or spread < 1e-9:
        return Difference(centre, None, None, n, is_paired)
    from scipy.stats import t  # slow to load

    half = spread * float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Difference(centre, centre - half, centre + half, n, is_paired)


def _group(runs: Sequence[Run], title: str) -> Group:
    by_arm: dict[object, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    notes = []
    members: list[tuple[Run, ...]] = []
    for same in by_arm.values():
        seeds: dict[int, Run] = {}
        for run in same:
            if run.seed in seeds:
                notes.append(
                    f"{run.path.parent.name}/{run.path.name} and {seeds[run.seed].path.parent.name}"
                    f"/{run.path.name} are the same run made twice; the first is left out."
                )
            else:
                seeds[run.seed] = run
        members.append(tuple(seeds[seed] for seed in sorted(seeds)))
    ordinary = sorted((m for m in members if not m[0].freezes), key=lambda m: -m[0].total_steps)
    # The ordinary run as long as those which freeze were asked to be; else the longest.
    asked = next((m[0].asked_steps for m in members if m[0].freezes), None)
    longest = ordinary[0] if ordinary else None
    full_runs = next((m for m in ordinary if m[0].total_steps == asked), longest)
    full_steps = full_runs[0].total_steps if full_runs else None
    arms = [Arm(m, m[0].total_steps, full_steps) for m in ordinary]
    full = next((arm for arm in arms if arm.runs is full_runs), None)
    frozen = sorted((m for m in members if m[0].freezes), key=_order)
    alike: dict[object, list[Run]] = {}
    for m in frozen:
        alike.setdefault(_cost(m[0]), []).extend(m)
    for m in frozen:
        same_time = equal_time_steps(alike[_cost(m[0])], full_runs) if full_runs else None
        arms.append(Arm(m, same_time, full_steps))
    comparisons = tuple(_comparison(arm, arms, full) for arm in arms if arm.freezes)
    return Group(
        title=title,
        subtitle=_subtitle(runs),
        is_test=runs[0].values["validate"] == "test",
        arms=tuple(arms),
        full=full,
        comparisons=comparisons,
        notes=(*notes, *_notes(arms, full), *_seed_notes(comparisons, full)),
    )


def _order(runs: Sequence[Run]) -> tuple[object, ...]:
    run = runs[0]
    return run.strategy, run.values["t_0"], run.total_steps


def _cost(run: Run) -> object:
    """Equal for arms of the same cost: scaled or not, layers freeze at the same steps."""
    return tuple((name, value) for name, value in run.arm if name != "scale_lr")


def _comparison(arm: Arm, arms: Sequence[Arm], full: Arm | None) -> Comparison:
    rival = None
    if arm.ordinary_steps is not None:
        steps = arm.ordinary_steps
        rival = min(
            (o for o in arms if not o.freezes and abs(o.steps - steps) <= _SAME_TIME * steps),
            key=lambda o: (-len(_common_seeds(arm, o)), abs(o.steps - steps)),
            default=None,
        )
    to_rival = None if rival is None else difference(arm, rival)
    to_full = None if full is None else difference(arm, full)
    return Comparison(arm, rival, to_rival, to_full, _conclusion(arm, rival, to_rival))


def _conclusion(arm: Arm, rival: Arm | None, found: Difference | None) -> str:
    """What may be concluded about an arm, in two sentences."""
    if arm.full_steps is None:
        return "There is no ordinary run to compare with, so neither time nor error can be judged."
    if arm.time_saved is None:
        return (
            "It was made on other hardware than the ordinary runs, so the time it saved is unknown."
        )
    share = abs(arm.time_saved)
    saves = f"It {'saves' if arm.time_saved >= 0 else 'costs'} {100 * share:.1f} %" + (
        " of the ordinary run's time. " if arm.time_saved >= 0 else " more time. "
    )
    if rival is None:
        steps = round(arm.ordinary_steps or 0)
        return saves + (
            "No ordinary run of the same time was made, so whether freezing pays is open; "
            f"make one with --no-freezeout --steps {steps}."
        )
    if found is None:
        return saves + "No error was measured."
    seeds = f"{found.n} seed{'s' if found.n > 1 else ''}"
    if found.low is None or found.high is None:
        why = "there is one seed" if found.n < 2 else "it is the same with all seeds"
        return saves + (
            f"Its error is {points(found.mean)} than that of an ordinary run of the same time; "
            f"no interval can be given, since {why}."
        )
    if found.shows == "nothing":
        return saves + (
            f"No difference to an ordinary run of the same time can be shown with {seeds}: "
            f"{points(found.mean)}, {interval(found)}."
        )
    pays = "so freezing pays here" if found.shows == "better" else "so freezing does not pay here"
    return saves + (
        f"Its error is {points(found.mean)} than that of an ordinary run of the same time "
        f"({interval(found)}, {seeds}), {pays}."
    )


def points(value: float) -> str:
    """A difference of errors in words, in percentage points.

    >>> points(0.0123), points(-0.001)
    ('1.23 points higher', '0.10 points lower')
    """
    return f"{abs(value) * 100:.2f} points {'lower' if value < 0 else 'higher'}"


def interval(found: Difference) -> str:
    """The confidence interval in words."""
    assert found.low is not None
    assert found.high is not None
    return f"95 % interval {signed(found.low)} to {signed(found.high)}"


def signed(value: float) -> str:
    """Percentage points with a sign.

    >>> signed(0.0123), signed(-0.001)
    ('+1.23', '−0.10')
    """
    return f"{value * 100:+.2f}".replace("-", "−")


def _notes(arms: Sequence[Arm], full: Arm | None) -> list[str]:
    notes = []
    hardware = sorted({run.hardware for arm in arms for run in arm.runs})
    if len(hardware) > 1:
        notes.append(
            f"These runs were made on different hardware ({'; '.join(hardware)}): "
            "times are compared on the same hardware only."
        )
    if full is None:
        notes.append(
            "There is no ordinary run here. Make one with --no-freezeout: without it, time saved "
            "is unknown."
        )
    if full is not None and (spread := _spread(full)) > _DISTURBED:
        notes.append(
            f"The machine was disturbed: the ordinary run's steps are all alike, and yet took "
            f"{100 * spread:.0f} % longer in some epochs than in others. Time saved may be off."
        )
    if len([arm for arm in arms if arm.freezes]) > 1:
        notes.append(
            "Each 95 % interval holds for one comparison by itself: of twenty arms that are no "
            "different, one will seem to be."
        )
    return notes


def _seed_notes(comparisons: Sequence[Comparison], full: Arm | None) -> list[str]:
    """Which arms are compared over a part of their seeds, or of the other's."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for comparison in comparisons:
        arm, rival = comparison.arm, comparison.rival
        for other in (rival, None if rival is full else full):
            if other and other.errors and arm.errors and other.errors.keys() != arm.errors.keys():
                key = other.label, tuple(_common_seeds(arm, other))
                found.setdefault(key, []).append(arm.label)
    return [
        f"The seeds of {' and '.join(labels)} are not those of “{other}”: "
        + (
            f"differences to it are over those that both have, {', '.join(map(str, both))}."
            if len(both) > 1
            else f"both have {both[0] if both else 'none'}, so differences to it are of the means."
        )
        for (other, both), labels in found.items()
    ]


def _common_seeds(first: Arm, second: Arm) -> list[int]:
    return sorted(first.errors.keys() & second.errors.keys())


def _spread(full: Arm) -> float:
    """How much longer a step of the full-length run took in a slow epoch, the ninth of ten, than
    in a fast one, the first of ten, on the same hardware."""
    return max(
        _spread_of([e.step_seconds for r in full.runs if r.hardware == name for e in r.epochs])
        for name in {run.hardware for run in full.runs}
    )


def _spread_of(seconds: Sequence[float]) -> float:
    if len(seconds) < 4:
        return 0.0
    tenths = quantiles(seconds, n=10, method="inclusive")
    return tenths[-1] / tenths[0] - 1


def _title(run: Run) -> str:
    names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "handwritten digits"}
    return f"{run.network} on {names.get(run.values['dataset'], run.values['dataset'])}"


def _long_title(run: Run) -> str:
    """With the options that may tell it from another group of the same title."""
    v = run.values
    words = [
        run.precision,
        f"batch {v['batch_size']}",
        f"lr {v['lr']:g}",
        f"weight decay {v['weight_decay']:g}",
        f"momentum {v['momentum']:g}",
        f"dropout {v['dropout']:g}",
        f"error on {v['validate']}",
        "augmented" if v["augment"] else "not augmented",
    ]
    if v["images"] is not None:
        words.append(f"first {v['images']:,} images")
    return f"{_title(run)} ({', '.join(words)})"


def _subtitle(runs: Sequence[Run]) -> str:
    run = runs[0]
    hardware = sorted({r.hardware for r in runs})
    which = {"test": "test images", "valid": "validation images", "none": "no images held out"}
    held_out = which.get(run.values["validate"], str(run.values["validate"]))
    return (
        f"{len(runs)} runs, {run.precision}, batch {run.values['batch_size']}, "
        f"learning rate {run.values['lr']:g}, error on {held_out}, {'; '.join(hardware)}"
    )
