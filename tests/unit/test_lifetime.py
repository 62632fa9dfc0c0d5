"""A run's beginning and end: interrupted runs, copies, models used again, states that are loaded;
and what happens behind FreezeOut's back."""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from freezeout import FreezeOut, Frozen, Layer, PrefixCache, Schedule, find_layers, thaw
from freezeout.cost import saving
from freezeout.errors import CheckpointError, FreezeOutError, InvalidValue
from tests.models import conv_net, images, linear_net, loss_of, run, vectors

STEPS = 20
EARLY = Schedule(0.4, "linear")
OURS = {"train", "reset_running_stats", "__reduce_ex__", "__deepcopy__"}


def begun(steps: int, net: Any = conv_net, data: Any = images) -> tuple[nn.Sequential, FreezeOut]:
    """A run of which some steps have been made, in which the optimizer is not kept."""
    torch.manual_seed(0)
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=data(0)[0])
    run(model, [optimizer], freezer, data, range(steps))
    return model, freezer


def is_ordinary(model: nn.Module) -> bool:
    """Everything trains, and nothing of ours is left on it."""
    parts = [*model.modules(), *model.parameters()]
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return (
        all(p.requires_grad for p in model.parameters())
        and all(m.training for m in model.modules())
        and not any(OURS & {*vars(part)} for part in parts)
        and not hooks
    )


def test_the_end_of_a_with_block_releases() -> None:
    model = conv_net()
    optimizer = SGD(model.parameters(), 0.1)
    with FreezeOut(model, optimizer, STEPS, schedule=Frozen(2), layers=None) as freezer:
        assert not is_ordinary(model)
        run(model, [optimizer], freezer, images, range(2))
    assert is_ordinary(model)
    assert not optimizer._optimizer_step_pre_hooks
    with (
        pytest.raises(KeyboardInterrupt),
        FreezeOut(model, optimizer, STEPS, schedule=Frozen(2)) as freezer,
    ):
        raise KeyboardInterrupt
    assert is_ordinary(model)


def test_thaw_makes_an_ordinary_model_of_any() -> None:
    model, freezer = begun(13)
    assert not is_ordinary(model)
    assert thaw(model)
    assert is_ordinary(model)
    assert freezer.num_frozen == 0  # it was released
    assert not thaw(model)
    assert not thaw(conv_net())


def test_thaw_when_what_drove_the_model_is_gone() -> None:
    model, freezer = begun(13)
    model[0].bias.requires_grad  # noqa: B018
    del freezer
    import gc

    gc.collect()
    assert not is_ordinary(model)
    assert thaw(model)
    assert is_ordinary(model)


def test_thaw_of_a_part_and_what_the_user_froze_stays_so() -> None:
    model = linear_net()
    model[0].requires_grad_(False)
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(3), example_inputs=vectors(0)[0]
    )
    assert thaw(model[2])
    assert freezer.num_frozen == 0
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 6


# --- a model that is used again -------------------------------------------------------------


@pytest.mark.parametrize("thawed_by_hand", [False, True])
def test_a_second_run_takes_the_model_over(thawed_by_hand: bool) -> None:
    model, freezer = begun(13)
    if thawed_by_hand:  # as people do
        model.requires_grad_(True)
        model.train()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="an earlier FreezeOut had left the model frozen in part"):
        again = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=images(0)[0])
    assert [layer.name for layer in again.layers] == [layer.name for layer in freezer.layers]
    before = [p.detach().clone() for p in model.parameters()]
    run(model, [optimizer], again, images, range(STEPS))
    for was, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.ndim == 1 or not torch.equal(was, parameter)
    assert again.num_frozen == 3


def test_an_optimizer_that_was_built_of_what_still_trained_is_refused() -> None:
    """The head alone would be trained."""
    model, _ = begun(13)
    few = SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # as a cell of a notebook that is run again
        with pytest.raises(
            InvalidValue, match=r"does not hold parameter '0\.weight', which an ear"
        ):
            FreezeOut(model, few, STEPS, example_inputs=images(0)[0])
    assert thaw(model)
    assert is_ordinary(model)
    FreezeOut(model, SGD(model.parameters(), 0.1), STEPS, example_inputs=images(0)[0])


