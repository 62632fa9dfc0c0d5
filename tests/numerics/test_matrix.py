"""Frozen parameters and buffers never move by a bit, and trained ones are what they would be if all
gradients were computed and the frozen ones discarded: across optimizers and ways of training.

Each case runs the library's loop beside a reference that knows nothing of it. In the reference
nothing is frozen: each layer has a parameter group, whose rate is set by hand, frozen layers are
put in evaluation mode by hand, and their gradients are discarded before clipping. The cases cover
every pair of choices.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from freezeout import FreezeOut, FreezeOutError, Frozen, Plan, Schedule
from tests.models import CLASSES, conv_net, images, layer_tensors, run

STEPS = 10
EARLY = Schedule(0.3, "linear")
PLANS: dict[str, Plan] = {
    "early": EARLY,
    "start": Frozen(1, then=EARLY),
    "static": Frozen(2),
}
Groups = list[dict[str, Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(5, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(relu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Four layers with batch statistics, dropout, matrices and vectors; takes (batch, 5)."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, CLASSES)
        self.checkpointing = checkpointing

    def layers(self) -> list[nn.Module]:
        return [self.stem, *self.blocks, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            if self.checkpointing and layer is not self.head:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 5, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def simple(kind: Any, **options: Any) -> Callable[[Groups], list[Optimizer]]:
    return lambda groups: [kind(groups, **options)]


def muon_and_adamw(groups: Groups) -> list[Optimizer]:
    """The blocks' matrices to Muon, which is frozen before the end; the rest to AdamW."""
    inside = {(5, 10), (10, 5)}
    matrices = [{"params": [p for p in g["params"] if tuple(p.shape) in inside]} for g in groups]
    rest = [{"params": [p for p in g["params"] if tuple(p.shape) not in inside]} for g in groups]
    return [
        Muon([g for g in matrices if g["params"]], lr=0.02, weight_decay=0.1),
        AdamW([g for g in rest if g["params"]], lr=0.01, weight_decay=0.1),
    ]


