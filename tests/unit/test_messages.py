"""What cannot work is refused in one line, which names it and says what to do; and texts that are
true whatever else the training script does."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from freezeout import FreezeOut, Schedule, find_layers, thaw
from freezeout.errors import CheckpointError, FreezeOutError, InvalidType, InvalidValue
from freezeout.versions import VERSION
from tests.models import conv_net, images, linear_net, run, vectors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning"),
]

STEPS = 20


def begun(steps: int, **options: Any) -> tuple[nn.Sequential, SGD, FreezeOut]:
    torch.manual_seed(0)
    model = conv_net()
    optimizer = SGD(model.parameters(), 0.1)
    options = {"schedule": Schedule(0.4, "linear"), "example_inputs": images(0)[0], **options}
    freezer = FreezeOut(model, optimizer, STEPS, **options)
    run(model, [optimizer], freezer, images, range(steps))
    return model, optimizer, freezer


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(nn.Linear(5, 5))
    return module


def traced() -> nn.Module:
    trace: Any = torch.jit.trace
    module: nn.Module = trace(nn.Linear(5, 5), torch.randn(2, 5))
    return module


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("make", [scripted, traced])
def test_a_part_of_torchscript_is_refused_by_name(
    make: Callable[[], nn.Module], look: bool
) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(make()), nn.Linear(5, 3))
    optimizer = SGD(model.parameters(), 0.1)
    inputs = vectors(0)[0] if look else None
    message = (
        r"module '1\.0' is scripted or traced .*before torch\.jit\.script or torch\.jit\.trace"
    )
    with pytest.raises(InvalidValue, match=message):
        FreezeOut(model, optimizer, STEPS, example_inputs=inputs)
    with pytest.raises(InvalidValue, match=message):
        FreezeOut(model, optimizer, STEPS, example_inputs=inputs, layers=list(model))
    model.requires_grad_(False)[2].requires_grad_(True)
    with pytest.raises(InvalidValue, match=r"in a list: self\.part = \[scripted\]"):
        find_layers(model, inputs)
    with pytest.raises(InvalidValue, match="the model is scripted or traced"):
        find_layers(make(), inputs)


@pytest.mark.parametrize("steps", [0, 12])
def test_scripting_a_model_in_training_says_what_to_do(steps: int) -> None:
    model, _, freezer = begun(steps)
    with pytest.raises(FreezeOutError, match=r"script a copy, .*or call FreezeOut\.release\(\)"):
        torch.jit.script(model)
    x = images(0)[0]
    for other in (copy.deepcopy(model), model):
        if other is model:
            freezer.release()
        other.eval()
        assert torch.equal(torch.jit.script(other)(x), other(x))
        assert not any("__prepare_scriptable__" in vars(module) for module in other.modules())


STRICT = pytest.param(
    True,
    marks=pytest.mark.skipif(VERSION < (2, 11), reason="torch 2.7 raises an error of its own"),
)


@pytest.mark.parametrize("strict", [False, STRICT])
def test_a_model_in_training_is_exported_without_a_word(strict: bool) -> None:
    model, _, _ = begun(12)
    model.eval()
    x = images(0)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile compiles frozen layers")
        exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize("look", [True, False])
def test_lazy_modules_without_sizes_are_refused_by_name(look: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))
    optimizer = SGD(model.parameters(), 0.1)
    inputs = vectors(0)[0] if look else None
    with pytest.raises(InvalidValue, match=r"module '1' \(LazyLinear\) has no sizes yet: make one"):
        FreezeOut(model, optimizer, STEPS, example_inputs=inputs)
    model(vectors(0)[0])
    FreezeOut(model, SGD(model.parameters(), 0.1), STEPS, example_inputs=inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_0": 0.5}, r"FreezeOut has no option 't_0': give schedule=Schedule\(t_0=0\.5\)"),
        (
            {"t_0": 0.5, "scale_lr": False},
            r"give schedule=Schedule\(t_0=0\.5, scale_lr=False\)",
        ),
        ({"up_to": "2"}, r"no option 'up_to': give schedule=Frozen\(up_to='2'\)"),
        ({"example_input": 3}, "no option 'example_input': is it 'example_inputs'"),
        ({"zzz": 3}, "no option 'zzz': it has model, optimizer, total_steps, schedule, layers, "),
        ({"schedule": {"t_0": 0.5}}, r"schedule must be a plan, .* got dict \{'t_0': 0\.5\}"),
        ({"schedule": Schedule}, "schedule must be a plan, .* got Schedule, a class"),
        ({"layers": ["0", "2"]}, r"holds a str, not a module, which model\.get_submodule\(name\)"),
    ],
)
def test_options_are_named_with_what_to_give(options: Any, message: str) -> None:
    model = linear_net()
    with pytest.raises(InvalidType, match=message):
        FreezeOut(model, SGD(model.parameters(), 0.1), STEPS, **options)


def test_options_of_a_callback_are_named_with_what_to_give() -> None:
    lightning = pytest.importorskip("freezeout.integrations.lightning")
    transformers = pytest.importorskip("freezeout.integrations.transformers")
    for kind in (lightning.FreezeOutCallback, transformers.FreezeOutTrainerCallback):
        message = rf"{kind.__name__} has no option 't_0': give schedule=Schedule\(t_0=0\.5\)"
        with pytest.raises(InvalidType, match=message):
            kind(t_0=0.5)
        with pytest.raises(InvalidType, match="no option 'total_step': is it 'total_steps'"):
            kind(total_step=3)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies_of_a_freezer_are_refused(copied: Callable[[Any], Any]) -> None:
    _, _, freezer = begun(12)
    with pytest.raises(InvalidType, match=r"cannot be copied or pickled, .*state_dict\(\)"):
        copied(freezer)
    assert copy.deepcopy(freezer.state_dict()) == freezer.state_dict()


def test_copies_of_a_callback_have_no_part_in_its_run() -> None:
    lightning = pytest.importorskip("freezeout.integrations.lightning")
    callback = lightning.FreezeOutCallback(Schedule(0.5), total_steps=9)
    _, _, callback.freezer = begun(12)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (other.freezer, other.schedule, other.total_steps) == (None, Schedule(0.5), 9)


def test_states_and_models_of_another_kind() -> None:
    _, _, freezer = begun(0)
    with pytest.raises(CheckpointError, match="a FreezeOut state is a dictionary, got FreezeOut"):
        freezer.load_state_dict(freezer)  # type: ignore[arg-type]
    with pytest.raises(InvalidType, match=r"thaw\(\) takes a model, .* got FreezeOut"):
        thaw(freezer)  # type: ignore[arg-type]


def test_a_warm_up_from_zero_leaves_the_texts_true() -> None:
    """The rate is zero when FreezeOut is built: what the plan makes of it is what counts."""
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    LambdaLR(optimizer, lambda step: step / 10)
    with pytest.warns(UserWarning, match=r"starts at 15\.6 times the base learning rate \(1\.56\)"):
        freezer = FreezeOut(model, optimizer, 1000, schedule=Schedule(0.4))
    assert "15.62 x lr" in str(freezer)
    freezer.release()
    optimizer = SGD(model.parameters(), 0.0)  # by hand, that is
    with pytest.warns(UserWarning, match="times the base learning rate, because"):
        FreezeOut(model, optimizer, 1000, schedule=Schedule(0.4))


def test_weights_that_are_rolled_back_are_no_stale_graph() -> None:
    """To a state of before the freeze, or of another run: norms have other counts there."""
    for steps in (3, 20):
        model, optimizer, freezer = begun(7)
        state, _, _ = begun(steps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, [optimizer], freezer, images, range(7, 8))
            assert freezer.num_frozen == 1
            model.load_state_dict(state.state_dict())
            run(model, [optimizer], freezer, images, range(8, 12))
    assert freezer.num_frozen == 2


def test_that_nothing_will_ever_freeze_is_told_unless_the_plan_says_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 5)

        def forward(self, x: Any) -> Any:
            return linear(self.encoder(x), self.encoder.weight.t())

    def build(model: nn.Module, **options: Any) -> None:
        FreezeOut(model, SGD(model.parameters(), 0.1), 20, **options)

    with pytest.warns(
        UserWarning, match=r"no layer will be frozen.* one layer \('encoder'\).*layers="
    ):
        build(Tied(), example_inputs=vectors(0)[0])
    with pytest.warns(UserWarning, match="freeze_every=50 leaves no step for it in a run of 20"):
        build(linear_net(), freeze_every=50)
    build(linear_net(), schedule=Schedule(1.0))