def test_models_that_share_a_module_without_parameters_have_a_driver_each() -> None:
    act = nn.ReLU()
    models = [nn.Sequential(nn.Linear(5, 5), act, nn.Linear(5, 3)) for _ in range(2)]
    drivers = [
        FreezeOut(model, SGD(model.parameters(), 0.1), 4, example_inputs=vectors(0)[0])
        for model in models
    ]
    for driver in drivers:
        driver.step()
    head = nn.Linear(5, 2)
    other = nn.Sequential(models[0][0], head)
    FreezeOut(other, SGD(other.parameters(), 0.1), 4, example_inputs=vectors(0)[0])
    with pytest.raises(FreezeOutError, match="a later one over the same parameters"):
        drivers[0].step()
    drivers[1].step()


# --- copies and files -----------------------------------------------------------------------


def through_torch(model: nn.Module, weights_only: bool) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    classes: list[Any] = [type(module) for module in model.modules()]
    with torch.serialization.safe_globals(classes):
        loaded: nn.Module = torch.load(buffer, weights_only=weights_only)
    return loaded


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": partial(through_torch, weights_only=False),
    "weights only": partial(through_torch, weights_only=True),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@pytest.mark.parametrize("steps", [0, 9, 20])
def test_copies_and_pickles_are_ordinary(clone: Any, steps: int) -> None:
    model, freezer = begun(steps)
    other = clone(model)
    assert is_ordinary(other)
    assert freezer.num_frozen == (0, 1, 3)[(0, 9, 20).index(steps)]
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    optimizer = SGD(other.parameters(), 0.1)
    fresh = FreezeOut(other, optimizer, STEPS, schedule=EARLY, example_inputs=images(0)[0])
    assert len(fresh.layers) == 4


def test_a_model_saved_whole_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    for steps in (0, 13):
        model, _ = begun(steps)
        torch.save(model, tmp_path / "whole.pt")
        code = (
            "import sys; sys.modules['freezeout'] = None\nimport torch\n"
            f"m = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)\n"
            "m.train(); m(torch.zeros(2, 3, 6, 6)).sum().backward()\n"
            "print(all(p.grad is not None for p in m.parameters()))"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.stdout == "True\n", ended.stderr


def test_tied_weights_and_the_users_hooks_are_copied() -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    model = linear_net()
    model[2].weight = model[0].weight
    model[0].register_forward_hook(double)
    optimizer = SGD(model.parameters(), 0.1)
    FreezeOut(model, optimizer, None, schedule=Frozen(2), example_inputs=vectors(0)[0])
    other = copy.deepcopy(model)
    assert other[2].weight is other[0].weight
    assert list(other[0]._forward_hooks.values()) == [double]
    assert torch.equal(other(vectors(0)[0]), model(vectors(0)[0]))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_modules_that_copy_themselves(through: Any) -> None:
    """Parametrized modules have a `__deepcopy__` of their own (and no pickles)."""
    first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    if through is not copy.deepcopy:
        first = torch.nn.LSTM(5, 5)
    model = nn.Sequential(first, nn.Linear(5, 5), nn.Linear(5, 3))
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(1), layers=list(model)
    )
    other = through(model)
    assert is_ordinary(other)
    assert not is_ordinary(model)
    assert freezer.layers[0].is_frozen
    if through is copy.deepcopy:
        torch.autograd.backward(other(vectors(0)[0]).sum())
        assert all(p.grad is not None for p in other.parameters())
        assert not model[0](vectors(0)[0]).requires_grad
    freezer.release()
    assert is_ordinary(model)


# --- modes ----------------------------------------------------------------------------------


def test_modes_are_those_last_asked_for() -> None:
    """`from_pretrained` returns a model in evaluation mode, and so it is frozen; norms that the
    user keeps in evaluation mode while all else trains do not wake when they thaw."""
    model = conv_net().eval()
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(2), example_inputs=images(0)[0]
    )
    model.train()
    model[1].eval()  # as the user does in each epoch
    freezer.release()
    assert [m.training for m in model] == [i != 1 for i in range(len(model))]
    model.eval()
    model[4].train()
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(2), example_inputs=images(0)[0]
    )
    freezer.release()
    assert [m.training for m in model] == [i == 4 for i in range(len(model))]


def test_a_users_own_train_comes_back() -> None:
    model = conv_net()
    calls: list[bool] = []

    def train(mode: bool = True) -> nn.Module:
        calls.append(mode)
        return nn.Module.train(model[1], mode)

    vars(model[1])["train"] = train
    model.train()
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(2), example_inputs=images(0)[0]
    )
    calls.clear()
    assert not model.train()[1].training
    assert calls == []
    freezer.release()
    assert model[1].train is train
    model.train()
    assert calls == [True]


