"""What freezing does on a GPU beside computing: calls that wait for it, memory that it returns."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from freezeout import FreezeOut, Schedule

from .part import Row, Setup, Wrong
from .right_proofs import row

STEPS = 20
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: SGD(m.parameters(), 1e-3, 0.9),
    "SGD fused": lambda m: SGD(m.parameters(), 1e-3, 0.9, fused=True),
    "AdamW": lambda m: AdamW(m.parameters(), 1e-3),
    "AdamW fused": lambda m: AdamW(m.parameters(), 1e-3, fused=True),
}


class Run:
    """Six layers with norms that freeze one after another; `backward` leaves gradients."""

    def __init__(self, device: torch.device, build: Callable[[nn.Module], Optimizer], width: int):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
                for _ in range(5)
            ),
            nn.Linear(width, 10),
        ).to(device)
        self.x = torch.randn(32, width).to(device)
        self.y = torch.randint(10, (32,)).to(device)
        self.optimizer = build(self.model)
        self.freezer = FreezeOut(
            self.model,
            self.optimizer,
            STEPS,
            schedule=Schedule(times=(0.25, 0.4, 0.55, 0.7, 0.85, 1.0), scale_lr=False),
            layers=list(self.model),
            example_inputs=self.x,
        )

    def backward(self) -> None:
        loss: Tensor = cross_entropy(self.model(self.x), self.y)
        torch.autograd.backward(loss)


def synchronisations(setup: Setup) -> list[Row]:
    """Between freezes the optimizer's step and FreezeOut's never wait for the GPU."""
    if not setup.on_gpu:
        return [row("synchronisations", note="not measured: no GPU")]
    rows = []
    for name, build in OPTIMIZERS.items():
        run = Run(setup.device, build, 64)
        steps = at_freezes = 0
        fresh = False  # the step after a freeze looks whether it engaged
        for _ in range(STEPS):
            run.backward()
            torch.cuda.synchronize(setup.device)
            freezes = run.freezer.next_freeze == run.freezer.step_count + 1
            quiet = not freezes and not fresh
            count = _waits(run, "error" if quiet else "warn")
            steps, at_freezes = steps + quiet, at_freezes + count
            fresh = freezes
        if run.freezer.num_frozen != 5:
            raise Wrong(f"{name}: {run.freezer.num_frozen} layers are frozen at the end, not 5")
        note = f"none in {steps} steps; {at_freezes} at 5 freezes and in the steps after them"
        rows.append(row(f"synchronising calls, {name}", steps, note=note))
    return rows


def _waits(run: Run, mode: str) -> int:
    """Make the update; how many calls waited (mode "warn"), or an error at the first."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.freezer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def memory_returned(setup: Setup) -> list[Row]:
    """A freeze frees gradients and optimizer state at once."""
    if not setup.on_gpu:
        return [row("memory returned", note="not measured: no GPU")]
    rows = []
    for name, build in OPTIMIZERS.items():
        run = Run(setup.device, build, 1024)
        freed = expected = 0
        for _ in range(STEPS):
            run.backward()
            run.optimizer.step()
            run.backward()  # gradients are held at the freeze
            torch.cuda.synchronize(setup.device)
            step = run.freezer.step_count + 1
            layers = [
                layer
                for layer, end in zip(run.freezer.layers, run.freezer.freeze_steps, strict=True)
                if end == step < STEPS
            ]
            held = sum(_held(run.optimizer, p) for layer in layers for p in layer.parameters)
            gc.collect()
            before = torch.cuda.memory_allocated(setup.device)
            if set(run.freezer.step()) != set(layers):
                raise Wrong(f"{name}: other layers froze at step {step} than were to")
            after = torch.cuda.memory_allocated(setup.device)
            # Blocks of 512 bytes: the check of frozen norms keeps a number of each.
            norms = sum(isinstance(m, nn.BatchNorm1d) for m in run.model.modules())
            if layers and before - after < held - 512 * norms:
                raise Wrong(f"{name}: {held} bytes were held, {before - after} came back")
            freed += before - after if layers else 0
            expected += held
            run.optimizer.zero_grad()
        note = f"{freed / 2**20:.2f} MiB came back of {expected / 2**20:.2f} MiB held"
        rows.append(row(f"memory at a freeze, {name}", 5, note=note))
    return rows


def _held(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Bytes on the device of its gradient and of its state."""
    values: list[Any] = [parameter.grad, *optimizer.state.get(parameter, {}).values()]
    return sum(
        value.numel() * value.element_size()
        for value in values
        if isinstance(value, Tensor) and value.is_cuda
    )
