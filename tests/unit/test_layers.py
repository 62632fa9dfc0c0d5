"""find_layers: order, grouping, and what it leaves untouched."""

import copy
import pickle
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from freezeout import FreezeOut, FreezeOutError, Layer, find_layers
from freezeout.errors import InvalidType, InvalidValue, LayerOrderError
from freezeout.layers import given_layers
from tests import models
from tests.models import ResNet, Reversed, TiedTransformer, TransformerBlock, conv_net, linear_net


def names(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def layer_of(layers: list[Layer], what: object) -> int:
    """The number of the one layer that has this module or parameter."""
    places = [
        i
        for i, layer in enumerate(layers)
        if any(what is part for part in (*layer.modules, *layer.parameters))
    ]
    assert len(places) == 1, places
    return places[0]


def check_partition(model: nn.Module, layers: list[Layer]) -> None:
    """Every module and parameter in exactly one layer, each layer with a parameter."""
    for part in (*model.modules(), *model.parameters()):
        layer_of(layers, part)
    assert all(layer.parameters for layer in layers)
    assert sum(len(layer.modules) for layer in layers) == len(list(model.modules()))


# --- order and grouping ---------------------------------------------------------------------


def test_resnet_has_a_layer_a_block_with_the_stem_and_the_classifier() -> None:
    model = ResNet()
    layers = find_layers(model, torch.randn(2, 3, 8, 8))
    assert names(layers) == list(ResNet.names)
    check_partition(model, layers)
    assert layer_of(layers, model.bn1) == 0
    assert {layer_of(layers, m) for m in model.layer2[0].modules()} == {3}
    assert layer_of(layers, model.avgpool) == 4


def test_order_is_that_of_execution_not_of_definition() -> None:
    model = Reversed()
    layers = find_layers(model, torch.randn(2, 5))
    assert names(layers) == list(Reversed.names)
    assert layer_of(layers, model.stem_norm) == 0
    assert names(find_layers(model)) == ["head", "middle", "stem"]


def test_convolution_and_norm_are_one_layer_and_dropout_goes_with_the_layer_before() -> None:
    model = conv_net()
    layers = find_layers(model, models.images(0)[0])
    assert names(layers) == ["0", "4", "7", "12"]
    assert [layer_of(layers, m) for m in model] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3]


def test_a_norm_in_front_goes_with_what_follows_and_a_final_norm_with_the_classifier() -> None:
    pre = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    layers = find_layers(pre, torch.randn(2, 3, 2, 2))
    assert [layer_of(layers, m) for m in pre] == [0, 0, 0, 1]
    block = TransformerBlock(8)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Sequential(block, TransformerBlock(8)), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    layers = find_layers(model, torch.randn(2, 4, 5))
    assert names(layers) == ["0", "1.0", "1.1", "3"]
    assert layer_of(layers, model[2]) == 3
    assert {layer_of(layers, m) for m in block.modules()} == {1}


def test_dense_units_are_layers_each() -> None:
    class Unit(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(self.norm(x))], 1)

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Unit(4), Unit(6), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3)
    )
    layers = find_layers(model, torch.randn(2, 3, 3, 3))
    assert names(layers) == ["0", "1", "2", "5"]
    assert layer_of(layers, model[3]) == 3


