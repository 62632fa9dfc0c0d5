"""Layers have the names of the plain model, whatever it is wrapped in: a state goes from one to the
other."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.optim import SGD

from freezeout import FreezeOut, Frozen, find_layers
from freezeout.errors import CheckpointError
from freezeout.layers.names import from_names, innermost, plain_names, to_names
from tests.models import linear_net

Wrap = Callable[[nn.Module], nn.Module]

NAMES = ["embedding", "encoder.0", "encoder.1", "encoder.2", "head.0", "head.2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu())
        return x + y


class Net(nn.Module):
    """Embeddings that are one layer, blocks in a list, a norm, and a list that is split."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(10, 8), nn.Embedding(10, 8)
        self.encoder = nn.Sequential(*(Block() for _ in range(3)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embedding(x) + self.position(x))
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


checkpointed = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def inside(wrap: Wrap, *paths: str) -> Wrap:
    """Wraps those parts of the model."""

    def wrapped(model: nn.Module) -> nn.Module:
        for path in paths:
            parent, _, key = path.rpartition(".")
            model.get_submodule(parent)._modules[key] = wrap(model.get_submodule(path))
        return model

    return wrapped


BLOCKS = NAMES[1:4]
WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "compiled encoder": inside(compiled, "encoder"),
    "compiled encoder and head": inside(compiled, "encoder", "head"),
    "compiled blocks": inside(compiled, *BLOCKS),
    "checkpointed blocks": inside(checkpointed, *BLOCKS),
    "one block checkpointed": inside(checkpointed, "encoder.1"),
    "compiled leaves": inside(compiled, "embedding", "position", "norm", "head.0"),
    "all at once": lambda m: nn.DataParallel(
        inside(lambda b: checkpointed(compiled(b)), *BLOCKS)(m)
    ),
}


def tokens() -> Tensor:
    return torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(0))


def freezer_over(model: nn.Module, schedule: Frozen | None = None, look: bool = True) -> FreezeOut:
    inputs = tokens() if look else None
    optimizer = SGD(model.parameters(), 0.1)
    return FreezeOut(model, optimizer, 20, schedule=schedule, example_inputs=inputs)


@pytest.mark.parametrize("look", [True, False], ids=["seen", "by definition"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_state_goes_from_a_wrapped_model_to_the_plain_one_and_back(
    wrap: Wrap, look: bool
) -> None:
    plain, wrapped = freezer_over(Net(), look=look), freezer_over(wrap(Net()), look=look)
    assert [layer.name for layer in wrapped.layers] == NAMES
    assert "_" not in str(wrapped)
    plain.load_state_dict({**plain.state_dict(), "step": 16})
    wrapped.load_state_dict(plain.state_dict())
    assert wrapped.num_frozen == plain.num_frozen == 4
    assert wrapped.state_dict() == plain.state_dict()
    plain.load_state_dict(wrapped.state_dict())
    wrapped.model.train()
    with torch.compiler.set_stance("force_eager"):
        wrapped.model(tokens()).sum().backward()
    for layer in wrapped.layers:
        assert all((p.grad is None) == layer.is_frozen for p in layer.parameters)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_layers_written_down_are_read_for_another_wrapping(wrap: Wrap) -> None:
    plain, wrapped = Net(), wrap(Net())
    written = to_names(plain, find_layers(plain, tokens()))
    found = find_layers(wrapped, tokens())
    assert to_names(wrapped, found) == written
    read = from_names(wrapped, written)
    assert [set(layer.modules) for layer in read] == [set(layer.modules) for layer in found]
    assert [layer.parameters for layer in read] == [layer.parameters for layer in found]
    assert to_names(plain, from_names(plain, to_names(wrapped, read))) == written


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compiled", "DataParallel"])
def test_names_with_wrappers_in_them_are_understood(wrap: Wrap) -> None:
    """A state that was saved with the wrappers' names in it, and a plan that names a module."""
    plain, wrapped = freezer_over(Net()), wrap(Net())
    names = {module: name for name, module in wrapped.named_modules()}
    old = {
        layer.name: names[innermost(module)]
        for layer in find_layers(wrapped, tokens())
        for module, name in plain_names(wrapped).items()
        if name == layer.name
    }
    assert old["head.0"].count(".") == 2
    plain.load_state_dict({**plain.state_dict(), "layers": [old[name] for name in NAMES]})
    written = to_names(plain.model, plain.layers)
    for layer in written:
        layer["name"] = old[layer["name"]]
        layer["modules"] = [old.get(name, name) for name in layer["modules"]]
    assert to_names(plain.model, from_names(plain.model, written))[3]["name"] == NAMES[3]
    for name in (NAMES[2], old[NAMES[2]]):
        assert freezer_over(wrap(Net()), Frozen(up_to=name)).num_frozen == 3


class Around(nn.Module):
    """A module of a user's own, that calls a part of it as wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


def test_a_part_that_is_only_called_as_wrappers_do_keeps_its_name() -> None:
    model = nn.Sequential(*map(Around, (nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))))
    layers = find_layers(model, torch.randn(2, 5))
    assert [layer.name for layer in layers] == ["0", "1", "2"]
    assert layers[0].modules == (model[0], model[0].module)
    written = to_names(model, layers)
    assert written[0]["modules"] == ["0", "0.module"]
    assert to_names(model, from_names(model, written)) == written


def test_a_state_without_names_is_refused() -> None:
    freezer = FreezeOut(model := linear_net(), SGD(model.parameters(), 0.1), 20)
    with pytest.raises(CheckpointError, match="no FreezeOut state: its layers are None"):
        freezer.load_state_dict({**freezer.state_dict(), "layers": None})
