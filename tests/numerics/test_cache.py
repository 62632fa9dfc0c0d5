"""Training with a `PrefixCache` gives the numbers of training without one, or says why not."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from freezeout import PrefixCache
from freezeout.cache.depths import Depths
from freezeout.cache.placeholders import Placeholders, holds_placeholder
from freezeout.errors import CacheError, InvalidType, InvalidValue
from tests.caching import Data, Run, same
from tests.models import (
    CLASSES,
    BasicBlock,
    ResNet,
    Reversed,
    TiedTransformer,
    conv_net,
    images,
    linear_net,
    tokens,
    vectors,
)


@pytest.mark.parametrize(
    ("make", "data"),
    [(conv_net, images), (ResNet, images), (linear_net, vectors), (Reversed, vectors)],
)
def test_training_with_a_cache_is_training_without_one_bit_for_bit(
    make: Callable[[], nn.Module], data: Data
) -> None:
    """The same batches in each epoch; the frontier moves while they pass."""
    reference = Run(make, data).steps(None)
    run = Run(make, data)
    cache = run.cache()
    run.steps(cache)
    assert same(run, reference)
    stats = cache.stats
    assert min(stats.hits, stats.advanced, stats.misses) > 0
    assert stats.hits + stats.advanced + stats.misses + stats.bypassed == 24 * run.size
    assert cache.refusals == []
    assert cache.bytes_held > 0


def test_in_shuffled_batches_losses_agree_to_rounding() -> None:
    """Samples are served beside others than those that they were computed with."""
    reference = Run(Reversed, vectors).steps(None, shuffle=True)
    run = Run(Reversed, vectors)
    cache = run.cache()
    run.steps(cache, shuffle=True)
    assert cache.stats.hits > 0
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize("where", ["device", "file"])
def test_every_store_serves_the_same_bits(where: str, tmp_path: Path) -> None:
    reference = Run(conv_net, images).steps(None)
    run = Run(conv_net, images)
    cache = run.cache(where=tmp_path / "cache" if where == "file" else where)
    run.steps(cache)
    assert cache.stats.hits > 0
    assert same(run, reference)
    cache.close()


def test_a_budget_for_some_samples_serves_those() -> None:
    reference = Run(Reversed, vectors).steps(None)
    run = Run(Reversed, vectors)
    cache = run.cache(budget=64 * 12)
    with pytest.warns(UserWarning, match="budget of 768 bytes is used up"):
        run.steps(cache)
    assert 0 < cache.bytes_held <= 768
    assert cache.stats.hits > 0
    assert run.losses == pytest.approx(reference.losses, rel=1e-6)


def growing_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 40), nn.ReLU()),
        *(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, CLASSES)),
    )


def test_a_record_that_outgrows_its_room_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is set aside for the largest; here it is not, and old records lose their place."""
    monkeypatch.setattr(Depths, "record_bytes", lambda *_: 1)
    reference = Run(growing_net, vectors).steps(None)
    run = Run(growing_net, vectors)
    cache = run.cache()
    cache._activations.store.reserve(10**6)
    cache._activations.store._bytes.fill_(255)  # NaN, to whoever reads what was not written
    run.steps(cache)
    assert same(run, reference)
    assert cache.stats.misses > len(run.x)
    assert cache.stats.hits > 0


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_shorter_types_are_near_and_the_first_visit_is_rounded_too(
    dtype: str, bytes_each: int
) -> None:
    """So it does not matter to the numbers when a sample came to be stored."""
    reference = Run(linear_net, vectors).steps(None)
    run, late = Run(linear_net, vectors), Run(linear_net, vectors)
    cache, other = run.cache(dtype=dtype, depths=[1]), late.cache(dtype=dtype, depths=[1])
    run.steps(cache)
    with warnings.catch_warnings():
        for _ in range(24):
            other._activations.store.clear()  # every visit is the first
            late.step(lambda x, ids: other(x, ids=ids))
    assert cache.stats.hits > 0 == other.stats.hits
    assert run.losses == late.losses
    assert run.losses == pytest.approx(reference.losses, rel=2e-3)
    assert cache.bytes_held == len(run.x) * 5 * bytes_each


