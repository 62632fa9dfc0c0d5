"""What could make a cache serve wrong numbers without anyone noticing: it does not."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from freezeout import FreezeOut, Frozen, PrefixCache, Schedule
from freezeout.cache.depths import Depths
from freezeout.cache.files import ENTRY
from freezeout.cache.inputs import Batch
from freezeout.cache.store import Store
from tests.caching import Run, same
from tests.models import CLASSES, conv_net, linear_net, vectors

# Padding.

TIME = 8


class Text(nn.Module):
    """A layer for each token, one that looks at its neighbours, and a mean; `pads`: which layers
    take padding in."""

    class Mixing(nn.Conv1d):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return relu(super().forward((x * mask).mT).mT)

    def __init__(self, pads: str = "none") -> None:
        super().__init__()
        self.embedding, self.mixing = nn.Embedding(30, 6), self.Mixing(6, 6, 3, padding=1)
        self.last, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.pads = pads

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, :, None].float()
        x = self.embedding(input_ids)
        x = self.mixing(x, torch.ones_like(mask) if self.pads == "frozen layers" else mask)
        x = relu(self.last(x))
        if self.pads == "later layers":
            mask = torch.ones_like(mask)
        return self.head((x * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """The frozen layers end with as many numbers a text as it has tokens with its padding."""

    class Pooler(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward((x * mask).sum(1) / mask.sum(1))

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.pooler = nn.Embedding(30, 6), self.Pooler(6, TIME)
        self.head = nn.Linear(TIME, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(self.pooler(x, attention_mask[:, :, None].float()))  # type: ignore[no-any-return]


def texts(lengths: list[int], time: int = TIME) -> dict[str, Tensor]:
    mask = torch.arange(time)[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(time)
    tokens = torch.randint(1, 30, mask.shape, generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}


def frozen(model: nn.Module, example: Any, depth: int = 2) -> FreezeOut:
    """With the first layers frozen, and rates that leave the others as they are."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, example_inputs=example)
    freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
    model.train()
    return freezer


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("first", ["padded", "whole"])
@pytest.mark.parametrize("pads", ["later layers", "frozen layers"])
def test_padding_that_counts_is_never_served(pads: str, first: str, dtype: str | None) -> None:
    """Zeros stand in for padding in store, which this model would take for tokens. The first
    batch that is served may have no padding to show it."""
    torch.manual_seed(0)
    model = Text(pads)
    whole, padded = texts([TIME] * 3), texts([5, 2, TIME])
    freezer = frozen(model, whole)
    cache = PrefixCache(freezer, 6, budget=10**6, depths="all", dtype=dtype)
    order = [(whole, [0, 1, 2]), (padded, [3, 4, 5])]
    tolerance = 0 if dtype is None else 2e-2  # served numbers were rounded

    def check() -> None:
        for _ in range(3):
            for batch, ids in order if first == "whole" else order[::-1]:
                assert torch.allclose(cache(**batch, ids=ids), model(**batch), tolerance, tolerance)

    with pytest.warns(UserWarning, match="the model's|padding"):
        check()
    assert cache.off is not None


def test_padding_that_does_not_count_is_no_hindrance() -> None:
    torch.manual_seed(0)
    model = Text()
    padded = texts([5, 2, TIME])
    cache = PrefixCache(frozen(model, padded), 3, budget=10**6, depths=[2])
    for _ in range(3):
        assert torch.equal(cache(**padded, ids=[0, 1, 2]), model(**padded))
    assert (cache.refusals, cache.stats.hits) == ([], 6)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_features_are_not_taken_for_tokens(dtype: str | None) -> None:
    """As many of them as tokens, in texts that are shorter."""
    torch.manual_seed(0)
    model, padded = Pooled(), texts([5, 2, 3])
    freezer = frozen(model, padded)
    cache = PrefixCache(freezer, 3, budget=10**6, depths=[2], dtype=dtype)
    for _ in range(3):
        served, own = cache(**padded, ids=[0, 1, 2]), model(**padded)
        assert torch.allclose(served, own, 0 if dtype is None else 2e-2, 0)
    assert cache.stats.hits == 6


