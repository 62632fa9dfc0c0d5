"""Graphs and seconds of torch.compile beside freezing: python -m benchmarks.compile_graphs

50 equal residual blocks, all of which freeze, one after another, in 100 steps; compiled block by
block, with all graphs made ahead, and as a whole in as few and as many stages as asked for.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from freezeout import FreezeOut, Schedule
from freezeout.parallel import allow_stages, compile_layers

from .timing import environment

BLOCKS, WIDTH, BATCH, STEPS = 50, 128, 256, 100


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x)): several operations to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.gelu(self.first(self.norm(x))))
        return x + y


class Net(nn.Module):
    """The blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x))
        return y


def run(name: str, prepare: Callable[[FreezeOut, Tensor], object], freeze_every: int = 1) -> None:
    """Train the whole schedule once and print what it took."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))
    times = [0.9 * (i + 1) / BLOCKS for i in range(BLOCKS)]
    freezer = FreezeOut(
        model,
        optimizer,
        STEPS,
        schedule=Schedule(times=(*times, 1.0), scale_lr=False),
        example_inputs=x,
        freeze_every=freeze_every,
    )
    start = time.perf_counter()
    prepare(freezer, x)
    ahead = time.perf_counter() - start
    made = counters["stats"]["unique_graphs"]
    seconds = []
    while freezer.step_count < STEPS:
        start = time.perf_counter()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        seconds.append(time.perf_counter() - start)
    graphs = counters["stats"]["unique_graphs"]
    print(
        f"{name:<34} {graphs:3d} graphs, {made:3d} of them before training ({ahead:6.1f} s); "
        f"training {sum(seconds):6.1f} s, its slowest step {max(seconds):6.2f} s",
        flush=True,
    )


def main() -> None:
    """Print a line for each way."""
    print(environment())
    print(f"{BLOCKS} blocks {WIDTH} wide, batch {BATCH}, {STEPS} steps, float32")
    run("uncompiled", lambda freezer, x: None)
    run("compile_layers(freezer)", lambda freezer, x: compile_layers(freezer))
    run("compile_layers(freezer, ahead=x)", lambda freezer, x: compile_layers(freezer, ahead=x))

    def whole(freezer: FreezeOut, x: Tensor) -> None:
        allow_stages(freezer)
        freezer.model.compile()

    run("allow_stages, freeze_every=45", whole, freeze_every=45)


if __name__ == "__main__":
    main()
