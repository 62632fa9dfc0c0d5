"""Short training runs, with a cache or without."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from freezeout import FreezeOut, PrefixCache, Schedule

Data = Callable[[int], tuple[Tensor, Tensor]]
BATCHES = 3


def dataset(data: Data) -> tuple[Tensor, Tensor]:
    pairs = [data(i) for i in range(BATCHES)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


class Run:
    """A short training run, with a cache or without; `autocast`: in bf16."""

    def __init__(
        self, make: Callable[[], nn.Module], data: Data, steps: int = 24, autocast: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.x, self.y = dataset(data)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.freezer = FreezeOut(
            self.model,
            self.optimizer,
            steps,
            example_inputs=self.x[:2],
            schedule=Schedule(0.3, "linear", scale_lr=False),
        )
        self.size = len(self.x) // BATCHES
        self.losses: list[float] = []
        self.autocast = autocast
        self.order = torch.Generator().manual_seed(1)
        self.ids = torch.arange(len(self.x))

    def cache(self, **options: Any) -> PrefixCache:
        given: dict[str, Any] = {"depths": "all", "budget": 10**7, **options}
        return PrefixCache(self.freezer, len(self.x), **given)

    def step(self, call: Callable[..., Any], shuffle: bool = False) -> None:
        number = self.freezer.step_count
        if number % BATCHES == 0 and shuffle:
            self.ids = torch.randperm(len(self.x), generator=self.order)
        place = number % BATCHES
        ids = self.ids[place * self.size : (place + 1) * self.size]
        torch.manual_seed(number)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            output = call(self.x[ids], ids)
            loss = cross_entropy(output.flatten(0, -2), self.y[ids].flatten())
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.freezer.step()
        self.losses.append(loss.item())

    def steps(self, cache: PrefixCache | None, shuffle: bool = False, until: int = 24) -> "Run":
        while self.freezer.step_count < until:
            if cache is None:
                self.step(lambda x, ids: self.model(x), shuffle)
            else:
                self.step(lambda x, ids: cache(x, ids=ids), shuffle)
        return self

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


def same(one: Run, other: Run) -> bool:
    return one.losses == other.losses and all(
        torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True)
    )
