"""The cache with autocast, compiled layers, several tensors at the frontier, sequences in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from freezeout import FreezeOut, PrefixCache, Schedule
from freezeout.parallel import compile_layers
from tests.caching import Run, same
from tests.models import CLASSES, conv_net, images, linear_net, vectors


@pytest.mark.parametrize(("make", "data"), [(conv_net, images), (linear_net, vectors)])
def test_under_autocast_it_is_training_without_a_cache_bit_for_bit(make: Any, data: Any) -> None:
    reference = Run(make, data, autocast=True).steps(None)
    run = Run(make, data, autocast=True)
    cache = run.cache()
    run.steps(cache)
    assert same(run, reference)
    assert cache.stats.hits > 0
    assert cache.refusals == []


def test_a_call_in_another_precision_is_not_served() -> None:
    """What is stored was computed under autocast; evaluation in fp32 is another computation."""
    run = Run(conv_net, images, autocast=True)
    cache = run.cache()
    run.steps(cache, until=20)
    x, ids = run.x[:8], torch.arange(8)
    hits = cache.stats.hits
    run.model.eval()
    with pytest.warns(UserWarning, match="differs in precision"):
        served = cache(x, ids=ids)
    assert torch.equal(served, run.model(x))
    assert cache.stats.hits == hits


# Torch looks there while it traces, and hides the warning in a way that "error" does not respect.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_are_left_out_like_others() -> None:
    """Each block is a graph of its own; those in front of the frontier are not called."""

    def make() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Linear(5, CLASSES))

    reference, run = Run(make, vectors), Run(make, vectors)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):  # put back afterwards
        for each in (reference, run):
            compile_layers(each.freezer, backend="eager")
        reference.steps(None)
        cache = run.cache()
        run.steps(cache)
    torch._dynamo.reset()
    assert same(run, reference)
    assert cache.stats.hits > 0
    assert cache.refusals == []


class TwoStreams(nn.Module):
    """Each block takes two tensors and returns two, of different sizes and types."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, sides = streams
            x = relu(self.wide(x))
            return x, sides + self.narrow(x).double()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams.Block() for _ in range(4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        streams = (x, x[:, :3].double())
        for block in self.blocks:
            streams = block(streams)
        return self.head(torch.cat([streams[0], streams[1].float()], 1))  # type: ignore[no-any-return]


def test_several_tensors_at_the_frontier_are_kept_together() -> None:
    reference = Run(TwoStreams, vectors).steps(None)
    run = Run(TwoStreams, vectors)
    cache = run.cache()
    run.steps(cache)
    assert same(run, reference)
    assert cache.stats.hits > 0
    assert cache.refusals == []
    assert cache.bytes_held == len(run.x) * (5 * 4 + 3 * 8)


class Reader(nn.Module):
    """Token by token, with a mean over the tokens that the mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = relu(layer(x))
        mask = attention_mask[:, :, None].to(x.dtype)
        return self.head((x * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


COUNT, LONGEST = 24, 12


def read(folder: Path | None) -> tuple[list[float], PrefixCache | None]:
    """Losses of four epochs over texts of 1 to 12 tokens, two layers frozen from the second on."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (COUNT,), generator=generator)
    texts = torch.randint(1, 30, (COUNT, LONGEST), generator=generator)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        time = int(lengths[ids].max())
        mask = torch.arange(time)[None] < lengths[ids][:, None]
        return {"input_ids": texts[ids, :time] * mask, "attention_mask": mask.long()}

    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(
        model,
        optimizer,
        4 * COUNT // 8,
        schedule=Schedule(times=(0.25, 0.25, 0.25, 1.0, 1.0), scale_lr=False),
        example_inputs=inputs(torch.arange(2)),
    )
    cache = None
    if folder is not None:
        cache = PrefixCache(freezer, COUNT, where=folder, budget=10**6, depths="all")
    losses = []
    for epoch in range(4):
        # Other company in each epoch, so that texts are padded to other lengths.
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(epoch))
        for ids in torch.split(order, 8):
            batch = inputs(ids)
            output = model(**batch) if cache is None else cache(**batch, ids=ids)
            loss = cross_entropy(output, labels[ids])
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
            losses.append(loss.item())
    return losses, cache


def test_sequences_keep_their_lengths_in_files_and_another_process_reads_them(
    tmp_path: Path,
) -> None:
    reference, _ = read(None)
    first, cache = read(tmp_path / "cache")
    assert cache is not None
    assert first == pytest.approx(reference, rel=1e-5)  # other batches: other summation order
    # After the epoch in which they are stored, each text is served twice.
    assert (cache.stats.misses, cache.stats.hits) == (COUNT, 2 * COUNT)
    generator = torch.Generator().manual_seed(0)
    tokens = int(torch.randint(1, LONGEST + 1, (COUNT,), generator=generator).sum())
    assert cache.bytes_held == tokens * 6 * 4
    cache.close()
    again, other = read(tmp_path / "cache")
    assert other is not None
    assert again == first  # the same frozen weights: what the first stored is served
    assert (other.stats.misses, other.stats.hits) == (0, 3 * COUNT)
    other.close()
