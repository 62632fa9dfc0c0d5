"""Schedule: when layers freeze, at which rates, and what it refuses."""

import doctest
import math
import pickle
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import freezeout.plan
import freezeout.schedule
from freezeout import FreezeOutError, Frozen, Plan, Schedule, Timeline
from freezeout.errors import InvalidType, InvalidValue
from freezeout.schedule import HowScale, read_plan
from freezeout.values import whole_number

HOW_SCALES: list[HowScale] = ["linear", "squared", "cubic"]
schedules = st.builds(
    Schedule,
    t_0=st.floats(1e-6, 1),
    how_scale=st.sampled_from(HOW_SCALES),
    scale_lr=st.booleans(),
)
sizes = st.integers(1, 60)
totals = st.integers(1, 3000)
everies = st.integers(1, 200)
properties = settings(max_examples=100, deadline=None)


def test_docstring_examples_hold() -> None:
    result = doctest.testmod(freezeout.schedule)
    assert (result.failed, result.attempted) == (0, 7)


def test_defaults_are_the_papers_recommendation() -> None:
    assert Schedule() == Schedule(t_0=0.8, how_scale="cubic", scale_lr=True, times=None)
    assert Schedule().freeze_times(2) == pytest.approx((0.512, 1), abs=1e-15)


@pytest.mark.parametrize(
    ("how_scale", "times"),
    [
        ("linear", (0.5, 0.625, 0.75, 0.875, 1)),
        ("squared", (0.25, 0.390625, 0.5625, 0.765625, 1)),
        ("cubic", (0.125, 0.244140625, 0.421875, 0.669921875, 1)),
    ],
)
def test_times_are_the_linear_ones_to_a_power(
    how_scale: HowScale, times: tuple[float, ...]
) -> None:
    assert Schedule(0.5, how_scale).freeze_times(5) == times


