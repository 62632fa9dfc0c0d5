"""`torch.compile` beside freezing: graphs counted, results as without it, never a silent stop."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from freezeout import FreezeOut, FreezeOutError, Frozen, Layer, Plan, Schedule
from freezeout.errors import InvalidValue
from freezeout.lab.models.densenet import DenseNet
from freezeout.lab.models.wide_resnet import WideResNet
from freezeout.parallel import allow_stages, compile_layers
from freezeout.parallel.compiled import blocks, refuse_cuda_graphs
from tests.models import TiedTransformer, TransformerBlock, conv_net, images, tokens

# Torch looks there while it traces, and hides the warning in a way that "error" does not respect.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Batch = Callable[[int], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(
        recompile_limit=8, fail_on_recompile_limit_hit=False, skip_nnmodule_hook_guards=True
    ):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


class Residual(nn.Module):
    """A block with everything that freezing must stop: weights, statistics, dropout."""

    def __init__(self, width: int = 6, name: str = "") -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.name = name  # not a number: torch 2.7 compiles one graph for all numbers

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.linear(self.norm(x))))
        return x + y / (1 + len(self.name))  # type: ignore[no-any-return]


def residual(num_blocks: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual() for _ in range(num_blocks)), nn.Linear(6, 3))


class Net(nn.Module):
    """As one graph: `compile()` of a bare Sequential compiles its elements one by one."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.inner = residual(num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def vectors(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def even(num_layers: int, steps: int) -> Schedule:
    """Every layer but the last freezes, one after another, in the first 80 % of the steps."""
    times = [0.8 * (i + 1) / num_layers for i in range(num_layers - 1)]
    return Schedule(times=(*times, 1.0), scale_lr=False)


def driven(
    model: nn.Module,
    data: Batch,
    steps: int,
    *,
    example: bool = True,
    plan: Plan | None = None,
    **options: Any,
) -> FreezeOut:
    inputs = data(0)[0]
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    found = FreezeOut(model, optimizer, steps, example_inputs=inputs)
    found.release()
    number = len(found.layers)
    return FreezeOut(
        model,
        optimizer,
        steps,
        schedule=plan or even(number, steps),
        example_inputs=inputs if example else None,
        **options,
    )


