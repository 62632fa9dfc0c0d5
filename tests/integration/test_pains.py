"""What hurts users who freeze by hand or with other tools: each shown on the naive way, which goes
wrong as reported, and then with FreezeOut, where it does not. (DDP, FSDP and torch.compile have
tests of their own.)"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from freezeout import FreezeOut, FreezeOutError, Schedule
from freezeout.versions import VERSION
from tests.models import (
    CLASSES,
    conv_net,
    graph_of,
    images,
    layer_tensors,
    linear_net,
    loss_of,
    run,
    vectors,
)

EARLY = Schedule(0.4, "linear")
STEPS = 20


def frozen_run(
    model: nn.Module,
    optimizer: Optimizer,
    data: Callable[[int], tuple[Tensor, Tensor]],
    steps: int = 9,
    **options: Any,
) -> FreezeOut:
    """After nine of twenty steps: the first of four layers has frozen at the eighth."""
    options = {"schedule": EARLY, "example_inputs": data(0)[0], **options}
    freezer = FreezeOut(model, optimizer, STEPS, **options)
    run(model, [optimizer], freezer, data, range(steps))
    return freezer


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), 0.1, momentum=0.9)


# --- 1. resuming ----------------------------------------------------------------------------


def test_resuming_after_a_freeze() -> None:
    """Naive: what is frozen is taken out of the optimizer, whose state then fits no new one
    (composer#1002, pytorch#192202)."""
    naive = linear_net()
    optimizer = momentum(naive)
    run(naive, [optimizer], None, vectors, range(3))
    frozen = set(naive[0].parameters())
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p not in frozen]
    with pytest.raises(KeyError):
        optimizer.state_dict()  # states of parameters that no group has
    for p in frozen:
        del optimizer.state[p]
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="parameter group that doesn't match"):
        momentum(linear_net()).load_state_dict(saved)

    model = linear_net()
    optimizer = momentum(model)
    freezer = frozen_run(model, optimizer, vectors)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, freezer)], file)
    run(model, [optimizer], freezer, vectors, range(9, 14))
    file.seek(0)
    other = linear_net()
    fresh = momentum(other)
    again = FreezeOut(other, fresh, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
    loaded: tuple[Any, ...] = (other, fresh, again)
    for part, state in zip(loaded, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert again.num_frozen == 1
    run(other, [fresh], again, vectors, range(9, 14))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


# --- 2. norms -------------------------------------------------------------------------------


def test_statistics_of_frozen_norms() -> None:
    """Naive: requires_grad alone; model.train() wakes the norm, and its statistics drift; with
    track_running_stats off it normalises by the batch (pytorch#86590, lightning#15062)."""
    naive = conv_net().train()
    naive[:4].requires_grad_(False)
    naive[1].eval()
    before = copy.deepcopy(naive[1].state_dict())
    run(naive, [SGD(naive[4:].parameters(), 0.1)], None, images, range(2))  # calls train()
    assert not torch.equal(naive[1].running_mean, before["running_mean"])  # type: ignore[arg-type]
    assert isinstance(naive[1], nn.BatchNorm2d)
    naive[1].track_running_stats = False
    naive[1].running_mean = naive[1].running_var = None
    naive.eval()
    x = images(0)[0]
    assert not torch.allclose(naive[:2](x)[:2], naive[:2](x[:2]))  # depends on the rest

    model = conv_net()
    freezer = frozen_run(model, momentum(model), images)
    held = layer_tensors(freezer.layers[0])
    model.train()
    for step in range(3):
        model(images(step)[0])
        model[:4](images(step)[0])
    assert all(map(torch.equal, held, layer_tensors(freezer.layers[0])))
    torch.testing.assert_close(model[:2](x)[:2], model[:2](x[:2]))


# --- 6. frozen weights that move ------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [momentum, lambda m: AdamW(m.parameters(), 0.01), lambda m: SGD(m.parameters(), 0.1, 0, 0, 1)],
    ids=["momentum", "decoupled decay", "weight decay"],
)
def test_weights_with_a_zero_gradient(build: Callable[[nn.Module], Optimizer]) -> None:
    """Naive: the gradient is set to zero. Momentum and weight decay move the weights on."""
    naive = linear_net()
    optimizer = build(naive)
    run(naive, [optimizer], None, vectors, range(3))
    before = naive[0].get_parameter("weight").detach().clone()
    torch.autograd.backward(loss_of(naive, *vectors(3)))
    for p in naive[0].parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not torch.equal(naive[0].get_parameter("weight"), before)

    model = linear_net()
    optimizer = build(model)
    freezer = frozen_run(model, optimizer, vectors)
    held = layer_tensors(freezer.layers[0])
    for step in range(9, 12):
        torch.autograd.backward(loss_of(model, *vectors(step)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        freezer.step()
    assert all(map(torch.equal, held, layer_tensors(freezer.layers[0])))


# --- 7. schedulers --------------------------------------------------------------------------


def test_schedulers_and_groups() -> None:
    """Naive: a group a layer, and the frozen layer's is removed. The scheduler, which goes by
    position, fails or gives each group another's rate (pytorch#104361, #62475)."""
    naive = linear_net(3)
    rates = (0.1, 0.2, 0.3)
    groups = [
        {"params": list(part.parameters()), "lr": lr}
        for part, lr in zip((naive[0], naive[2], naive[4]), rates, strict=True)
    ]
    by_layer = SGD(groups)
    scheduler = LambdaLR(by_layer, lambda step: 1.0)
    by_layer.step()
    scheduler.step()
    del by_layer.param_groups[0]
    by_layer.step()
    if VERSION < (2, 11):
        scheduler.step()
        assert [group["lr"] for group in by_layer.param_groups] == [0.1, 0.2]
    else:
        with pytest.raises(ValueError, match=r"zip\(\)"):
            scheduler.step()

    model = linear_net()
    optimizer = momentum(model)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
    for step in range(STEPS):
        base = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS))).item()
        factors = EARLY.factors(step, EARLY.timeline(4, STEPS))
        rates_now = [base * factor for factor in factors]
        assert freezer.learning_rates == pytest.approx(rates_now, abs=1e-7)
        run(model, [optimizer], freezer, vectors, range(step, step + 1), schedule)
    assert len(optimizer.param_groups) == 1