def test_modes_that_a_framework_saves_and_sets_again() -> None:
    """As Lightning does around each validation: by attribute, past `train()`."""
    model = conv_net().train()
    model[5].eval()  # the user's
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(2), example_inputs=images(0)[0]
    )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module, training in modes.items():
        module.training = training
    model[5].eval()
    freezer.release()
    assert [m.training for m in model] == [i != 5 for i in range(len(model))]


class KeepsNormsAsleep(nn.Module):
    """As backbones of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "KeepsNormsAsleep":
        super().train(mode)
        self.norm.eval()
        return self


def test_norms_that_a_modules_own_train_keeps_asleep_do_not_wake() -> None:
    model = nn.Sequential(KeepsNormsAsleep(), nn.Linear(5, 5), nn.Linear(5, 3)).train()
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), None, schedule=Frozen(1), example_inputs=vectors(0)[0]
    )
    model.train()
    freezer.release()
    modes = {name: module.training for name, module in model[0].named_modules()}
    assert modes == {"": True, "linear": True, "norm": False}


# --- states ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changes": [[0, 99]]}, "99 of 4 layers frozen at step 0: at most 3 can be"),
        ({"changes": [[0, 4]]}, "4 of 4 layers frozen"),
        ({"changes": [[3, 1]]}, "the first change must be at step 0"),
        ({"changes": [[0, 1], [0, 2]]}, "changes must come at rising steps"),
        ({"changes": [[0, 1], [20, 2]]}, "a change at step 20 is after the run's 20 steps"),
        ({"changes": [[0, -1]]}, "changes must be pairs"),
        ({"changes": 3}, "this is no FreezeOut state"),
        ({"changes": [["a", "b"]]}, "changes must be pairs"),
        ({"step": "9"}, "it is at step '9'"),
        ({"step": True}, "it is at step True"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    _, freezer = begun(9)
    state = freezer.state_dict() | change
    with pytest.raises(CheckpointError, match=message):
        freezer.load_state_dict(state)
    assert (freezer.step_count, freezer.num_frozen) == (9, 1)
    assert [layer.is_frozen for layer in freezer.layers] == [True, False, False, False]


def test_numpy_numbers_leave_a_state_that_is_read_with_weights_only() -> None:
    model = linear_net()
    plan = Frozen(np.int64(1), then=Schedule(times=np.linspace(0.5, 1, 3)))  # type: ignore[arg-type]
    freezer = FreezeOut(
        model,
        SGD(model.parameters(), 0.1),
        np.int64(20),  # type: ignore[arg-type]
        schedule=plan,
        example_inputs=vectors(0)[0],
    )
    cache = PrefixCache(freezer, 8, depths=np.array([1, 2]), budget=10**6)
    buffer = io.BytesIO()
    torch.save([freezer.state_dict(), cache.state_dict()], buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == [freezer.state_dict(), cache.state_dict()]
    single = Schedule(np.float32(0.5), "linear")  # type: ignore[arg-type]
    assert type(single.t_0) is float


def test_a_state_holds_no_durations() -> None:
    """Minutes that another machine saved are not this one's."""
    _, freezer = begun(13)
    plain = {"step", "changes", "num_frozen", "total_steps", "freeze_every", "anneal"}
    assert set(freezer.state_dict()) == plain | {"plan", "layers"}
    other = conv_net()
    again = FreezeOut(
        other, SGD(other.parameters(), 0.1), STEPS, schedule=EARLY, example_inputs=images(0)[0]
    )
    again.load_state_dict(freezer.state_dict())
    assert again.seconds_saved() is None
    assert again.step_seconds == {}


def test_after_release_the_summary_and_the_table_agree() -> None:
    _, freezer = begun(13)
    freezer.release()
    assert freezer.summary().startswith("froze 2 of 4 layers; made 13 of 20 steps")
    head, _, *rows = str(freezer).splitlines()
    assert head == "FreezeOut released at step 13 of 20, 2 of 4 layers were frozen"
    assert ["was frozen" in line for line in rows] == [True, True, False, False]
    assert freezer.next_freeze is None
    assert freezer.learning_rates == (0.1,) * 4


def test_fewer_updates_than_planned_are_said() -> None:
    _, freezer = begun(5)
    assert "made 5 of 20 steps" in freezer.summary()
    assert freezer.is_unfinished
    _, freezer = begun(20)
    assert "made" not in freezer.summary()
    assert not freezer.is_unfinished