OPTIMIZERS: dict[str, Callable[[Groups], list[Optimizer]]] = {
    "sgd": simple(SGD, lr=0.1, weight_decay=0.05),
    "momentum": simple(SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": simple(SGD, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    "sgd fused": simple(SGD, lr=0.1, momentum=0.9, weight_decay=0.05, fused=True),
    "adam": simple(Adam, lr=0.01, weight_decay=0.05, amsgrad=True),
    "adamw": simple(AdamW, lr=0.01, weight_decay=0.5),
    "adamw foreach": simple(AdamW, lr=0.01, weight_decay=0.5, foreach=True),
    "adamw fused": simple(AdamW, lr=0.01, weight_decay=0.5, fused=True),
    "rmsprop": simple(RMSprop, lr=0.003, momentum=0.9, weight_decay=0.05, centered=True),
    "adagrad": simple(Adagrad, lr=0.03, lr_decay=0.1, weight_decay=0.05),
    "muon and adamw": muon_and_adamw,
}
CHOICES: dict[str, list[Any]] = {
    "optimizer": list(OPTIMIZERS),
    "zero_grad": ["none", "zeros", "model", "before"],
    "train_each_step": [True, False],
    "micro_batches": [1, 3],
    "clip": [None, "norm", "value"],
    "precision": ["fp32", "bf16", "scaler", "bf16 and scaler"],
    "average": [None, "ema", "swa"],
    "checkpointing": [False, True],
    "scheduler": [None, "before", "after"],
    "plan": list(PLANS),
}


class Case(NamedTuple):
    optimizer: str
    zero_grad: str
    train_each_step: bool
    micro_batches: int
    clip: str | None
    precision: str
    average: str | None
    checkpointing: bool
    scheduler: str | None
    plan: str


def pairs(values: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    return {(i, values[i], j, values[j]) for i, j in combinations(range(len(values)), 2)}


def pairwise_cases() -> Iterator[Case]:
    """Few cases, such that each two choices of different kinds meet in one: greedily."""
    options = list(CHOICES.values())
    waiting = {
        (i, a, j, b)
        for i, j in combinations(range(len(options)), 2)
        for a in options[i]
        for b in options[j]
    }
    while waiting:
        i, a, j, b = min(waiting, key=repr)
        values: dict[int, Any] = {i: a, j: b}
        for k, choices in enumerate(options):
            if k not in values:
                # The choice that meets most that it has not met.
                values[k] = max(
                    choices,
                    key=lambda c: sum(
                        (min((n, v), (k, c), key=lambda nv: nv[0])
                         + max((n, v), (k, c), key=lambda nv: nv[0]))
                        in waiting
                        for n, v in values.items()
                    ),
                )  # fmt: skip
        case = [values[k] for k in range(len(options))]
        waiting -= pairs(case)
        yield Case(*case)


CASES = list(pairwise_cases())


def test_the_cases_cover_every_pair_of_choices() -> None:
    met = set().union(*(pairs(case) for case in CASES))
    kinds = list(CHOICES.values())
    assert len(met) == sum(len(a) * len(b) for a, b in combinations(kinds, 2))


class Training:
    """A model and what a user trains it with; `update` makes one update, as a user would."""

    def __init__(self, case: Case, by_layer: bool) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = Net(case.checkpointing)
        groups: Groups = (
            [{"params": list(layer.parameters())} for layer in self.model.layers()]
            if by_layer
            else [{"params": list(self.model.parameters())}]
        )
        self.optimizers = OPTIMIZERS[case.optimizer](groups)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=8.0, growth_interval=3, enabled="scaler" in case.precision
        )
        self.average: AveragedModel | None = None
        if case.average == "ema":
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(0.8),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
        elif case.average == "swa":
            self.average = AveragedModel(self.model)

    def update(self, step: int, between: Callable[[], None] = lambda: None) -> None:
        case, n = self.case, self.case.micro_batches
        torch.manual_seed(step)
        if case.train_each_step:
            self.model.train()
        if case.zero_grad == "before":
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16)
        for micro in range(n):
            x, y = batch(n * step + micro)
            with autocast if "bf16" in case.precision else nullcontext():
                loss = cross_entropy(self.model(x), y) / n
            torch.autograd.backward(self.scaler.scale(loss))
        between()
        if case.clip is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            if case.clip == "norm":
                clip_grad_norm_(self.model.parameters(), 0.5)
            else:
                clip_grad_value_(self.model.parameters(), 0.02)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            if case.zero_grad in ("none", "zeros"):
                optimizer.zero_grad(set_to_none=case.zero_grad == "none")
        if case.zero_grad == "model":
            self.model.zero_grad()
        if self.average is not None and (case.average == "ema" or step >= STEPS // 2):
            self.average.update_parameters(self.model)


def reference(case: Case) -> Training:
    """All gradients computed, those of frozen layers discarded before clipping; rates by hand."""
    training = Training(case, by_layer=True)
    layers = training.model.layers()
    plan = PLANS[case.plan]
    timeline = plan.timeline(len(layers), STEPS)
    ends = [STEPS if end is None else end for end in timeline.freeze_steps]
    of_parameter = {p: i for i, layer in enumerate(layers) for p in layer.parameters()}
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    base = [group["lr"] for group in groups]
    for step in range(STEPS):
        # What a warm-up over four updates gives, then each layer's factor.
        warm_up = 1.0 if case.scheduler is None else min(1.0, 0.25 + 0.75 * step / 4)
        factors = plan.factors(step, timeline)
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * warm_up * factors[of_parameter[group["params"][0]]]
        if step == 0:
            training.model.train()
        # A frozen layer's norms and dropout do nothing, whatever train() says.
        for layer, end in zip(layers, ends, strict=True):
            if end <= step:
                for module in layer.modules():
                    module.training = False
                layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign,misc]

        def discard(step: int = step) -> None:
            for parameter, i in of_parameter.items():
                if ends[i] <= step:
                    parameter.grad = None

        discard()
        # An optimizer without gradients would stop the scaler: it has nothing to do.
        every = training.optimizers
        training.optimizers = [
            optimizer
            for optimizer in every
            if any(
                ends[of_parameter[p]] > step for g in optimizer.param_groups for p in g["params"]
            )
        ]
        training.update(step, discard)
        training.optimizers = every
    return training


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_frozen_stand_still_and_trained_equal_the_reference(case: Case) -> None:
    training = Training(case, by_layer=False)
    model, optimizers = training.model, training.optimizers

    def warm_ups() -> list[LinearLR]:
        return [LinearLR(optimizer, 0.25, total_iters=4) for optimizer in optimizers]

    schedulers = warm_ups() if case.scheduler == "before" else []
    plan = PLANS[case.plan]
    freezer = FreezeOut(model, optimizers, STEPS, schedule=plan, example_inputs=batch(0)[0])
    schedulers += warm_ups() if case.scheduler == "after" else []
    assert [set(layer.parameters) for layer in freezer.layers] == [
        set(layer.parameters()) for layer in model.layers()
    ]
    awake: list[str] = []

    def record(module: nn.Module, args: object) -> None:
        frozen = {m for layer in freezer.layers[: freezer.num_frozen] for m in layer.modules}
        if module in frozen and module.training:
            awake.append(f"{module} at step {freezer.step_count}")

    for module in model.modules():
        module.register_forward_pre_hook(record)
    frozen = [layer_tensors(layer) for layer in freezer.layers[: freezer.num_frozen]]
    for step in range(STEPS):
        training.update(step)
        for scheduler in schedulers:
            scheduler.step()
        for layer, values in zip(freezer.layers, frozen, strict=False):
            assert all(map(torch.equal, layer_tensors(layer), values)), (layer, step)
            assert all(p.grad is None for p in layer.parameters)
        frozen += [layer_tensors(layer) for layer in freezer.step()]
    assert len(frozen) == (2 if case.plan == "static" else 3)
    assert awake == []
    # The norm of two optimizers' gradients is summed in another order.
    exact = case.optimizer != "muon and adamw" or case.clip != "norm"
    expected = reference(case)
    pairs_of_models: list[tuple[nn.Module, nn.Module]] = [(model, expected.model)]
    if training.average is not None and expected.average is not None:
        pairs_of_models.append((training.average, expected.average))
    for ours, theirs in pairs_of_models:
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(
                ours.state_dict()[name],
                value,
                rtol=0 if exact else 1e-5,
                atol=0 if exact else 1e-6,
            )
    assert training.scaler.get_scale() == expected.scaler.get_scale()