class Vision(nn.Module):
    """A ViT: class token and position embedding are the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.late = nn.Parameter(torch.randn(8))
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.ModuleList([TransformerBlock(8), TransformerBlock(8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.late)[:, 0])  # type: ignore[no-any-return]


def test_parameters_of_the_root_go_with_the_layer_that_first_needs_them() -> None:
    model = Vision()
    layers = find_layers(model, torch.randn(2, 3, 4, 4))
    assert names(layers) == ["patch", "blocks.0", "blocks.1", "head"]
    check_partition(model, layers)
    assert [layer_of(layers, p) for p in (model.cls, model.position, model.late)] == [1, 1, 3]


@pytest.mark.parametrize("example", [models.tokens(0)[0], None])
def test_tied_parameters_belong_to_the_last_layer_that_uses_them(example: Tensor | None) -> None:
    model = TiedTransformer()
    layers = find_layers(model, example)
    assert names(layers) == list(TiedTransformer.names)
    check_partition(model, layers)
    assert layer_of(layers, model.wte.weight) == 4
    assert layer_of(layers, model.wte) == 0
    assert layer_of(layers, model.ln_f) == 4


def test_a_weight_used_again_as_a_function_belongs_to_that_use() -> None:
    class Functional(TiedTransformer):
        def __init__(self) -> None:
            super().__init__()
            del self.lm_head

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return linear(self.ln_f(x), self.wte.weight)

    model = Functional()
    layers = find_layers(model, models.tokens(0)[0])
    check_partition(model, layers)
    assert layer_of(layers, model.wte.weight) == len(layers) - 1
    # The classifier is the norm with the matrix, so the last block is a layer before it.
    assert [layer_of(layers, m) for m in (model.blocks[2], model.ln_f)] == [3, 4]


def test_a_reused_module_has_the_place_of_its_last_use() -> None:
    class Albert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.between = nn.Linear(5, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.shared(self.between(self.shared(x))))  # type: ignore[no-any-return]

    assert names(find_layers(Albert(), torch.randn(2, 5))) == ["between", "shared", "head"]
    assert names(find_layers(Albert())) == ["shared", "between", "head"]


def test_parameters_never_reached_go_with_the_last_layer_with_one_warning() -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 5), "spare": nn.Linear(2, 2), "b": nn.Linear(5, 3)})

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x))  # type: ignore[no-any-return]

    whole = Partial()
    with pytest.warns(UserWarning, match=r"2 parameters .* 'parts.b': parts.spare.weight") as seen:
        layers = find_layers(whole, torch.randn(2, 5))
    assert len(seen) == 1
    assert names(layers) == ["parts.a", "parts.b"]
    assert layer_of(layers, model["spare"]) == layer_of(layers, model["spare"].weight) == 1


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(5, 3), nn.Linear(5, 5)

    def forward(self, x: Any, *rest: Any, scale: Any = None, **more: Any) -> dict[str, Any]:
        inner = x["deep"][0] if isinstance(x, dict) else x
        out = self.second(self.first(inner))
        return {"logits": out if scale is None else out * scale["by"][0]}


X = torch.randn(2, 5)


@pytest.mark.parametrize(
    "example",
    [
        X,
        (X,),
        (X, X, None),
        {"x": X},
        {"x": {"deep": [X]}, "scale": {"by": (X.new_ones(3),)}},
        ((X,), {"scale": {"by": [2.0]}}),
        ((), {"x": X}),
        ({"deep": (X, "text")}, 3),
    ],
)
def test_example_inputs_nest_in_any_way(example: Any) -> None:
    assert names(find_layers(Keywords(), example)) == ["first", "second"]


@given(st.permutations(range(6)))
@settings(max_examples=25, deadline=None)
def test_whatever_the_order_of_definition_the_found_order_is_that_of_execution(
    order: list[int],
) -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in order:
                self.add_module(f"m{i}", nn.Linear(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(6):
                x = self.get_submodule(f"m{i}")(x)
            return x

    assert names(find_layers(Shuffled(), X)) == [f"m{i}" for i in range(6)]


# --- what is left as it was -----------------------------------------------------------------


class Marks(nn.Module):
    """Everything that a forward pass could leave a mark on."""

    in_place: Tensor
    by_data: Tensor
    assigned: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()
        self.body[1].eval()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("by_data", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place.add_(1)
        self.by_data.data.add_(1)
        self.assigned = self.assigned + 1
        return self.body(x + torch.rand_like(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("buffer", ["in_place", "by_data", "assigned"])
def test_buffers_are_as_before(buffer: str) -> None:
    model = Marks()
    held = model.get_buffer(buffer)
    find_layers(model, models.images(0)[0])
    assert model.get_buffer(buffer).eq(0).all()
    assert model.get_buffer(buffer) is held


def test_modes_norm_statistics_random_state_gradients_and_hooks_are_as_before() -> None:
    model = Marks()
    x, _ = models.images(0)
    model(x).sum().backward()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.body.state_dict())
    gradients = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
    random = torch.get_rng_state()
    x.requires_grad_()
    find_layers(model, x)
    assert [module.training for module in model.modules()] == modes
    assert len({*modes}) == 2
    for name, value in model.body.state_dict().items():
        assert torch.equal(value, state[name])
    for p, gradient in gradients.items():
        assert p.grad is not None
        assert gradient is not None
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_forward_pass_is_named_and_leaves_no_mark() -> None:
    model = conv_net()
    with pytest.raises(InvalidValue, match="forward pass on example_inputs failed with Runtime"):
        find_layers(model, torch.randn(2, 7, 4, 4))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_works_inside_no_grad() -> None:
    with torch.no_grad():
        assert len(find_layers(conv_net(), models.images(0)[0])) == 4


# --- layers that the user gives -------------------------------------------------------------


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 6, 6)])
def test_given_layers_take_in_all_the_rest(example: Tensor | None) -> None:
    model = conv_net()
    layers = given_layers(model, [[model[0], model[1]], model[4], [model[7], model[12]]], example)
    assert names(layers) == ["0", "4", "7"]
    check_partition(model, layers)
    assert [layer_of(layers, model[i]) for i in (0, 1, 4, 7, 12)] == [0, 0, 1, 2, 2]
    assert {p for layer in layers for p in layer.parameters} == set(model.parameters())


def test_given_layers_in_another_order_than_execution_are_refused() -> None:
    model = linear_net(3)
    with pytest.raises(LayerOrderError, match="'0' is listed after '2' but runs before it"):
        given_layers(model, [model[2], model[0], model[4]], X)


def bad_layers(model: nn.Sequential) -> dict[str, Any]:
    return {
        "empty": [],
        "an empty layer": [model[0], []],
        "no module": [model[0], "2"],
        "a parameter": [[model[0].weight]],
        "another model's": [nn.Linear(2, 2)],
        "twice": [model[0], [model[2], model[0]]],
        "a child of another": [model, model[0]],
        "one number": 3,
    }


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("empty", InvalidValue, "layers is empty; pass at least one module"),
        ("an empty layer", InvalidValue, r"layers\[1\] is empty"),
        ("no module", InvalidType, r"layers\[1\] holds a str, not a module"),
        ("a parameter", InvalidType, r"layers\[0\] holds a Parameter, not a module"),
        ("another model's", InvalidValue, r"layers\[0\] holds a Linear that is no part of"),
        ("twice", InvalidValue, r"module '0' is in layers\[0\] and in layers\[1\]"),
        ("a child of another", InvalidValue, r"module '0' is in layers\[0\] and in layers\[1\]"),
        ("one number", InvalidType, "layers must be .*, got 3"),
    ],
)
def test_given_layers_refuses(case: str, error: type[FreezeOutError], message: str) -> None:
    model = linear_net(3)
    with pytest.raises(error, match=message):
        given_layers(model, bad_layers(model)[case])


@pytest.mark.parametrize("entry", [torch.zeros(2), 3])
def test_a_layer_that_is_neither_module_nor_list_is_refused(entry: Any) -> None:
    model = linear_net(3)
    with pytest.raises(InvalidType, match=r"layers\[1\] holds a"):
        given_layers(model, [model[0], entry])


def test_find_layers_refuses() -> None:
    with pytest.raises(InvalidType, match=r"model must be a torch.nn.Module, got function"):
        find_layers(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="no parameters"):
        find_layers(nn.ReLU())


# --- checking the order of definition -------------------------------------------------------


def test_without_example_inputs_a_mismatch_raises_in_the_first_training_forward() -> None:
    model = Reversed()
    FreezeOut(model, torch.optim.SGD(model.parameters(), 0.1), 10)
    model.eval()(X)  # evaluation says nothing about training
    with torch.no_grad():
        model.train()(X)
    message = "'middle' is listed after 'head' but runs before it.*stem, middle, head"
    with pytest.raises(LayerOrderError, match=message):
        model(X)


def test_the_check_goes_away_after_the_first_training_forward() -> None:
    model = conv_net()
    freezer = FreezeOut(model, torch.optim.SGD(model.parameters(), 0.1), 10)
    assert any(m._forward_pre_hooks for m in model.modules())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone(models.images(0)[0])
    model(models.images(0)[0])
    inner = [m for m in model.modules() if m is not model]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner)
    freezer.step()
    freezer.step()
    assert not {**model._forward_hooks, **model._forward_pre_hooks}


def test_the_check_sees_a_weight_used_again_as_a_function() -> None:
    """Otherwise the shared weight would stop with its first use, without a word."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle = nn.Embedding(11, 5), nn.Linear(5, 5)
            self.norm = nn.LayerNorm(5)

        def forward(self, tokens: Tensor) -> Tensor:
            return linear(self.norm(self.middle(self.embed(tokens))), self.embed.weight)

    model = Functional()
    FreezeOut(model, torch.optim.SGD(model.parameters(), 0.1), 10)
    with pytest.raises(LayerOrderError, match="embed"):
        model(models.tokens(0)[0])


