"""That freezing engaged: what the check finds, what it refuses, and that it goes away again."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from freezeout import FreezeOut, FreezeOutError, Schedule
from tests import models
from tests.models import CLASSES, conv_net, images, linear_net, run, vectors

EARLY = Schedule(0.4, "linear")
STEPS = 20
Step = Callable[[], None]


@pytest.fixture
def room_for_graphs() -> Iterator[None]:
    """As `parallel.allow_stages` makes it, so that nothing is said about too many graphs."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def setup(model: nn.Module, x: Tensor, **options: Any) -> tuple[FreezeOut, Step]:
    """A FreezeOut that freezes after 8, 12 and 16 of 20 steps, and one training step."""
    torch.manual_seed(0)
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x, **options)

    def step() -> None:
        model.train()
        torch.autograd.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()

    return freezer, step


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_one_training_forward_pass_is_looked_at_and_no_more() -> None:
    model = conv_net()
    freezer, step = setup(model, images(0)[0])
    assert hooks(model) > 0
    model.eval()(images(0)[0])
    with torch.no_grad():
        model.train()(images(0)[0])
    assert hooks(model) > 0  # neither was training
    step()
    assert hooks(model) == 2  # whether an input requires a gradient is looked at for two steps
    for _ in range(6):
        step()
        assert hooks(model) == 0
    step()
    detaching = sum(2 * len(layer.boundary) for layer in freezer.layers[:1])
    assert freezer.num_frozen == 1
    assert hooks(model) == detaching + 2
    step()
    assert hooks(model) == detaching


def test_release_takes_the_hooks_of_an_armed_check_away() -> None:
    model = linear_net()
    freezer, _ = setup(model, vectors(0)[0])
    freezer.release()
    assert hooks(model) == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_made_while_armed_carry_no_hooks(
    clone: Callable[[nn.Module], nn.Module],
) -> None:
    model = conv_net()
    _, step = setup(model, images(0)[0])
    for _ in range(8):
        step()
    other = clone(model)
    other.train()(images(0)[0].requires_grad_()).sum().backward()
    assert hooks(other) == 0
    with pytest.warns(UserWarning, match="passes through frozen layers"):  # the model's does
        model(images(0)[0].requires_grad_())


def test_an_exception_in_the_forward_pass_leaves_the_check_armed() -> None:
    model = linear_net()
    _, step = setup(model, vectors(0)[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.zeros(2, 9))
    assert hooks(model) > 0
    step()
    step()
    assert hooks(model) == 0


def warned(freezer: FreezeOut, forward: Callable[[], object], message: str) -> None:
    """The first forward pass warns, once; the same after the next freeze does not again."""
    with pytest.warns(UserWarning, match=message) as seen:
        forward()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward()
        freezer._engaged.arm()
        forward()


PASSES = "what comes into the model requires a gradient: it passes through frozen layers"


def test_an_input_that_requires_a_gradient_is_told_of() -> None:
    model = conv_net()
    freezer, step = setup(model, images(0)[0])
    for _ in range(8):
        step()
    generator = nn.Conv2d(3, 3, 1)  # trained through the model, a discriminator
    warned(freezer, lambda: model(generator(images(1)[0])), PASSES)


def test_what_requires_a_gradient_only_inside_the_model_is_told_of_too() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, CLASSES)
            self.prompt = [torch.zeros(5, requires_grad=True)]  # no parameter of the model

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(input=x + self.prompt[0]).relu())  # type: ignore[no-any-return]

    model = Prompted()
    freezer, step = setup(model, vectors(0)[0])
    for _ in range(8):
        step()
    warned(freezer, lambda: model(vectors(0)[0]), PASSES)


def test_a_second_forward_pass_tells_of_it_before_anything_is_frozen() -> None:
    """A discriminator sees real images first, and a generator's after its own update."""
    model = linear_net()
    freezer, step = setup(model, vectors(0)[0])
    step()
    with pytest.warns(UserWarning, match=PASSES):
        model(vectors(0)[0].requires_grad_())
    assert freezer.num_frozen == 0
    for _ in range(9):
        model(vectors(0)[0].requires_grad_())  # once: warnings are errors
        step()
    assert freezer.num_frozen > 0