def test_short_texts_first_leave_room_for_long_ones(tmp_path: Path) -> None:
    for where in ("ram", str(tmp_path / "cache")):
        torch.manual_seed(0)
        model = Text("none")
        short, long = texts([1, 1], 2), texts([40, 40], 40)
        freezer = frozen(model, short, depth=1)
        cache = PrefixCache(freezer, 4, where=where, budget=10**5, depths=[1])
        for _ in range(2):
            assert torch.equal(cache(**short, ids=[0, 1]), model(**short))
            assert torch.equal(cache(**long, ids=[2, 3]), model(**long))
        assert cache.refusals == []
        assert cache.bytes_held == (1 + 1 + 40 + 40) * 6 * 4
        cache.close()


# Randomness, labels, and arguments that all samples share.


class Random(nn.Module):
    """Something is drawn once a batch, between two layers."""

    def __init__(self, draw: Callable[[], Any], rate: float) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.draw, self.rate = draw, rate

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        if self.training and self.draw() < self.rate:
            x = 0.5 * x
        return self.head(relu(self.middle(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.random])
def test_what_is_drawn_once_a_batch_is_drawn_in_every_step(draw: Callable[[], Any]) -> None:
    """In one step of ten: the passes in which the cache is checked need not show it."""

    def make() -> nn.Module:
        return Random(draw, 0.1)

    def seeded() -> Run:
        random.seed(0)
        np.random.seed(0)
        return Run(make, vectors)

    reference = seeded().steps(None)
    run = seeded()
    with pytest.warns(UserWarning, match="behind layer 'middle'.*drawn in front of the frontier"):
        run.steps(run.cache())
    assert same(run, reference)


def test_a_rate_of_zero_draws_and_decides_nothing() -> None:
    def make() -> nn.Module:
        return Random(lambda: torch.rand(()), 0.0)

    reference, run = Run(make, vectors).steps(None), Run(make, vectors)
    cache = run.cache()
    run.steps(cache)
    assert same(run, reference)
    assert cache.refusals == []
    assert 2 in cache._activations.ready


class Counted(nn.Module):
    """A number goes through all layers, as the Trainer's `num_items_in_batch` does, and the last
    uses it; `front`: so does the first, in this way."""

    class Stem(nn.Linear):
        def __init__(self, front: Callable[[Tensor, Any], Tensor]) -> None:
            super().__init__(5, 5)
            self.front = front

        def forward(self, x: Tensor, count: Any) -> Tensor:  # type: ignore[override]
            return self.front(super().forward(x), count)

    def __init__(self, front: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.stem = self.Stem(front)
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, count: Any = None, **others: Any) -> Tensor:
        return self.head(relu(self.middle(self.stem(x, count)))) / count  # type: ignore[no-any-return]


COUNTS: list[Callable[[int], Any]] = [torch.tensor, int, float]


def counted(front: Callable[[Tensor, Any], Tensor], kind: Callable[[int], Any]) -> PrefixCache:
    """The cache, after three rounds in which the number is another each time."""
    torch.manual_seed(0)
    model, x = Counted(front), torch.randn(6, 5)
    cache = PrefixCache(frozen(model, (x, kind(1))), 6, budget=10**6, depths=[2])
    for count in (1, 2, 2, 5):
        served = cache(x, count=kind(count), ids=range(6))
        assert torch.equal(served, model(x, count=kind(count)))
    return cache


@pytest.mark.parametrize("kind", COUNTS)
def test_numbers_that_frozen_layers_hand_on_and_do_not_use_do_not_count(kind: Any) -> None:
    cache = counted(lambda x, count: x if count is not None else x + 1, kind)
    assert cache.refusals == []
    assert cache.stats.hits == 3 * 6


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize(
    "front",
    [
        lambda x, count: x * count,
        lambda x, count: x if count < 4 else 2 * x,
        lambda x, count: x.add(x, alpha=count) if isinstance(count, int) else x + count,
        lambda x, count: x + float(f"{float(count):.1f}"),
        lambda x, count: x if {2: True}.get(int(count)) else 2 * x,
    ],
)
def test_numbers_that_frozen_layers_use_count(front: Any, kind: Any) -> None:
    with pytest.warns(UserWarning, match="'count'.* has another value.* the frozen layers use it"):
        cache = counted(front, kind)
    assert cache.stats.hits == 0


class Labelled(nn.Module):
    """Frozen layers take the label too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classes = nn.Linear(5, 5), nn.Embedding(CLASSES, 5)
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = relu(self.stem(x)) + self.classes(labels)
        return self.head(relu(self.middle(x)))  # type: ignore[no-any-return]


def test_labels_that_frozen_layers_use_are_inputs() -> None:
    """They are in no checksum, since most models take them at the end."""
    torch.manual_seed(0)
    model, x = Labelled(), torch.randn(6, 5)
    labels = torch.arange(6) % CLASSES
    cache = PrefixCache(frozen(model, (x, labels)), 6, budget=10**6, depths=[2])
    for turned in (labels, labels, labels.flip(0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            served = cache(x, labels=turned, ids=range(6))
        assert torch.equal(served, model(x, labels=turned))
    assert any("use the labels" in reason for reason in cache.refusals)


def test_a_first_batch_of_one_label_shows_nothing_and_is_not_believed() -> None:
    torch.manual_seed(0)
    model, x = Labelled(), torch.randn(6, 5)
    ones, labels = torch.ones(6, dtype=torch.int64), torch.arange(6) % CLASSES
    cache = PrefixCache(frozen(model, (x, labels)), 12, budget=10**6, depths=[2])
    for _ in range(3):
        assert torch.equal(cache(x, labels=ones, ids=range(6)), model(x, labels=ones))
    assert cache.stats.hits == 12
    with pytest.warns(UserWarning, match="use the labels"):
        served = cache(x, labels=labels, ids=range(6))
    assert torch.equal(served, model(x, labels=labels))


class Attends(nn.Module):
    """Attention in a frozen layer, which torch tags as drawing, and a drop rate of zero."""

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)[:, None, None]
            return scaled_dot_product_attention(x, x, x).flatten(1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = self.Block(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0:
            x = 0 * x
        return self.head(relu(self.middle(self.stem(x))))  # type: ignore[no-any-return]


def test_attention_is_not_taken_for_a_draw() -> None:
    reference, run = Run(Attends, vectors).steps(None), Run(Attends, vectors)
    cache = run.cache()
    run.steps(cache)
    assert same(run, reference)
    assert cache.refusals == []
    assert cache.stats.hits > 0


class Scaled(nn.Module):
    class Stem(nn.Linear):
        def forward(self, x: Tensor, by: Any) -> Tensor:  # type: ignore[override]
            return relu(super().forward(x)) * torch.as_tensor(by, dtype=x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = self.Stem(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, by: Any) -> Tensor:
        return self.head(relu(self.middle(self.stem(x, by))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_an_argument_that_all_samples_share_may_not_change(kind: Callable[[float], Any]) -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(6, 5)
    cache = PrefixCache(frozen(model, (x, kind(1.0))), 6, budget=10**6, depths=[2])
    for _ in range(3):
        assert torch.equal(cache(x, kind(1.0), ids=range(6)), model(x, kind(1.0)))
    assert cache.stats.hits == 12
    with pytest.warns(UserWarning, match="a batch is not cached"):
        assert torch.equal(cache(x, kind(2.0), ids=range(6)), model(x, kind(2.0)))


def test_every_part_of_a_tokens_features_counts() -> None:
    mask = torch.ones(1, 4, dtype=torch.long)
    x = torch.randn(1, 4, 40)
    sums = [
        int(Batch((), {"inputs_embeds": each, "attention_mask": mask}, 1).checksums()[0])
        for each in (x, x.index_add(2, torch.tensor([39]), torch.ones(1, 4, 1)))
    ]
    assert sums[0] != sums[1]


# Weights.


def replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight * 2, requires_grad=False)  # type: ignore[index]


def assigned(model: nn.Module) -> None:
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    before = [p.requires_grad for p in model.parameters()]
    model.load_state_dict(state, assign=True)
    for parameter, trains in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(trains)


def moved(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


@pytest.mark.parametrize("change", [replaced, assigned, moved])
def test_weights_that_are_exchanged_are_noticed(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model, x = linear_net(), torch.randn(6, 5)
    cache = PrefixCache(frozen(model, x), 6, budget=10**6, depths="all")
    for _ in range(3):
        cache(x, ids=range(6))
    change(model)
    with pytest.warns(UserWarning, match="weights of frozen layers were changed"):
        served = cache(x, ids=range(6))
    assert torch.equal(served, model(x))
    assert torch.equal(cache(x, ids=range(6)), model(x))


def test_a_buffer_that_gets_what_it_held_has_not_changed() -> None:
    """As DistributedDataParallel does in each pass, before torch 2.13."""
    torch.manual_seed(0)
    model, x = conv_net(), torch.randn(6, 3, 8, 8)
    cache = PrefixCache(frozen(model, x), 6, budget=10**6, depths="all")
    model.train()
    for _ in range(3):
        cache(x, ids=range(6))
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())
    assert cache.stats.hits == 12
    assert cache.refusals == []
    next(model.buffers()).add_(1)
    with pytest.warns(UserWarning, match="weights of frozen layers were changed"):
        assert torch.equal(cache(x, ids=range(6)), model(x))


def test_what_is_done_behind_autograds_back_is_for_clear() -> None:
    torch.manual_seed(0)
    model, x = linear_net(), torch.randn(6, 5)
    cache = PrefixCache(frozen(model, x), 6, budget=10**6, depths="all")
    for _ in range(3):
        cache(x, ids=range(6))
    next(model.parameters()).data.mul_(2)
    cache.clear()
    for _ in range(3):
        assert torch.equal(cache(x, ids=range(6)), model(x))


# Modes, and passes that are made for checking.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_may_come_first(mode: Callable[[], Any]) -> None:
    """What is made in inference mode must not stay where training meets it."""
    torch.manual_seed(0)
    model, x = conv_net(), torch.randn(6, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, example_inputs=x)
    cache = PrefixCache(freezer, 6, budget=10**6, depths="all")
    for depth in (1, 2):
        freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
        for training in (False, True):
            model.train(training)
            with mode():
                for _ in range(3):
                    cache(x[:3], ids=range(3))
        model.train()
        for _ in range(3):
            torch.autograd.backward(cache(x, ids=range(6)).sum())
            optimizer.zero_grad()
    assert cache.refusals == []
    assert cache.stats.hits > 20


def test_two_calls_before_one_backward_pass() -> None:
    """Statistics of norms that still train are put back after checks, unseen by autograd."""
    torch.manual_seed(0)
    model, x = conv_net(), torch.randn(12, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, example_inputs=x)
    cache = PrefixCache(freezer, 12, budget=10**6, depths="all")
    for depth in (1, 2):
        freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
        model.train()
        cache(x[:6], ids=range(6))
        for _ in range(2):  # the second call is the first of its kind to be served
            one, two = cache(x[6:], ids=range(6, 12)), cache(x[:6], ids=range(6))
            torch.autograd.backward((one - two).square().sum())
            optimizer.zero_grad()
    assert cache.stats.hits > 20


# Room, and files.


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_memory_that_is_not_there_turns_the_cache_off(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reserve(*_: Any) -> None:
        raise error("out of memory\nTried to allocate 10 GB")

    reference, run = Run(linear_net, vectors).steps(None), Run(linear_net, vectors)
    cache = run.cache()
    monkeypatch.setattr(Store, "reserve", reserve)
    with pytest.warns(UserWarning, match="no memory for the cache: out of memory; the cache is"):
        run.steps(cache)
    assert same(run, reference)


def test_layers_that_stay_frozen_under_another_schedule_are_kept() -> None:
    model = linear_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, schedule=Schedule(1.0))
    depths = Depths([2], freezer, 8, 1, None, freezer.model)
    assert depths.reached == []
    freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, 2]]})
    assert depths.reached == [2]


def test_a_larger_budget_counts_in_a_folder_that_is_there(tmp_path: Path) -> None:
    def hits(budget: int) -> int:
        torch.manual_seed(0)
        model, x = linear_net(), torch.randn(12, 5)
        freezer = frozen(model, x)
        cache = PrefixCache(freezer, 12, where=tmp_path / "cache", budget=budget, depths=[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                assert torch.allclose(cache(x, ids=range(12)), model(x), 1e-5)
        cache.close()
        return cache.stats.hits

    assert hits(60 * 4) == 4  # 20 bytes, and an entry of 40
    assert hits(60 * 12) > 12


def test_records_in_another_order_of_memory_are_not_gone_on_from(tmp_path: Path) -> None:
    """The same weights, and as many bytes; but channels last in the second process."""
    for kind in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = conv_net().to(memory_format=kind)  # type: ignore[call-overload]
        x = torch.randn(6, 3, 8, 8).to(memory_format=kind)
        depths = (1,) if kind is torch.contiguous_format else (2,)
        freezer = frozen(model, x, 1)
        cache = PrefixCache(freezer, 6, where=tmp_path / "cache", budget=10**6, depths=[1, 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for depth in depths:
                freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
                model.train()
                for _ in range(3):
                    torch.manual_seed(1)
                    served = cache(x, ids=range(6))
                    torch.manual_seed(1)
                    assert torch.allclose(served, model(x), 1e-4, 1e-5)
        assert cache.stats.advanced == 0
        cache.close()


@pytest.mark.parametrize("field", ["key", "input", "bytes", "offset"])
def test_a_damaged_index_does_no_harm(field: str, tmp_path: Path) -> None:
    """Where records of two depths are of one size, an entry may still look plausible."""
    torch.manual_seed(0)
    model, x = linear_net(), torch.randn(6, 5)
    freezer = frozen(model, x, 1)
    for attempt in range(2):
        cache = PrefixCache(freezer, 6, where=tmp_path / "cache", budget=10**6, depths=[1, 2])
        for depth in (1, 2) if attempt == 0 else (2,):
            freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
            model.train()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for _ in range(2):
                    assert torch.allclose(cache(x, ids=range(6)), model(x), 1e-5)
        cache.close()
        for file in (tmp_path / "cache").glob("*/*.index") if attempt == 0 else ():
            index = np.memmap(file, ENTRY, "r+")
            index[field][3] += 1
            index.flush()
    missed = field in ("input", "key")  # what stands there is another's
    assert missed or any("damaged" in str(warning.message) for warning in said)
    assert cache.stats.misses + cache.stats.advanced > 0


# --- arguments ------------------------------------------------------------------------------


class Shifts(nn.Module):
    """Writes into its input, and may keep numbers in an object that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, seen: Any = None, memory: Tensor | None = None) -> Tensor:
        if seen is not None:
            seen.rows = getattr(seen, "rows", 0) + len(x)
        x.sub_(0.5).div_(0.25)
        x = relu(self.frozen(x))
        if memory is not None:
            x = x + memory.mean(0)
        output: Tensor = self.head(x)
        return output


