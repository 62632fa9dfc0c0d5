"""Time and memory of a training step as layers freeze, and what FreezeOut itself adds to it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.profiler import ProfilerActivity, profile

from freezeout import FreezeOut, Frozen, Plan, Schedule
from freezeout.parallel import compile_layers
from freezeout.profile import count_step

from ..step_overhead import hundred_layers
from ..timing import interleaved
from .networks import SHAPES, TINY, Shape, loss_of
from .part import Case, Part, Row, Setup

SHARES = (0.0, 0.25, 0.5, 0.75)


class Training:
    """A network, its optimizer and a batch on the device; `step` is a training step."""

    def __init__(self, shape: Shape, setup: Setup, batch: int | None = None) -> None:
        self.shape, self.device = shape, setup.device
        torch.manual_seed(0)
        images = len(shape.inputs) == 1
        with torch.device(setup.device):
            self.model = shape.build().train()
        self.x, self.y = shape.data(setup.device, batch)
        if images:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.optimizer: Optimizer = (
            SGD(self.model.parameters(), 1e-3, 0.9, fused=setup.on_gpu)
            if images and not shape.name.startswith(("ViT", "ConvNeXt"))
            else AdamW(self.model.parameters(), 1e-5, fused=setup.on_gpu)
        )
        self._bf16 = setup.on_gpu

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def loss(self, model: Callable[[Any], Tensor] | None = None) -> Tensor:
        """Of the batch."""
        with self.autocast():
            return loss_of(model or self.model, self.x, self.y)

    def step(self) -> None:
        """Forward, backward, update."""
        torch.autograd.backward(self.loss())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def freezer(self, depth: int) -> FreezeOut:
        """With so many layers frozen from the start."""
        return FreezeOut(
            self.model, self.optimizer, None, schedule=Frozen(depth), example_inputs=self.x[:2]
        )


def depths(layers: int) -> list[int]:
    """None, a quarter, half and three quarters of the layers."""
    return [round(share * layers) for share in SHARES]


def steps(shape: Shape, setup: Setup) -> list[Row]:
    """A line for each depth: milliseconds, memory, shares saved, measured and counted."""
    training = Training(shape, setup)
    with training.freezer(0) as freezer:
        layers = freezer.layers
        names = [layer.name for layer in layers]
    counted = _counted(shape, names)
    rows: list[Row] = []
    full: dict[str, float] = {}
    repeats = 2 if setup.tiny else 5
    for depth in depths(len(layers)):
        with training.freezer(depth) as freezer:
            training.optimizer.zero_grad()

            def some(freezer: FreezeOut = freezer) -> None:
                for _ in range(repeats):
                    training.step()
                    freezer.step()

            _reset_peak(setup)
            rounds = 3 if setup.tiny else 7
            seconds = interleaved({"": some}, rounds, 2, setup.device)[""] / repeats
            peak = _peak(setup)
            full = full or {"seconds": seconds, "peak": peak or 0}
            rows.append(
                {
                    "network": shape.name,
                    "batch": shape.batch,
                    "precision": "bf16" if setup.on_gpu else "fp32",
                    "frozen": f"{depth} of {len(layers)}",
                    "ms": 1e3 * seconds,
                    "saved %": _percent(1 - seconds / full["seconds"]),
                    "saved, counted %": _percent(1 - counted[depth] / counted[0]),
                    "peak GB": None if peak is None else peak / 1e9,
                    "memory saved %": None if peak is None else _percent(1 - peak / full["peak"]),
                }
            )
    return rows


def _counted(shape: Shape, names: list[str]) -> list[float]:
    """FLOPs of a step at each depth, of one item, without memory."""
    with torch.device("meta"):
        model = shape.build().train()
    x, y = shape.data(torch.device("meta"), 2)
    optimizer = SGD(model.parameters(), 1e-3)
    with FreezeOut(model, optimizer, None, schedule=Frozen(0), example_inputs=x) as freezer:
        layers = freezer.layers
    assert [layer.name for layer in layers] == names
    return count_step(model, layers, lambda: loss_of(model, x, y)).step_costs()


def compiled(shape: Shape, setup: Setup) -> list[Row]:
    """The same with the layers compiled, at no depth and at three quarters."""
    rows: list[Row] = []
    full = 0.0
    for share in (0.0, 0.75):
        training = Training(shape, setup)
        with training.freezer(0) as freezer:
            number = len(freezer.layers)
        depth = round(share * number)
        with training.freezer(depth) as freezer:
            compile_layers(freezer, **({"backend": "aot_eager"} if setup.tiny else {}))
            begin = time.perf_counter()
            training.step()
            first = time.perf_counter() - begin

            def some(training: Training = training, freezer: FreezeOut = freezer) -> None:
                for _ in range(5):
                    training.step()
                    freezer.step()

            rounds = 3 if setup.tiny else 7
            seconds = interleaved({"": some}, rounds, 2, setup.device)[""] / 5
        full = full or seconds
        rows.append(
            {
                "network": f"{shape.name}, compiled",
                "batch": shape.batch,
                "precision": "bf16" if setup.on_gpu else "fp32",
                "frozen": f"{depth} of {number}",
                "ms": 1e3 * seconds,
                "saved %": _percent(1 - seconds / full),
                "first step, s": first,
            }
        )
    return rows


def overhead(setup: Setup) -> list[Row]:
    """`step()` between changes, beside a scheduler's; of a split update, beside a plain one's:
    microseconds of the host, milliseconds until the device is done, and kernels launched."""
    calls = 50 if setup.tiny else 1000
    device = setup.device
    with torch.device(device):
        model = hundred_layers()
        plain = hundred_layers()
    x = torch.randn(2, 4, device=device)
    driven = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, driven, 10**9, example_inputs=x)
    groups = [{"params": list(layer.parameters())} for layer in plain]
    scheduled = SGD(groups, 1e-3)
    scheduler = CosineAnnealingLR(scheduled, 10**9)
    for net, optimizer in ((model, driven), (plain, scheduled)):
        for _ in range(25):
            torch.autograd.backward(net(x).sum())
            optimizer.step()
            (freezer if net is model else scheduler).step()

    def times(function: Callable[[], object]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls):
                function()

        return repeat

    both = {"ours": times(freezer.step), "theirs": times(scheduler.step)}
    seconds = interleaved(both, 5, 1, device)
    return [
        {
            "what": "FreezeOut.step(), 100 layers",
            "µs": 1e6 * seconds["ours"] / calls,
            "CosineAnnealingLR.step(), µs": 1e6 * seconds["theirs"] / calls,
            "launches": launches(freezer.step, setup),
        }
    ]


def split(shape: Shape, setup: Setup) -> list[Row]:
    """What FreezeOut adds to steps in which every layer trains: with the rates of each layer
    annealed by itself, and by a plan that anneals nothing, beside plain steps. The host is not
    waited for between steps, as in training."""
    rows: list[Row] = []
    kinds: dict[str, Callable[[nn.Module], Optimizer]] = {
        "SGD": lambda m: SGD(m.parameters(), 0.0, 0.9),
        "AdamW": lambda m: AdamW(m.parameters(), 0.0),
        "AdamW fused": lambda m: AdamW(m.parameters(), 0.0, fused=True),
    }
    plans: dict[str, Plan | None] = {"plain": None, "annealed": Schedule(), "plan": Frozen(0)}
    repeats = 2 if setup.tiny else 5
    for name, build in kinds.items():
        loops: dict[str, Callable[[], None]] = {}
        updates: dict[str, tuple[Training, Callable[[], None]]] = {}
        for arm, plan in plans.items():
            training = Training(shape, setup)
            training.optimizer = build(training.model)
            freezer = None
            if plan is not None:
                freezer = FreezeOut(
                    training.model,
                    training.optimizer,
                    10**9,
                    schedule=plan,
                    example_inputs=training.x[:2],
                )

            def update(training: Training = training, freezer: FreezeOut | None = freezer) -> None:
                training.optimizer.step()
                if freezer is not None:
                    freezer.step()

            def loop(training: Training = training, update: Callable[[], None] = update) -> None:
                for _ in range(repeats):
                    torch.autograd.backward(training.loss())
                    update()
                    training.optimizer.zero_grad()

            loops[arm], updates[arm] = loop, (training, update)
        seconds = interleaved(loops, 3 if setup.tiny else 9, 3, setup.device)
        row: Row = {"what": f"{shape.name}, {name}"}
        row |= {f"{arm} step, ms": 1e3 * value / repeats for arm, value in seconds.items()}
        for arm in ("annealed", "plan"):
            row[f"{arm}, added %"] = _percent(seconds[arm] / seconds["plain"] - 1)
        for arm, (training, its) in updates.items():
            torch.autograd.backward(training.loss())
            row[f"{arm}, kernels an update"] = launches(its, setup)
        rows.append(row)
    return rows


def launches(work: Callable[[], object], setup: Setup) -> int | None:
    """Kernels that one call sends to the device; None on a CPU."""
    if not setup.on_gpu:
        return None
    torch.cuda.synchronize(setup.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize(setup.device)
    events = seen.key_averages()
    return sum(int(each.count) for each in events if each.key.startswith("cudaLaunchKernel"))


def hooks(shape: Shape, setup: Setup) -> list[Row]:
    """A forward pass with every layer but the last frozen, beside one under no_grad in evaluation
    mode: what remains is what the hooks of frozen layers cost."""
    training = Training(shape, setup)
    with training.freezer(0) as freezer:
        number = len(freezer.layers)
    other = Training(shape, setup)
    with training.freezer(number - 1):
        other.model.eval()

        def frozen() -> None:
            with training.autocast():
                training.model(training.x)

        def bare() -> None:
            with other.autocast(), torch.no_grad():
                other.model(other.x)

        seconds = interleaved({"frozen": frozen, "bare": bare}, 9, 2, setup.device)
    return [
        {
            "what": f"{shape.name}, forward, {number - 1} of {number} frozen",
            "frozen, ms": 1e3 * seconds["frozen"],
            "no_grad, eval, ms": 1e3 * seconds["bare"],
            "added %": _percent(seconds["frozen"] / seconds["bare"] - 1),
        }
    ]


def _peak(setup: Setup) -> int | None:
    return torch.cuda.max_memory_allocated(setup.device) if setup.on_gpu else None


def _reset_peak(setup: Setup) -> None:
    if setup.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def _percent(share: float) -> float:
    return round(100 * share, 2)


def cases(setup: Setup) -> list[Case]:
    """Every network, what FreezeOut adds, and some networks compiled."""
    shapes = TINY if setup.tiny else SHAPES
    convolutions = shapes[0 if setup.tiny else 3]
    transformer = shapes[2 if setup.tiny else 5]
    found = [Case(shape.name, partial(steps, shape, setup)) for shape in shapes]
    found.append(Case("step", partial(overhead, setup)))
    found.append(Case("update", partial(split, convolutions, setup)))
    found.append(Case("update of a transformer", partial(split, transformer, setup)))
    found.append(Case("hooks", partial(hooks, transformer, setup)))
    some = shapes[:1] if setup.tiny else [shape for shape in shapes if shape.name in COMPILED]
    return found + [
        Case(f"{shape.name}, compiled", partial(compiled, shape, setup)) for shape in some
    ]


COMPILED = ("WRN-40-4", "ResNet-50", "ViT-B/16", "GPT-2 small")

PART = Part("fast", "Steps as layers freeze", cases)
