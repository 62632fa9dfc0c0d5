"""Gradients beside frozen layers: one that something outside of the model needs passes through,
exactly as by hand; and layers that the loss does not use are found in the first update."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from freezeout import FreezeOut, FreezeOutError, Frozen, PrefixCache, Schedule
from freezeout.parallel import compile_layers
from tests.models import (
    CLASSES,
    TiedTransformer,
    conv_net,
    images,
    linear_net,
    run,
    tokens,
    vectors,
)

EARLY = Schedule(0.4, "linear")
told = pytest.mark.filterwarnings("ignore:what comes into the model requires a gradient")


def frozen(model: nn.Module, x: Any, depth: int = 2) -> FreezeOut:
    optimizer = SGD(model.parameters(), 0.1)
    return FreezeOut(model, optimizer, None, schedule=Frozen(depth), example_inputs=x)


def by_hand(model: nn.Module, freezer: FreezeOut) -> nn.Module:
    """A copy with the same layers frozen as a user would, and nothing of ours."""
    paths = {module: path for path, module in model.named_modules()}
    names = {p: name for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    for layer in freezer.layers[: freezer.num_frozen]:
        for module in layer.modules:
            other.get_submodule(paths[module]).training = False
        for parameter in layer.parameters:
            other.get_parameter(names[parameter]).requires_grad_(False)
    return other


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


# --- through frozen layers ------------------------------------------------------------------


@told
@pytest.mark.parametrize("training", [True, False])
def test_a_generator_learns_through_a_frozen_discriminator(training: bool) -> None:
    torch.manual_seed(0)
    discriminator, generator = conv_net(), nn.Conv2d(3, 3, 1)
    freezer = frozen(discriminator, images(0)[0])
    reference, theirs = by_hand(discriminator, freezer), copy.deepcopy(generator)
    for d, g in ((discriminator, generator), (reference, theirs)):
        d.train(training)
        if d is reference and training:
            reference = by_hand(discriminator, freezer)
            d = reference
        torch.manual_seed(1)
        torch.autograd.backward(d(g(images(0)[0])).square().mean())
    assert same(gradients(generator), gradients(theirs))
    assert all(gradient is not None for gradient in gradients(generator))
    assert same(gradients(discriminator), gradients(reference))
    still = {p for layer in freezer.layers[:2] for p in layer.parameters}
    assert all((p.grad is None) == (p in still) for p in discriminator.parameters())


@told
@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_the_input_also_of_second_order(again: bool) -> None:
    """FGSM differentiates by the input; WGAN-GP goes on through that gradient."""
    torch.manual_seed(0)
    model = linear_net().double()
    freezer = frozen(model, vectors(0)[0].double())
    found = []
    for net in (model, by_hand(model, freezer)):
        x = vectors(0)[0].double().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=again)
        if again:
            torch.autograd.backward((gradient.norm(dim=1) - 1).square().mean())
        found.append((gradient.detach(), gradients(net)))
    assert torch.equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])
    assert again == any(gradient is not None for gradient in found[0][1])


def test_an_inner_features_gradient_in_evaluation() -> None:
    """Grad-CAM of a frozen layer: no warning, since nobody trains."""
    torch.manual_seed(0)
    model = conv_net()
    freezer = frozen(model, images(0)[0])
    model.eval()
    found = []
    for net in (model, by_hand(model, freezer).eval()):
        kept: list[Tensor] = []

        def keep(m: nn.Module, i: object, o: Tensor, kept: list[Tensor] = kept) -> None:
            o.retain_grad()
            kept.append(o)

        handle = net.get_submodule("0").register_forward_hook(keep)
        torch.autograd.backward(net(images(0)[0].requires_grad_())[:, 0].sum())
        handle.remove()
        found.append(kept[0].grad)
    assert found[0] is not None
    assert same(found[:1], found[1:])


class Prompted(TiedTransformer):
    """Takes embeddings, too; the output matrix is the embedding."""

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        x = self.wte(tokens)
        if prompt is not None:
            x = torch.cat((prompt.expand(len(x), -1, -1), x), 1)
        x = x + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]


@told
def test_a_soft_prompt_is_trained_and_a_tied_weight_gets_nothing_from_frozen_layers() -> None:
    torch.manual_seed(0)
    model, prompt = Prompted(), nn.Parameter(torch.randn(1, 2, 8))
    text = tokens(0)[0][:, :4]
    freezer = frozen(model, text, depth=3)
    model.train()
    torch.manual_seed(1)
    torch.autograd.backward(model(text, prompt).square().mean())
    through = model.wte.weight.grad
    assert prompt.grad is not None
    assert prompt.grad.abs().sum() > 0
    assert through is not None
    # As if the rows had been looked up in a table that is none of the model's.
    model.wte.weight.grad = None
    with torch.no_grad():
        rows: Tensor = model.wte(text)
    other = torch.zeros_like(prompt, requires_grad=True)

    class Table(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return rows

    reference = by_hand(model, freezer)
    reference.wte = Table()
    with torch.no_grad():
        other.copy_(prompt)
    torch.manual_seed(1)
    torch.autograd.backward(reference(text, other).square().mean())
    assert torch.equal(prompt.grad, other.grad)  # type: ignore[arg-type]
    assert torch.equal(through, reference.lm_head.weight.grad)  # type: ignore[arg-type, union-attr]


class UsesTied(nn.Module):
    """A block that itself uses a weight which is trained on as the output matrix."""

    def __init__(self, tied: Tensor) -> None:
        super().__init__()
        self.linear, self.tied = nn.Linear(5, 5), tied
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) @ self.tied
        if self.fails:
            raise ZeroDivisionError("in the frozen block")
        return y


@told
def test_a_tied_weight_within_a_frozen_block_is_spared_also_after_an_exception() -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 5, bias=False)
    block = UsesTied(head.weight)
    model = nn.Sequential(block, head)
    freezer = frozen(model, vectors(0)[0], depth=1)
    assert head.weight.requires_grad
    x = vectors(0)[0].requires_grad_()
    torch.autograd.backward(model(x).sum())
    assert x.grad is not None
    inner = (block.linear(x) @ head.weight).detach()
    expected = torch.ones(8, 5).T @ inner  # of the head's own use alone
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-6, atol=1e-6)
    block.fails = True
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert head.weight.requires_grad
    block.fails = False
    assert freezer.layers[0].is_frozen
    assert model(x).requires_grad


# --- what does not count --------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_an_embedding_that_checkpointing_makes_require_a_gradient_does_not_count(
    early: bool,
) -> None:
    """`enable_input_require_grads()` of transformers hangs such a hook on the embedding. If its
    gradient passed, every frozen block would go backward, for nothing."""
    model = TiedTransformer()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    text = tokens(0)[0]

    def make_inputs_require_grads(module: nn.Module, args: object, output: Tensor) -> None:
        output.requires_grad_(True)

    if early:
        model.wte.register_forward_hook(make_inputs_require_grads)
    freezer = frozen(model, text, depth=3)
    if not early:
        model.wte.register_forward_hook(make_inputs_require_grads)
    out: list[Tensor] = []
    freezer.layers[2].boundary[0].register_forward_hook(lambda m, i, o: out.append(o))
    for _ in range(2):
        model.train()(text)
        assert not out.pop().requires_grad
    model.eval()(text)
    assert out.pop().requires_grad  # somebody looks at what the embedding does


@told
def test_a_hook_that_joins_something_trained_elsewhere_does() -> None:
    model, steering = linear_net(), nn.Parameter(torch.zeros(5))
    frozen(model, vectors(0)[0], depth=1)
    model[0].register_forward_hook(lambda m, i, o: o + steering)
    torch.autograd.backward(model.train()(vectors(0)[0]).square().sum())
    assert steering.grad is not None


def test_a_trained_weight_used_ahead_of_frozen_layers_does_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.block = nn.Linear(5, 11, bias=False), nn.Linear(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            x = embedding(tokens, self.head.weight)
            self.passed = self.block(x)
            return self.head(self.passed.relu())  # type: ignore[no-any-return]

    model = Tied()
    frozen(model, torch.arange(8), depth=1)
    model.train()(torch.arange(8))
    assert not model.passed.requires_grad


# --- beside compiling, checkpointing, the cache -----------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_an_input_that_requires_a_gradient_in_some_steps_is_told_of_once(late: bool) -> None:
    """Adversarial training that sets in later, or in every third step."""
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    told: list[int] = []
    for step in range(20):
        x = vectors(step)[0].requires_grad_(step >= 9 if late else step % 3 == 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.autograd.backward(model(x).square().mean())
        told += [step for each in caught if "requires a gradient" in str(each.message)]
        assert x.grad is not None or not x.requires_grad
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert told == [9 if late else 8]  # of frozen layers


def test_parameters_that_were_off_when_their_layer_froze_train_after_the_run() -> None:
    """`set_requires_grad(discriminator, False)` around a generator's step, in each of them."""
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is undone
        for step in range(19):
            model.requires_grad_(True)
            model(vectors(step)[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.requires_grad_(False)
            freezer.step()
        model.requires_grad_(True)
        freezer.step()
    assert not model[0].weight.requires_grad
    freezer.release()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("look", [False, True])
def test_reentrant_checkpointing_is_refused_where_a_method_gives_the_loss(look: bool) -> None:
    class ByMethod(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def loss(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.b, self.a(x).relu(), use_reentrant=True)
            return self.head(hidden).square().mean()  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()))  # type: ignore[no-any-return]

    model, x = ByMethod(), vectors(0)[0]
    optimizer = SGD(model.parameters(), 0.1)
    plan = Schedule(0.5, scale_lr=False)
    inputs = x if look else None
    freezer = FreezeOut(model, optimizer, 20, schedule=plan, example_inputs=inputs)

    def step() -> None:
        torch.autograd.backward(model.loss(x))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what autograd's graph does not show
            freezer.step()

    step()
    with pytest.raises(FreezeOutError, match="layer 'b' runs under reentrant"):
        step()


@told
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_through_compiled_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))
    freezer = frozen(model, vectors(0)[0])
    reference = by_hand(model, freezer)
    compile_layers(freezer, backend="eager")
    for net in (model, reference):
        net.train()
        torch.autograd.backward(net(vectors(0)[0]).sum())
    found = []
    for net in (model, reference):
        x = vectors(0)[0].requires_grad_()
        torch.autograd.backward(net(x).sum())
        found.append(x.grad)
    assert found[0] is not None
    assert same(found[:1], found[1:])
    assert same(gradients(model), gradients(reference))


