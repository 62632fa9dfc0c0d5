"""FreezeOut: exactness, the user's optimizer, saving and loading, and what it refuses."""

import copy
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from freezeout import FreezeOut, FreezeOutError, Frozen, Schedule
from freezeout.errors import CheckpointError, InvalidType, InvalidValue
from tests import models
from tests.models import conv_net, images, layer_tensors, linear_net, run, train, vectors

STEPS = 20
# The first three of four layers freeze after 8, 12 and 16 steps.
EARLY = Schedule(0.4, "linear")
ENDS = (8, 12, 16, 20)

Build = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda m: SGD(m.parameters(), 0.1),
    "nesterov": lambda m: SGD(m.parameters(), 0.1, 0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 1e-2, weight_decay=0.1, amsgrad=True),
    "adamw": lambda m: AdamW(m.parameters(), 1e-2, weight_decay=0.5),
    "adamw foreach": lambda m: AdamW(m.parameters(), 1e-2, weight_decay=0.5, foreach=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 1e-2, lr_decay=0.1),
    "tensor rate": lambda m: AdamW(m.parameters(), torch.tensor(1e-2), weight_decay=0.5),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def setup(
    build: Build = OPTIMIZERS["nesterov"], total: int = STEPS, **options: Any
) -> tuple[nn.Sequential, Optimizer, FreezeOut]:
    torch.manual_seed(0)
    model = conv_net()
    optimizer = build(model)
    options = {"schedule": EARLY, "example_inputs": images(0)[0], **options}
    return model, optimizer, FreezeOut(model, optimizer, total, **options)


def simple(
    build: Build = OPTIMIZERS["sgd"], total: int = STEPS, **options: Any
) -> tuple[nn.Sequential, Optimizer, FreezeOut]:
    """Four linear layers."""
    torch.manual_seed(0)
    model = linear_net()
    optimizer = build(model)
    options = {"schedule": EARLY, "example_inputs": vectors(0)[0], **options}
    return model, optimizer, FreezeOut(model, optimizer, total, **options)


def factors(schedule: Schedule, step: int, layers: int, total: int = STEPS) -> tuple[float, ...]:
    return schedule.factors(step, schedule.timeline(layers, total))


def update(model: nn.Module, optimizer: Optimizer, step: int = 0) -> None:
    torch.autograd.backward(models.loss_of(model, *vectors(step)))
    optimizer.step()
    optimizer.zero_grad()


