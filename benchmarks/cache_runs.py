"""Whole runs with the cache, beside runs without it and runs whose frozen layers cost nothing.

    python -m benchmarks.cache_runs --data-dir DIR [--case ...]

Wide ResNet 16-1 on CIFAR-10 images, cubic scaled 0.8. The arms of a case take turns, ten steps at
a time; their seconds are those of all steps, and of what the cache measures and compares. Claims:
with one view the cache saves at least 85 % of what costless frozen layers would (without it about
60 %); and `--cache auto` takes at most 1.02 of the time without it, also where each version of an
image hardly comes back, where the cache does not fit, and where the run is short.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from freezeout.lab.cached import CachedRun
from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job

from .cache_step import halves
from .timing import environment, in_turn

WRN = TrainConfig(model="wrn", depth=16, widen_factor=1, dataset="cifar10", cache="auto")
DENSENET = replace(WRN, model="densenet", depth=22, widen_factor=None, images=2000)
PAYING = {
    "100 epochs, 2,000 images, 1 view": replace(WRN, epochs=100, images=2000, views=1),
    "30 epochs, 5,000 images, 1 view": replace(WRN, epochs=30, images=5000, views=1),
}
SHORTER = replace(WRN, epochs=30, images=3000)
OTHERS = {
    "30 epochs, 3,000 images, 2 views": replace(SHORTER, views=2),
    "30 epochs, 3,000 images, 8 views": replace(SHORTER, views=8),
    "30 epochs, 3,000 images, 1 view, 30 MB": replace(SHORTER, views=1, cache_budget="30M"),
    "5 epochs, 5,000 images, 4 views": replace(WRN, epochs=5, images=5000, views=4),
    "DenseNet-BC-22, 10 epochs, 2,000 images, 2 views": replace(DENSENET, epochs=10, views=2),
}
TURN = 10  # steps


class Arm:
    """One run, some steps at a time. `is_costless`: what frozen layers give is given."""

    def __init__(self, config: TrainConfig, is_costless: bool = False) -> None:
        self.job = Job(config)
        self.model = self.job.model.train()
        self.optimizer = self.job.optimizer(self.model)
        self.total = self.job.total_steps(config.epochs)
        self.freezer = self.job.freezer(self.model, self.optimizer, self.total)
        self.is_costless = is_costless
        begin = time.perf_counter()
        cache = self.job.cache(self.freezer)
        self.cached = None if cache is None else CachedRun(self.job, cache)
        if self.cached is not None:
            self.cached.prepare()
        self.seconds = time.perf_counter() - begin
        self.steps = self._steps()

    def turn(self) -> None:
        """The next steps."""
        begin = time.perf_counter()
        for _ in islice(self.steps, TURN):
            pass
        self.seconds += time.perf_counter() - begin

    def _steps(self) -> Iterator[None]:
        net: Callable[[Tensor], Tensor] = self.model
        depth = 0
        for epoch in range(self.job.config.epochs):
            view = None if self.cached is None else self.cached.view(epoch)
            for number, (x, y, _) in enumerate(self.job.batches(epoch, 0, view)):
                if self.cached is not None:
                    net = self.cached.net(epoch, number)
                elif self.is_costless and depth != self.freezer.num_frozen:
                    depth = self.freezer.num_frozen
                    net = self._suffix(depth, x)
                torch.autograd.backward(self.job.loss(net, x, y)[0])
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.freezer.step()
                yield

    def _suffix(self, depth: int, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The layers behind the frontier, given what the frozen ones make of these images."""
        prefix, suffix = halves(self.model, self.freezer, depth)
        with torch.no_grad(), self.job.autocast():
            reached = prefix(x)
        return lambda images: suffix(reached)


def compare(name: str, arms: dict[str, Arm]) -> dict[str, float]:
    """Seconds of each arm, all of them run to their end."""
    for label in in_turn(arms, -(-arms["frozen"].total // TURN)):
        arms[label].turn()
    seconds = {label: arm.seconds for label, arm in arms.items()}
    times = ", ".join(f"{label} {each:.1f} s" for label, each in seconds.items())
    cached = arms["cached"].cached
    assert cached is not None
    print(f"{name}, {arms['frozen'].job.precision}: {times}; {cached.describe()}", flush=True)
    return seconds


def main() -> None:
    """Print seconds and shares of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--case", choices=[*PAYING, *OTHERS], action="append")
    args = parser.parse_args()
    for name in args.case or [*PAYING, *OTHERS]:
        config = replace((PAYING | OTHERS)[name], data_dir=args.data_dir)
        without = replace(config, cache="off", views=None, cache_budget=None)
        arms = {"frozen": Arm(without), "cached": Arm(config)}
        if name in PAYING:
            arms["ordinary"] = Arm(replace(without, freezeout=False))
            arms["costless"] = Arm(without, is_costless=True)
        seconds = compare(name, arms)
        if name in PAYING:
            saved = {k: 1 - each / seconds["ordinary"] for k, each in seconds.items()}
            print(
                f"  saved: without cache {saved['frozen']:.1%}, "
                f"{saved['frozen'] / saved['costless']:.0%} of what costless frozen layers would, "
                f"{saved['costless']:.1%}; with it {saved['cached']:.1%}, "
                f"{saved['cached'] / saved['costless']:.0%} (claim: >= 85 %)"
            )
        ratio = seconds["cached"] / seconds["frozen"]
        print(f"  with the cache / without: {ratio:.3f} (claim: <= 1.02)", flush=True)
    print(environment())


if __name__ == "__main__":
    main()