@told
def test_under_activation_checkpointing() -> None:
    torch.manual_seed(0)
    model = conv_net()
    freezer = frozen(model, images(0)[0])
    found = []
    for net in (model, by_hand(model, freezer)):
        x = images(0)[0].requires_grad_()
        torch.autograd.backward(checkpoint(net, x, use_reentrant=False).sum())
        found.append((x.grad, gradients(net)))
    assert found[0][0] is not None
    assert same([found[0][0], *found[0][1]], [found[1][0], *found[1][1]])


@told
def test_the_cache_leaves_such_passes_to_the_model() -> None:
    model = linear_net()
    freezer = frozen(model, vectors(0)[0])
    cache = PrefixCache(freezer, 8, depths=[2])
    x, ids = vectors(0)[0], torch.arange(8)
    for _ in range(3):
        cache(x, ids=ids)
    assert cache.stats.take().hits > 0
    asked = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="requires a gradient"):
        torch.autograd.backward(cache(asked, ids=ids).sum())
    assert asked.grad is not None
    assert asked.grad.abs().sum() > 0
    done = cache.stats.take()
    assert (done.hits, done.bypassed) == (0, 8)


# --- layers that the loss does not use --------------------------------------------------------


class Pooled(nn.Module):
    """Its pooler runs last, and is no part of what it returns first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.pooler = nn.Linear(CLASSES, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.b(self.a(x).relu())
        return hidden, self.pooler(hidden).tanh()


UNUSED = r"the loss does not use 'pooler'.*Layer 'b', .* from step 4 on"


def one(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), 0.1)]


def two(model: nn.Module) -> list[Optimizer]:
    last = list(model.parameters())[-4:]
    return [SGD(list(model.parameters())[:-4], 0.1), SGD(last, 0.1)]


@pytest.mark.parametrize("build", [one, two])
@pytest.mark.parametrize("closure", [False, True])
def test_a_last_layer_that_the_loss_does_not_use_is_refused_in_the_first_update(
    build: Callable[[nn.Module], list[Optimizer]], closure: bool
) -> None:
    model = Pooled()
    optimizers = build(model)
    x = vectors(0)[0]
    plan = Schedule(times=(0.2, 0.4, 1.0), scale_lr=False)
    FreezeOut(model, optimizers, 10, schedule=plan, example_inputs=x)

    def loss() -> Tensor:
        model.zero_grad()
        value: Tensor = model(x)[0].square().mean()
        torch.autograd.backward(value)
        return value

    def update() -> None:
        for optimizer in optimizers:
            if closure:
                optimizer.step(loss)  # type: ignore[arg-type]
            else:
                loss()
                optimizer.step()

    with pytest.raises(FreezeOutError, match=UNUSED):
        update()


def test_so_is_one_whose_loss_has_weight_0() -> None:
    model = Pooled()
    optimizer = SGD(model.parameters(), 0.1)
    plan = Schedule(times=(0.2, 0.4, 1.0), scale_lr=False)
    FreezeOut(model, optimizer, 10, schedule=plan, example_inputs=vectors(0)[0])
    hidden, pooled = model(vectors(0)[0])
    (hidden.square().mean() + 0 * pooled.square().mean()).backward()
    with pytest.raises(FreezeOutError, match=UNUSED):
        optimizer.step()


@pytest.mark.parametrize("kind", ["off in some batches", "all layers", "nothing at all"])
def test_a_later_loss_that_will_have_nothing_to_train_is_told_of_once(kind: str) -> None:
    model = Pooled()
    optimizer = SGD(model.parameters(), 0.1)
    plan = Schedule(times=(0.2, 0.4, 1.0), scale_lr=False)
    freezer = FreezeOut(model, optimizer, 10, schedule=plan, example_inputs=vectors(0)[0])
    said = pytest.warns(UserWarning, match=r"nothing behind layer 'b', .* step 4 on.*layers=")
    for step in range(4):
        optimizer.zero_grad()
        hidden, pooled = model(vectors(step)[0])
        is_off = step in (1, 2) and kind != "all layers"
        if not is_off or kind == "off in some batches":
            (hidden if is_off else pooled).square().mean().backward()
        optimizer.step()
        with said if step == 1 and kind == "off in some batches" else nullcontext():
            freezer.step()


def test_what_the_message_says_to_do_helps() -> None:
    model = Pooled()
    model.pooler.requires_grad_(False)
    optimizer = SGD(model.parameters(), 0.1)
    x = vectors(0)[0]
    freezer = FreezeOut(model, optimizer, 10, schedule=EARLY, example_inputs=x)
    for _ in range(10):
        torch.autograd.backward(model(x)[0].square().mean())
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert freezer.num_frozen == len(freezer.layers) - 1 == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_no_harm_no_error(depth: int) -> None:
    """A plan that never freezes what the loss uses; a first update without any gradient."""
    model = Pooled()
    optimizer = SGD(model.parameters(), 0.1)
    x = vectors(0)[0]
    freezer = FreezeOut(model, optimizer, None, schedule=Frozen(depth), example_inputs=x)
    optimizer.step()
    freezer.step()
    for _ in range(3):
        torch.autograd.backward(model(x)[0].square().mean())
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()


def test_released_before_the_first_update_nothing_is_looked_at() -> None:
    model = Pooled()
    optimizer = SGD(model.parameters(), 0.1)
    x = vectors(0)[0]
    FreezeOut(model, optimizer, 10, schedule=EARLY, example_inputs=x).release()
    assert not optimizer._optimizer_step_post_hooks
    torch.autograd.backward(model(x)[0].square().mean())
    optimizer.step()


# --- hooks on parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_falls_silent_is_named_once(after_backward: bool, late: bool) -> None:
    model = linear_net()
    calls: list[Any] = []
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    if late:
        run(model, [optimizer], freezer, vectors, range(3))
    weight: Any = model[0].weight
    if after_backward:
        weight.register_post_accumulate_grad_hook(calls.append)
    else:
        weight.register_hook(calls.append)
    begin = 3 if late else 0
    message = r"parameter '0\.weight' has a gradient hook \(builtins\.list\.append\), which is not"
    with pytest.warns(UserWarning, match=message) as seen:
        run(model, [optimizer], freezer, vectors, range(begin, 8 if late else 1))
    run(model, [optimizer], freezer, vectors, range(8 if late else 1, 20))
    assert len(seen) == 1
    assert len(calls) == 8 - begin


def test_hooks_on_what_never_freezes_are_not_named() -> None:
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 20, schedule=EARLY, example_inputs=vectors(0)[0])
    weight: Any = model[6].weight
    weight.register_hook(torch.clone)
    run(model, [optimizer], freezer, vectors, range(20))
    assert freezer.num_frozen == 3
