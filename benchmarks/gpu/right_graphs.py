"""Compiled layers and CUDA graphs beside the same training without them."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch.nn.functional import cross_entropy, gelu
from torch.optim import SGD

from freezeout import FreezeOut, FreezeOutError, Schedule
from freezeout.parallel import allow_stages, compile_layers

from .part import Case, Row, Setup, Wrong
from .right_proofs import exactly, largest_difference, row

BLOCKS, STEPS, ROWS = 5, 15, 32
# Each block freezes, one after another, after 2, 4 ... 10 steps.
SCHEDULE = Schedule(times=(*(2 * (i + 1) / STEPS for i in range(BLOCKS)), 1.0), scale_lr=False)
SAID = 300  # characters of an error in a table
Data = list[tuple[Tensor, Tensor]]
Prepare = Callable[[FreezeOut, Tensor], int]  # returns how many graphs there may be


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Equal blocks and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(Block(width) for _ in range(BLOCKS)), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Run:
    """A network that freezes as it trains, on the same batches as every other."""

    def __init__(self, device: torch.device, width: int) -> None:
        torch.manual_seed(0)
        self.model = Net(width).to(device)
        # Without momentum, an old graph holds no memory that a freeze has freed.
        self.optimizer = SGD(self.model.parameters(), 0.05, weight_decay=0.01)
        generator = torch.Generator().manual_seed(1)
        self.data: Data = [
            (
                torch.randn(ROWS, width, generator=generator).to(device),
                torch.randint(10, (ROWS,), generator=generator).to(device),
            )
            for _ in range(STEPS)
        ]
        self.freezer = FreezeOut(
            self.model,
            self.optimizer,
            STEPS,
            schedule=SCHEDULE,
            layers=list(self.model.inner),
            example_inputs=self.data[0][0],
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.model(x), y)

    def frozen(self) -> dict[str, Tensor]:
        """Copies of frozen parameters and buffers, by name."""
        still = {m for layer in self.freezer.layers if layer.is_frozen for m in layer.modules}
        return {
            f"{path}.{name}": tensor.detach().clone()
            for path, module in self.model.named_modules()
            if module in still
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        }

    def moved(self, before: dict[str, Tensor]) -> list[str]:
        """Which of them are others now."""
        now = self.model.state_dict()
        return [name for name, tensor in before.items() if not torch.equal(now[name], tensor)]

    def train(self, bf16: bool = False, mark: bool = False) -> None:
        """To the end. `mark`: tell CUDA graphs of torch.compile where a step begins."""
        device = self.data[0][0].device
        for x, y in self.data:
            before = self.frozen()
            if mark:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = self.loss(x, y)
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if moved := self.moved(before):
                raise Wrong(f"frozen and moved: {', '.join(moved)}")
            self.freezer.step()
        if self.freezer.num_frozen != BLOCKS:
            raise Wrong(f"{self.freezer.num_frozen} layers are frozen at the end, not {BLOCKS}")

    def difference(self, other: "Run") -> float:
        """Of all parameters and buffers."""
        theirs = other.model.state_dict()
        return largest_difference((v, theirs[k]) for k, v in self.model.state_dict().items())


def cases(setup: Setup) -> list[Case]:
    """What is compiled or captured."""
    backend = "inductor" if setup.on_gpu else "aot_eager"

    def layers(freezer: FreezeOut, x: Tensor) -> int:
        compile_layers(freezer, backend=backend)
        return 3

    def ahead(freezer: FreezeOut, x: Tensor) -> int:
        with torch.autocast(setup.device.type, torch.bfloat16):
            compile_layers(freezer, ahead=x, backend=backend)
        return 3

    def whole(freezer: FreezeOut, x: Tensor) -> int:
        graphs = allow_stages(freezer)
        freezer.model.compile(backend=backend)
        return graphs

    def overhead(freezer: FreezeOut, x: Tensor) -> int:
        # Refused; what would it do?
        with patch("freezeout.parallel.compiled.refuse_cuda_graphs"):
            compile_layers(freezer, mode="reduce-overhead")
        return 3

    def found(name: str, prepare: Prepare, **options: bool) -> Case:
        return Case(name, partial(_compiled, setup, name, prepare, **options))

    if setup.tiny:
        return [
            Case("CUDA graphs", partial(_by_hand, setup)),
            found("compiled by layer", layers),
            found("compiled ahead, bf16", ahead, bf16=True),
        ]
    compiled = [
        found("compiled by layer", layers),
        found("compiled ahead, bf16", ahead, bf16=True),
    ]
    if setup.on_gpu:
        compiled += [
            found("compiled, reduce-overhead", overhead, reported=True),
            found("compiled, reduce-overhead, steps marked", overhead, reported=True, mark=True),
        ]
    compiled.append(found("compiled whole", whole))
    return [Case("CUDA graphs", partial(_by_hand, setup)), *compiled]


def _compiled(
    setup: Setup,
    name: str,
    prepare: Prepare,
    *,
    bf16: bool = False,
    mark: bool = False,
    reported: bool = False,
) -> list[Row]:
    """Compiled beside uncompiled. `reported`: an error of torch's is a row, not a failure."""
    width = 64 if setup.on_gpu else 8
    plain = Run(setup.device, width)
    plain.train(bf16)
    torch._dynamo.reset()
    counters.clear()
    # What compile_layers() and allow_stages() set is put back.
    with torch._dynamo.config.patch(
        recompile_limit=8,
        accumulated_recompile_limit=256,
        fail_on_recompile_limit_hit=False,
        skip_nnmodule_hook_guards=True,
    ):
        run = Run(setup.device, width)
        most = prepare(run.freezer, run.data[0][0])
        try:
            run.train(bf16, mark)
        except (AssertionError, RuntimeError) as error:
            if not reported:
                raise
            said = " ".join(str(error).split())[:SAID]
            step = run.freezer.step_count
            return [row(name, 1, 0, note=f"refused by torch in step {step}: {said}")]
        finally:
            torch._dynamo.reset()
            if reported:
                reset_cudagraph_trees()
    graphs = counters["stats"]["unique_graphs"]
    if graphs > most:
        raise Wrong(f"{graphs} graphs, not at most {most}")
    difference = run.difference(plain)
    if difference > (5e-2 if bf16 else 1e-4):
        raise Wrong(f"differs from uncompiled training by {difference:.2g}")
    note = f"{graphs} graphs"
    if reported:
        note += f", {counters['inductor']['cudagraph_skips']} of them not as CUDA graphs"
    return [row(name, 1, int(difference == 0), difference, note)]


