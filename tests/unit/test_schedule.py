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

import freezeout.schedule
from freezeout import FreezeOutError, Schedule
from freezeout.errors import InvalidType, InvalidValue
from freezeout.schedule import HowScale, whole_number

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
    assert (result.failed, result.attempted) == (0, 4)


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
    factors = [schedule.factors(step, 5, 1000) for step in range(1001)]
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
    largest = schedule.largest_factor(n, total, every)
    assert largest == max(schedule.factors(0, n, total, every)) >= 1
    for step in {0, total // 3, total - 1, total, total + 1, *ends}:
        factors = schedule.factors(step, n, total, every)
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
    ends = schedule.freeze_steps(n, total)
    curves = list(zip(*(schedule.factors(s, n, total) for s in range(total + 1)), strict=True))
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
    for step in {0, total // 3, total // 2, total - 1}:
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        assert schedule.factors(step, n, total, every) == (cosine,) * n


def test_rounding_counts_0_8_cubed_of_1000_as_512() -> None:
    assert 0.8**3 * 1000 > 512
    assert Schedule().freeze_steps(2, 1000) == (512, 1000)


def test_freeze_every_rounds_up_and_scaling_follows() -> None:
    schedule = Schedule()
    assert schedule.freeze_steps(3, 1000, freeze_every=100) == (600, 800, 1000)
    assert schedule.factors(0, 3, 1000, freeze_every=100) == (1000 / 600, 1000 / 800, 1)
    assert schedule.freeze_steps(3, 1000, freeze_every=999) == (999, 999, 1000)
    assert schedule.freeze_steps(3, 1000, freeze_every=5000) == (1000, 1000, 1000)


def test_explicit_times_stand_in_place_of_t_0_and_how_scale() -> None:
    schedule = Schedule(times=[0.25, 0.25, 1])  # type: ignore[arg-type]  # a list will do
    assert schedule.times == (0.25, 0.25, 1)
    assert schedule.freeze_times(3) == (0.25, 0.25, 1)
    assert schedule.freeze_steps(3, 100) == (25, 25, 100)
    assert schedule.factors(0, 3, 100) == (4, 4, 1)
    assert Schedule(times=(0.25, 1), scale_lr=False).factors(0, 2, 100) == (1, 1)


def test_a_single_layer_trains_to_the_end() -> None:
    assert Schedule(0.1).freeze_times(1) == (1,)
    assert Schedule(0.1).freeze_steps(1, 7) == (7,)


def test_times_are_positive_even_where_the_power_underflows() -> None:
    assert Schedule(1e-200).freeze_times(2)[0] > 0


def test_a_small_t_0_starts_a_thousand_times_higher() -> None:
    assert Schedule(0.1).largest_factor(5, 10_000) == 1000
    assert Schedule(0.1, scale_lr=False).largest_factor(5, 10_000) == 1


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
        ({"times": (0, 1)}, InvalidValue, r"times\[0\] must be in \(0, 1\], got 0"),
        ({"times": ("a", 1)}, InvalidType, r"times\[0\] must be a number in \(0, 1\], got 'a'"),
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


def test_refuses_a_negative_step_and_another_number_of_layers() -> None:
    with pytest.raises(InvalidValue, match="step must be at least 0, got -1"):
        Schedule().factors(-1, 2, 10)
    with pytest.raises(InvalidValue, match="times has 2 entries for 3 layers"):
        Schedule(times=(0.5, 1)).freeze_times(3)


def test_whole_numbers_of_any_kind_are_taken_as_int() -> None:
    number = whole_number("n", np.int64(3))
    assert (number, type(number)) == (3, int)
