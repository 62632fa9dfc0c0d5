"""Layers that are no plain chain: branches, teachers, functional weights, losses by method."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.optim import SGD, SparseAdam

from freezeout import FreezeOut, Frozen, Layer, Schedule, find_layers
from freezeout.errors import InvalidValue, LayerOrderError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def block(out: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, out))


def built(model: nn.Module, inputs: Any = X, **options: Any) -> FreezeOut:
    return FreezeOut(model, SGD(model.parameters(), 0.1), 20, example_inputs=inputs, **options)


def weights(model: nn.Module, layers: list[Layer]) -> list[list[str]]:
    """The names of each layer's parameters, but for biases."""
    names = {p: name for name, p in model.named_parameters()}
    found = [[names[p] for p in layer.parameters] for layer in layers]
    return [[name for name in layer if "bias" not in name] for layer in found]


# --- branches -------------------------------------------------------------------------------


class Heads(nn.Module):
    """The auxiliary head branches off in the middle, and runs there or at the end."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.main, self.aux, self.early = block(2), block(2), early

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.backbone[1](self.backbone[0](x))
        if self.early:
            aux = self.aux(middle)
            return self.main(self.backbone[2](middle)), aux
        return self.main(self.backbone[2](middle)), self.aux(middle)


@pytest.mark.parametrize("early", [False, True])
def test_heads_of_several_layers_end_together(early: bool) -> None:
    model = Heads(early)
    found = [set(layer) for layer in weights(model, built(model).layers)]
    assert found == [
        *({f"backbone.{i}.weight"} for i in range(3)),
        {"main.0.weight", "aux.0.weight"},
        {"main.2.weight", "aux.2.weight"},
    ]


def test_exits_behind_every_block_end_together() -> None:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.exits = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            out = []
            for each, leave in zip(self.blocks, self.exits, strict=True):
                x = each(x).relu()
                out.append(leave(x))
            return out

    names = weights(model := Exits(), find_layers(model, X))
    assert names[:3] == [[f"blocks.{i}.weight"] for i in range(3)]
    assert names[3] == [f"exits.{i}.weight" for i in range(3)]


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(depth))
        self.norm, self.proj = nn.LayerNorm(6), nn.Parameter(torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        for each, drop in zip(self.blocks, self.drops, strict=True):
            x = drop(each(x).relu())
        return self.norm(x) @ self.proj  # type: ignore[no-any-return]


class Towers(nn.Module):
    def __init__(self, image: int, text: int) -> None:
        super().__init__()
        self.image, self.text = Tower(image), Tower(text)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale.exp() * self.image(a) @ self.text(b).T  # type: ignore[no-any-return]


@pytest.mark.parametrize(("image", "text"), [(3, 3), (3, 2), (2, 3)])
def test_towers_freeze_side_by_side_counted_from_the_end(image: int, text: int) -> None:
    model = Towers(image, text)
    layers = find_layers(model, (X, X))
    found = [set(layer) for layer in weights(model, layers)]
    ends = {f"{tower}.{name}" for tower in ("image", "text") for name in ("norm.weight", "proj")}
    assert found[-1] == {"scale", *ends}
    for depth, layer in enumerate(reversed(found[:-1]), start=1):
        assert layer == {
            f"{tower}.blocks.{count - depth}.weight"
            for tower, count in (("image", image), ("text", text))
            if depth <= count
        }
    for tower in (model.image, model.text):  # what has no parameters freezes with what feeds it
        for linear_, drop in zip(tower.blocks, tower.drops, strict=True):
            own = next(layer for layer in layers if linear_ in layer.modules)
            assert drop in own.modules


def test_a_tower_of_one_layer_freezes_beside_the_last_of_the_other() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.item, self.top = nn.Linear(6, 6), nn.Linear(12, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            for each in self.user:
                a = each(a).relu()
            return self.top(torch.cat([a, self.item(b)], 1))  # type: ignore[no-any-return]

    model = Fused()
    found = weights(model, find_layers(model, (X, X)))
    assert [set(layer) for layer in found] == [
        {"user.0.weight"},
        {"user.1.weight"},
        {"user.2.weight", "item.weight"},
        {"top.weight"},
    ]


def test_a_decoders_embedding_is_a_layer_behind_the_encoder() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(9, 6), nn.Embedding(9, 6)
            self.encoder, self.decoder = block(), nn.Linear(6, 6)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            memory = self.encoder(self.source(a))
            return self.decoder(memory + self.target(b))  # type: ignore[no-any-return]

    tokens = torch.arange(4)
    names = [layer.name for layer in find_layers(Translator(), (tokens, tokens))]
    assert names == ["source", "encoder.0", "encoder.2", "target", "decoder"]


def test_users_may_list_branches_in_any_order_that_runs() -> None:
    model = Towers(3, 3)
    pairs = list(zip(model.image.blocks, model.text.blocks, strict=True))
    freezer = built(model, (X, X), layers=[*map(list, pairs), [model.image.norm, model.text.norm]])
    assert len(freezer.layers) == 4
    freezer.release()
    built(model, (X, X), layers=[*model.text.blocks, *model.image.blocks])
    with pytest.raises(LayerOrderError, match=r"'image.blocks.0' is listed after 'image.blocks.1'"):
        built(model, (X, X), layers=[model.image.blocks[i] for i in (1, 0, 2)])


def test_without_example_inputs_branches_are_named() -> None:
    model = Heads(early=False)
    built(model, None)
    with pytest.warns(UserWarning, match=r"'main.2' and 'aux.0' do not feed each other.*layers="):
        model(X)


class Twins(nn.Module):
    """An encoder that runs for each of two inputs; behind each run a head of its own."""

    def __init__(self, order: str) -> None:
        super().__init__()
        parts = {"encoder": block(), "one": block(), "two": nn.Linear(6, 6)}
        for name in order.split():
            self.add_module(name, parts[name])

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        encoder, one, two = map(self.get_submodule, ("encoder", "one", "two"))
        first = one(encoder(a))
        return first, two(encoder(b))


def test_what_a_shared_encoder_feeds_is_behind_it_though_the_encoder_runs_again_later() -> None:
    torch.manual_seed(0)
    model = Twins("encoder one two")
    freezer = built(model, (X, X), schedule=Schedule(0.2, scale_lr=False))
    assert weights(model, freezer.layers) == [
        ["encoder.0.weight"],
        ["encoder.2.weight"],
        ["one.0.weight"],
        ["one.2.weight", "two.weight"],
    ]
    plain = copy.deepcopy(model)
    for step in range(20):
        plain.load_state_dict(model.state_dict())
        for each in (model, plain):
            each.zero_grad()
            sum(out.pow(2).sum() for out in each(X, X + step)).backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is None or torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
        freezer.step()


@pytest.mark.parametrize("listed", [False, True])
def test_a_shared_encoder_that_is_listed_behind_what_it_feeds_is_refused(listed: bool) -> None:
    model = Twins("one encoder two")
    refused = pytest.raises(LayerOrderError, match=r"'encoder.*' is listed after 'one")
    if listed:
        with refused:
            built(model, (X, X), layers=[model.one, model.encoder, model.two])
    else:
        built(model, None)
        with refused:
            model(X, X)


# --- teachers, and what other optimizers train ------------------------------------------------


class Taught(nn.Module):
    """The teacher is a moving average of the student, and runs first or last."""

    def __init__(self, first: bool = True, update: str = "outside") -> None:
        super().__init__()
        self.teacher, self.student = self._body(), self._body()
        self.head, self.first, self.update = nn.Linear(6, 6), first, update

    def _body(self) -> nn.Sequential:
        each = (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1)) for _ in "ab")
        return nn.Sequential(*each)

    def _target(self, x: Tensor) -> Tensor:
        if self.update == "detach":
            return self.teacher(x).detach()  # type: ignore[no-any-return]
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for mine, theirs in pairs:
                if self.update == "assigned":
                    mine.data = mine.data * 0.9 + theirs.data * 0.1
                elif self.update == "in place":
                    mine.lerp_(theirs, 0.1)
            return self.teacher(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        target = self._target(x) if self.first else None
        out = self.head(self.student(x))
        return (out - (self._target(x) if target is None else target)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("update", ["outside", "in place", "assigned", "detach"])
def test_a_teacher_stays_out_of_the_layers(update: str, first: bool, frozen: bool) -> None:
    model = Taught(first, update)
    model.teacher.requires_grad_(not frozen)
    freezer = built(model)
    assert [layer.name for layer in freezer.layers] == ["student.0.0", "student.1.0", "head"]
    assert set(model.teacher.modules()) <= set(freezer.layers[-1].modules)
    assert freezer.freeze_steps[0] == built(Taught(first)).freeze_steps[0]
    assert freezer.freeze_steps[0] != 0
    freezer.release()
    built(model, schedule=Frozen(2))
    before = model.teacher[0][1].num_batches_tracked.item()  # type: ignore[index]
    model.train()(X)
    assert model.teacher[0][1].num_batches_tracked == before + 1  # type: ignore[index]
    assert all(m.training for m in model.teacher.modules())
    assert not any(m.training for m in model.student.modules())


def test_a_teacher_that_no_optimizer_trains_stays_out_wherever_it_is_detached() -> None:
    class Returned(Taught):
        def forward(self, x: Tensor) -> Any:
            return self.teacher(x), self.head(self.student(x))

    model = Returned()
    optimizer = SGD([*model.student.parameters(), *model.head.parameters()], 0.1)
    with pytest.warns(UserWarning, match=r"8 parameters .* in no optimizer .*'teacher.0.0.weight'"):
        freezer = FreezeOut(model, optimizer, 20, example_inputs=X)
    assert [layer.name for layer in freezer.layers] == ["student.0.0", "student.1.0", "head"]


@pytest.mark.parametrize("without_grad", [False, True])
def test_frozen_first_layers_that_feed_trained_ones_are_frozen_from_the_start(
    without_grad: bool,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = block().requires_grad_(False), block()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad() if without_grad else nullcontext():
                x = self.backbone(x)
            return self.head(x)  # type: ignore[no-any-return]

    freezer = built(Net())
    assert [layer.name for layer in freezer.layers] == [
        "backbone.0",
        "backbone.2",
        "head.0",
        "head.2",
    ]
    assert freezer.freeze_steps[:2] == (0, 0)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_example_inputs_a_teacher_that_would_freeze_is_refused(frozen: bool) -> None:
    model = Taught()
    model.teacher.requires_grad_(not frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers frozen from the start
        built(model, None)
    with pytest.raises(LayerOrderError, match=r"'teacher.0.0.weight' is not trained.*example_inp"):
        model(X)


def test_parameters_of_an_optimizer_that_was_not_given_are_named_at_once() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 6), nn.Linear(6, 2))
    tokens = torch.arange(4)
    sparse, dense = SparseAdam(model[0].parameters(), 0.1), SGD(model[1:].parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"1 parameters .* no optimizer .*'0.weight'.*as a list"):
        FreezeOut(model, dense, 20, example_inputs=tokens).release()
    assert len(FreezeOut(model, [sparse, dense], 20, example_inputs=tokens).layers) == 3


# --- weights that a parent uses -----------------------------------------------------------------


def _plainly(parts: nn.ModuleList, x: Tensor) -> Tensor:
    for part in parts:
        x = linear(x, part.weight, part.bias).relu()  # type: ignore[arg-type]
    return x


def _product(parts: nn.ModuleList, x: Tensor) -> Tensor:
    for part in parts:
        x = (x @ part.weight.t() + part.bias).relu()  # type: ignore[operator]
    return x


def _prepared(parts: nn.ModuleList, x: Tensor) -> Tensor:
    scaled = [2 * part.weight for part in reversed(parts)]  # type: ignore[operator]
    for part in parts:
        x = linear(x, scaled.pop(), part.bias).relu()  # type: ignore[arg-type]
    return x


def _in_part(parts: nn.ModuleList, x: Tensor) -> Tensor:
    for i, part in enumerate(parts):
        x = (part(x) if i % 2 else linear(x, part.weight, part.bias)).relu()  # type: ignore[arg-type]
    return x


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("forward", [_plainly, _product, _prepared, _in_part])
def test_layers_whose_weights_a_parent_uses_are_chained(
    forward: Callable[[nn.ModuleList, Tensor], Tensor], parametrized: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.blocks, self.head = nn.Sequential(block(), block()), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(forward(self.parts, x)))  # type: ignore[no-any-return]

    model = Net()
    if parametrized:
        for part in model.parts:
            nn.utils.parametrizations.weight_norm(part)
    parts = [f"parts.{i}" for i in range(4)]
    blocks = [f"blocks.{i}.{j}" for i in range(2) for j in (0, 2)]
    layers = find_layers(model, X)
    assert [layer.name for layer in layers] == [*parts, *blocks, "head"]
    assert all(set(model.parts[i].parameters()) == {*layers[i].parameters} for i in range(4))


def test_weights_that_are_handed_to_blocks_anew_are_theirs() -> None:
    class Masked(nn.Module):
        """Each block runs with weights that its parent has made of its own, all made first."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)
            self.blocks = nn.ModuleList(block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            made = [{n: p * 0.5 for n, p in each.named_parameters()} for each in self.blocks]
            for each, weights in reversed(list(zip(self.blocks, made, strict=True))):
                x = functional_call(each, weights, (x,)).relu()
            return self.head(x)  # type: ignore[no-any-return]

    model = Masked()
    found = weights(model, find_layers(model, X))
    assert found == [
        *([f"blocks.{i}.{part}.weight"] for i in (2, 1, 0) for part in (0, 2)),
        ["head.weight"],
    ]


def test_codes_go_with_the_part_that_makes_weights_of_them() -> None:
    """They would get no gradient through it once it is frozen."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randn(3, 4))
            self.maker, self.head = nn.Linear(4, 36), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for code in self.codes:
                x = linear(x, self.maker(code).view(6, 6)).relu()
            return self.head(x)  # type: ignore[no-any-return]

    model = Hyper()
    found = weights(model, find_layers(model, X))
    assert found == [["codes", "maker.weight"], ["head.weight"]]


def test_blocks_of_which_a_parent_calls_the_parts_are_layers_each() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix, self.mlp = nn.LayerNorm(6), nn.Linear(6, 6), block()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for each in self.blocks:
                x = x + each.mix(each.norm(x))  # type: ignore[operator]
                x = x + each.mlp(x)  # type: ignore[operator]
            return self.head(x)  # type: ignore[no-any-return]

    layers = find_layers(Net(), X)
    assert [layer.name for layer in layers] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert [len(layer.parameters) for layer in layers] == [8, 8, 8, 2]


# --- losses that come from a method -------------------------------------------------------------


class ByMethod(nn.Module):
    """Defined in the reverse order, and without a forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.decoder, self.encoder = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(6, 6)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu()  # type: ignore[no-any-return]

    def loss(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encode(x)).relu()).square().mean()  # type: ignore[no-any-return]