def shifting() -> tuple[nn.Module, PrefixCache]:
    torch.manual_seed(0)
    model = Shifts()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(
        model, optimizer, 100, schedule=Frozen(1), layers=[model.frozen, model.head]
    )
    return model.train(), PrefixCache(freezer, 8, depths=[1], budget=10**6)


def test_checks_leave_what_is_written_into_to_the_model_itself() -> None:
    model, cache = shifting()
    x = torch.randn(8, 5)
    expected = model(x.clone())
    for _ in range(3):
        assert torch.equal(cache(x.clone(), ids=torch.arange(8)), expected)
    assert cache.stats.hits == 16


def test_an_object_that_may_be_written_into_is_a_reason_not_to_cache() -> None:
    _, cache = shifting()
    for number in range(1, 3):
        seen = SimpleNamespace()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache(torch.randn(8, 5), seen=seen, ids=torch.arange(8))
        assert seen.rows == 8, number
    (refusal,) = cache.refusals
    assert "an argument is a SimpleNamespace, which the model may write into" in refusal


def test_a_shared_argument_of_another_size_is_compared_anew() -> None:
    class Remembers(Shifts):
        def forward(self, x: Tensor, seen: Any = None, memory: Tensor | None = None) -> Tensor:
            assert memory is not None
            output: Tensor = self.head(relu(self.frozen(x + memory.mean(0))))
            return output

    model, cache = shifting()
    model.__class__ = Remembers
    x, ids = torch.randn(8, 5), torch.arange(8)
    for memory in (torch.zeros(5, 5), torch.zeros(5, 5), torch.ones(6, 5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            served = cache(x, memory=memory, ids=ids)
        assert torch.equal(served, model(x, memory=memory))


def test_a_shared_argument_may_have_as_many_rows_as_the_last_batch() -> None:
    model, cache = shifting()
    x, memory = torch.randn(6, 5), torch.randn(2, 5)
    for batches in (([0, 1, 2, 3], [4, 5]), ([0, 1, 2, 3], [5, 4])):
        for ids in map(torch.tensor, batches):
            served = cache(x[ids], memory=memory, ids=ids)
            assert torch.allclose(served, model(x[ids], memory=memory), rtol=1e-5)
    assert cache.stats.hits == 6


def test_of_two_caches_inside_each_other_the_inner_one_serves() -> None:
    model, cache = shifting()
    other = PrefixCache(cache.freezer, 8, depths=[1], budget=10**6)
    x, y, ids = torch.randn(8, 5), torch.randn(8, 5), torch.arange(8)
    for _ in range(3):
        with cache.batch(ids):
            with other.batch(ids):
                of_other = model(y.clone())
            served = model(x.clone())
    assert cache.stats.hits == other.stats.hits == 16
    assert torch.equal(served, model(x.clone()))
    assert torch.equal(of_other, model(y.clone()))