def test_a_tied_weight_that_comes_in_is_no_news() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.block = nn.Linear(5, 11, bias=False), nn.Linear(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            x = nn.functional.embedding(tokens, self.head.weight)
            return self.head(self.block(x).relu())  # type: ignore[no-any-return]

    model = Tied()
    freezer, step = setup(model, torch.arange(8))
    for _ in range(10):  # warnings are errors
        step()
    assert [layer.name for layer in freezer.layers[: freezer.num_frozen]] == ["block"]


def test_requires_grad_set_again_is_undone_in_the_next_step_and_warned_of_once() -> None:
    """As some scripts for GANs set it in every step."""
    model = linear_net()
    freezer, step = setup(model, vectors(0)[0])
    for _ in range(8):
        step()
    held = {p: p.detach().clone() for p in freezer.layers[0].parameters}

    def undone() -> None:
        model.requires_grad_(True)
        step()
        assert not any(p.requires_grad for p in held)

    with pytest.warns(UserWarning, match=r"2 parameters of frozen layers \('0\.weight' of '0'"):
        undone()
    for _ in range(7):
        undone()  # warnings are errors here
    assert freezer.num_frozen == 3
    assert all(p.grad is None and torch.equal(p, was) for p, was in held.items())


class Remembering(nn.Module):
    """Keeps what its first layer made of the first batch, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not self.training:
            return self.b(y)  # type: ignore[no-any-return]
        if self.kept is None:
            self.kept = y
        return self.b(y + self.kept)  # type: ignore[no-any-return]


def test_a_tensor_kept_from_before_the_freeze_is_found_by_its_parameters() -> None:
    model = Remembering()
    optimizer = SGD(model.parameters(), 0.1)
    x = vectors(0)[0]
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)

    def step() -> None:
        model(x).square().mean().backward(retain_graph=True)
        for p in model.parameters():  # so that the kept graph stays valid
            p.grad = None
        optimizer.step()
        freezer.step()

    while freezer.num_frozen == 0:
        step()
    with pytest.warns(UserWarning, match=r"parameter 'a\.\w+' of frozen layer 'a' is still in the"):
        step()


def test_training_set_by_hand_wakes_a_norm_and_is_found() -> None:
    model = conv_net()
    _, step = setup(model, images(0)[0])
    for _ in range(8):
        step()
    model[1].training = True  # not through train(), which frozen modules withstand
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="norm of frozen layer '0' counted another batch"):
        step()


@pytest.mark.usefixtures("room_for_graphs")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_stale_compiled_graph_is_found(norm: type[nn.Module]) -> None:
    """torch is told to skip its guards, and so runs the graph from before the freeze."""
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(5, 5), norm(5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    compiled = torch.compile(inner, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    _, step = setup(compiled, vectors(0)[0])
    for _ in range(8):
        step()
    with (
        torch.compiler.set_stance(skip_guard_eval_unsafe=True),
        pytest.warns(UserWarning, match="stale compiled graph"),
    ):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        step()


def test_a_stale_graph_of_a_model_compiled_from_outside_is_found_by_its_norms() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    freezer, _ = setup(model, vectors(0)[0])
    compiled = torch.compile(model, backend="aot_eager")
    (optimizer,) = (each.optimizer for each in freezer._optimizers)

    def step() -> None:
        compiled(vectors(0)[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()

    for _ in range(8):
        step()
    assert freezer.num_frozen == 1
    with (
        torch.compiler.set_stance(skip_guard_eval_unsafe=True),
        pytest.warns(UserWarning, match="norm of frozen layer '0' counted another batch"),
    ):
        step()


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, blocks: list[Branch]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("room_for_graphs")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_the_check_costs_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many graphs as without it, for blocks compiled alone and for the model as a whole."""

    def graphs(check: bool, whole: bool) -> int:
        torch._dynamo.reset()
        made = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal made
            made += 1
            return graph.forward

        blocks = [Branch() for _ in range(3)]
        model = Stack(blocks)
        freezer, step = setup(model, vectors(0)[0])
        if not check:
            freezer._engaged.disarm()
            monkeypatch.setattr(freezer._engaged, "arm", lambda loaded=False: None)
        for block in [model] if whole else blocks:
            block.compile(backend=backend)
        for _ in range(STEPS):
            step()
        assert freezer.num_frozen == 3
        return made

    for whole in (False, True):
        assert graphs(True, whole) == graphs(False, whole) > 0


class Checkpointed(nn.Module):
    """Four layers, each checkpointed, but for the last; or a part inside each."""

    def __init__(self, reentrant: bool, inside: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3)
        )
        self.head = nn.Linear(5, CLASSES)
        self.reentrant, self.inside = reentrant, inside

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            inner, outer = (layer[:2], layer[2]) if self.inside else (layer, nn.Identity())  # type: ignore[index]
            x = outer(self._run(inner, x))
        return self.head(x)  # type: ignore[no-any-return]

    def _run(self, part: nn.Module, x: Tensor) -> Tensor:
        if not self.training:
            return part(x)  # type: ignore[no-any-return]
        return checkpoint(part, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("at", [0, 9])
def test_reentrant_checkpointing_is_refused_with_the_reason(inside: bool, at: int) -> None:
    """Also in a run that was loaded with layers frozen."""
    model = Checkpointed(True, inside)
    freezer, step = setup(model, vectors(0)[0])
    freezer.load_state_dict({**freezer.state_dict(), "step": at})
    for _ in range(2):  # it does not go away by trying again
        with pytest.raises(FreezeOutError, match=r"reentrant .*use_reentrant=False"):
            step()


def test_reentrant_checkpointing_of_a_function_is_found_in_the_graph() -> None:
    """It calls no module, so that none is seen to run inside."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            def inner(y: Tensor) -> Tensor:
                return nn.functional.linear(y, self.b.weight).tanh()

            y = self.a(x)
            return self.c(checkpoint(inner, y, use_reentrant=True) if self.training else inner(y))  # type: ignore[no-any-return]

    model = Functional()
    model.b.bias = None  # type: ignore[assignment]
    _, step = setup(model, vectors(0)[0])
    with pytest.raises(FreezeOutError, match=r"the model runs under reentrant"):
        step()


@pytest.mark.parametrize("inside", [False, True])
def test_non_reentrant_checkpointing_freezes_and_trains(inside: bool) -> None:
    model, plain = Checkpointed(False, inside), Checkpointed(False, inside).eval()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        optimizer = SGD(each.parameters(), 0.1)
        freezer = FreezeOut(each, optimizer, STEPS, schedule=EARLY, example_inputs=vectors(0)[0])
        if each is plain:
            plain.train = lambda mode=True: plain  # type: ignore[method-assign]
        run(each, [optimizer], freezer, vectors, range(STEPS))
        assert freezer.num_frozen == len(freezer.layers) - 1
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_no_grad_around_a_part_is_the_users_affair() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)  # type: ignore[no-any-return]

    _, step = setup(Partly(), vectors(0)[0])
    for _ in range(10):
        step()


# --- micro-batches --------------------------------------------------------------------------


def accumulate(every: int, calls: int) -> None:
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, example_inputs=vectors(0)[0])
    for micro in range(calls):
        torch.autograd.backward(models.loss_of(model, *vectors(micro)))
        if micro % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()
        freezer.step()


@pytest.mark.parametrize(("every", "without"), [(4, 15), (3, 14)])
def test_micro_batches_counted_as_steps_are_warned_of_once(every: int, without: int) -> None:
    message = f"{without} of the first 20 calls of FreezeOut.step"
    with pytest.warns(UserWarning, match=message) as seen:
        accumulate(every, 60)
    assert len(seen) == 1


@pytest.mark.parametrize(("every", "calls"), [(1, 60), (2, 60), (4, 20)])
def test_half_of_the_steps_without_an_update_are_no_news_nor_are_few(
    every: int, calls: int
) -> None:
    accumulate(every, calls)


def test_several_optimizers_and_skipped_steps_are_no_micro_batches() -> None:
    model = linear_net()
    optimizers = [SGD(model[:2].parameters(), 0.1), SGD(model[2:].parameters(), 0.1)]
    freezer = FreezeOut(model, optimizers, 100, example_inputs=vectors(0)[0])
    for step in range(40):
        torch.autograd.backward(models.loss_of(model, *vectors(step)))
        optimizers[step % 2].step()  # one each time
        freezer.step()


# --- a model changed after construction -----------------------------------------------------


def replace_head(model: Any) -> None:
    model[6] = nn.Linear(5, CLASSES)


def replace_bias(model: Any) -> None:
    model[2].bias = nn.Parameter(torch.zeros(5))


def add_parameter(model: Any) -> None:
    model.scale = nn.Parameter(torch.ones(1))


def remove_bias(model: Any) -> None:
    model[2].bias = None


def replace_activation(model: Any) -> None:
    model[3] = nn.GELU()


def add_module(model: Any) -> None:
    model[2].extra = nn.Dropout()


def remove_module(model: Any) -> None:
    del model[7]


@pytest.mark.parametrize("at", [0, 5, 9])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_head, r"parameter '6\.weight' was added to the model, or put in another's place"),
        (replace_bias, r"parameter '2\.bias' was added"),
        (add_parameter, "parameter 'scale' was added"),
        (remove_bias, r"parameter '2\.bias' has gone"),
        (replace_activation, r"module '3' \(GELU\) was added"),
        (add_module, r"module '2\.extra' \(Dropout\) was added"),
        (remove_module, "a ReLU of layer '6' has gone"),
    ],
)
def test_a_model_changed_after_construction_is_refused_by_name(
    change: Callable[[nn.Module], None], message: str, at: int
) -> None:
    model = linear_net()
    freezer, step = setup(model, vectors(0)[0])
    for _ in range(at):
        step()
    state = freezer.state_dict()
    change(model)
    with pytest.raises(FreezeOutError, match=message):
        freezer.load_state_dict(state)
    refused = 0 if at == 0 else 7 if at == 5 else 11  # at the first step, and at freezes
    for _ in range(at, refused):
        freezer.step()
    with pytest.raises(FreezeOutError, match=message):
        freezer.step()
    assert freezer.step_count == refused  # nothing of the refused step was done
    freezer.release()


@pytest.mark.usefixtures("room_for_graphs")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_a_module_wrapped_after_construction_is_the_same_model() -> None:
    model = conv_net()
    freezer, step = setup(model, images(0)[0])
    model[4] = torch.compile(model[4], backend="eager")  # type: ignore[assignment]
    for _ in range(STEPS):
        step()
    assert freezer.num_frozen == 3
