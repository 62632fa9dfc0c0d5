"""Step costs, measured with a clock that goes on when a step is made, and at no other time."""

import doctest
import time
from collections.abc import Callable, Sequence

import pytest
import torch

import freezeout.profile.seconds
from freezeout import Layer, find_layers
from freezeout.errors import InvalidValue
from freezeout.profile import measure_step_costs
from tests.models import linear_net


class Training:
    """Steps whose cost is a function of how many layers are frozen and of the step's number."""

    def __init__(self, num_layers: int, cost: Callable[[int, int], float]) -> None:
        self.model = linear_net(num_layers)
        self.layers = find_layers(self.model, torch.randn(2, 5))
        self.cost = cost
        self.now = 0.0
        self.depths: list[int] = []

    def step(self) -> None:
        frozen = [layer.is_frozen for layer in self.layers]
        assert frozen == sorted(frozen, reverse=True)  # a prefix
        self.now += self.cost(sum(frozen), len(self.depths))
        self.depths.append(sum(frozen))

    def clock(self) -> float:
        return self.now


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    def make(num_layers: int, cost: Callable[[int, int], float]) -> Training:
        made = Training(num_layers, cost)
        monkeypatch.setattr(time, "perf_counter", made.clock)
        return made

    return make


Make = Callable[..., Training]


def untouched(layers: Sequence[Layer], training: bool = True) -> bool:
    modules = [module for layer in layers for module in layer.modules]
    return not any(layer.is_frozen for layer in layers) and all(
        [
            *(module.training is training and "train" not in vars(module) for module in modules),
            *(p.requires_grad for layer in layers for p in layer.parameters),
        ]
    )


def test_docstring_examples_hold() -> None:
    result = doctest.testmod(freezeout.profile.seconds)
    assert (result.failed, result.attempted) == (0, 3)


def test_each_depth_of_a_short_network_is_measured(training: Make) -> None:
    here = training(5, lambda depth, number: 10.0 - depth**2 / 4)
    costs = measure_step_costs(here.step, here.layers)
    assert costs == pytest.approx([10 - k**2 / 4 for k in range(5)])
    assert set(here.depths) == set(range(5))


def test_depths_between_are_interpolated(training: Make) -> None:
    here = training(20, lambda depth, number: 100.0 - depth**2 / 4)
    costs = measure_step_costs(here.step, here.layers, depths=5)
    measured = sorted(set(here.depths))
    assert measured == [0, 5, 10, 14, 19]
    assert [costs[k] for k in measured] == pytest.approx([100 - k**2 / 4 for k in measured])
    assert costs[7] == pytest.approx(costs[5] * 0.6 + costs[10] * 0.4)
    assert len(costs) == 20
    assert costs == sorted(costs, reverse=True)


def test_costs_in_proportion_to_depth_are_exact_at_all_depths(training: Make) -> None:
    here = training(77, lambda depth, number: 100.0 - depth)
    assert measure_step_costs(here.step, here.layers) == pytest.approx([100 - k for k in range(77)])


@pytest.mark.parametrize("num_layers", [1, 2, 20, 77])
def test_a_deep_network_takes_few_steps_and_two_come_beforehand(
    num_layers: int, training: Make
) -> None:
    here = training(num_layers, lambda depth, number: 1.0)
    measure_step_costs(here.step, here.layers)
    assert len(here.depths) == 2 + 5 * 2 * min(5, num_layers) <= 60
    assert here.depths[:2] == [0, 0]


def test_the_first_steps_are_slow_and_do_not_count(training: Make) -> None:
    here = training(4, lambda depth, number: 1e6 if number < 2 else 4.0 - depth)
    assert measure_step_costs(here.step, here.layers) == pytest.approx([4, 3, 2, 1])


def test_two_slow_rounds_of_five_change_nothing(training: Make) -> None:
    """The machine was busy: each round visits every depth, and each depth's median counts."""
    here = training(4, lambda depth, number: (4.0 - depth) * (50 if 10 <= number < 26 else 1))
    assert measure_step_costs(here.step, here.layers) == pytest.approx([4, 3, 2, 1])
    assert here.depths[2:] == [0, 0, 1, 1, 2, 2, 3, 3] * 5


def test_the_first_step_at_a_depth_does_not_count(training: Make) -> None:
    def cost(depth: int, number: int) -> float:
        is_first = number == 0 or here.depths[-1] != depth
        return 100.0 if is_first else 4.0 - depth

    here = training(4, cost)
    assert measure_step_costs(here.step, here.layers) == pytest.approx([4, 3, 2, 1])


def test_a_step_with_more_layers_frozen_does_not_cost_more(training: Make) -> None:
    here = training(5, lambda depth, number: [9.0, 7.0, 8.0, 3.0, 4.0][depth])
    assert measure_step_costs(here.step, here.layers) == pytest.approx([9, 7.5, 7.5, 3.5, 3.5])


def test_costs_between_two_depths_follow_a_shape(training: Make) -> None:
    flops = [float(2 ** (20 - k)) for k in range(20)]
    here = training(20, lambda depth, number: 3.0 + flops[depth] / 1000)
    costs = measure_step_costs(here.step, here.layers, shape=flops)
    assert costs == pytest.approx([3 + each / 1000 for each in flops])
    # A shape that says nothing between two depths leaves a straight line.
    flat = measure_step_costs(here.step, here.layers, shape=[1.0] * 20)
    assert flat == pytest.approx(measure_step_costs(here.step, here.layers))


@pytest.mark.parametrize("mode", [True, False])
def test_layers_are_as_they_were_afterwards(mode: bool, training: Make) -> None:
    here = training(4, lambda depth, number: 1.0)
    here.model.train(mode)
    measure_step_costs(here.step, here.layers)
    assert max(here.depths) == 3
    assert untouched(here.layers, mode)


def test_layers_are_as_they_were_after_a_step_that_fails(training: Make) -> None:
    here = training(4, lambda depth, number: 1.0 if depth < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_step_costs(here.step, here.layers)
    assert untouched(here.layers)


def test_the_accelerator_is_waited_for_before_and_after_each_step(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still queued when a step has returned takes time as well, and is the step's own."""
    here = training(2, lambda depth, number: 0.0)
    events: list[str] = []

    def wait(device: torch.device) -> None:
        assert device == torch.device("cuda", 0)
        here.now += 2.0 - here.depths[-1] if events[-1:] == ["step"] else 0.0
        events.append("wait")

    def step() -> None:
        here.step()
        events.append("step")

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    costs = measure_step_costs(step, here.layers, warmup=0, device=torch.device("cuda", 0))
    assert events == ["step", "wait", "step", "wait"] * 10
    assert costs == [2.0, 1.0]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"depths": 0}])
def test_nothing_to_measure_is_refused(wrong: dict[str, int], training: Make) -> None:
    here = training(3, lambda depth, number: 1.0)
    with pytest.raises(InvalidValue, match="rounds and depths must be at least 1"):
        measure_step_costs(here.step, here.layers, **wrong)  # type: ignore[arg-type]
    assert here.depths == []