class OfWeights(ByMethod):
    def loss(self, x: Tensor) -> Tensor:
        for each in (self.encoder, self.decoder, self.head):
            x = linear(x, each.weight)
        return x.square().mean()


def steps(model: ByMethod, count: int, **options: Any) -> Iterator[FreezeOut]:
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, **options)
    for _ in range(count):
        (model.loss(X) + model.encode(X).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        yield freezer


@pytest.mark.parametrize(
    ("schedule", "said"), [(None, ": encoder, decoder, head"), (Frozen(1), "")]
)
@pytest.mark.parametrize("order", [None, ["decoder", "encoder", "head"]])
def test_the_order_is_checked_where_a_method_gives_the_loss(
    order: Any, schedule: Any, said: str
) -> None:
    model = ByMethod()
    layers = order and [model.get_submodule(name) for name in order]
    with pytest.raises(LayerOrderError, match=f"runs before it.*of execution{said}$"):
        next(steps(model, 1, layers=layers, schedule=schedule))


def test_a_right_order_is_checked_once_and_no_hook_stays() -> None:
    model = ByMethod()
    run = steps(model, 3, layers=[model.encoder, model.decoder, model.head])
    freezer = next(run)
    assert not freezer.order_pending
    assert all(not m._forward_pre_hooks for m in copy.deepcopy(model).children())
    next(run)
    assert not any(m._forward_pre_hooks for m in model.children())
    assert not any("__reduce_ex__" in vars(m) for m in model.children())
    assert len(list(run)) == 1


def test_an_order_that_was_never_seen_is_told_before_the_first_freeze() -> None:
    run = (freezer for freezer in steps(OfWeights(), 20) if freezer.num_frozen)
    with pytest.warns(
        UserWarning, match=r"never checked: 'head', 'decoder' were not seen.*layers="
    ):
        next(run)


def test_a_model_without_a_forward_is_told_of_layers() -> None:
    with pytest.raises(InvalidValue, match=r"ByMethod has no forward\(\).*pass layers="):
        built(ByMethod())


def test_copies_that_are_made_before_the_first_pass_carry_no_hook() -> None:
    model = ByMethod()
    FreezeOut(model, SGD(model.parameters(), 0.1), 20)
    assert model.head._forward_pre_hooks
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(m._forward_pre_hooks or "__reduce_ex__" in vars(m) for m in clone.modules())


def test_what_a_part_computes_once_for_several_blocks_is_in_front_of_the_first() -> None:
    """A relative position bias, say, of which only a method is called."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = block()

        def of(self, width: int) -> Any:
            return self.net(torch.ones(width))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = block()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            self.bias, self.blocks = Bias(), nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            x, bias = self.stem(x), self.bias.of(6)
            for each in self.blocks:
                x = each(x + bias)
            return self.head(x)  # type: ignore[no-any-return]

    names = [layer.name for layer in find_layers(Biased(), X)]
    assert names == ["stem", "bias", "blocks.0", "blocks.1", "head"]


class Product(torch.autograd.Function):
    """A linear map with a backward pass of its own. Autograd is off while its forward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product


def test_weights_that_an_autograd_function_takes_are_trained() -> None:
    """A teacher's are taken without gradients, too."""
    model = nn.Sequential(nn.Linear(4, 4), *(OwnLinear(4, 4, bias=False) for _ in range(2)))
    assert [layer.name for layer in find_layers(model, torch.randn(2, 4))] == ["0", "1", "2"]