def test_fp16_that_overflows_turns_the_cache_off_and_changes_no_number() -> None:
    reference, run = Run(linear_net, vectors), Run(linear_net, vectors)
    for each in (reference, run):
        with torch.no_grad():
            each.x[5] *= 1e6
    cache = run.cache(dtype="fp16")
    reference.steps(None)
    with pytest.warns(UserWarning, match="too large for fp16"):
        run.steps(cache)
    assert cache.off is not None
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses == pytest.approx(reference.losses, rel=2e-3)  # fp16, until it overflows


# --- what must be refused -----------------------------------------------------------------


class Skips(nn.Module):
    """A skip connection from the first layer to the last, joined in a way of choice."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(5, 5), nn.Linear(5, 5)
        self.late, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        skip = relu(self.stem(x))
        x = relu(self.middle(skip))
        return self.head(self.join(self.late(x), skip))  # type: ignore[no-any-return]


def add_in_place(o: Tensor, skip: Tensor) -> Tensor:
    o += skip
    return o


def through_matrix(o: Tensor, skip: Tensor) -> Tensor:
    return o @ skip.T @ skip


def masked(o: Tensor, skip: Tensor) -> Tensor:
    return o.masked_fill(skip > 0, 0.0)


def by_value(o: Tensor, skip: Tensor) -> Tensor:
    return o * 2 if skip.mean() > 0.1 else o


def listed(o: Tensor, skip: Tensor) -> Tensor:
    return o * float(skip.detach().flatten().tolist()[0])


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (add_in_place, "by another way"),
        (through_matrix, "by another way"),
        (masked, "by another way"),
        (by_value, "reads values"),
        (listed, "reads values"),
    ],
)
def test_a_way_around_the_frontier_is_refused_and_training_goes_on_as_it_is(
    join: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    reference = Run(lambda: Skips(join), vectors).steps(None)
    run = Run(lambda: Skips(join), vectors)
    cache = run.cache()
    with pytest.warns(UserWarning, match=reason):
        run.steps(cache)
    assert same(run, reference)
    # The layer that the skip starts in may be cached: nothing goes around it.
    held = {int(depth) for depth in cache._activations.store.index["depth"]}
    assert held <= {0, 1}


class InPlace(nn.Module):
    """Its first operation on what the frozen part gives changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = layer(x)
            x.mul_(0.5) if not x.requires_grad else x.mul(0.5)
            x = x.clone() if x.requires_grad else x.relu_()
        return self.head(x)  # type: ignore[no-any-return]


def test_an_in_place_operation_on_what_is_served_leaves_the_store_alone() -> None:
    reference = Run(InPlace, vectors).steps(None)
    run = Run(InPlace, vectors)
    cache = run.cache()
    run.steps(cache)
    assert cache.stats.hits > 0
    assert same(run, reference)


class Draws(nn.Module):
    """Dropout by function, in the root and so never in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(self.stem(x), 0.3, self.training)
        return self.head(relu(self.middle(x)))  # type: ignore[no-any-return]


class Mixes(nn.Module):
    """A norm without statistics of its own: what a sample gives depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False))
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.middle(self.stem(x))))  # type: ignore[no-any-return]


class Keeps(nn.Module):
    """A block leaves a tensor in an attribute, which another reads."""

    class Stem(nn.Linear):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = self.Stem(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.middle(self.stem(x))) + self.stem.kept)  # type: ignore[no-any-return]


