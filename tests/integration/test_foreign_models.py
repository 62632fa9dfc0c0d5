"""Models that this library does not know, each frozen with the two lines that FreezeOut adds."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from freezeout import FreezeOut, Schedule
from tests import models
from tests.models import ResNet, Reversed, TiedTransformer, layer_tensors, run, train

STEPS = 20
EARLY = Schedule(0.4, "linear")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
Data = Callable[[int], tuple[Tensor, Tensor]]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW(model.parameters(), 1e-2, weight_decay=0.1)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """Matrices inside the blocks to Muon; embeddings, norms and biases to AdamW."""
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, 1e-2), AdamW(rest, 1e-2)]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-2, nesterov=True)]


@pytest.mark.parametrize(
    ("make_model", "data", "make_optimizers"),
    [
        (ResNet, models.images, sgd),
        (ResNet, models.images, adamw),
        (Reversed, models.vectors, sgd),
        (Reversed, models.vectors, adamw),
        (TiedTransformer, models.tokens, sgd),
        (TiedTransformer, models.tokens, adamw),
        pytest.param(TiedTransformer, models.tokens, muon_and_adamw, marks=needs_muon),
    ],
)
def test_two_lines_freeze_in_execution_order_and_frozen_layers_stand_still(
    make_model: type[ResNet] | type[Reversed] | type[TiedTransformer],
    data: Data,
    make_optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizers = make_optimizers(model)
    freezer = FreezeOut(model, optimizers, STEPS, schedule=EARLY, example_inputs=data(0)[0])
    assert [layer.name for layer in freezer.layers] == list(make_model.names)
    before = [layer_tensors(layer) for layer in freezer.layers]
    frozen: list[list[Tensor]] = []
    froze: list[str] = []
    for step, layers in enumerate(train(model, optimizers, freezer, data, range(STEPS))):
        froze += [layer.name for layer in layers]
        assert freezer.num_frozen == len(froze)
        frozen += [layer_tensors(layer) for layer in layers]
        for layer, values in zip(freezer.layers, frozen, strict=False):
            assert all(map(torch.equal, layer_tensors(layer), values))
            assert not any(module.training for module in layer.modules)
        if layers and step < STEPS - 1:
            models.check_prefix_left_graph(freezer, *data(step))
    assert froze == list(make_model.names[:-1])
    for was, now in zip(before, map(layer_tensors, freezer.layers), strict=True):
        assert not any(map(torch.equal, was, now))  # each was trained
    last = freezer.layers[-1].parameters
    held = {p for optimizer in optimizers for p in optimizer.state}
    assert held == set(last)
    state = [s for o in optimizers for each in o.state.values() for s in each.values()]
    moments = sum(s.numel() for s in state if isinstance(s, Tensor) and s.ndim)
    per_weight = 1 if make_optimizers is sgd else 2
    assert moments == per_weight * sum(p.numel() for p in last)


def test_a_tied_weight_goes_on_learning_through_its_last_use_alone() -> None:
    torch.manual_seed(0)
    model = TiedTransformer()
    optimizers = sgd(model)
    freezer = FreezeOut(
        model, optimizers, STEPS, schedule=EARLY, example_inputs=models.tokens(0)[0]
    )
    training = train(model, optimizers, freezer, models.tokens, range(STEPS))
    while freezer.num_frozen == 0:
        next(training)
    assert model.wte.weight.requires_grad
    x, y = models.tokens(0)
    torch.manual_seed(0)
    torch.autograd.backward(models.loss_of(model, x, y))
    through_both = model.wte.weight.grad
    assert through_both is not None
    # By hand: the same network, its input a constant.
    torch.manual_seed(0)
    h = model.drop(model.wte(x) + model.wpe(torch.arange(6))).detach()
    for block in model.blocks:
        h = block(h)
    logits = model.lm_head(model.ln_f(h))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    (last_use,) = torch.autograd.grad(loss, [model.wte.weight])
    assert torch.equal(through_both, last_use)


def scheduler(kind: str, optimizer: Optimizer) -> LRScheduler:
    match kind:
        case "linear":
            return LinearLR(optimizer, 0.1, 1.0, total_iters=5)
        case "lambda":
            return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        case "sequential":
            parts: Sequence[LRScheduler] = [
                LinearLR(optimizer, 0.2, 1.0, total_iters=4),
                CosineAnnealingLR(optimizer, STEPS - 4),
            ]
            return SequentialLR(optimizer, list(parts), [4])
        case _:
            return OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)


# A SequentialLR of torch 2.7 warns of what it does itself.
@pytest.mark.filterwarnings(r"ignore:The epoch parameter in `scheduler.step\(\)`:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["linear", "lambda", "sequential", "one cycle"])
def test_a_users_scheduler_is_multiplied_by_eq_1_and_never_notices(kind: str, when: str) -> None:
    """Its own rates are those that it gives without FreezeOut, and nothing warns."""
    torch.manual_seed(0)
    plain = ResNet()
    (lonely,) = sgd(plain)
    alone = scheduler(kind, lonely)
    base: list[float] = []
    momenta: list[float] = []
    for _ in range(STEPS):
        base.append(lonely.param_groups[0]["lr"])
        momenta.append(lonely.param_groups[0]["momentum"])
        lonely.step()
        alone.step()

    model = ResNet()
    (optimizer,) = sgd(model)
    x = models.images(0)[0]
    groups = optimizer.param_groups
    schedule = scheduler(kind, optimizer) if when == "before" else None
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)
    schedule = schedule or scheduler(kind, optimizer)
    training = train(model, [optimizer], freezer, models.images, range(STEPS), schedule)
    for step in range(STEPS):
        factors = EARLY.factors(step, freezer.timeline)
        assert optimizer.param_groups[0]["lr"] == base[step]
        assert optimizer.param_groups[0]["momentum"] == momenta[step]
        assert freezer.learning_rates == tuple(base[step] * f for f in factors)
        next(training)
        assert optimizer.param_groups is groups
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert freezer.num_frozen == 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_rates_under_warm_up_are_those_that_the_weights_get(when: str) -> None:
    """Plain SGD with a gradient of one: each weight moves by its layer's rate."""
    model = models.linear_net(3)
    optimizer = SGD(model.parameters(), 0.5)
    warm_up = LinearLR(optimizer, 0.1, total_iters=6) if when == "before" else None
    freezer = FreezeOut(model, optimizer, 10, example_inputs=torch.randn(2, 5))
    warm_up = warm_up or LinearLR(optimizer, 0.1, total_iters=6)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        rates = freezer.learning_rates
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        warm_up.step()
        for i, (was, now) in enumerate(zip(before, model.parameters(), strict=True)):
            torch.testing.assert_close(was - now.detach(), torch.full_like(was, rates[i // 2]))
        freezer.step()


def test_frozen_training_is_the_same_with_and_without_a_new_run_of_the_same_seed() -> None:
    """Two runs agree bit for bit, so the other tests' comparisons mean something."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ResNet()
        optimizers = adamw(model)
        freezer = FreezeOut(model, optimizers, STEPS, example_inputs=models.images(0)[0])
        run(model, optimizers, freezer, models.images, range(STEPS))
        ends.append(model.state_dict())
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))