def train(
    freezer: FreezeOut,
    data: Batch,
    forward: Callable[[Tensor], Tensor] | None = None,
    autocast: bool = False,
) -> list[Tensor]:
    """A whole run, checking that what is frozen stays; returns all the model's tensors."""
    model = freezer.model
    (optimizer,) = (split.optimizer for split in freezer._optimizers)
    still: list[tuple[Tensor, Tensor]] = []

    def watch(layers: Sequence[Layer]) -> None:
        for layer in layers:
            own = [*layer.parameters, *(b for m in layer.modules for b in m.buffers(recurse=False))]
            still.extend((t, t.detach().clone()) for t in own)

    watch(freezer.layers[: freezer.num_frozen])
    assert freezer.total_steps is not None
    for step in range(freezer.total_steps):
        torch.manual_seed(step)
        model.train()
        x, y = data(step)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = model(x) if forward is None else forward(x)
        torch.autograd.backward(cross_entropy(output.float().flatten(0, -2), y.flatten()))
        frozen = {p for layer in freezer.layers[: freezer.num_frozen] for p in layer.parameters}
        assert all((p.grad is None) == (p in frozen) for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        for tensor, value in still:
            assert torch.equal(tensor, value)
        watch(freezer.step())
    assert freezer.num_frozen == len(freezer.layers) - 1
    return [t.detach().clone() for t in model.state_dict().values()]


def compared(
    build: Callable[[], nn.Module],
    data: Batch,
    steps: int,
    backend: Any,
    *,
    autocast: bool = False,
    tolerance: float = 1e-5,
    plan: Plan | None = None,
) -> FreezeOut:
    """Train uncompiled, and with compiled layers; the results must agree."""
    expected = train(driven(build(), data, steps, plan=plan), data, autocast=autocast)
    freezer = driven(build(), data, steps, plan=plan)
    compile_layers(freezer, backend=backend)
    actual = train(freezer, data, autocast=autocast)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    return freezer


# --- layer by layer -------------------------------------------------------------------------


def test_fifty_equal_blocks_need_three_graphs() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    freezer = compared(lambda: residual(50), vectors, 60, graphs)
    assert freezer.num_frozen == 50
    assert graphs.frame_count == counters["stats"]["unique_graphs"] == 3


def test_layers_frozen_from_the_start_share_graphs_too() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    plan = Frozen(3, then=even(6, 12))
    freezer = compared(lambda: residual(8), vectors, 12, graphs, plan=plan)
    assert freezer.freeze_steps[:3] == (0, 0, 0)
    # Trained behind frozen ones, and frozen: none is trained behind a trained one at first, but
    # those after it are.
    assert graphs.frame_count == counters["stats"]["unique_graphs"] == 3


def test_a_whole_model_frozen_from_the_start_needs_a_graph_for_each_depth() -> None:
    freezer = driven(Net(4), vectors, 12, plan=Frozen(2, then=Schedule(times=(0.5, 0.75, 1))))
    assert allow_stages(freezer) == 3


@pytest.mark.parametrize("ahead", [False, True])
def test_inductor_gives_the_same(ahead: bool) -> None:
    expected = train(driven(residual(4), vectors, 12), vectors)
    freezer = driven(residual(4), vectors, 12)
    # Its own random numbers would be others.
    compile_layers(
        freezer, ahead=vectors(9)[0] if ahead else None, options={"fallback_random": True}
    )
    torch.testing.assert_close(train(freezer, vectors), expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3


def wide_resnet(depth: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return WideResNet(3, depth=depth, widen_factor=1, dropout=0.1)


def dense_net() -> nn.Module:
    torch.manual_seed(0)
    return DenseNet(3, depth=16, growth=2)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return TiedTransformer()


def pictures(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.randint(3, (4,), generator=generator)


@pytest.mark.parametrize(
    ("build", "data", "kinds"),
    # Groups of two unequal blocks, but for the first, and the head; units at three sizes of
    # image, two transitions and the head; a transformer block.
    [(wide_resnet, pictures, 6), (dense_net, pictures, 9), (transformer, tokens, 1)],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_real_models(
    build: Callable[[], nn.Module], data: Batch, kinds: int, autocast: bool
) -> None:
    graphs = CompileCounterWithBackend("eager")
    tolerance = 1e-2 if autocast else 1e-5  # of bfloat16, whose rounding may differ
    compared(build, data, 14, graphs, autocast=autocast, tolerance=tolerance)
    assert kinds < graphs.frame_count <= 3 * kinds


def test_blocks_that_only_look_equal_are_all_compiled() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Residual(name="a" * i) for i in range(4)), nn.Linear(6, 3))

    graphs = CompileCounterWithBackend("eager")
    compared(build, vectors, 12, graphs)
    # The first has nothing trained before it, and so is trained in one state.
    assert graphs.frame_count == 3 * 4 - 1 > 8


def test_giving_up_is_an_error() -> None:
    freezer = driven(residual(4), vectors, 12)
    compile_layers(freezer, backend="eager")
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(FailOnRecompileLimitHit),
    ):
        train(freezer, vectors)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"triton.cudagraphs": True}},
    ],
)
def test_cuda_graphs_are_refused_on_a_gpu_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="makes CUDA graphs, which do not go with") as error:
        refuse_cuda_graphs(options, {"cuda"})
    assert str(next(iter(options.values()))) in str(error.value)
    refuse_cuda_graphs(options, {"cpu"})
    refuse_cuda_graphs({"mode": "max-autotune-no-cudagraphs", "options": None}, {"cuda"})