class Turns(nn.Module):
    """Which layers run depends on what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.middle(x) if x.sum() > -1e9 else x
        return self.head(relu(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "data", "reason"),
    [
        (Mixes, vectors, "depends on the other samples"),
        (Keeps, vectors, "keeps tensors"),
        (TiedTransformer, tokens, "still trains"),
    ],
)
def test_what_cannot_be_served_is_computed(
    make: Callable[[], nn.Module], data: Data, reason: str
) -> None:
    reference = Run(make, data).steps(None)
    run = Run(make, data)
    cache = run.cache()
    with pytest.warns(UserWarning, match=reason):
        run.steps(cache)
    assert cache.stats.hits == 0
    assert same(run, reference)


def test_random_numbers_drawn_in_front_of_the_frontier_keep_it_behind_them() -> None:
    """Dropout of what the stem gives is still drawn anew, so the stem alone is cached."""
    reference = Run(Draws, vectors).steps(None)
    run = Run(Draws, vectors)
    cache = run.cache()
    with pytest.warns(UserWarning, match="behind layer 'middle'.*random"):
        run.steps(cache)
    assert {int(depth) for depth in cache._activations.store.index["depth"]} == {1}
    assert same(run, reference)


def test_a_forward_pass_that_reads_values_in_front_of_the_frontier_is_refused_there() -> None:
    reference = Run(Turns, vectors).steps(None)
    run = Run(Turns, vectors)
    cache = run.cache()
    with pytest.warns(UserWarning, match="reads values"):
        run.steps(cache)
    assert same(run, reference)


class Shows(nn.Module):
    """Returns what its layers gave as well, where asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> Any:
        stem = self.stem(x)
        middle = self.middle(relu(stem))
        output = self.head(relu(middle))
        return (output, stem, middle) if output_hidden_states else output


def test_hidden_states_of_frozen_layers_are_never_served() -> None:
    run = Run(Shows, vectors)
    cache = run.cache()
    run.steps(cache, until=20)
    assert run.freezer.num_frozen == 2
    x, ids = run.x[:8], torch.arange(8)
    with pytest.warns(UserWarning, match="differs in precision or in options"):
        served = cache(x, ids=ids, output_hidden_states=True)
    for one, other in zip(served, run.model(x, output_hidden_states=True), strict=True):
        assert torch.equal(one, other)
    # Where it has been asked for from the start.
    other_cache = run.cache()
    with pytest.warns(UserWarning, match="returns something from inside"):
        served = other_cache(x, ids=ids, output_hidden_states=True)
    assert not holds_placeholder(served)


def test_a_model_compiled_as_a_whole_is_called_as_it_is() -> None:
    run = Run(linear_net, vectors)
    run.model.compile(backend="eager")
    cache = run.cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.steps(cache)
    assert cache.stats.hits == 0
    assert any("compiled as a whole" in reason for reason in cache.refusals)
    assert same(run, Run(linear_net, vectors).steps(None))


def test_a_hook_of_the_users_inside_the_frozen_part_is_not_left_out() -> None:
    run = Run(ResNet, images)
    seen: list[int] = []
    inner = run.model.layer1[0].conv2  # type: ignore[index,union-attr]
    inner.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"'layer1.0.conv2' has a forward hook"):
        run.steps(run.cache())
    assert len(seen) >= 24


def test_a_model_whose_way_changes_later_stops_with_an_error_and_no_number() -> None:
    class Changes(Skips):
        skips = False

        def forward(self, x: Tensor) -> Tensor:
            skip = relu(self.stem(x))
            x = relu(self.late(relu(self.middle(skip))))
            return self.head(x + skip if self.skips else x)  # type: ignore[no-any-return]

    run = Run(lambda: Changes(add_in_place), vectors)
    cache = run.cache()
    run.steps(cache, until=20)
    assert cache.stats.hits > 0
    Changes.skips = True
    with pytest.raises(CacheError, match="failed where earlier ones did not"), pytest.warns():
        run.steps(cache)
    run.steps(cache)  # it is off now
    assert run.freezer.step_count == 24


# --- what it is given ---------------------------------------------------------------------


def test_ids_out_of_range_or_of_another_kind_are_refused() -> None:
    run = Run(linear_net, vectors)
    cache = run.cache(views=2)
    x = run.x[:2]
    with pytest.raises(InvalidValue, match=r"id 24 is out of range: num_samples=24"):
        cache(x, ids=[0, 24])
    with pytest.raises(InvalidValue, match="id -1"):
        cache(x, ids=[0, -1])
    with pytest.raises(InvalidType, match="ids must be integers"):
        cache(x, ids=[0.5, 1.0])
    with pytest.raises(InvalidValue, match="view 2 is out of range: views=2"):
        cache(x, ids=[0, 1], view=2)
    with pytest.raises(InvalidType, match="view must be"):
        cache(x, ids=[0, 1], view="left")


