"""Training cost from the cost of a step at each depth."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import freezeout.cost
from freezeout import Frozen, Plan, Schedule, Timeline
from freezeout.cost import (
    epochs_of_equal_cost,
    epochs_within,
    paper_costs,
    paper_saving,
    run_cost,
    saving,
    t_0_for_saving,
    with_cache,
)
from freezeout.errors import FreezeOutError, InvalidValue
from freezeout.schedule import HowScale
from tests import reference

runs = st.tuples(st.floats(0.01, 1), st.integers(1, 30), st.integers(1, 500), st.integers(1, 50))
properties = settings(max_examples=60, deadline=None)


def timeline_of(run: tuple[float, int, int, int]) -> Timeline:
    t_0, n, total, every = run
    return Schedule(t_0).timeline(n, total, every)


def test_docstring_examples_hold() -> None:
    result = doctest.testmod(freezeout.cost)
    assert (result.failed, result.attempted) == (0, 7)


@properties
@given(runs)
def test_counts_are_what_a_run_would_live_through(
    run: tuple[float, int, int, int],
) -> None:
    t_0, n, total, every = run
    ends = Schedule(t_0).freeze_steps(n, total, every)
    lived = [0] * n
    for step in range(total):
        lived[sum(end <= step for end in ends)] += 1
    assert timeline_of(run).counts() == lived


@properties
@given(runs, st.data())
def test_run_cost_is_the_sum_over_steps_and_saving_its_share(
    run: tuple[float, int, int, int], data: st.DataObject
) -> None:
    line, (_, n, total, _) = timeline_of(run), run
    costs = data.draw(st.lists(st.floats(1, 1e6), min_size=n, max_size=n), label="step costs")
    summed = sum(costs[line.num_frozen(step)] for step in range(total))
    assert run_cost(costs, line.counts()) == pytest.approx(summed, rel=1e-9)
    share = saving(costs, line.counts())
    assert share == pytest.approx(1 - summed / (total * costs[0]), rel=1e-9, abs=1e-9)
    assert share < 1


def test_freezing_that_makes_steps_no_cheaper_saves_nothing() -> None:
    assert saving([3.0, 3.0, 3.0], [5, 2, 3]) == 0


def test_nothing_frozen_saves_nothing() -> None:
    assert saving([3.0, 2.0, 1.0], [10, 0, 0]) == 0
    assert Schedule(t_0=1).timeline(3, 10).counts() == [10, 0, 0]


def test_costs_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InvalidValue, match="2 step costs for 3 layers"):
        run_cost([1.0, 2.0], [5, 2, 3])


@pytest.mark.parametrize("how_scale", ["linear", "squared", "cubic"])
@pytest.mark.parametrize("depth", [22, 76, 100])
def test_the_papers_formula_is_the_papers(how_scale: HowScale, depth: int) -> None:
    for tenth in range(1, 10):
        t_0 = tenth / 10
        share = paper_saving(paper_costs(depth, 12), Schedule(t_0, how_scale))
        assert share == pytest.approx(reference.saved_share(depth, 12, t_0, how_scale), abs=1e-12)


@pytest.mark.parametrize(
    ("t_0", "how_scale", "share"),
    [
        (0.8, "cubic", 0.1778133024829064),
        (0.5, "linear", 0.2248882882882882),
        (0.5, "squared", 0.28049196493791084),
    ],
)
def test_the_papers_formula_gives_known_figures(
    t_0: float, how_scale: HowScale, share: float
) -> None:
    assert paper_saving(paper_costs(76, 12), Schedule(t_0, how_scale)) == pytest.approx(
        share, abs=1e-12
    )


def test_the_papers_formula_is_not_for_given_times() -> None:
    with pytest.raises(InvalidValue, match="not for given times"):
        paper_saving(paper_costs(), Schedule(times=(0.5, 1.0)))
    with pytest.raises(InvalidValue, match="depth must be at least 10, got 4"):
        paper_costs(4)


@properties
@given(st.lists(st.floats(1, 1e3), min_size=2, max_size=20), st.floats(0.01, 0.6))
def test_a_target_gives_the_latest_t_0_that_reaches_it(costs: list[float], target: float) -> None:
    costs.sort(reverse=True)
    schedule = Schedule(how_scale="linear", scale_lr=False)

    def saved(t_0: float) -> float:
        return saving(costs, Schedule(t_0, "linear", False).timeline(len(costs), 500).counts())

    most = max(0.0, saved(0.001))
    if most < target:
        with pytest.raises(InvalidValue, match=f"at most {most:.1%}"):
            t_0_for_saving(costs, target, schedule, 500)
        return
    t_0 = t_0_for_saving(costs, target, schedule, 500)
    assert saved(t_0) >= target
    assert t_0 == 1 or saved(round(t_0 + 0.001, 3)) < target


@pytest.mark.parametrize("target", [0, 1, -0.2, 20, True, float("nan")])
def test_a_target_must_be_a_share(target: float) -> None:
    with pytest.raises(FreezeOutError, match=r"the target saving must be .*in \(0, 1\), got"):
        t_0_for_saving([2.0, 1.0], target, Schedule(), 100)


@properties
@given(
    st.floats(1, 1e6),
    st.lists(st.floats(1, 100), min_size=3, max_size=9),
    st.integers(1, 50),
    st.integers(1, 20),
    st.sampled_from([Schedule(), Frozen(2), Frozen(1, then=Schedule(0.5))]),
)
def test_as_many_epochs_as_fit(
    budget: float, costs: list[float], steps_per_epoch: int, every: int, plan: Plan
) -> None:
    def cost(epochs: int) -> float:
        steps = epochs * steps_per_epoch
        return run_cost(costs, plan.timeline(len(costs), steps, every).counts())

    costs.sort(reverse=True)
    epochs = epochs_within(budget, costs, plan, steps_per_epoch, every)
    assert epochs == 0 or cost(epochs) <= budget
    assert cost(epochs + 1) > budget


@pytest.mark.parametrize("every", [1, 7, 40, 400])
@pytest.mark.parametrize("plan", [Schedule(), Frozen(1), Frozen(share=0.4, then=Schedule(0.5))])
def test_equal_cost_is_to_the_nearest_epoch(plan: Plan, every: int) -> None:
    costs = [10.0, 6.0, 2.0]

    def missed(epochs: int) -> float:
        return abs(run_cost(costs, plan.timeline(3, 10 * epochs, every).counts()) - 10000)

    found = epochs_of_equal_cost(100, costs, plan, 10, every)
    assert found == min(range(1, 600), key=missed) > 100


def test_without_freezing_equal_cost_is_the_same_length() -> None:
    assert epochs_of_equal_cost(100, [10.0, 6.0, 2.0], Schedule(t_0=1), 10) == 100
    # Nothing freezes before the run is over.
    assert epochs_of_equal_cost(100, [10.0, 6.0, 2.0], Schedule(), 10, 2000) == 100


def test_a_target_counts_what_is_frozen_from_the_start() -> None:
    costs = [10.0, 8.0, 6.0, 4.0, 2.0]

    def saved(t_0: float) -> float:
        return saving(costs, Frozen(2, then=Schedule(t_0)).timeline(5, 500, 10).counts())

    t_0 = t_0_for_saving(costs, 0.5, Schedule(), 500, 10, frozen=2)
    assert saved(t_0) >= 0.5 > saved(round(t_0 + 0.001, 3))
    assert t_0_for_saving(costs, 0.4, Schedule(), 500, frozen=2) == 1  # the two alone save that


def test_a_cache_is_used_where_reading_is_cheaper() -> None:
    assert with_cache([10.0, 8.0, 6.0], [0.0, 2.0, 4.0], [0.0, 3.0, 1.0]) == [10.0, 8.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        with_cache([10.0, 8.0], [0.0], [0.0, 3.0])