def test_savings_without_a_step_in_which_all_layers_train() -> None:
    assert saving([10.0, 6.0, 2.0], [0, 0, 5]) == pytest.approx(0.8)
    model = linear_net()
    freezer = FreezeOut(
        model, SGD(model.parameters(), 0.1), 10, schedule=Frozen(2), example_inputs=vectors(0)[0]
    )
    assert freezer.predicted_share([4.0, 3.0, 2.0, 1.0]) is None
    freezer.step()
    assert freezer.predicted_share([4.0, 3.0, 2.0, 1.0]) == pytest.approx(0.5)
    assert "predicted 50%" in freezer.summary([4.0, 3.0, 2.0, 1.0])


# --- behind its back ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_a_group_added_for_a_frozen_layer_is_refused_in_the_step(given: bool) -> None:
    model = linear_net()
    if given:
        model[:3].requires_grad_(False)
    optimizer = SGD(list(model[4:].parameters()) if given else model.parameters(), 0.1)
    freezer = FreezeOut(
        model, optimizer, None, schedule=Frozen(0 if given else 2), example_inputs=vectors(0)[0]
    )
    run(model, [optimizer], freezer, vectors, range(2))
    if not given:
        optimizer.param_groups[0]["params"] = list(model[4:].parameters())
    optimizer.add_param_group({"params": list(model[2].parameters())})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidValue, match=r"for parameter '2\.weight', but its layer '2' is froz"):
        run(model, [optimizer], freezer, vectors, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_that_change_places_between_groups_get_their_new_rates() -> None:
    model = linear_net(2)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = SGD([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.01}], 1.0)
    freezer = FreezeOut(model, optimizer, None, schedule=Frozen(0), example_inputs=vectors(0)[0])

    def update() -> list[float]:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        freezer.step()
        return [
            round((a - b).mean().item(), 5) for a, b in zip(before, model.parameters(), strict=True)
        ]

    assert update() == [0.1, 0.1, 0.01, 0.01]
    groups = optimizer.param_groups
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    assert update() == [0.01, 0.01, 0.1, 0.1]


def test_finding_layers_does_not_disturb_a_backward_pass_that_is_still_to_come() -> None:
    torch.manual_seed(0)
    model = conv_net().train()
    other = copy.deepcopy(model)
    x, y = images(0)
    gradients = []
    for net, look in ((model, True), (other, False)):
        torch.manual_seed(1)
        loss = loss_of(net, x, y)
        if look:
            find_layers(net, images(1)[0])
        torch.autograd.backward(loss)
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["plain", "fused", "foreach"])
@pytest.mark.parametrize("how", ["loaded", "layer"])
def test_activations_of_a_layer_that_has_trained_since_are_not_served(kind: str, how: str) -> None:
    """A fused optimizer leaves a weight's version as it was."""
    model = linear_net()
    options = {} if kind == "plain" else {kind: True}
    optimizer = AdamW(model.parameters(), 0.1, **options)  # type: ignore[arg-type]
    x = torch.randn(8, 5)
    freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=x)
    cache = PrefixCache(freezer, 8, depths=[1], budget=10**6)
    early = freezer.state_dict()
    late = early | {"step": 8}
    freezer.load_state_dict(late)
    ids = torch.arange(8)
    for _ in range(3):
        assert torch.equal(cache(x, ids=ids), model(x))
    assert cache.stats.hits == 16
    if how == "loaded":
        freezer.load_state_dict(early)
    else:
        freezer.layers[0].unfreeze()
    for p in model[0].parameters():
        assert p.requires_grad
    torch.autograd.backward(model(x).square().sum())
    if how == "layer":
        (AdamW(model[0].parameters(), 0.1, **options)).step()  # type: ignore[arg-type]
    optimizer.step()
    optimizer.zero_grad()
    if how == "loaded":
        freezer.load_state_dict(late)
    else:
        freezer.layers[0].freeze()
    with pytest.warns(UserWarning, match="weights of frozen layers were changed"):
        assert torch.equal(cache(x, ids=ids), model(x))
    assert torch.equal(cache(x, ids=ids), model(x))


def test_a_layer_counts_how_often_it_was_frozen() -> None:
    layer = Layer("0", [module := nn.Linear(2, 2)], module.parameters())
    assert layer.freezes == 0
    for count in (1, 2):
        layer.freeze()
        layer.freeze()
        assert layer.freezes == count
        layer.unfreeze()