def test_a_repeated_id_is_served_twice_unless_its_inputs_differ() -> None:
    run = Run(linear_net, vectors)
    cache = run.cache()
    run.steps(cache, until=20)
    ids = torch.tensor([3, 4, 3])
    assert torch.allclose(cache(run.x[ids], ids=ids), run.model(run.x[ids]), rtol=1e-6)
    with pytest.raises(InvalidValue, match="id 3 comes twice in this batch with different"):
        cache(run.x[[3, 4, 5]], ids=ids)


def test_a_data_set_that_changed_is_noticed() -> None:
    run = Run(linear_net, vectors)
    cache = run.cache()
    run.steps(cache, until=20)
    run.x[7, 2] += 1e-3
    with pytest.raises(InvalidValue, match="input of sample 7 is not what it was"):
        cache(run.x[:8], ids=range(8))


def test_weights_that_are_changed_behind_its_back_are_noticed() -> None:
    run, reference = Run(linear_net, vectors), Run(linear_net, vectors)
    cache = run.cache()
    run.steps(cache, until=20)
    reference.steps(None, until=20)
    for each in (run, reference):
        with torch.no_grad():
            next(each.model.parameters()).mul_(2)
    with pytest.warns(UserWarning, match="weights of frozen layers were changed"):
        run.steps(cache)
    assert same(run, reference.steps(None))


def test_going_back_to_an_earlier_state_drops_what_was_stored() -> None:
    """The layers that freeze again have been trained on in the meantime."""
    run, reference = Run(linear_net, vectors), Run(linear_net, vectors)
    cache = run.cache()
    states = []
    for each, used in ((run, cache), (reference, None)):
        each.steps(used, until=5)
        states.append(each.freezer.state_dict())
        each.steps(used, until=20)
        each.freezer.load_state_dict(states[-1])
        assert each.freezer.num_frozen == 0
        each.steps(used)
    assert same(run, reference)


def test_views_are_kept_apart_and_random_ones_not_at_all() -> None:
    run = Run(linear_net, vectors)
    cache = run.cache(views=2)
    run.steps(cache, until=20)
    x, ids = run.x[:8], torch.arange(8)
    hits = cache.stats.hits
    mirrored = x.flip(1)
    for _ in range(2):
        assert torch.equal(cache(mirrored, ids=ids, view=1), run.model(mirrored))
    assert cache.stats.hits == hits + 8
    assert torch.equal(cache(x, ids=ids), run.model(x))
    bypassed = cache.stats.bypassed
    noise = torch.randn(8, 5)
    assert torch.equal(cache(noise, ids=ids, view=None), run.model(noise))
    assert cache.stats.bypassed == bypassed + 8


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    run = Run(linear_net, vectors)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"views": 0}, "views"),
        ({"dtype": "int8"}, "dtype must be None, fp32, bf16, fp16, got 'int8'"),
        ({"budget": 0}, "budget"),
        ({"depths": [4]}, r"depths must be in 1\.\.3, got 4"),
        ({"depths": "some"}, "depths must be 'auto'"),
        ({"where": "gpu"}, "where must be 'ram'"),
    ]
    for options, said in mistakes:
        with pytest.raises(InvalidValue, match=said):
            run.cache(**options)
    with pytest.raises(InvalidType, match="must be a FreezeOut"):
        PrefixCache(run.model, 3)  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidValue, match=r"holds other files \(notes.txt\)"):
        run.cache(where=tmp_path)


def test_placeholders_raise_where_plain_meta_tensors_would_not() -> None:
    made = Placeholders().like(torch.ones(2, 3))
    real = torch.ones(2, 3)
    with pytest.raises(AssertionError):
        real += made
    with pytest.raises(AssertionError):
        real @ made.T
    meta = torch.ones(2, 3, device="meta")
    before = real.clone()
    real += meta  # silently nothing: why meta tensors are no placeholders
    assert torch.equal(real, before)


def test_bottleneck_blocks_of_a_residual_network_leave_no_trace_on_the_model() -> None:
    run = Run(ResNet, images)
    before = {name: set(vars(module)) for name, module in ResNet().named_modules()}
    cache = run.cache()
    run.steps(cache)
    run.freezer.release()
    assert {name: set(vars(module)) for name, module in run.model.named_modules()} == before
    assert isinstance(run.model.layer1[0], BasicBlock)  # type: ignore[index]
