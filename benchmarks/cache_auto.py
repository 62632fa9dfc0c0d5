"""Whole runs with `--cache auto` beside the same runs without a cache: it must never cost time.

    python -m benchmarks.cache_auto --data-dir DIR

FreezeOut at cubic scaled 0.8 on 10,000 CIFAR-10 images: where the cache pays, where each version of
an image hardly comes back, where it does not fit, and where the run is too short. Claim: with the
cache a run takes at most 1.02 of the time without it. The two take turns, ten steps at a time; the
seconds are those of all steps, and of what the cache measures and compares.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from freezeout.lab.cached import CachedRun
from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job

from .timing import environment

WRN = TrainConfig(model="wrn", depth=16, widen_factor=1, dataset="cifar10", images=10000)
DENSENET = TrainConfig(model="densenet", depth=22, dataset="cifar10", images=2000)
CASES = {
    "WRN-16-1, 30 epochs, 1 view": replace(WRN, epochs=30, views=1),
    "WRN-16-1, 30 epochs, 8 views": replace(WRN, epochs=30, views=8),
    "WRN-16-1, 30 epochs, 8 views, 200 MB": replace(WRN, epochs=30, views=8, cache_budget="200M"),
    "WRN-16-1, 5 epochs, 4 views": replace(WRN, epochs=5, views=4),
    "DenseNet-BC-22, 10 epochs, 2 views": replace(DENSENET, epochs=10, views=2),
}
TURN = 10  # steps


class Arm:
    """One run, a step at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self.job = Job(config)
        self.model = self.job.model.train()
        self.optimizer = self.job.optimizer(self.model)
        self.total = self.job.total_steps(config.epochs)
        self.freezer = self.job.freezer(self.model, self.optimizer, self.total)
        self.seconds = 0.0
        begin = time.perf_counter()
        cache = self.job.cache(self.freezer)
        self.cached = None if cache is None else CachedRun(self.job, cache)
        if self.cached is not None:
            self.cached.prepare()
        self.steps = self._steps()
        self.seconds += time.perf_counter() - begin

    def turn(self) -> None:
        """A few steps."""
        begin = time.perf_counter()
        for _ in islice(self.steps, TURN):
            pass
        self.seconds += time.perf_counter() - begin

    def _steps(self) -> Iterator[None]:
        for epoch in range(self.job.config.epochs):
            cached = self.cached
            view = None if cached is None else cached.view(epoch)
            for number, (x, y, _) in enumerate(self.job.batches(epoch, 0, view)):
                net = self.model if cached is None else cached.net(epoch, number)
                self.job.loss(net, x, y)[0].backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.freezer.step()
                yield


def main() -> None:
    """Print the ratio of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--case", choices=list(CASES), action="append")
    args = parser.parse_args()
    for name in args.case or CASES:
        config = replace(CASES[name], data_dir=args.data_dir)
        off, auto = Arm(config), Arm(replace(config, cache="auto"))
        for number in range(-(-off.total // TURN)):
            for arm in (off, auto) if number % 2 else (auto, off):
                arm.turn()
        assert auto.cached is not None
        print(
            f"{name}, {off.job.precision}: {auto.seconds:.1f} s with the cache, {off.seconds:.1f} "
            f"s without, ratio {auto.seconds / off.seconds:.3f} (claim: <= 1.02); "
            f"{auto.cached.describe()}",
            flush=True,
        )
    print(environment())


if __name__ == "__main__":
    main()