def same_tensors(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return bool(a == b)


# --- freezing -------------------------------------------------------------------------------


@every_optimizer
def test_frozen_parameters_and_buffers_stay_bit_for_bit(build: Build) -> None:
    model, optimizer, freezer = setup(build)
    frozen: list[list[Tensor]] = []
    for layers in train(model, [optimizer], freezer, images, range(STEPS)):
        frozen += [layer_tensors(layer) for layer in layers]
        for layer, values in zip(freezer.layers, frozen, strict=False):
            assert all(map(torch.equal, layer_tensors(layer), values))
            assert all(not p.requires_grad and p.grad is None for p in layer.parameters)
            assert all(p not in optimizer.state for p in layer.parameters)
        trained = [p for layer in freezer.layers[len(frozen) :] for p in layer.parameters]
        assert all(p.requires_grad for p in trained)
    assert [len(values) for values in frozen] == [7, 7, 7]  # 4 parameters and 3 statistics
    assert set(optimizer.state) <= set(freezer.layers[-1].parameters)


@every_optimizer
def test_t_0_of_1_is_cosine_annealing_bit_for_bit(build: Build) -> None:
    model, optimizer, freezer = setup(build, schedule=Schedule(1))
    run(model, [optimizer], freezer, images, range(STEPS))
    torch.manual_seed(0)
    plain = conv_net()
    other = build(plain)
    cosine = LambdaLR(other, lambda step: factors(Schedule(1), step, 1)[0])
    run(plain, [other], None, images, range(STEPS), cosine)
    assert same_tensors(model.state_dict(), plain.state_dict())
    assert same_tensors(optimizer.state_dict()["state"], other.state_dict()["state"])
    assert freezer.num_frozen == 0


def test_step_returns_the_layers_that_it_froze_and_mostly_none() -> None:
    model, optimizer, freezer = simple()
    seen = [(freezer.num_frozen, freezer.next_freeze)]
    froze = {}
    for count, layers in enumerate(train(model, [optimizer], freezer, vectors, range(STEPS)), 1):
        assert freezer.step_count == count
        if layers:
            froze[count] = layers
            seen.append((freezer.num_frozen, freezer.next_freeze))
    assert froze == {end: [freezer.layers[i]] for i, end in enumerate(ENDS[:3])}
    assert seen == [(0, 8), (1, 12), (2, 16), (3, None)]
    assert freezer.freeze_steps == ENDS
    assert freezer.learning_rates == (0, 0, 0, 0)


def test_a_layer_whose_freeze_step_is_the_last_is_never_frozen() -> None:
    _, _, freezer = simple(schedule=Schedule(0.9, "linear"), total=5)
    assert freezer.freeze_steps == (5, 5, 5, 5)
    assert [freezer.step() for _ in range(5)] == [[]] * 5
    assert freezer.num_frozen == 0


def test_freeze_every_freezes_several_at_once() -> None:
    _, _, freezer = simple(freeze_every=8)
    froze = [len(freezer.step()) for _ in range(STEPS)]
    assert {i + 1: n for i, n in enumerate(froze) if n} == {8: 1, 16: 2}


@pytest.mark.parametrize("scale_lr", [False, True])
def test_without_annealing_layers_freeze_at_the_base_rate(scale_lr: bool) -> None:
    schedule = Schedule(0.4, "linear", scale_lr)
    _, _, freezer = simple(schedule=schedule, anneal=False)
    for _ in range(12):
        freezer.step()
    assert freezer.learning_rates == (0, 0, 0.1, 0.1)


def test_the_frozen_prefix_leaves_the_graph() -> None:
    model, optimizer, freezer = setup()
    for layers in train(model, [optimizer], freezer, images, range(STEPS)):
        if layers:
            x, y = images(1)
            models.check_prefix_left_graph(freezer, x, y)
            assert not any(m.training for layer in layers for m in layer.modules)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_are_ordinary_and_leave_it_frozen(
    clone: Callable[[nn.Module], nn.Module],
) -> None:
    model, optimizer, freezer = setup()
    run(model, [optimizer], freezer, images, range(13))
    other = clone(model)
    assert same_tensors(other.state_dict(), model.state_dict())
    assert all(m.training for m in other.modules())
    assert not any({"train", "__reduce_ex__"} & {*vars(m)} for m in other.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    assert all(not vars(p) for p in other.parameters())
    torch.autograd.backward(models.loss_of(other, *images(3)))
    assert all(p.grad is not None for p in other.parameters())
    assert freezer.num_frozen == 2
    models.check_prefix_left_graph(freezer, *images(1))
    assert not any(m.training for layer in freezer.layers[:2] for m in layer.modules)


def test_layers_that_no_optimizer_trains_are_not_counted_and_freeze_with_the_next() -> None:
    model = conv_net()
    optimizer = SGD([*model[4].parameters(), *model[12].parameters()], 0.1)
    with pytest.warns(UserWarning, match=r"in no optimizer .* \('0.weight', .* \('4' first\)"):
        freezer = FreezeOut(model, optimizer, 10, schedule=EARLY, example_inputs=images(0)[0])
    assert [layer.name for layer in freezer.layers] == ["4", "12"]
    assert {*model[0].parameters(), *model[4].parameters()} <= {*freezer.layers[0].parameters}
    run(model, [optimizer], freezer, images, range(4))
    assert freezer.num_frozen == 1
    assert not any(m.training for m in (model[0], model[1], model[4], model[5]))
    assert all(m.training for m in (model[7], model[8], model[12]))


def test_parameters_that_the_user_froze_stay_so() -> None:
    model = conv_net()
    model[:2].requires_grad_(False)
    model[12].requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"the layers in which nothing trains \(1: "):
        freezer = FreezeOut(model, optimizer, 10, schedule=EARLY, example_inputs=images(0)[0])
    assert [layer.name for layer in freezer.layers] == ["0", "4", "7"]
    assert freezer.num_frozen == 1
    run(model, [optimizer], freezer, images, range(10))
    freezer.release()
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 8 + [False] * 2


def test_low_rank_adapters_alone_are_trained_layer_by_layer() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 5).requires_grad_(False)
            self.down, self.up = nn.Linear(5, 1, bias=False), nn.Linear(1, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(5, 5).requires_grad_(False), Adapted(), Adapted(), Adapted())
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    freezer = FreezeOut(model, optimizer, 10, schedule=EARLY, example_inputs=vectors(0)[0])
    assert [layer.name for layer in freezer.layers] == ["0", "1", "2", "3"]
    assert freezer.freeze_steps == (0, 4, 7, 10)  # the times count the layers that train
    run(model, [optimizer], freezer, vectors, range(10))
    assert set(optimizer.state) == {p for p in model[3].parameters() if p.requires_grad}


