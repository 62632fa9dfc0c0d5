"""Training cost from the cost of a step at each depth."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import freezeout.cost
from freezeout import Schedule
from freezeout.cost import run_cost, saving, steps_at_depth
from freezeout.errors import InvalidValue

runs = st.tuples(st.floats(0.01, 1), st.integers(1, 30), st.integers(1, 500), st.integers(1, 50))
properties = settings(max_examples=60, deadline=None)


def ends_of(run: tuple[float, int, int, int]) -> tuple[int, ...]:
    t_0, n, total, every = run
    return Schedule(t_0).freeze_steps(n, total, every)


def test_docstring_examples_hold() -> None:
    result = doctest.testmod(freezeout.cost)
    assert (result.failed, result.attempted) == (0, 2)


@properties
@given(runs)
def test_steps_at_depth_counts_what_a_run_would_live_through(
    run: tuple[float, int, int, int],
) -> None:
    ends, total = ends_of(run), run[2]
    lived = [0] * len(ends)
    for step in range(total):
        lived[sum(end <= step for end in ends)] += 1
    assert steps_at_depth(ends, total) == lived


@properties
@given(runs, st.data())
def test_run_cost_is_the_sum_over_steps_and_saving_its_share(
    run: tuple[float, int, int, int], data: st.DataObject
) -> None:
    ends, total = ends_of(run), run[2]
    costs = data.draw(
        st.lists(st.floats(1, 1e6), min_size=len(ends), max_size=len(ends)), label="step costs"
    )
    summed = sum(costs[sum(end <= step for end in ends)] for step in range(total))
    assert run_cost(costs, ends, total) == pytest.approx(summed, rel=1e-9)
    share = saving(costs, ends, total)
    assert share == pytest.approx(1 - summed / (total * costs[0]), rel=1e-9, abs=1e-9)
    assert share < 1


def test_freezing_that_makes_steps_no_cheaper_saves_nothing() -> None:
    assert saving([3.0, 3.0, 3.0], (5, 7, 10), 10) == 0


def test_nothing_frozen_saves_nothing() -> None:
    assert saving([3.0, 2.0, 1.0], (10, 10, 10), 10) == 0
    assert steps_at_depth((10,), 10) == [10]


def test_costs_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InvalidValue, match="2 step costs for 3 layers"):
        run_cost([1.0, 2.0], (5, 7, 10), 10)