# --- graphs captured by hand ----------------------------------------------------------------


class Captured:
    """Forward and backward passes in a CUDA graph, on static inputs."""

    def __init__(self, run: Run, with_update: bool = False) -> None:
        self.run = run
        self.x, self.y = (tensor.clone() for tensor in run.data[0])
        buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is allocated only once is, and kernels are chosen
            for _ in range(3):
                run.optimizer.zero_grad()
                torch.autograd.backward(run.loss(self.x, self.y))
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        run.optimizer.zero_grad()  # gradients will be the graph's own
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            torch.autograd.backward(run.loss(self.x, self.y))
            if with_update:
                run.optimizer.step()

    def replay(self, step: int) -> None:
        """With the batch of a step."""
        for mine, given in zip((self.x, self.y), self.run.data[step], strict=True):
            mine.copy_(given)
        self.graph.replay()


def _by_hand(setup: Setup) -> list[Row]:
    if not setup.on_gpu:
        return [row("CUDA graphs by hand", note="not measured: no GPU")]
    rows, _ = exactly(partial(_graphs, setup.device))
    return rows


def _graphs(device: torch.device) -> list[Row]:
    return [_refused(device), _anew(device), _stale(device), _unrefused(device)]


def _refused(device: torch.device) -> Row:
    """A capture of the whole step."""
    run = Run(device, 64)
    groups = run.optimizer.param_groups
    try:
        Captured(run, with_update=True)
    except FreezeOutError as error:
        said = str(error)
    else:
        raise Wrong("a capture of optimizer.step() was not refused")
    torch.cuda.synchronize()
    if run.optimizer.param_groups is not groups:
        raise Wrong("the refused capture left split groups in the optimizer")
    run.optimizer.zero_grad()
    run.train()  # and it works again
    return row("CUDA graph of a whole step", note=f"refused: {said}")


def _anew(device: torch.device) -> Row:
    """Forward and backward captured, anew after each freeze."""
    plain = Run(device, 64)
    plain.train()
    run = Run(device, 64)
    captured: Captured | None = None
    captures = 0
    for step in range(STEPS):
        if captured is None:
            captured, captures = Captured(run), captures + 1
        captured.replay(step)
        before = run.frozen()
        run.optimizer.step()
        if moved := run.moved(before):
            raise Wrong(f"frozen and moved: {', '.join(moved)}")
        if run.freezer.step():
            captured = None
    difference = run.difference(plain)
    if difference > 1e-5:
        raise Wrong(f"captured training differs by {difference:.2g}")
    what = "CUDA graph of forward and backward, anew after each freeze"
    return row(what, 1, int(difference == 0), difference, f"{captures} captures")


def _until_frozen(run: Run, captured: Captured, update: Callable[[], object]) -> int:
    """Replay until two blocks are frozen; returns the next step."""
    step = 0
    while run.freezer.num_frozen < 2:
        captured.replay(step)
        update()
        run.freezer.step()
        step += 1
    return step


def _stale(device: torch.device) -> Row:
    """A graph of forward and backward from before a freeze, replayed after it."""
    run = Run(device, 64)
    captured = Captured(run)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step = _until_frozen(run, captured, run.optimizer.step)
        before = run.frozen()
        captured.replay(step)
        run.optimizer.step()
        run.freezer.step()
    parameters = dict(run.model.named_parameters())
    moved = run.moved(before)
    if any(name in parameters for name in moved):
        raise Wrong(f"frozen parameters moved: {', '.join(moved)}")
    told = any("did not fully engage" in str(warning.message) for warning in seen)
    if moved and not told:
        raise Wrong(f"frozen statistics moved, and nothing was said: {', '.join(moved)}")
    note = (
        "frozen parameters stay; frozen norms' statistics "
        f"{'move, and a warning says so' if moved else 'stay'}"
    )
    return row("CUDA graph from before a freeze, replayed", note=note)


def _unrefused(device: torch.device) -> Row:
    """Why a whole step is refused: what its replay does after a freeze."""
    run = Run(device, 64)
    with patch("freezeout.optimizers._refuse_capture"):
        captured = Captured(run, with_update=True)
    step = _until_frozen(run, captured, lambda: None)
    before = run.frozen()
    captured.replay(step)
    parameters = dict(run.model.named_parameters())
    moved = [name for name in run.moved(before) if name in parameters]
    note = f"frozen parameters {'move' if moved else 'stay'}"
    return row("CUDA graph of a whole step, were it not refused", note=note)
