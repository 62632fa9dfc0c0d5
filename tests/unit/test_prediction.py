"""Predicted against measured seconds, with a clock that goes on by what a step is said to cost."""

import json
import time
from typing import Any

import pytest
import torch
from torch.optim import SGD

from freezeout import FreezeOut, Frozen, Schedule
from freezeout.errors import CheckpointError, InvalidValue
from freezeout.lab.prediction import Prediction, warning
from freezeout.savings import StepTimes
from tests.models import linear_net

COSTS = (10.0, 8.0, 6.0, 4.0)
MEASURED = Prediction("measured", COSTS)
TIMES = Schedule(times=(0.2, 0.4, 0.6, 1.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def trained(clock: list[float], costs: tuple[float, ...], total: int = 100) -> FreezeOut:
    """A run whose steps take `costs[num_frozen]` seconds."""
    model = linear_net(4)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 5)
    freezer = FreezeOut(model, optimizer, total, schedule=TIMES, example_inputs=x)
    for _ in range(total):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock[0] += costs[freezer.num_frozen]
        freezer.step()
    return freezer


def against(prediction: Prediction, freezer: FreezeOut) -> dict[str, Any]:
    return prediction.against(freezer.step_seconds, freezer.seconds_saved())


def test_a_run_as_predicted_has_no_flags(clock: list[float]) -> None:
    savings = against(MEASURED, trained(clock, COSTS))
    assert savings["basis"] == "measured"
    assert savings["predicted_share"] == pytest.approx((20 * 2 + 20 * 4 + 40 * 6) / 1000)
    assert savings["measured_share"] == pytest.approx(savings["predicted_share"])
    steps = [20, 20, 20, 40]
    for depth, each in enumerate(savings["depths"]):
        assert each == {
            "frozen_layers": depth,
            "steps": steps[depth],
            "predicted_step_seconds": COSTS[depth],
            "measured_step_seconds": pytest.approx(COSTS[depth]),
            "flagged": False,
        }
    assert warning(savings) is None


def test_depths_that_save_less_than_70_percent_are_flagged(clock: list[float]) -> None:
    # Saved 1.5, 2.7 and 4.3 of 2, 4 and 6: the shares 0.75, 0.675 and 0.717.
    savings = against(MEASURED, trained(clock, (10.0, 8.5, 7.3, 5.7)))
    assert [each["flagged"] for each in savings["depths"]] == [False, False, True, False]
    line = warning(savings)
    assert line is not None
    assert "number of frozen layers was 2 (20 steps)" in line
    assert "70%" in line


def test_counted_costs_are_compared_by_their_ratios(clock: list[float]) -> None:
    counted = Prediction("counted", tuple(7e9 * cost for cost in COSTS))
    savings = against(counted, trained(clock, COSTS))
    for depth, each in enumerate(savings["depths"]):
        assert each["predicted_step_seconds"] == pytest.approx(COSTS[depth])
        assert not each["flagged"]
    assert savings["predicted_share"] == pytest.approx(0.36)


def test_a_few_steps_are_no_evidence(clock: list[float]) -> None:
    savings = against(MEASURED, trained(clock, (10.0,) * 4, total=20))
    assert [each["steps"] for each in savings["depths"]] == [4, 4, 4, 8]
    assert not any(each["flagged"] for each in savings["depths"])


def test_without_full_steps_their_time_is_predicted(clock: list[float]) -> None:
    """Two of four layers are frozen from the start, and a third halfway."""
    model = linear_net(4)
    optimizer = SGD(model.parameters(), lr=0.1)
    plan = Frozen(2, then=Schedule(times=(0.5, 1)))
    freezer = FreezeOut(model, optimizer, 40, schedule=plan, example_inputs=torch.randn(2, 5))
    for _ in range(40):
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
        clock[0] += (6.0, 5.5)[freezer.num_frozen - 2]
        freezer.step()
    savings = against(Prediction("counted", COSTS), freezer)
    assert savings["full_steps"] == "predicted"
    assert savings["predicted_share"] == pytest.approx((20 * 4 + 20 * 6) / 400)
    assert savings["measured_share"] is None
    two, three = savings["depths"]
    assert (two["predicted_step_seconds"], three["predicted_step_seconds"]) == (6.0, 4.0)
    # Of 6 seconds that should be saved of 10, 4.5 are.
    assert not two["flagged"]
    assert not three["flagged"]
    measured = against(Prediction("measured", (9.0, 7.0, 5.0, 2.0)), freezer)
    # Of 4 seconds to be saved of 9, 3 are: enough; and of 7, 3.5: too few.
    assert [each["flagged"] for each in measured["depths"]] == [False, True]


def test_times_go_on_where_a_checkpoint_left_them(clock: list[float]) -> None:
    times, again = StepTimes(since=3), StepTimes()

    def make(times: StepTimes, steps: int) -> None:
        for step in range(steps):
            clock[0] += 2.0 + step % 3
            times.served = step % 2 == 1
            times.record(step // 4, torch.device("cpu"))

    make(times, 9)
    again.load(json.loads(json.dumps(times.state())))
    assert again.by_depth() == times.by_depth()
    assert again.state() == times.state()
    assert again.since == 3
    make(again, 200)
    assert sum(steps for steps, _ in again.by_depth().values()) == 209
    assert max(len(seconds) for *_, seconds in again.state()["kinds"]) <= 64


def test_before_the_first_step_nothing_is_said() -> None:
    model = linear_net(4)
    x = torch.randn(2, 5)
    freezer = FreezeOut(model, SGD(model.parameters()), 10, example_inputs=x)
    savings = against(Prediction("counted", COSTS), freezer)
    assert savings == {
        "basis": "counted",
        "predicted_share": None,
        "measured_share": None,
        "full_steps": "predicted",
        "depths": [],
    }


def test_the_summary_says_what_was_predicted(clock: list[float]) -> None:
    freezer = trained(clock, COSTS)
    share = "36% of the steps' time"
    saved = f"froze 3 of 4 layers; 6 min saved ({share})"
    memory = "; a step takes 360 B of gradients and 120 B of activations less"
    assert freezer.summary() == saved + memory
    assert freezer.summary(COSTS) == f"{saved}, predicted 36%{memory}"
    with pytest.raises(InvalidValue, match="3 step costs for 4 layers"):
        freezer.summary(COSTS[:3])


def test_it_is_written_and_read() -> None:
    prediction = Prediction("measured", COSTS)
    assert Prediction.from_json(prediction.to_json()) == prediction
    assert Prediction.from_json(None) is None
    for wrong in ({}, 3, {"basis": "guessed", "step_costs": [1.0]}, {"basis": "measured"}):
        with pytest.raises(CheckpointError):
            Prediction.from_json(wrong)