# --- one layer ------------------------------------------------------------------------------


def frozen_layer(model: nn.Sequential) -> Layer:
    layer = find_layers(model, models.images(0)[0])[0]
    model[0].bias.requires_grad_(False)
    model(models.images(0)[0]).sum().backward()
    layer.freeze()
    return layer


def test_freezing_stops_parameters_drops_gradients_and_sleeps_for_good() -> None:
    model = conv_net()
    layer = frozen_layer(model)
    assert all(not p.requires_grad and p.grad is None for p in layer.parameters)
    for part in (model, model[1], model[3]):
        part.train()
        assert not any(module.training for module in layer.modules)
    assert model[5].training
    assert model.eval()[5].training is False


def test_a_frozen_containers_other_children_still_follow_train() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    layer = Layer("outer", [inner, inner[0]], inner.parameters())
    layer.freeze()
    assert [m.training for m in inner.train().modules()] == [False, False, True]
    assert [m.training for m in inner.eval().modules()] == [False, False, False]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_ordinary_and_leave_the_layer_frozen(clone: Any) -> None:
    model = conv_net()
    model[3].eval()  # as the user wants it
    layer = frozen_layer(model)
    other = clone(model)
    assert [m.training for m in other[:6]] == [True, True, True, False, True, True]
    assert [p.requires_grad for p in other.parameters()] == [
        name != "0.bias"
        for name, _ in model.named_parameters()  # which the user froze
    ]
    assert other[:4](models.images(0)[0]).requires_grad
    assert not model[:4](models.images(0)[0]).requires_grad
    assert layer.is_frozen
    assert not model.train()[1].training
    assert not any(p.requires_grad for p in layer.parameters)


