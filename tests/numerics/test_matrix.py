"""Frozen parameters and buffers never move by a bit, and trained ones are what they would be if all
gradients were computed and the frozen ones discarded: across optimizers and ways of training. The
cases and their reference are in tests/matrix.py.
"""

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.swa_utils import AveragedModel, update_bn

from freezeout import FreezeOut, FreezeOutError, Schedule
from tests.matrix import (
    CHOICES,
    CHOICES_ON_GPU,
    EARLY,
    STEPS,
    Block,
    Case,
    Net,
    batch,
    pairs,
    pairwise_cases,
    prove,
)
from tests.models import conv_net, images, layer_tensors, run

CASES = list(pairwise_cases())


@pytest.mark.parametrize("choices", [CHOICES, CHOICES_ON_GPU], ids=["cpu", "gpu"])
def test_the_cases_cover_every_pair_of_choices(choices: dict[str, list[Any]]) -> None:
    met = set().union(*(pairs(case) for case in pairwise_cases(choices)))
    kinds = list(choices.values())
    assert len(met) == sum(len(a) * len(b) for a, b in combinations(kinds, 2))
    assert Case._fields == tuple(choices)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_stand_still_and_trained_equal_the_reference(case: Case) -> None:
    prove(case)


@pytest.mark.filterwarnings("ignore:no layer will be frozen")  # with some freeze_every
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
    with pytest.warns(UserWarning, match="in no optimizer .*'head.weight', 'head.bias'"):
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
