"""The library against `tests/reference.py`, the paper written out literally."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from freezeout import FreezeOut, Schedule
from freezeout.schedule import POWERS, HowScale
from tests import reference

STRATEGIES: list[tuple[HowScale, bool]] = [
    (how_scale, scale_lr)
    for how_scale in ("linear", "squared", "cubic")
    for scale_lr in (False, True)
]
every_strategy = pytest.mark.parametrize(("how_scale", "scale_lr"), STRATEGIES)
ALPHA, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 1e-2, 50


def network() -> nn.Sequential:
    """Layers as a list: three of convolution + norm, one of two modules more, a classifier."""
    torch.manual_seed(0)
    widths = [3, 4, 5, 4]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 3))).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 6, 3, 4, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (STEPS, 6), generator=generator)
    return list(zip(x, y, strict=True))


def by_the_paper(how_scale: HowScale, scale_lr: bool) -> nn.Sequential:
    model = network()
    ends = reference.freeze_iterations(Fraction(1, 2), POWERS[how_scale], 4, STEPS)
    reference.train(list(model), cross_entropy, data(), ends, ALPHA, scale_lr, MOMENTUM, DECAY)
    return model


@every_strategy
@pytest.mark.parametrize(("t_0", "num_layers"), [("0.8", 20), ("0.5", 5), ("0.1", 3), ("0.3", 1)])
def test_learning_rates_agree_with_eq_1_at_every_step(
    how_scale: HowScale, scale_lr: bool, t_0: str, num_layers: int
) -> None:
    schedule = Schedule(float(t_0), how_scale, scale_lr)
    for total in (37, 1000):
        ends = reference.freeze_iterations(Fraction(t_0), POWERS[how_scale], num_layers, total)
        assert schedule.freeze_steps(num_layers, total) == tuple(ends)
        for step in range(total + 1):
            expected = [reference.learning_rate(0.1, step, e, total, scale_lr) for e in ends]
            rates = [0.1 * f for f in schedule.factors(step, schedule.timeline(num_layers, total))]
            assert rates == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert rates == [0.0] * num_layers


@every_strategy
def test_weights_and_rates_agree_with_the_paper_over_50_steps(
    how_scale: HowScale, scale_lr: bool
) -> None:
    expected = by_the_paper(how_scale, scale_lr)
    ends = reference.freeze_iterations(Fraction(1, 2), POWERS[how_scale], 4, STEPS)
    model = network()
    optimizer = torch.optim.SGD(
        model.parameters(), ALPHA, MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    schedule = Schedule(0.5, how_scale, scale_lr)
    batches = data()
    freezer = FreezeOut(model, optimizer, STEPS, schedule=schedule, example_inputs=batches[0][0])
    assert [set(layer.parameters) for layer in freezer.layers] == [
        set(part.parameters()) for part in model
    ]
    for step, (x, y) in enumerate(batches):
        model.train()
        rates = [reference.learning_rate(ALPHA, step, e, STEPS, scale_lr) for e in ends]
        assert freezer.learning_rates == pytest.approx(rates, rel=1e-12, abs=1e-12)
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert freezer.num_frozen == 3
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)


def test_the_six_strategies_give_six_different_networks() -> None:
    """So agreement with the oracle says which one was run."""
    weights = [by_the_paper(*strategy)[0][0].weight for strategy in STRATEGIES]  # type: ignore[index]
    for i, one in enumerate(weights):
        assert all((one - other).abs().max() > 1e-6 for other in weights[:i])
