"""A user's training loop with all that may have a state: python -m tests.integration.user_loop
CONFIGURATION FILE ORDER STOP. It goes on from FILE if that is there, loading its parts in an order
that ORDER chooses, saves after each step, and kills itself after step STOP unless that is the end.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, RandomSampler

from freezeout import FreezeOut, Frozen, Plan, Schedule

TOTAL = 16
EARLY = Schedule(0.3, "linear")
_CPU = torch.device("cpu")
_BATCHES = 5  # an epoch; freezes come in the middle of epochs


@dataclass(frozen=True)
class Configuration:
    optimizers: Callable[[nn.Module], list[Optimizer]]
    scheduler: Callable[[Optimizer], LRScheduler]
    micro_batches: int = 1
    scaler: bool = False
    clip: bool = False
    checkpointing: bool = False
    plan: Plan = EARLY


def _muon(model: nn.Module) -> list[Optimizer]:
    matrices = [model.get_parameter("2.weight"), model.get_parameter("5.weight")]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=0.02), AdamW(rest, lr=0.01)]


CONFIGURATIONS = {
    "sgd": Configuration(
        lambda m: [SGD(m.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)],
        lambda o: LinearLR(o, 0.1, total_iters=6),
        micro_batches=2,
    ),
    "fused": Configuration(
        lambda m: [AdamW(m.parameters(), 0.01, fused=True)],
        lambda o: OneCycleLR(o, 0.02, total_steps=TOTAL + 1),
        clip=True,
        scaler=True,
    ),
    "adagrad": Configuration(
        lambda m: [Adagrad(m.parameters(), 0.05, lr_decay=0.1)],
        lambda o: CosineAnnealingLR(o, TOTAL),
        checkpointing=True,
    ),
    "start": Configuration(
        lambda m: [AdamW(m.parameters(), 0.01, weight_decay=0.1)],
        lambda o: CosineAnnealingLR(o, TOTAL),
        clip=True,
        plan=Frozen(2, then=EARLY),
    ),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    CONFIGURATIONS["muon"] = Configuration(
        _muon,
        lambda o: CosineAnnealingLR(o, TOTAL),
        scaler=True,
        clip=True,
        checkpointing=True,
    )


class Net(nn.Sequential):
    """Four layers with norms and dropout."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__(
            *(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=False) if self.checkpointing else part(x)
        return x


class Sampler:
    """Shuffled batches, endlessly; its state is that of its generator when the epoch began, and
    how many batches of it are done."""

    def __init__(self, size: int, batch_size: int) -> None:
        self._generator = torch.Generator().manual_seed(3)
        shuffled = RandomSampler(range(size), generator=self._generator)
        self._batches = BatchSampler(shuffled, batch_size, drop_last=True)
        self._start()

    def _start(self) -> None:
        self._began, self._done = self._generator.get_state(), 0
        self._epoch = list(self._batches)

    def next(self) -> list[int]:
        if self._done == len(self._epoch):
            self._start()
        self._done += 1
        return self._epoch[self._done - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["began"])
        self._start()
        self._done = state["done"]


class Random:
    """torch's global generators, as a part with a state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)


class Loop:
    """All that a user builds, and the loop."""

    def __init__(self, configuration: Configuration, device: torch.device = _CPU) -> None:
        torch.manual_seed(0)
        self.configuration, self.device = configuration, device
        self.data = torch.randn(_BATCHES * 6, 5).to(device)
        self.labels = torch.randint(3, (len(self.data),)).to(device)
        self.model = Net(configuration.checkpointing).to(device)
        self.optimizers = configuration.optimizers(self.model)
        self.freezer = FreezeOut(
            self.model,
            self.optimizers,
            TOTAL,
            schedule=configuration.plan,
            example_inputs=self.data[:2],
        )
        self.schedulers = [configuration.scheduler(each) for each in self.optimizers]
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=64.0, growth_interval=4, enabled=configuration.scaler
        )
        self.average = AveragedModel(self.model)
        self.sampler = Sampler(len(self.data), 6)
        torch.manual_seed(1)

    def parts(self) -> dict[str, Any]:
        named: dict[str, Any] = {"model": self.model, "average": self.average}
        named |= {f"optimizer{i}": each for i, each in enumerate(self.optimizers)}
        named |= {"scheduler": self.schedulers[0], "scaler": self.scaler}
        return {
            **named,
            "freezer": self.freezer,
            "sampler": self.sampler,
            "random": Random(self.device),
        }

    def save(self, file: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["schedulers"] = [each.state_dict() for each in self.schedulers]
        torch.save(state, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)

    def load(self, file: Path, order: Iterable[str]) -> None:
        state = torch.load(file, weights_only=True)
        for name in order:
            self.parts()[name].load_state_dict(state[name])
        for each, its in zip(self.schedulers, state["schedulers"], strict=True):
            each.load_state_dict(its)

    def train(self, until: int, after: Callable[[int], None] = lambda step: None) -> None:
        configuration = self.configuration
        while self.freezer.step_count < until:
            self.model.train()
            for _ in range(configuration.micro_batches):
                chosen = self.sampler.next()
                loss = cross_entropy(self.model(self.data[chosen]), self.labels[chosen])
                torch.autograd.backward(self.scaler.scale(loss / configuration.micro_batches))
            if configuration.clip:
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            self.model.zero_grad()
            for scheduler in self.schedulers:
                scheduler.step()
            self.average.update_parameters(self.model)
            self.freezer.step()
            after(self.freezer.step_count)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(file: Path, expected: dict[str, Any]) -> list[str]:
    """Parts of a saved state that are not bit for bit as expected."""
    state = torch.load(file, weights_only=True)
    return [key for key in expected if not same(state[key], expected[key])]


def main(name: str, path: str, order: str, stop: str) -> None:
    """One process's share of a run."""
    torch.set_num_threads(1)
    loop, file = Loop(CONFIGURATIONS[name]), Path(path)
    if file.exists():
        names = list(loop.parts())
        random.Random(int(order)).shuffle(names)
        loop.load(file, names)

    def save_and_stop(step: int) -> None:
        loop.save(file)
        if step == int(stop) < TOTAL:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(TOTAL, save_and_stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