@given(
    kind=st.sampled_from(
        [
            (SGD, {"momentum": 0.9, "maximize": True}),
            (SGD, {"momentum": 0.5, "nesterov": True, "foreach": True}),
            (Adam, {"amsgrad": True, "decoupled_weight_decay": True}),
            (AdamW, {"maximize": True, "foreach": False}),
            (RMSprop, {"momentum": 0.9}),
            (Adagrad, {"initial_accumulator_value": 0.1}),
            (torch.optim.NAdam, {"momentum_decay": 0.01}),
            (torch.optim.Adamax, {}),
            (torch.optim.ASGD, {"t0": 0}),
            (torch.optim.Adadelta, {}),
        ]
    ),
    lr=st.floats(1e-3, 0.5),
    weight_decay=st.sampled_from([0.0, 0.3]),
    t_0=st.floats(0.05, 1.0),
    freeze_every=st.integers(1, 4),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_nothing_frozen_ever_moves(
    kind: tuple[Any, dict[str, Any]],
    lr: float,
    weight_decay: float,
    t_0: float,
    freeze_every: int,
    zeros: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Net()
    optimizer = kind[0](model.parameters(), lr=lr, weight_decay=weight_decay, **kind[1])
    schedule = Schedule(t_0, "linear", scale_lr=False)
    freezer = FreezeOut(
        model,
        optimizer,
        8,
        schedule=schedule,
        example_inputs=batch(0)[0],
        freeze_every=freeze_every,
    )
    frozen: list[list[Tensor]] = []
    for step in range(8):
        model.train()
        x, y = batch(seed + step)
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not zeros)
        for layer, values in zip(freezer.layers, frozen, strict=False):
            assert all(map(torch.equal, layer_tensors(layer), values))
        frozen += [layer_tensors(layer) for layer in freezer.step()]
    assert len(frozen) == sum(end is not None and end < 8 for end in freezer.freeze_steps)
    freezer.release()


def test_training_is_false_in_frozen_modules_however_they_are_called() -> None:
    """By the model, by themselves, and each submodule directly, after train() on any of them."""
    model = Net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=batch(0)[0])
    run(model, [optimizer], freezer, batch, range(8))
    frozen = {module for layer in freezer.layers[: freezer.num_frozen] for module in layer.modules}
    modes: list[bool] = []
    for module in frozen:
        module.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    for module in model.modules():
        module.train()
        model(batch(0)[0])
    assert isinstance(model.blocks[0], Block)
    for part in (model.stem, model.blocks[0], *model.blocks[0].children()):
        x = torch.randn(6, 10 if part is model.blocks[0].down else 5)
        before = copy.deepcopy(part.state_dict())
        part.train()(x)
        assert all(map(torch.equal, before.values(), part.state_dict().values()))
    assert len(modes) > 50
    assert not any(modes)


# --- averaged copies ------------------------------------------------------------------------