class Embedded(nn.Module):
    """A block without anything that a freeze changes: its one weight is the classifier's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * self.table(tokens)  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Embedded()
        self.blocks = nn.ModuleList(TransformerBlock(6) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_no_graph_from_before_a_freeze_serves_after_it() -> None:
    graphs = CompileCounterWithBackend("eager")
    freezer = compared(Tied, tokens, 12, graphs)
    model = freezer.model
    assert isinstance(model, Tied)
    assert model.embed._compiled_call_impl is not None
    assert model.head.weight.requires_grad
    assert not model.embed(tokens(0)[0]).requires_grad


def test_order_may_be_checked_in_the_first_forward_pass() -> None:
    freezer = driven(residual(4), vectors, 12, example=False)
    graphs = CompileCounterWithBackend("eager")
    compile_layers(freezer, backend=graphs)
    assert freezer.order_pending
    train(freezer, vectors)
    assert not freezer.order_pending
    assert graphs.frame_count == 3


def test_single_operations_are_compiled_only_where_there_is_nothing_else() -> None:
    def names(model: nn.Module, data: Batch) -> list[str]:
        name_of = {module: name for name, module in model.named_modules()}
        found = driven(model, data, 10).layers
        return [name_of[module] for _, module in blocks(model, found)]

    assert names(dense_net(), pictures) == [
        *("block1_unit1", "block1_unit2", "transition1", "block2_unit1", "block2_unit2"),
        *("transition2", "block3_unit1", "block3_unit2", "head"),
    ]
    assert names(conv_net(), images) == ["0", "1", "4", "5", "7", "8", "12"]
    nested = nn.Sequential(nn.ModuleList([residual(2)[:2]])[0], nn.Linear(6, 3))
    assert names(nested, vectors) == ["0.0", "0.1"]


def test_copies_and_pickles_are_uncompiled_and_right() -> None:
    freezer = driven(residual(4), vectors, 12)
    compile_layers(freezer, backend="eager")
    train(freezer, vectors)
    freezer.model.eval()
    x = vectors(0)[0]
    expected = freezer.model(x)
    for other in (copy.deepcopy(freezer.model), pickle.loads(pickle.dumps(freezer.model))):
        assert all(module._compiled_call_impl is None for module in other.modules())
        torch.testing.assert_close(other(x), expected)
        for parameter in other.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(freezer.model(x), expected)


# --- ahead ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "data", "autocast"),
    [
        (lambda: residual(6), vectors, False),
        (lambda: wide_resnet(10), pictures, True),
        (transformer, tokens, False),
        (Tied, tokens, False),
    ],
)
def test_nothing_is_compiled_after_compiling_ahead(
    build: Callable[[], nn.Module], data: Batch, autocast: bool
) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    freezer = driven(build(), data, 14)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        compile_layers(freezer, ahead=data(5)[0], backend=graphs)
    before = graphs.frame_count
    assert before > 0
    train(freezer, data, autocast=autocast)
    assert graphs.frame_count == before


def test_compiling_ahead_leaves_no_mark() -> None:
    model = wide_resnet()
    x, y = pictures(0)
    freezer = driven(model, pictures, 14)
    torch.autograd.backward(cross_entropy(model(x), y))
    model.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    compile_layers(freezer, ahead=x, backend="eager")
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer.is_frozen for layer in freezer.layers)


def test_compiling_ahead_in_the_middle_of_a_run() -> None:
    freezer = driven(residual(6), vectors, 14)
    for _ in range(6):
        freezer.step()
    state = freezer.state_dict()
    freezer = driven(residual(6), vectors, 14)
    freezer.load_state_dict(state)
    graphs = CompileCounterWithBackend("eager")
    compile_layers(freezer, ahead=vectors(0)[0], backend=graphs)
    before = graphs.frame_count
    freezer.model(vectors(0)[0]).sum().backward()
    while freezer.step_count < 13:
        freezer.step()
        freezer.model(vectors(0)[0]).sum().backward()
    assert graphs.frame_count == before == 3


def test_a_model_without_a_tensor_to_differentiate_is_refused() -> None:
    class Dull(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    freezer = driven(Dull(2), vectors, 10)
    with pytest.raises(FreezeOutError, match="no tensor that requires a gradient"):
        compile_layers(freezer, ahead=vectors(0)[0], backend="eager")


# --- the whole model ------------------------------------------------------------------------


def compiled(model: nn.Module, way: str, backend: Any) -> Callable[[Tensor], Tensor]:
    if way == "torch.compile":
        return torch.compile(model, backend=backend)
    model.compile(backend=backend)
    return model


WAYS = pytest.mark.parametrize("way", ["torch.compile", "model.compile"])


@WAYS
def test_a_model_compiled_as_a_whole_is_warned_about(way: str) -> None:
    """What happens without help: torch stops at eight graphs, and says so in its log alone."""
    graphs = CompileCounterWithBackend("eager")
    freezer = driven(Net(9), vectors, 14)
    forward = compiled(freezer.model, way, graphs)
    with pytest.warns(UserWarning, match=r"compile_layers\(freezer\).*allow_stages") as warned:
        train(freezer, vectors, forward)
    assert graphs.frame_count == 8
    assert len(warned) >= 7
    assert counters["stats"]["unique_graphs"] < freezer.num_frozen + 1


@WAYS
def test_a_stage_needs_a_graph(way: str) -> None:
    expected = train(driven(Net(9), vectors, 14), vectors)
    graphs = CompileCounterWithBackend("eager")
    freezer = driven(Net(9), vectors, 14)
    assert allow_stages(freezer) == 10
    forward = compiled(freezer.model, way, graphs)
    actual = train(freezer, vectors, forward)
    assert graphs.frame_count == counters["stats"]["unique_graphs"] == 10
    torch.testing.assert_close(actual, expected)


def test_fewer_stages_need_fewer_graphs() -> None:
    expected = train(driven(Net(5), vectors, 16, freeze_every=4), vectors)
    graphs = CompileCounterWithBackend("eager")
    freezer = driven(Net(5), vectors, 16, freeze_every=4)
    assert len(freezer.layers) == 6
    assert allow_stages(freezer) == 4
    actual = train(freezer, vectors, torch.compile(freezer.model, backend=graphs))
    assert graphs.frame_count == 4
    torch.testing.assert_close(actual, expected)


@WAYS
def test_no_part_of_a_model_keeps_a_graph_from_before_a_freeze(way: str) -> None:
    """After a graph break, the part that a freeze leaves alone is a graph of its own."""
    handed_on: list[bool] = []

    class Broken(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            torch._dynamo.graph_break()
            handed_on.append(x.requires_grad)
            for block in self.blocks:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    freezer = driven(Broken(), tokens, 12)
    handed_on.clear()
    allow_stages(freezer)
    forward = compiled(freezer.model, way, "eager")
    first = freezer.freeze_steps[0]
    assert first is not None
    while freezer.step_count < 12:
        forward(tokens(0)[0])
        freezer.step()
    assert handed_on == [True] * first + [False] * (12 - first)


def test_beyond_the_room_for_stages_is_an_error() -> None:
    freezer = driven(Net(4), vectors, 12)
    allow_stages(freezer)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(FailOnRecompileLimitHit),
    ):
        train(freezer, vectors, torch.compile(freezer.model, backend="eager"))


def test_limits_are_never_lowered() -> None:
    with torch._dynamo.config.patch(recompile_limit=9999, accumulated_recompile_limit=99999):
        freezer = driven(Net(4), vectors, 12)
        allow_stages(freezer)
        compile_layers(freezer)
        assert torch._dynamo.config.recompile_limit == 9999
        assert torch._dynamo.config.accumulated_recompile_limit == 99999


def test_what_cannot_work_is_refused() -> None:
    model = residual(2)
    freezer = driven(model, vectors, 10, example=False)
    with pytest.raises(FreezeOutError, match="example_inputs="):
        allow_stages(freezer)
    freezer.release()
    freezer = driven(model, vectors, 10)
    model.compile()
    with pytest.raises(FreezeOutError, match="not compiled"):
        compile_layers(freezer)
    for function in (allow_stages, compile_layers):
        with pytest.raises(TypeError, match="must be a FreezeOut"):
            function(model)  # type: ignore[arg-type]


def test_adam_too() -> None:
    """An optimizer whose state is made at its first step, and dropped at a freeze."""
    results = []
    for compiles in (False, True):
        model = residual(3)
        optimizer = AdamW(model.parameters(), lr=0.01)
        freezer = FreezeOut(
            model, optimizer, 10, schedule=even(4, 10), example_inputs=vectors(0)[0]
        )
        if compiles:
            compile_layers(freezer, backend="eager")
        results.append(train(freezer, vectors))
        frozen = {p for layer in freezer.layers[:3] for p in layer.parameters}
        assert not frozen & set(optimizer.state)
    torch.testing.assert_close(results[1], results[0])