# --- the user's optimizer -------------------------------------------------------------------


@every_optimizer
def test_visible_groups_and_the_shape_of_the_state_stay_the_users(build: Build) -> None:
    model, optimizer, freezer = setup(build)
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    before = copy.deepcopy({k: v for k, v in group.items() if k != "params"})
    numbers = list(range(len(list(model.parameters()))))
    for _ in train(model, [optimizer], freezer, images, range(STEPS)):
        assert optimizer.param_groups is groups
        assert groups == [group]
        assert {k: v for k, v in group.items() if k != "params"} == before
        saved = optimizer.state_dict()
        assert [g["params"] for g in saved["param_groups"]] == [numbers]
        assert set(saved["state"]) <= set(numbers)


def test_several_groups_keep_their_own_options() -> None:
    model = linear_net()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "lr": 0.2}, {"params": rest, "lr": 0.1, "momentum": 0.5}]
    optimizer = SGD(groups, lr=1, momentum=0.9)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
    assert freezer.learning_rates == pytest.approx([0.2 * 20 / end for end in ENDS], rel=1e-15)
    for step in range(STEPS):
        expected = factors(EARLY, step, 4)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        velocity = {m: (1 - m ** (step + 1)) / (1 - m) for m in (0.9, 0.5)}
        for i, (was, p) in enumerate(zip(before, model.parameters(), strict=True)):
            lr, momentum = (0.2, 0.9) if p.ndim == 2 else (0.1, 0.5)
            moved = torch.full_like(was, lr * expected[i // 2] * velocity[momentum])
            torch.testing.assert_close(was - p.detach(), moved, rtol=1e-4, atol=1e-6)
        freezer.step()


class Plain(Optimizer):
    """Gradient descent that keeps notes in its groups, and counts what it is shown."""

    def __init__(self, parameters: Any, lr: float, first_only: bool = False) -> None:
        super().__init__(parameters, {"lr": lr, "calls": 0, "shrink": 1.0})
        self.first_only = first_only
        self.shown: list[Any] = []
        self.fail = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.shown = [(g["lr"], list(g["params"])) for g in self.param_groups]
        loss = None if closure is None else closure()
        groups = self.param_groups[:1] if self.first_only else self.param_groups
        for group in groups:
            group["calls"] += 1
            group["lr"] *= group["shrink"]
        if self.fail:
            raise ZeroDivisionError("in the step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


@pytest.mark.parametrize("first_only", [False, True], ids=["each group", "the first group"])
def test_a_group_value_that_the_optimizer_changed_is_carried_back(first_only: bool) -> None:
    model, optimizer, freezer = simple(lambda m: Plain(m.parameters(), 0.5, first_only))
    group = optimizer.param_groups[0]
    group["shrink"] = 0.5
    for calls in range(1, 11):
        update(model, optimizer)
        assert group["calls"] == calls
        assert group["lr"] == pytest.approx(0.5 ** (calls + 1), rel=1e-12)
        freezer.step()


def test_frozen_layers_are_not_shown_to_the_optimizer() -> None:
    model, optimizer, freezer = simple(lambda m: Plain(m.parameters(), 1.0))
    assert isinstance(optimizer, Plain)
    for step in range(STEPS):
        update(model, optimizer)
        kept = freezer.layers[freezer.num_frozen :]
        rates = freezer.learning_rates[freezer.num_frozen :]
        assert optimizer.shown == [
            (rate, list(layer.parameters)) for rate, layer in zip(rates, kept, strict=True)
        ]
        assert freezer.step_count == step
        freezer.step()


def test_groups_stay_whole_while_all_layers_have_the_same_factor() -> None:
    """So that a plan which anneals nothing sends a GPU no more kernels than plain training."""
    model = linear_net()
    optimizer = Plain(model.parameters(), 1.0)
    plan = Frozen(1, then=Schedule(times=(0.5, 0.8, 1.0), scale_lr=False))
    freezer = FreezeOut(
        model, optimizer, STEPS, schedule=plan, anneal=False, example_inputs=vectors(0)[0]
    )
    for _ in range(STEPS):
        update(model, optimizer)
        kept = freezer.layers[freezer.num_frozen :]
        assert optimizer.shown == [(1.0, [p for layer in kept for p in layer.parameters])]
        freezer.step()
    freezer.release()
    annealed = FreezeOut(model, optimizer, STEPS, example_inputs=vectors(0)[0])
    update(model, optimizer)
    assert len(optimizer.shown) == len(annealed.layers) == 4


def test_a_group_added_in_the_middle_is_trained_at_its_layers_rate() -> None:
    model = linear_net()
    optimizer = Plain(list(model.parameters())[2:], 1.0)
    with pytest.warns(UserWarning, match="2 parameters .* are in no optimizer"):
        freezer = FreezeOut(model, optimizer, STEPS, example_inputs=vectors(0)[0])
    update(model, optimizer)
    extra = nn.Parameter(torch.zeros(3))  # a loss's, say: trained as the last layer is
    optimizer.add_param_group({"params": [extra], "lr": 4.0})
    freezer.step()
    update(model, optimizer)
    assert optimizer.shown[-1] == (4 * factors(Schedule(), 1, 3)[-1], [extra])


own_step = Plain.step  # before any instance, and so any hook


@pytest.mark.parametrize("parent_used_before", [False, True])
def test_a_step_that_calls_its_parents_step_is_split_once(parent_used_before: bool) -> None:
    class Parent(Plain):
        def step(self, closure: Any = None) -> Any:
            return own_step(self, closure)  # of its own, so that torch adds no hooks to it

    class Child(Parent):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    if parent_used_before:  # torch adds hooks to a class's step when its first instance is made
        Parent([nn.Parameter(torch.zeros(1))], 1.0)
    model, optimizer, freezer = simple(lambda m: Child(m.parameters(), 1.0))
    assert isinstance(optimizer, Plain)
    groups = optimizer.param_groups
    update(model, optimizer)
    assert [rate for rate, _ in optimizer.shown] == list(freezer.learning_rates)
    assert optimizer.param_groups is groups
    assert groups[0]["calls"] == 1


def test_an_optimizer_whose_layers_are_all_frozen_still_has_a_first_group() -> None:
    """Optimizers that keep a global value read `param_groups[0]` in their step."""

    class Global(Plain):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"]
            return super().step(closure)

    model = linear_net()
    optimizers = [Global(model[:1].parameters(), 0.1), SGD(model[1:].parameters(), 0.1)]
    freezer = FreezeOut(model, optimizers, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
    run(model, optimizers, freezer, vectors, range(STEPS))
    assert freezer.num_frozen == 3


@pytest.mark.parametrize("where", ["step", "closure", "hook"])
def test_an_exception_puts_the_users_groups_back(where: str) -> None:
    model, optimizer, freezer = simple(lambda m: Plain(m.parameters(), 1.0))
    assert isinstance(optimizer, Plain)
    groups, before = optimizer.param_groups, copy.deepcopy(optimizer.state_dict())

    def closure() -> Tensor:
        assert optimizer.param_groups is groups
        raise ZeroDivisionError("in the closure")

    def hook(*args: Any) -> None:
        raise ZeroDivisionError("in the hook")

    optimizer.fail = where == "step"
    handle = optimizer.register_step_pre_hook(hook) if where == "hook" else None
    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        optimizer.step(closure if where == "closure" else None)
    assert optimizer.param_groups is groups
    if where != "step":
        assert optimizer.state_dict() == before
    if handle is not None:
        handle.remove()
    optimizer.fail = False
    update(model, optimizer)  # and it works again
    assert [rate for rate, _ in optimizer.shown] == list(freezer.learning_rates)
    assert optimizer.param_groups is groups


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_sees_the_users_groups_and_its_loss_is_returned(keyword: bool) -> None:
    model, optimizer, freezer = simple(OPTIMIZERS["nesterov"])
    other, without_closure, freezer_of_other = simple(OPTIMIZERS["nesterov"])
    groups = optimizer.param_groups
    for step in range(10):

        def closure(step: int = step) -> Any:
            assert optimizer.param_groups is groups
            optimizer.zero_grad()
            loss = models.loss_of(model, *vectors(step))
            torch.autograd.backward(loss)
            return loss

        expected = models.loss_of(model, *vectors(step)).item()
        loss: Any = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.item() == expected
        freezer.step()
    run(other, [without_closure], freezer_of_other, vectors, range(10))
    assert same_tensors(model.state_dict(), other.state_dict())


def test_copies_and_pickles_of_the_optimizer_are_ordinary_ones() -> None:
    _, optimizer, _ = simple(OPTIMIZERS["nesterov"])
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "step" not in vars(other)
        parameter = other.param_groups[0]["params"][0]
        parameter.grad = torch.zeros_like(parameter)
        other.step()
        assert len(other.param_groups) == 1


def test_a_gradient_scaler_works_and_skipped_steps_count() -> None:
    model, optimizer, freezer = simple()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    for step in range(10):
        loss = models.loss_of(model, *vectors(step))
        if step < 9:
            loss = loss * float("inf")
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        freezer.step()
        changed = not same_tensors(model.state_dict(), before)
        assert changed == (step == 9)
    assert freezer.num_frozen == 1


def test_a_step_that_a_cuda_graph_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rates, and what is frozen, would be those of the capture for good."""
    model, optimizer, _ = simple(OPTIMIZERS["nesterov"])
    update(model, optimizer)
    groups, before = optimizer.param_groups, copy.deepcopy(model.state_dict())
    torch.autograd.backward(models.loss_of(model, *vectors(1)))
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(
            FreezeOutError, match=r"^SGD\.step\(\) runs in a CUDA graph capture"
        ) as e:
            optimizer.step()
    for advice in ("forward and backward passes alone", "anew", "compile_layers(freezer)"):
        assert advice in str(e.value)
    assert optimizer.param_groups is groups
    assert same_tensors(model.state_dict(), before)
    optimizer.step()  # outside of the capture
    assert not same_tensors(model.state_dict(), before)


# --- saving and loading ---------------------------------------------------------------------

AT = [0, 5, 7, 8, 9, 12, 15, 16, 19, 20]


class Run:
    """A model in training, with warm-up, so that there are four states to save."""

    def __init__(self, build: Build = OPTIMIZERS["nesterov"]) -> None:
        self.model, self.optimizer, self.freezer = setup(build)
        self.scheduler = LinearLR(self.optimizer, 0.2, total_iters=10)

    def train(self, steps: range) -> "Run":
        run(self.model, [self.optimizer], self.freezer, images, steps, self.scheduler)
        return self

    def parts(self) -> list[Any]:
        return [self.model, self.optimizer, self.scheduler, self.freezer]

    def save(self) -> list[Any]:
        return [copy.deepcopy(part.state_dict()) for part in self.parts()]

    def load(self, states: list[Any], order: tuple[int, ...] = (0, 1, 2, 3)) -> "Run":
        for i in order:
            self.parts()[i].load_state_dict(copy.deepcopy(states[i]))
        return self

    def standing(self) -> Any:
        """All that decides how training goes on."""
        return [
            *self.save()[:3],
            self.freezer.num_frozen,
            self.freezer.learning_rates,
            [layer.is_frozen for layer in self.freezer.layers],
            [module.training for module in self.model.modules()],
            [(p.requires_grad, p.grad) for p in self.model.parameters()],
        ]


@pytest.fixture(scope="module")
def lived() -> dict[int, tuple[list[Any], Any]]:
    """States and standing of one uninterrupted run, after each number of steps."""
    whole = Run()
    record = {0: (whole.save(), whole.standing())}
    for step in range(STEPS):
        whole.train(range(step, step + 1))
        record[step + 1] = (whole.save(), whole.standing())
    return record


@pytest.mark.parametrize("at", AT)
def test_loading_at_any_step_is_as_having_lived_through_it(
    at: int, lived: dict[int, tuple[list[Any], Any]]
) -> None:
    resumed = Run().load(lived[at][0])
    assert same_tensors(resumed.standing(), lived[at][1])
    resumed.train(range(at, STEPS))
    assert same_tensors(resumed.standing(), lived[STEPS][1])


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
@pytest.mark.parametrize(("start", "at"), [(0, 13), (13, 13), (18, 13), (18, 5), (13, 5), (9, 0)])
def test_the_order_of_loading_is_free_also_when_rolling_back(
    start: int, at: int, order: tuple[int, ...], lived: dict[int, tuple[list[Any], Any]]
) -> None:
    """Into a run that stands at `start`, the states of step `at`."""
    resumed = Run().train(range(start)).load(lived[at][0], (0, *order))
    resumed.train(range(at, at + 1))
    assert same_tensors(resumed.standing(), lived[at + 1][1])


def test_rolling_back_unfreezes() -> None:
    model, optimizer, freezer = setup()
    early = freezer.state_dict()
    run(model, [optimizer], freezer, images, range(17))
    assert freezer.num_frozen == 3
    freezer.load_state_dict(early)
    assert (freezer.num_frozen, freezer.step_count) == (0, 0)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert [len(freezer.step()) for _ in range(8)] == [0] * 7 + [1]


def test_loading_in_evaluation_mode_keeps_it() -> None:
    model, _, freezer = setup()
    for _ in range(13):
        freezer.step()
    model.eval()
    freezer.load_state_dict({**freezer.state_dict(), "step": 9, "num_frozen": 1})
    assert not any(m.training for m in model.modules())
    assert not model.train()[1].training
    assert model[5].training


def test_the_state_is_plain_values_that_torch_and_json_read_back(
    lived: dict[int, tuple[list[Any], Any]],
) -> None:
    state = lived[13][0][3]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state
    for read in (state, json.loads(json.dumps(state))):
        _, _, freezer = setup()
        freezer.load_state_dict(read)
        assert (freezer.step_count, freezer.num_frozen) == (13, 2)
        assert freezer.state_dict() == state


def test_loading_does_not_change_the_state_given() -> None:
    _, _, freezer = setup()
    state = freezer.state_dict()
    before = copy.deepcopy(state)
    _, _, other = setup()
    other.load_state_dict(state)
    other.step()
    other.step()
    assert state == before == freezer.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 30}, "total_steps was 20 and is now 30"),
        ({"freeze_every": 2}, "freeze_every was 1 and is now 2"),
        ({"anneal": False}, "anneal was True and is now False"),
        ({"schedule": Schedule(0.5, "linear")}, r"plan was .*0\.4.* and is now .*0\.5"),
        ({"schedule": Schedule(times=(0.1, 0.2, 0.3, 1))}, "plan was .* and is now"),
    ],
)
def test_a_state_of_another_schedule_is_refused_unless_asked_for(
    options: dict[str, Any], message: str
) -> None:
    _, _, freezer = setup()
    for _ in range(9):
        freezer.step()
    _, _, other = setup(**options)
    with pytest.raises(CheckpointError, match=f"{message}.*allow_schedule_change=True"):
        other.load_state_dict(freezer.state_dict())
    assert (other.step_count, other.num_frozen) == (0, 0)
    other.load_state_dict(freezer.state_dict(), allow_schedule_change=True)
    assert other.step_count == 9
    assert other.num_frozen >= 1


def test_lengthening_keeps_frozen_layers_frozen_also_after_saving_again() -> None:
    model, optimizer, freezer = setup()
    run(model, [optimizer], freezer, images, range(13))
    longer, other, lengthened = setup(total=60)  # layer 0 would freeze after 24 steps
    longer.load_state_dict(model.state_dict())
    lengthened.load_state_dict(freezer.state_dict(), allow_schedule_change=True)
    assert (lengthened.num_frozen, lengthened.next_freeze) == (2, 48)
    assert lengthened.learning_rates[:2] == (0, 0)
    assert lengthened.learning_rates[2:] == tuple(0.1 * f for f in factors(EARLY, 13, 4, 60)[2:])
    held = [layer_tensors(layer) for layer in lengthened.layers[:2]]
    run(longer, [other], lengthened, images, range(13, 20))
    assert same_tensors([layer_tensors(layer) for layer in lengthened.layers[:2]], held)
    _, _, again = setup(total=60)
    again.load_state_dict(lengthened.state_dict())
    assert (again.num_frozen, again.step_count) == (2, 20)


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    _, _, freezer = setup()
    for _ in range(9):
        freezer.step()
    state = freezer.state_dict()
    _, _, shorter = setup(total=8)
    with pytest.raises(CheckpointError, match="at step 9 of a run that now has total_steps = 8"):
        shorter.load_state_dict(state, allow_schedule_change=True)
    _, _, foreign = simple()
    with pytest.raises(
        CheckpointError, match="other layers: it has '4' as layer 1, this model '2'"
    ):
        foreign.load_state_dict(state, allow_schedule_change=True)
    model = linear_net(3)
    with pytest.warns(UserWarning, match="is one layer"):
        few = FreezeOut(model, SGD(model.parameters(), 0.1), STEPS, schedule=EARLY, layers=[model])
    with pytest.raises(CheckpointError, match="other layers"):
        few.load_state_dict(state)
    with pytest.raises(CheckpointError, match="no FreezeOut state: it has no 'step'"):
        freezer.load_state_dict({})
    with pytest.raises(CheckpointError, match="at step -1"):
        freezer.load_state_dict({**state, "step": -1})
    assert freezer.step_count == 9


@given(st.lists(st.integers(0, STEPS), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_num_frozen_depends_on_the_step_alone(jumps: list[int]) -> None:
    _, _, freezer = setup()
    state = freezer.state_dict()
    for step in jumps:
        freezer.load_state_dict({**state, "step": step})
        expected = sum(end <= step for end in ENDS[:3])
        assert freezer.num_frozen == expected
        assert [layer.is_frozen for layer in freezer.layers] == [i < expected for i in range(4)]
        assert freezer.learning_rates == tuple(0.1 * f for f in factors(EARLY, step, 4))
    freezer.release()


# --- release --------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "never"])
@every_optimizer
def test_release_gives_an_ordinary_model_and_optimizer_back(build: Build, when: str) -> None:
    torch.manual_seed(0)
    model = conv_net()
    optimizer = build(model)
    schedules = [CosineAnnealingLR(optimizer, 50)] if when == "before" else []
    own_step = vars(optimizer).get("step")
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=images(0)[0])
    if when == "after":
        schedules.append(CosineAnnealingLR(optimizer, 50))
    run(model, [optimizer], freezer, images, range(13))
    freezer.release()
    assert freezer.num_frozen == 0
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("train" not in vars(m) for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    if when != "after":
        assert vars(optimizer).get("step") is own_step
    ordinary = conv_net()
    ordinary.load_state_dict(model.state_dict())
    other = build(ordinary)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, by in ((model, optimizer), (ordinary, other)):
        run(trained, [by], None, images, range(13, 16))
    assert same_tensors(model.state_dict(), ordinary.state_dict())


def test_after_release_step_is_refused_and_a_new_freezeout_is_not() -> None:
    model, optimizer, freezer = setup()
    freezer.step()
    freezer.release()
    with pytest.raises(FreezeOutError, match=re.escape("step() after release()")):
        freezer.step()
    again = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=images(0)[0])
    freezer.release()  # nothing is left to release: the new one is left alone
    run(model, [optimizer], again, images, range(8))
    assert again.num_frozen == 1
    with pytest.raises(InvalidValue, match="another FreezeOut already drives this SGD"):
        FreezeOut(model, optimizer, STEPS, example_inputs=images(0)[0])


def test_loading_after_release_is_refused() -> None:
    _, _, freezer = setup()
    state = freezer.state_dict()
    freezer.release()
    with pytest.raises(FreezeOutError, match="release"):
        freezer.load_state_dict(state)


# --- what is refused, what warns ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"anneal": False}, {"schedule": Frozen(2)}])
def test_updates_past_the_end_move_nothing_and_are_warned_of_once(options: dict[str, Any]) -> None:
    model, optimizer, freezer = simple(total=3, **options)
    for _ in range(3):
        freezer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="after its total_steps = 3 steps") as seen:
        run(model, [optimizer], freezer, vectors, range(3))
    assert len(seen) == 1
    assert freezer.step_count == 3
    assert same_tensors(before, list(model.parameters()))
    assert freezer.state_dict()["step"] == 3


class ZeroRedundancyOptimizer(SGD):
    """Refused by its name, as torch.distributed's is not always there."""


def bad_optimizers(model: nn.Module) -> dict[str, Any]:
    sgd = SGD(model.parameters(), 0.1)
    driven = SGD(model.parameters(), 0.1)
    FreezeOut(model, driven, 10)
    return {
        "lbfgs": torch.optim.LBFGS(model.parameters()),
        "zero": [ZeroRedundancyOptimizer(model.parameters(), 0.1)],
        "none": None,
        "a class": SGD,
        "a list of something": [sgd, "adam"],
        "empty": [],
        "twice": [sgd, sgd],
        "driven": driven,
        "foreign": SGD(nn.Linear(2, 2).parameters(), 0.1),
    }


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("lbfgs", InvalidType, "LBFGS cannot be used with FreezeOut"),
        ("zero", InvalidType, "ZeroRedundancyOptimizer cannot be used .* FSDP2"),
        ("none", InvalidType, "must be a torch optimizer or a list of them, got None"),
        ("a class", InvalidType, "must be a torch optimizer or a list of them, got <class"),
        ("a list of something", InvalidType, "must be a torch optimizer, got str"),
        ("empty", InvalidValue, "the list of optimizers is empty"),
        ("twice", InvalidValue, "the same optimizer is listed twice"),
        (
            "driven",
            InvalidValue,
            r"another FreezeOut already drives this SGD; call its release\(\)",
        ),
        ("foreign", InvalidValue, "holds none of the model's parameters"),
    ],
)
def test_optimizers_that_cannot_be_driven_are_refused(
    case: str, error: type[FreezeOutError], message: str
) -> None:
    model = linear_net()
    optimizer = bad_optimizers(model)[case]
    with pytest.raises(error, match=message):
        FreezeOut(model, optimizer, 10)


def test_a_refused_optimizer_is_left_as_it_was() -> None:
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(InvalidValue, match="forward pass on example_inputs failed"):
        FreezeOut(model, optimizer, 10, example_inputs=torch.zeros(2, 9))
    assert "step" not in vars(optimizer)
    FreezeOut(model, optimizer, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total": 0}, InvalidValue, "total_steps must be at least 1, got 0"),
        ({"total": 1.5}, InvalidType, "total_steps must be a whole number, got 1.5"),
        ({"freeze_every": 0}, InvalidValue, "freeze_every must be at least 1, got 0"),
        ({"freeze_every": "2"}, InvalidType, "freeze_every must be a whole number, got '2'"),
        (
            {"schedule": "cubic"},
            InvalidType,
            r"schedule must be a plan, such as Schedule\(\.\.\.\) .* got str",
        ),
        ({"schedule": Schedule(times=(0.5, 1))}, InvalidValue, "times has 2 entries for 4 layers"),
        ({"layers": []}, InvalidValue, "layers is empty"),
        ({"anneal": "yes"}, InvalidType, "anneal must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, Any], error: type[FreezeOutError], message: str
) -> None:
    with pytest.raises(error, match=message):
        setup(**options)


@pytest.mark.parametrize("t_0", [0.1, 0.4])
def test_a_steep_start_is_shown_and_warned_of_above_ten_times(t_0: float) -> None:
    largest = 1 / t_0**3
    message = f"starts at {largest:.3g} times the base learning rate ({0.1 * largest:.3g})"
    with pytest.warns(UserWarning, match=re.escape(message)) as seen:
        _, _, freezer = simple(total=1000, schedule=Schedule(t_0))
    assert len(seen) == 1
    assert f"{0.1 * largest:.4g}" in str(freezer)


@pytest.mark.parametrize(
    "options", [{"schedule": Schedule(0.1, scale_lr=False)}, {"anneal": False}]
)
def test_no_steep_start_no_warning(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, freezer = simple(**{"schedule": Schedule(0.1), "total": 1000, **options})
    assert set(freezer.learning_rates) == {0.1}


def test_a_steep_start_that_the_user_made_an_error_leaves_the_optimizer_free() -> None:
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    steep = Schedule(0.1)
    with pytest.raises(UserWarning, match="starts at"):  # pytest makes warnings errors
        FreezeOut(model, optimizer, 1000, schedule=steep, example_inputs=vectors(0)[0])
    assert "step" not in vars(optimizer)
    FreezeOut(model, optimizer, 1000, example_inputs=vectors(0)[0])


# --- for people -----------------------------------------------------------------------------


def lines(text: str) -> Iterator[list[str]]:
    return (line.split() for line in text.splitlines())


def test_the_table_shows_every_layer() -> None:
    _, _, freezer = simple()
    for _ in range(9):
        freezer.step()
    head, columns, *rows = lines(str(freezer))
    assert " ".join(head) == "FreezeOut at step 9 of 20, 1 of 4 layers frozen"
    assert columns == ["layer", "parameters", "freezes", "at", "starts", "at", "now"]
    assert rows[0] == ["0", "30", "8", "2.5", "x", "lr", "frozen"]
    assert rows[3] == ["6", "18", "never", "1", "x", "lr", f"{freezer.learning_rates[3]:.4g}"]
    assert len(rows) == 5
    assert "if p.grad is not None" in " ".join(rows[4])
    assert repr(freezer).startswith("FreezeOut(Sequential, 4 layers, step 9 of 20, Schedule(")


def test_the_summary_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, *range(100, 800, 100), 900, *range(950, 1350, 50), *range(2000, 9000)])
    monkeypatch.setattr("freezeout.clock.time.perf_counter", lambda: float(next(clock)))
    _, _, freezer = simple(schedule=Schedule(times=(0.4, 0.8, 0.9, 1)))
    assert freezer.summary() == "froze 0 of 4 layers; made 0 of 20 steps"
    assert freezer.seconds_saved() is None
    for _ in range(9):
        freezer.step()
    for _ in range(7):
        freezer.step()
    # Eight steps of 100 s, then eight of 50 s (the first includes a pause; medians leave it out).
    saved = freezer.seconds_saved()
    assert saved is not None
    assert (saved.seconds, saved.share) == (400, 0.25)
    assert freezer.summary() == (
        "froze 2 of 4 layers; made 16 of 20 steps; 7 min saved (25% of the steps' time); a step "
        "takes 240 B of gradients less"
    )