@pytest.mark.parametrize(
    ("how_scale", "scale_lr", "starts", "ends"),
    [
        ("linear", False, [1, 1, 1, 1, 1], [500, 625, 750, 875, 1000]),
        ("linear", True, [2, 1.6, 4 / 3, 8 / 7, 1], [500, 625, 750, 875, 1000]),
        ("cubic", False, [1, 1, 1, 1, 1], [125, 245, 422, 670, 1000]),
        ("cubic", True, [8, 4.096, 64 / 27, 512 / 343, 1], [125, 245, 422, 670, 1000]),
    ],
)
def test_figure_1_of_the_paper(
    how_scale: HowScale, scale_lr: bool, starts: list[float], ends: list[int]
) -> None:
    """Five layers, t_0 = 0.5: where each panel's curves start, pass half, and end."""
    schedule = Schedule(0.5, how_scale, scale_lr)
    assert schedule.freeze_steps(5, 1000) == tuple(ends)
    line = schedule.timeline(5, 1000)
    factors = [schedule.factors(step, line) for step in range(1001)]
    # Whole steps move the cubic ends by less than one step, so the starts by less than 1/244.
    assert factors[0] == pytest.approx(starts, rel=1 / 244)
    for layer, end in enumerate(ends):
        curve = [f[layer] for f in factors]
        assert all(a > b for a, b in pairwise(curve[: end + 1]))
        assert curve[end:] == [0.0] * (1001 - end)
        if end % 2 == 0:
            assert curve[end // 2] == pytest.approx(curve[0] / 2, rel=1e-12)


@properties
@given(schedules, sizes)
def test_freeze_times_never_decrease_and_lie_in_0_1(schedule: Schedule, n: int) -> None:
    times = schedule.freeze_times(n)
    assert len(times) == n
    assert all(0 < t <= 1 for t in times)
    assert all(a <= b for a, b in pairwise(times))
    assert times[-1] == 1


@properties
@given(schedules, sizes, totals, everies)
def test_freeze_steps_are_the_times_rounded_up(
    schedule: Schedule, n: int, total: int, every: int
) -> None:
    ends = schedule.freeze_steps(n, total, every)
    assert all(a <= b for a, b in pairwise(ends))
    assert ends[-1] == total
    for time, end in zip(schedule.freeze_times(n), ends, strict=True):
        assert end % every == 0 or end == total
        assert 1 <= end <= total
        assert end >= time * total * (1 - 1e-11)  # never before its time
        assert end == total or end - every < time * total  # and not a multiple later


@properties
@given(schedules, sizes, totals, everies)
def test_factors_start_highest_fall_and_end_in_exactly_zero(
    schedule: Schedule, n: int, total: int, every: int
) -> None:
    ends = schedule.freeze_steps(n, total, every)
    line = schedule.timeline(n, total, every)
    assert line.freeze_steps == ends
    largest = max(schedule.factors(0, line))
    assert largest >= 1
    for step in {0, total // 3, total - 1, total, total + 1, *ends}:
        factors = schedule.factors(step, line)
        for f, end in zip(factors, ends, strict=True):
            assert (f == 0) == (step >= end)
            assert 0 <= f <= largest


@properties
@given(st.sampled_from(HOW_SCALES), st.floats(0.05, 1), st.integers(1, 12), st.integers(1, 400))
def test_under_scaling_every_layer_has_the_same_integral(
    how_scale: HowScale, t_0: float, n: int, total: int
) -> None:
    """The integral of eq. 1 from 0 to t_i is (alpha / t_i) * t_i / 2 = alpha / 2, and its sum over
    whole steps is alpha * (f_i + 1) / (2 * t_i), where t_i means f_i / T."""
    schedule = Schedule(t_0, how_scale)
    ends, line = schedule.freeze_steps(n, total), schedule.timeline(n, total)
    curves = list(zip(*(schedule.factors(s, line) for s in range(total + 1)), strict=True))
    for curve, end in zip(curves, ends, strict=True):
        assert math.fsum(curve) == pytest.approx((end + 1) / (2 * (end / total)), rel=1e-12)
        # A cosine's trapezoids are its integral exactly: the sum less half of the first term.
        integral = (math.fsum(curve) - curve[0] / 2) / total
        assert integral == pytest.approx(0.5, rel=1e-12)


@given(st.sampled_from(HOW_SCALES), st.booleans(), sizes, totals, everies)
@properties
def test_t_0_of_1_is_plain_cosine_annealing_exactly(
    how_scale: HowScale, scale_lr: bool, n: int, total: int, every: int
) -> None:
    schedule = Schedule(1, how_scale, scale_lr)
    assert schedule.freeze_steps(n, total, every) == (total,) * n
    line = schedule.timeline(n, total, every)
    assert line.changes == ((0, 0),)
    for step in {0, total // 3, total // 2, total - 1}:
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        assert schedule.factors(step, line) == (cosine,) * n


def test_rounding_counts_0_8_cubed_of_1000_as_512() -> None:
    assert 0.8**3 * 1000 > 512
    assert Schedule().freeze_steps(2, 1000) == (512, 1000)


def test_freeze_every_rounds_up_and_scaling_follows() -> None:
    schedule = Schedule()
    assert schedule.freeze_steps(3, 1000, freeze_every=100) == (600, 800, 1000)
    line = schedule.timeline(3, 1000, freeze_every=100)
    assert line.changes == ((0, 0), (600, 1), (800, 2))
    assert schedule.factors(0, line) == (1000 / 600, 1000 / 800, 1)
    assert schedule.freeze_steps(3, 1000, freeze_every=999) == (999, 999, 1000)
    assert schedule.freeze_steps(3, 1000, freeze_every=5000) == (1000, 1000, 1000)


def test_explicit_times_stand_in_place_of_t_0_and_how_scale() -> None:
    schedule = Schedule(times=[0.25, 0.25, 1])
    assert schedule.times == (0.25, 0.25, 1)
    assert (schedule.t_0, schedule.how_scale) == (None, None)
    assert schedule.freeze_times(3) == (0.25, 0.25, 1)
    assert schedule.freeze_steps(3, 100) == (25, 25, 100)
    assert schedule.timeline(3, 100).changes == ((0, 0), (25, 2))
    assert schedule.factors(0, schedule.timeline(3, 100)) == (4, 4, 1)
    unscaled = Schedule(times=(0.25, 1), scale_lr=False)
    assert unscaled.factors(0, unscaled.timeline(2, 100)) == (1, 1)


def test_a_time_of_0_is_frozen_from_the_start() -> None:
    schedule = Schedule(times=(0, 0.0, 0.5, 1))
    line = schedule.timeline(4, 100)
    assert line.changes == ((0, 2), (50, 3))
    assert line.freeze_steps == schedule.freeze_steps(4, 100) == (0, 0, 50, 100)
    assert schedule.factors(0, line) == (0, 0, 2, 1)
    assert schedule.factors(25, line) == (0, 0, 1, 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.timeline(4, 100, freeze_every=30).changes == ((0, 2), (60, 3))


@properties
@given(st.lists(st.sampled_from([0, 0.25, 1 / 3, 0.8, 1]), max_size=9), totals, everies)
def test_given_times_freeze_when_they_say(times: list[float], total: int, every: int) -> None:
    times = [*sorted(times), 1]
    schedule = Schedule(times=times)
    line = schedule.timeline(len(times), total, every)
    ends = [math.ceil(t * total * (1 - 1e-12)) for t in times]
    ends = [min(total, -(-end // every) * every) for end in ends]
    assert line.freeze_steps == tuple(ends)
    for step in {0, total // 3, total - 1}:
        for factor, end in zip(schedule.factors(step, line), ends, strict=True):
            cosine = 0.5 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0
            assert factor == pytest.approx(cosine * total / end if end else 0.0, rel=1e-12)


@pytest.mark.parametrize("arguments", [{"t_0": 0.8, "how_scale": "cubic"}, {"t_0": 0.8}])
def test_times_beside_the_defaults_are_refused_too(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="either times or t_0 and how_scale, not both"):
        Schedule(times=(0.5, 1), **arguments)


def test_numbers_of_numpy_become_plain_ones() -> None:
    schedule = Schedule(t_0=np.float32(0.5), how_scale="linear")  # type: ignore[arg-type]
    assert (schedule.t_0, type(schedule.t_0)) == (0.5, float)
    given = Schedule(times=np.array([0, 0.5, 1]))  # type: ignore[arg-type]
    assert given.times == (0.0, 0.5, 1.0)
    assert given == Schedule(times=(0, 0.5, 1))
    assert {type(time) for time in given.times or ()} == {float}
    line = Timeline(3, 10, ((np.int64(0), np.int32(1)),))  # type: ignore[arg-type]
    assert {type(number) for change in line.changes for number in change} == {int}
    frozen = Frozen(np.int64(2), then=schedule)  # type: ignore[arg-type]
    assert type(frozen.first) is int
    assert type(Frozen(share=np.float64(0.5)).share) is float


def test_a_single_layer_trains_to_the_end() -> None:
    assert Schedule(0.1).freeze_times(1) == (1,)
    assert Schedule(0.1).freeze_steps(1, 7) == (7,)


def test_times_are_positive_even_where_the_power_underflows() -> None:
    assert Schedule(1e-200).freeze_times(2)[0] > 0


def test_a_small_t_0_starts_a_thousand_times_higher() -> None:
    for scale_lr, largest in ((True, 1000), (False, 1)):
        schedule = Schedule(0.1, scale_lr=scale_lr)
        assert max(schedule.factors(0, schedule.timeline(5, 10_000))) == largest


def test_is_a_value() -> None:
    schedule = Schedule(0.5, "linear")
    assert pickle.loads(pickle.dumps(schedule)) == schedule == Schedule(0.5, "linear")
    assert len({schedule, Schedule(0.5, "linear"), Schedule()}) == 2
    with pytest.raises(FrozenInstanceError):
        schedule.t_0 = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t_0": 0}, InvalidValue, r"t_0 must be in \(0, 1\], got 0"),
        ({"t_0": -0.5}, InvalidValue, r"t_0 must be in \(0, 1\], got -0.5"),
        ({"t_0": 1.01}, InvalidValue, r"t_0 must be in \(0, 1\], got 1.01"),
        ({"t_0": math.nan}, InvalidValue, r"t_0 must be in \(0, 1\], got nan"),
        ({"t_0": math.inf}, InvalidValue, r"t_0 must be in \(0, 1\], got inf"),
        ({"t_0": "0.8"}, InvalidType, r"t_0 must be a number in \(0, 1\], got '0.8'"),
        ({"t_0": True}, InvalidType, r"t_0 must be a number in \(0, 1\], got True"),
        ({"how_scale": "quartic"}, InvalidValue, "'linear', 'squared' or 'cubic', got 'quartic'"),
        ({"scale_lr": 1}, InvalidType, "scale_lr must be True or False, got 1"),
        ({"times": ()}, InvalidValue, r"times must end in 1 .*, got \(\)"),
        ({"times": (0.5, 0.9)}, InvalidValue, r"times must end in 1 .*, got \(0.5, 0.9\)"),
        ({"times": (0.5, 0.4, 1)}, InvalidValue, r"must not decrease, but times\[1\] = 0.4 < 0.5"),
        ({"times": (-0.1, 1)}, InvalidValue, r"times\[0\] must be in \[0, 1\], got -0.1"),
        ({"times": (math.nan, 1)}, InvalidValue, r"times\[0\] must be in \[0, 1\], got nan"),
        ({"times": ("a", 1)}, InvalidType, r"times\[0\] must be a number in \[0, 1\], got 'a'"),
        ({"times": 0.5}, InvalidType, "times must be .*, got 0.5"),
        ({"times": (1,), "t_0": 0.5}, InvalidValue, "either times or t_0 and how_scale"),
        ({"times": (1,), "how_scale": "linear"}, InvalidValue, "either times or t_0"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[FreezeOutError], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 10), InvalidValue, "num_layers must be at least 1, got 0"),
        ((2, 0), InvalidValue, "total_steps must be at least 1, got 0"),
        ((2, 10, 0), InvalidValue, "freeze_every must be at least 1, got 0"),
        ((2, 10.0), InvalidType, "total_steps must be a whole number, got 10.0"),
        ((True, 10), InvalidType, "num_layers must be a whole number, got True"),
    ],
)
def test_freeze_steps_refuses(
    arguments: tuple[Any, ...], error: type[FreezeOutError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Schedule().freeze_steps(*arguments)


def test_refuses_another_number_of_layers_and_a_run_without_a_length() -> None:
    with pytest.raises(InvalidValue, match="total_steps must be given"):
        Schedule().timeline(3, None)
    with pytest.raises(InvalidValue, match="times has 2 entries for 3 layers"):
        Schedule(times=(0.5, 1)).freeze_times(3)


def test_whole_numbers_of_any_kind_are_taken_as_int() -> None:
    number = whole_number("n", np.int64(3))
    assert (number, type(number)) == (3, int)


# --- Timeline -----------------------------------------------------------------------------


@st.composite
def timelines(draw: st.DrawFn, known: bool = True) -> Timeline:
    """Any: the number of frozen layers may fall as well."""
    n = draw(st.integers(1, 8))
    total = draw(st.integers(1, 60))
    steps = sorted(draw(st.sets(st.integers(1, total), max_size=6)))
    depths = st.integers(0, n - 1)
    changes = [(0, draw(depths)), *((step, draw(depths)) for step in steps if step < total)]
    is_known = known or draw(st.booleans())
    return Timeline(n, total if is_known else None, tuple(changes))


def lived(changes: Any, steps: int) -> list[int]:
    """How many layers are frozen at each step, by going through them one by one."""
    frozen, planned = [], dict(changes)
    depth = 0
    for step in range(steps):
        depth = planned.get(step, depth)
        frozen.append(depth)
    return frozen


def test_the_plans_docstring_examples_hold() -> None:
    result = doctest.testmod(freezeout.plan)
    assert (result.failed, result.attempted) == (0, 16)


@properties
@given(timelines(known=False), st.integers(0, 80), st.integers(0, 80))
def test_a_timeline_says_what_a_run_lives_through(line: Timeline, start: int, end: int) -> None:
    frozen = lived(line.changes, 100)
    assert [line.num_frozen(step) for step in range(100)] == frozen
    for step in range(70):
        change = next((c for c in line.changes if c[0] > step), None)
        assert line.next_change(step) == change
    for layer, at in enumerate(line.freeze_steps):
        times = (step for step, depth in enumerate(frozen) if depth > layer)
        assert at == next(times, line.total_steps)
    assert set(line.depths) == {depth for _, depth in line.changes}
    assert line.depths == tuple(sorted(line.depths))
    assert line.rises == (sorted(frozen) == frozen and len({*line.depths}) == len(line.changes))
    within = frozen[start:end]
    assert line.counts(start, end) == [within.count(k) for k in range(line.num_layers)]
    if line.total_steps is not None:
        whole = frozen[: line.total_steps]
        assert line.counts() == [whole.count(k) for k in range(line.num_layers)]
        assert [line.is_over(step) for step in range(70)] == [
            step >= line.total_steps for step in range(70)
        ]


@properties
@given(
    st.lists(
        st.tuples(st.integers(0, 80), st.integers(0, 4)), max_size=6, unique_by=lambda c: c[0]
    ),
    st.integers(1, 60),
    st.integers(1, 20),
)
def test_changes_at_any_steps_are_moved_up(
    changes: list[tuple[int, int]], total: int, every: int
) -> None:
    changes.sort()
    line = Timeline.of(5, total, changes, every)
    asked = lived(changes, 200)
    for step in range(total):
        at = step - step % every  # the last step at which the number may change
        moved = [depth for begin, depth in changes if begin <= at]
        assert line.num_frozen(step) == (moved[-1] if moved else 0)
        if every == 1:
            assert line.num_frozen(step) == asked[step]
    for (_, before), (step, after) in pairwise(line.changes):
        assert before != after
        assert step % every == 0


@properties
@given(timelines(), st.data())
def test_a_changed_timeline_keeps_the_past_and_obeys_what_was_planned(
    line: Timeline, data: st.DataObject
) -> None:
    assert line.total_steps is not None
    step = data.draw(st.integers(0, line.total_steps - 1), label="step")
    depth = data.draw(st.integers(0, line.num_layers - 1), label="depth")
    changed = line.changed(step, depth)
    expected = lived(line.changes, line.total_steps)
    now = depth
    planned = dict(line.changes)
    for at in range(step, line.total_steps):
        if at > step and at in planned:  # a rise does not thaw, a fall is obeyed
            rises = planned[at] > line.num_frozen(at - 1)
            now = max(now, planned[at]) if rises else planned[at]
        expected[at] = now
    assert [changed.num_frozen(at) for at in range(line.total_steps)] == expected
    assert (changed.num_layers, changed.total_steps) == (line.num_layers, line.total_steps)


@properties
@given(timelines(known=False), st.integers(0, 5))
def test_layers_in_front_are_always_frozen(line: Timeline, count: int) -> None:
    longer = line.behind(count)
    steps = range(70)
    assert [longer.num_frozen(s) for s in steps] == [line.num_frozen(s) + count for s in steps]
    assert longer.num_layers == line.num_layers + count
    back = longer.without(count)
    assert [back.num_frozen(s) for s in steps] == [line.num_frozen(s) for s in steps]
    assert (back.num_layers, back.total_steps) == (line.num_layers, line.total_steps)
    if count < line.num_layers:
        rest = line.without(count)
        expected = [max(0, line.num_frozen(s) - count) for s in steps]
        assert [rest.num_frozen(s) for s in steps] == expected


def test_a_timeline_is_a_value() -> None:
    line = Timeline(3, 10, ((0, 0), (5, 2)))
    _ = line.without(1), line.freeze_steps  # what is worked out is no part of it
    assert pickle.loads(pickle.dumps(line)) == line == Timeline(3, 10, [[0, 0], [5, 2]])  # type: ignore[arg-type]
    assert hash(line) == hash(Timeline(3, 10, ((0, 0), (5, 2))))
    with pytest.raises(FrozenInstanceError):
        line.total_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 10), InvalidValue, "num_layers must be at least 1, got 0"),
        ((3, 0), InvalidValue, "total_steps must be at least 1, got 0"),
        ((3, 10, ()), InvalidValue, "the first change must be at step 0"),
        ((3, 10, ((1, 1),)), InvalidValue, "the first change must be at step 0"),
        ((3, 10, ((0, 0), (4, 1), (4, 2))), InvalidValue, "rising steps, but 4 <= 4"),
        ((3, 10, ((0, 0), (4, 1), (3, 2))), InvalidValue, "rising steps, but 3 <= 4"),
        ((3, 10, ((0, 0), (10, 1))), InvalidValue, "step 10 is after the run's 10 steps"),
        ((3, 10, ((0, 3),)), InvalidValue, "3 of 3 layers frozen at step 0: at most 2"),
        ((3, 10, ((0, -1),)), InvalidValue, "pairs"),
        ((3, 10, ((0, 1, 2),)), InvalidValue, "pairs"),
        ((3, 10, ((0, 0.5),)), InvalidValue, "pairs"),
        ((3, 10, 5), InvalidValue, "pairs"),
    ],
)
def test_impossible_timelines_are_refused(
    arguments: tuple[Any, ...], error: type[FreezeOutError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Timeline(*arguments)


def test_counts_of_a_run_without_a_length_need_an_end() -> None:
    line = Timeline(3, None, ((0, 1), (4, 2)))
    assert line.counts(2, 6) == [0, 2, 2]
    assert not line.is_over(10**9)
    assert line.freeze_steps == (0, 4, None)
    with pytest.raises(InvalidValue, match="give total_steps"):
        line.counts()


# --- Frozen -------------------------------------------------------------------------------

NAMES = [["stem"], ["body.0", "body.0.conv"], ["body.1", "body.1.conv"], ["norm", "head"]]


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        (Frozen(0), 0),
        (Frozen(3), 3),
        (Frozen(all_but_last=1), 3),
        (Frozen(all_but_last=4), 0),
        (Frozen(share=0.0), 0),
        (Frozen(share=0.49), 1),
        (Frozen(share=0.5), 2),
        (Frozen(share=0.999), 3),
        (Frozen(up_to="stem"), 1),
        (Frozen(up_to="body.0.conv"), 2),
        (Frozen(up_to="body"), 3),  # the layer that it ends in
    ],
)
def test_each_way_of_saying_how_many(plan: Frozen, count: int) -> None:
    resolved = plan.resolved(NAMES)
    assert resolved == Frozen(count)
    assert resolved.timeline(4, None).changes == ((0, count),)
    if plan.up_to is None:
        assert plan.timeline(4, 100) == resolved.timeline(4, 100)
    # Of these, some are frozen by hand: the plan is for the others.
    for given_ones in range(4):
        rest = plan.resolved(NAMES, given_ones)
        assert rest.timeline(4 - given_ones, 100).changes == ((0, max(0, count - given_ones)),)


@properties
@given(st.integers(1, 400), st.integers(0, 400))
def test_a_share_is_rounded_down_and_no_further(n: int, k: int) -> None:
    if k < n:
        assert Frozen(share=k / n).timeline(n, None).num_frozen(0) == k


@properties
@given(st.integers(2, 12), totals, everies, st.data(), schedules)
def test_the_others_follow_their_own_plan(
    n: int, total: int, every: int, data: st.DataObject, then: Schedule
) -> None:
    count = data.draw(st.integers(0, n - 1), label="frozen")
    plan = Frozen(count, then=then)
    line, others = plan.timeline(n, total, every), then.timeline(n - count, total, every)
    assert line.freeze_steps == (0,) * count + others.freeze_steps
    for step in {0, total // 3, total - 1}:
        assert plan.factors(step, line) == (0,) * count + then.factors(step, others)
    alone = Frozen(count).timeline(n, total, every)
    assert alone.counts() == [total if k == count else 0 for k in range(n)]
    assert Frozen(count).factors(total // 2, alone) == (0,) * count + (1,) * (n - count)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InvalidValue, "takes one of first, all_but_last, share, up_to, got none"),
        ({"first": 1, "share": 0.5}, InvalidValue, "got first and share"),
        ({"first": -1}, InvalidValue, "first must be at least 0, got -1"),
        ({"first": 0.5}, InvalidType, "first must be a whole number, got 0.5"),
        ({"first": True}, InvalidType, "first must be a whole number, got True"),
        ({"all_but_last": 0}, InvalidValue, "all_but_last must be at least 1, got 0"),
        ({"share": 1}, InvalidValue, r"share must be in \[0, 1\), got 1"),
        ({"share": "0.5"}, InvalidType, "share must be a number"),
        ({"up_to": 3}, InvalidType, "up_to must be a module's name, got 3"),
        ({"first": 1, "then": 3}, InvalidType, "then must be a plan, .* got int"),
        ({"first": 1, "then": Schedule}, InvalidType, "then must be a plan, .* got Schedule"),
    ],
)
def test_frozen_refuses(
    arguments: dict[str, Any], error: type[FreezeOutError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Frozen(**arguments)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Frozen(4), r"Frozen\(first=4\) does not go with 4 layers: 0 to 3 of them"),
        (Frozen(all_but_last=5), r"Frozen\(all_but_last=5\) does not go with 4 layers"),
        (Frozen(up_to="head"), r"Frozen\(up_to='head'\) does not go with 4 layers"),
        (Frozen(up_to="bod"), "up_to='bod' is no module of the model"),
        (Frozen(up_to=""), "up_to='' is no module of the model"),
        (Frozen(1, then=Frozen(3)), r"Frozen\(first=3\) does not go with 3 layers"),
    ],
)
def test_a_plan_that_does_not_go_with_the_layers_says_so(plan: Plan, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        plan.resolved(NAMES)


def test_frozen_without_a_model_or_a_length() -> None:
    with pytest.raises(InvalidValue, match="up_to='stem' names a module, and no model is known"):
        Frozen(up_to="stem").timeline(4, 100)
    with pytest.raises(InvalidValue, match="total_steps must be given"):
        Frozen(1, then=Schedule()).timeline(4, None)


@pytest.mark.parametrize(
    "plan",
    [
        Schedule(0.5, "linear", False),
        Schedule(times=(0, 0.5, 1)),
        Frozen(2),
        Frozen(share=0.5, then=Schedule()),
        Frozen(up_to="stem", then=Frozen(all_but_last=1)),
    ],
)
def test_plans_are_values_and_can_be_read_from_what_describes_them(plan: Plan) -> None:
    assert read_plan(plan.describe()) == plan == pickle.loads(pickle.dumps(plan))
    assert hash(plan) == hash(read_plan(plan.describe()))