def test_unfreezing_undoes_freezing() -> None:
    model = conv_net()
    layer = frozen_layer(model)
    layer.freeze()  # again: nothing
    layer.unfreeze()
    assert not model[0].bias.requires_grad  # as the user had it
    assert model[0].weight.requires_grad
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("train" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict", "nested"])
def test_a_frozen_layer_detaches_whatever_goes_out(output: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor, *, by: list[Tensor]) -> Any:
            y = x * by[0] * self.weight
            forms = {"tensor": y, "tuple": (y, 1), "dict": {"y": y}, "nested": [{"a": (y, None)}]}
            return forms[output]

    block = Block()
    layer = Layer("block", [block], [])  # its weight is tied to a layer still trained
    layer.freeze()
    x = torch.ones(2, 5)
    result = block(x, by=[x])
    found = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    assert len(found) == 1
    assert not found[0].requires_grad
    assert block.weight.requires_grad


@pytest.mark.parametrize("container", ["dict", "list", "sequential"])
def test_outputs_are_detached_when_the_layers_container_is_never_called(container: str) -> None:
    """A tied embedding in a ModuleDict, say: calling its elements does not call the container."""
    shared = nn.Embedding(11, 5)
    if container == "dict":
        parts: nn.Module = nn.ModuleDict({"word": shared})
    else:
        parts = nn.ModuleList([shared]) if container == "list" else nn.Sequential(shared)
    layer = Layer("parts", parts.modules(), [])  # the weight is another layer's
    layer.freeze()
    assert not shared(torch.arange(3)).requires_grad


def test_names_and_sizes_are_shown() -> None:
    layers = find_layers(conv_net(), models.images(0)[0])
    assert repr(layers[3]) == "Layer('12', 2 modules, 15 parameters)"
    assert all(isinstance(layer.parameters, tuple) for layer in layers)
    assert all(isinstance(layer.modules, tuple) for layer in layers)
    assert all(a is not b for a, b in pairwise(layers))


def test_nothing_of_the_pass_that_finds_layers_stays_in_memory() -> None:
    """Of a sigmoid, autograd keeps the result, whose node keeps what is kept."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3))
    results: list[Any] = []
    model[1].register_forward_hook(lambda module, args, out: results.append(weakref.ref(out)))
    find_layers(model, torch.randn(2, 5))
    assert len(results) == 1
    assert results[0]() is None