def averaged(made_at: int) -> tuple[nn.Sequential, FreezeOut, AveragedModel]:
    torch.manual_seed(0)
    model = conv_net()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would change the statistics, and frozen copies have none
    optimizer = SGD(model.parameters(), 0.1, 0.9)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=images(0)[0])
    run(model, [optimizer], freezer, images, range(made_at))
    average = AveragedModel(model)
    for step in range(made_at, STEPS):
        run(model, [optimizer], freezer, images, range(step, step + 1))
        average.update_parameters(model)
    return model, freezer, average


@pytest.mark.parametrize("made_at", [0, 4, 9])
def test_update_bn_gives_an_averaged_copy_statistics_of_its_own_weights(made_at: int) -> None:
    """The same as for an ordinary network with the averaged weights; none of frozen norms is
    left at zero, and the model in training notices nothing."""
    model, _, average = averaged(made_at)
    before = copy.deepcopy(model.state_dict())
    plain = conv_net()
    plain.load_state_dict(average.module.state_dict())
    plain[3].p = 0.0  # type: ignore[assignment]
    batches = [images(step)[0] for step in range(3)]
    update_bn(batches, average)
    update_bn(batches, plain)
    ours = average.module.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in plain.state_dict().items())
    assert ours["1.num_batches_tracked"] == 3
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_update_bn_on_the_model_in_training_is_refused() -> None:
    model, freezer, _ = averaged(0)
    before = layer_tensors(freezer.layers[0])
    with pytest.raises(FreezeOutError, match=r"update_bn.* averaged copy, or call .*release"):
        update_bn([images(0)[0]], model)
    assert all(map(torch.equal, before, layer_tensors(freezer.layers[0])))
    freezer.release()
    update_bn([images(0)[0]], model)
    assert model[1].num_batches_tracked == 1


# --- gradient scalers -----------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam, Adagrad, RMSprop])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_scaler_steps_an_optimizer_all_of_whose_layers_are_frozen(
    kind: Any, options: dict[str, bool], unscale: bool
) -> None:
    if kind is RMSprop and "fused" in options:
        pytest.skip("there is none")
    model = Net()
    early, late = [list(model.stem.parameters()), [*model.blocks.parameters()]], model.head
    optimizers = [kind(early[0], lr=0.01, **options), SGD([*early[1], *late.parameters()], 0.01)]
    own = vars(optimizers[0]).get("_step_supports_amp_scaling")
    freezer = FreezeOut(model, optimizers, STEPS, schedule=EARLY, example_inputs=batch(0)[0])
    beginning = freezer.state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def update(scale: float = 1.0) -> None:
        x, y = batch(freezer.step_count)
        torch.autograd.backward(scaler.scale(cross_entropy(model(x), y) * scale))
        for optimizer in optimizers:
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        freezer.step()

    while freezer.num_frozen == 0:
        update()
    before = [layer_tensors(layer) for layer in freezer.layers]
    update(float("inf"))  # skipped, for all
    assert scaler.get_scale() == 2.0
    after = [layer_tensors(layer) for layer in freezer.layers]
    assert all(map(torch.equal, before[3], after[3]))
    update()
    assert all(map(torch.equal, before[0], layer_tensors(freezer.layers[0])))
    assert not any(map(torch.equal, before[3], layer_tensors(freezer.layers[3])))
    freezer.load_state_dict(beginning)
    assert vars(optimizers[0]).get("_step_supports_amp_scaling") is own
    before = [layer_tensors(layer) for layer in freezer.layers]
    update()
    assert not any(map(torch.equal, before[0], layer_tensors(freezer.layers[0])))
    freezer.load_state_dict({**beginning, "step": 4})
    freezer.release()
    assert vars(optimizers[0]).get("_step_supports_amp_scaling") is own


def test_a_group_added_to_a_frozen_optimizer_is_not_trained_on_scaled_gradients() -> None:
    model = Net()
    optimizers = [SGD(model.stem.parameters(), 0.01), SGD([*model.blocks.parameters()], 0.01)]
    freezer = FreezeOut(model, optimizers, STEPS, schedule=EARLY, example_inputs=batch(0)[0])
    freezer.load_state_dict({**freezer.state_dict(), "step": 5})
    extra = nn.Parameter(torch.zeros(2))
    optimizers[0].add_param_group({"params": [extra]})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.autograd.backward(scaler.scale(extra.sum()))
    with pytest.raises(FreezeOutError, match="gradients may still be scaled: skip this step"):
        scaler.step(optimizers[0])
    assert torch.equal(extra.detach(), torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    extra.grad = None
    torch.autograd.backward(scaler.scale(extra.sum()))
    scaler.step(optimizers[0])
    assert extra.detach()[0] < 0