# --- 8. reentrant checkpointing -------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):
            checkpointed = self.training and i > 0
            x = checkpoint(part, x, use_reentrant=self.reentrant) if checkpointed else part(x)
            x = x.tanh()
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_behind_frozen_layers() -> None:
    """Naive: the first layer is frozen, and the next two, checkpointed, learn nothing from then
    on, without an error (transformers#21381)."""
    naive = Checkpointed(True).train()
    naive.parts[0].requires_grad_(False)
    torch.autograd.backward(loss_of(naive, *vectors(0)))
    assert all(p.requires_grad and p.grad is None for p in naive.parts[1:].parameters())
    assert naive.head.weight.grad is not None

    model = Checkpointed(True)
    optimizer = momentum(model)
    with pytest.raises(FreezeOutError, match=r"reentrant .* use_reentrant=False"):
        frozen_run(model, optimizer, vectors, 1)
    model = Checkpointed(False)
    freezer = frozen_run(model, momentum(model), vectors)
    assert freezer.num_frozen == 1
    torch.autograd.backward(loss_of(model.train(), *vectors(9)))
    assert all(p.grad is not None for p in model.parts[1:].parameters())


# --- 9. freezing that saves nothing; 10. counters that do not see it ------------------------


class Prompted(nn.Module):
    """A trained vector in front of the first weights, as a class token or a prompt is."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 5))
        self.blocks = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.token))  # type: ignore[no-any-return]


def backward_flops(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Counted from the operations that run, not from the modules."""
    loss = cross_entropy(model(x), y)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss)
    model.zero_grad()
    return int(counter.get_total_flops())


# A product of (8, 5) by (5, 5), and by (5, 3); a layer needs one for its weights' gradient and
# one for its input's.
BLOCK, HEAD = 2 * 8 * 5 * 5, 2 * 8 * 5 * CLASSES


def test_a_trained_parameter_in_front_of_what_is_frozen() -> None:
    """Naive: all blocks are frozen, the token in front is not: the gradient goes through them."""
    x, y = vectors(0)
    naive = Prompted().train()
    full = backward_flops(naive, x, y)
    assert full == 6 * BLOCK + 2 * HEAD
    naive.blocks.requires_grad_(False)
    assert backward_flops(naive, x, y) == 3 * BLOCK + 2 * HEAD  # of which none is needed
    assert len([node for node in graph_of(loss_of(naive, x, y)) if "Addmm" in node.name()]) == 4

    model = Prompted()
    freezer = frozen_run(model, momentum(model), vectors, 19)
    assert freezer.num_frozen == 3
    assert not model.token.requires_grad
    assert backward_flops(model.train(), x, y) == HEAD
    assert len([node for node in graph_of(loss_of(model, x, y)) if "Addmm" in node.name()]) == 1


def test_a_graph_that_was_not_built_again() -> None:
    """Naive: a tensor kept from before the freeze; everything behind it goes on being computed.
    With FreezeOut a warning names the parameter."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, CLASSES)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self.second(self.first(x))  # type: ignore[no-any-return]
            if self.kept is None:
                self.kept = self.first(x)
            return self.second(self.kept)  # type: ignore[no-any-return]

    x, y = vectors(0)

    def flops(model: nn.Module) -> int:
        loss = cross_entropy(model(x), y)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(loss, retain_graph=True)
        return int(counter.get_total_flops())

    naive = Keeping().train()
    assert flops(naive) == 2 * HEAD + BLOCK
    naive.first.requires_grad_(False)
    assert flops(naive) == 2 * HEAD + BLOCK

    model = Keeping()
    optimizer = SGD(model.parameters(), 0.0)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)
    model.train()
    while freezer.num_frozen == 0:
        model(x)
        freezer.step()
    with pytest.warns(UserWarning, match=r"parameter 'first\.\w+' of frozen layer 'first'"):
        model(x)


def test_a_count_of_operations_sees_every_freeze() -> None:
    """Naive counters multiply what the modules' shapes say, and see no difference (thop#194,
    flops-counter#103). torch's counts what runs: at each freeze, one layer's two products less,
    and the next one's product for an input that nobody needs any more."""

    def by_shapes(model: nn.Module) -> int:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return sum(2 * 2 * 8 * module.in_features * module.out_features for module in linear)

    model = linear_net()
    optimizer = momentum(model)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
    named: set[int] = set()
    counted: dict[int, int] = {}
    for step in range(STEPS):
        named.add(by_shapes(model))
        counted[freezer.num_frozen] = backward_flops(model, *vectors(step))
        run(model, [optimizer], freezer, vectors, range(step, step + 1))
    assert named == {6 * BLOCK + 2 * HEAD}
    # The first layer never needs its input's gradient.
    assert counted == {
        0: 5 * BLOCK + 2 * HEAD,
        1: 3 * BLOCK + 2 * HEAD,
        2: 1 * BLOCK + 2 * HEAD,
        3: HEAD,
    }
