"""Runs that share a cache's folder while some of them are killed.

    python -m benchmarks.cache_shared [--rounds 20]   # from the root

In each round four processes train at once on one folder, each with its own order of samples, head
and rate, on top of one of two networks. Two of them are killed (SIGKILL) at random moments. Claim:
every loss that any of them came to is that of the same run without a cache, to a relative 1e-5 in
fp32; and a run that comes afterwards finds all samples in the folder, none of them wrong. Layers
freeze one after the other, so that records are written in most epochs. The folder is new in every
fourth round.
"""

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from freezeout import FreezeOut, PrefixCache, Schedule

SAMPLES, BATCH, EPOCHS, WIDTH = 192, 16, 6, 64
RUNS, KILLED = 4, 2
BOUND = 1e-5


def train(seed: int, folder: Path | None, log: Path | None = None) -> tuple[list[float], int]:
    """One run's losses, and how many samples were computed in it; each loss is a line of `log`."""
    torch.manual_seed(seed % 2)  # two networks, whose blocks stay as they are at a rate of zero
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, WIDTH)
    y = torch.randint(0, 5, (SAMPLES,))
    torch.manual_seed(seed)
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 5))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for block in blocks for p in block.parameters()], "lr": 0.0},
            {"params": model[-1].parameters(), "lr": 0.01 * (1 + seed % 3)},
        ]
    )
    steps = EPOCHS * SAMPLES // BATCH
    times = (*(each / EPOCHS for each in range(1, 5)), 1.0)
    freezer = FreezeOut(
        model,
        optimizer,
        steps,
        schedule=Schedule(times=times, scale_lr=False),
        example_inputs=x[:2],
        anneal=False,
    )
    cache = None
    if folder is not None:
        cache = PrefixCache(freezer, SAMPLES, where=folder, budget=2**30, depths="all")
    losses: list[float] = []
    for _ in range(EPOCHS):
        for ids in torch.randperm(SAMPLES).split(BATCH):  # type: ignore[no-untyped-call]
            output = model(x[ids]) if cache is None else cache(x[ids], ids=ids)
            loss = nn.functional.cross_entropy(output, y[ids])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
            losses.append(loss.item())
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{loss.item()!r}\n")
    if cache is None:
        return losses, 0
    if cache.off is not None:
        raise AssertionError(cache.off)
    return losses, cache.stats.misses + cache.stats.advanced


def together(
    folder: Path, seeds: list[int], kill: int, rng: random.Random
) -> tuple[dict[int, Path], list[int]]:
    """Train with each seed in a process of its own, on one folder, and kill some of them. Returns
    their logs, and who was killed."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    home = Path(tempfile.mkdtemp())
    logs = {seed: home / f"{seed}.log" for seed in seeds}
    runs = {seed: fork.Process(target=train, args=(seed, folder, logs[seed])) for seed in seeds}
    for run in runs.values():
        run.start()
    steps = EPOCHS * SAMPLES // BATCH
    # Each of these as soon as it has made so many steps.
    ends = {seed: rng.randrange(SAMPLES // BATCH, steps) for seed in rng.sample(seeds, kill)}
    while any(runs[seed].is_alive() for seed in ends):
        for seed, end in ends.items():
            lines = logs[seed].read_bytes().count(b"\n") if logs[seed].exists() else 0
            if lines >= end and runs[seed].is_alive():
                time.sleep(rng.random() * 2e-3)
                os.kill(runs[seed].pid or 0, signal.SIGKILL)
                runs[seed].join()
        time.sleep(1e-3)
    for seed, run in runs.items():
        run.join()
        if run.exitcode not in ((0, -signal.SIGKILL) if seed in ends else (0,)):
            raise AssertionError(f"run {seed} ended with {run.exitcode}")
    return logs, [*ends]


def difference(log: Path, expected: list[float]) -> float:
    """The largest relative one of the losses that the log has, which may be cut short."""
    losses = [float(line) for line in log.read_text().split("\n")[:-1]]
    pairs = zip(losses, expected, strict=False)
    return max((abs(mine - theirs) / abs(theirs) for mine, theirs in pairs), default=0.0)


def main() -> None:
    """Make the rounds and print the largest difference of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    largest = 0.0
    with tempfile.TemporaryDirectory() as home:
        for number in range(args.rounds):
            folder = Path(home) / f"cache{number // 4}"
            seeds = [RUNS * number + each + 1 for each in range(RUNS)]
            expected = {seed: train(seed, None)[0] for seed in seeds}
            logs, killed = together(folder, seeds, KILLED, rng)
            worst = max(difference(logs[seed], expected[seed]) for seed in seeds)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing is damaged
                again = next(seed for seed in seeds if seed not in killed)
                losses, computed = train(again, folder)
            after = max(abs(a - b) / abs(b) for a, b in zip(losses, expected[again], strict=True))
            largest = max(largest, worst, after)
            print(
                f"round {number + 1}: largest difference of a loss {worst:.1e}, of a later run's "
                f"{after:.1e}, which computed {computed} samples",
                flush=True,
            )
            if computed:
                raise SystemExit("a sample is missing that a run to the end had stored")
    print(f"largest relative difference {largest:.1e} (claim: <= {BOUND})")
    if largest > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
