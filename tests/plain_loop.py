"""The plain PyTorch loop that runs in a framework are compared with, and the comparison."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from freezeout import FreezeOut, Frozen, Layer, Plan, Schedule

from .models import images

EARLY = Schedule(0.4, "linear")
PLANS: dict[str, Plan] = {"early": EARLY, "start": Frozen(1, then=EARLY)}
BATCHES = 5  # an epoch
Row = tuple[int, int, tuple[float, ...]]


def row(freezer: FreezeOut | None) -> Row:
    """Where a run stands: steps made, layers frozen, learning rates."""
    assert freezer is not None
    return freezer.step_count, freezer.num_frozen, freezer.learning_rates


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models are equal bit for bit, buffers included."""
    mine, theirs = a.state_dict().values(), b.state_dict().values()
    return all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def update(
    freezer: FreezeOut,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any] = (),
    clip: float | None = None,
) -> list[Layer]:
    """What follows the backward passes of a step; returns the layers that it froze."""
    if clip is not None:
        nn.utils.clip_grad_norm_(freezer.model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for scheduler in schedulers:
        scheduler.step()
    return freezer.step()


def train(
    net: nn.Module,
    optimizers: Sequence[Optimizer],
    steps: int,
    *,
    schedulers: Sequence[Any] = (),
    accumulate: int = 1,
    clip: float | None = None,
    plan: Plan = EARLY,
) -> list[Row]:
    """Train on `images`, whose epochs end with a step; what happened in it after each batch."""
    freezer = FreezeOut(net, [*optimizers], steps, schedule=plan, example_inputs=images(0)[0])
    rows, batch = [], 0
    while freezer.step_count < steps:
        net.train()
        torch.manual_seed(batch)
        x, y = images(batch % BATCHES)
        torch.autograd.backward(cross_entropy(net(x), y) / accumulate)
        batch += 1
        if batch % BATCHES % accumulate == 0 or batch % BATCHES == 0:
            update(freezer, optimizers, schedulers, clip)
        rows.append(row(freezer))
    return rows
