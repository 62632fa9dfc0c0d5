"""What callbacks of frameworks hand to `FreezeOut`: wrapped optimizers, layers that were found or
written down before, a forward pass that was recorded, or one in which the model is not called."""

import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from freezeout import FreezeOut, Schedule, find_layers
from freezeout.errors import CheckpointError, LayerOrderError
from freezeout.layers import Trace
from freezeout.layers.names import from_names, to_names
from tests.models import (
    Reversed,
    TiedTransformer,
    conv_net,
    images,
    linear_net,
    loss_of,
    run,
    tokens,
    vectors,
)

EARLY = Schedule(0.4, "linear")


class StandIn(Optimizer):
    """As Accelerate's: never set up, it passes everything on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, object]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self) -> None:  # type: ignore[override]
        self.optimizer.step()


class Ahead(SGD):
    """Holds another optimizer, but is one itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, 0.1)
        self.optimizer = optimizer


def test_the_optimizer_within_a_stand_in_is_driven() -> None:
    net, other = linear_net(), linear_net()
    other.load_state_dict(net.state_dict())
    wrapped = StandIn(StandIn(SGD(net.parameters(), 0.1, momentum=0.9)))
    plain = SGD(other.parameters(), 0.1, momentum=0.9)
    x = vectors(0)[0]
    for model, optimizer in ((net, wrapped), (other, plain)):
        freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=x)
        for step in range(12):
            torch.autograd.backward(loss_of(model, *vectors(step)))
            optimizer.step()
            model.zero_grad()
            freezer.step()
    assert freezer.num_frozen == 2
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_optimizer_that_holds_another_is_driven_itself() -> None:
    net, other = linear_net(), linear_net()
    other.load_state_dict(net.state_dict())
    outer, plain = Ahead(SGD(net.parameters(), 0.1)), SGD(other.parameters(), 0.1)
    for model, optimizer in ((net, outer), (other, plain)):
        freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
        for step in range(12):
            torch.autograd.backward(loss_of(model, *vectors(step)))
            optimizer.step()
            model.zero_grad()
            freezer.step()
        freezer.release()
        assert "step" not in vars(optimizer)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert "step" not in vars(outer.optimizer)


def test_layers_that_were_found_before_are_taken_as_they_are() -> None:
    model = Reversed()
    layers = find_layers(model, vectors(0)[0])
    freezer = FreezeOut(model, SGD(model.parameters(), 0.1), 20, layers=layers)
    assert [layer.name for layer in freezer.layers] == list(Reversed.names)
    assert not freezer.order_pending  # it is known
    with pytest.raises(LayerOrderError):  # modules are checked
        FreezeOut(
            model,
            SGD(model.parameters(), 0.1),
            20,
            layers=[model.head, model.middle, model.stem],
            example_inputs=vectors(0)[0],
        )


def test_layers_from_a_recorded_forward_pass() -> None:
    """In training, while the model runs, as in evaluation by itself."""
    model = TiedTransformer()
    trace = Trace.recorder()
    with trace.listening(model, running=True):
        model.train()(tokens(0)[0])
    recorded = find_layers(model, trace)
    assert to_names(model, recorded) == to_names(model, find_layers(model, tokens(0)[0]))


def test_layers_as_names() -> None:
    """Tied weights and all, through a file."""
    model, other = TiedTransformer(), TiedTransformer()
    written = to_names(model, find_layers(model, tokens(0)[0]))
    read = from_names(other, json.loads(json.dumps(written)))
    assert to_names(other, read) == written
    assert [layer.name for layer in read] == list(TiedTransformer.names)
    assert read[-1].parameters[0] is other.wte.weight
    with pytest.raises(CheckpointError, match="of another model: this one has no 'wte'"):
        from_names(nn.Linear(2, 2), written)


def test_a_forward_pass_that_is_told_of_is_looked_at() -> None:
    """Here of a part of the model, which is not called itself."""
    model = nn.Sequential(linear_net())
    x, y = vectors(0)
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 4, schedule=EARLY, example_inputs=x)

    def step() -> None:
        freezer.forward_begins()
        loss = loss_of(model[0], x, y)
        freezer.forward_ended(loss)
        torch.autograd.backward(loss)
        optimizer.step()
        model.zero_grad()
        freezer.step()

    step()
    step()
    assert freezer.num_frozen == 1
    freezer.forward_begins()
    with pytest.warns(UserWarning, match="it passes through frozen layers"):
        loss = loss_of(model[0], x.requires_grad_(), y)
    freezer.forward_ended(loss)
    assert not model._forward_hooks  # seen, and gone


def test_what_was_can_be_asked_after_release() -> None:
    model = conv_net()
    freezer = FreezeOut(
        model,
        optimizer := SGD(model.parameters(), 0.1),
        20,
        schedule=EARLY,
        example_inputs=images(0)[0],
    )
    run(model, [optimizer], freezer, images, range(13))
    before = freezer.state_dict()
    freezer.release()
    assert freezer.num_frozen == 0
    assert freezer.summary().startswith("froze 2 of 4 layers")
    assert freezer.state_dict() == before


def test_seconds_of_a_depth_whose_only_step_followed_loading() -> None:
    """Its duration is unknown."""
    model = linear_net()
    x = vectors(0)[0]
    schedule = Schedule(times=(0.25, 0.5, 0.55, 1.0))
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=schedule, example_inputs=x)
    for _ in range(10):
        freezer.step()
    state = freezer.state_dict()
    freezer.load_state_dict(state)
    freezer.step()
    freezer.step()
    assert freezer.seconds_saved() is None
    assert "46% of the network's FLOPs saved; time saved is not known" in freezer.summary()
