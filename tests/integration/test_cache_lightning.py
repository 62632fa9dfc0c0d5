"""The cache in Lightning: one option, and the numbers of a run without."""

import copy
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from freezeout import Frozen, PrefixCache, Schedule
from freezeout.cache import Indexed
from freezeout.integrations.lightning import FreezeOutCallback
from tests.integration.lightning_runs import Batches, start_from, trainer
from tests.integration.test_examples import example
from tests.models import conv_net, images

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
]
CACHE: dict[str, Any] = {"depths": "all", "budget": 10**8}
COUNT, BATCH, EPOCHS = 24, 4, 3


class Module(LightningModule):
    """The classes of images; `calls`: what the training step calls."""

    def __init__(self, calls: str = "net", example_input: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.calls = conv_net(), calls
        self.losses: list[float] = []
        self.evaluated: list[float] = []
        self.hooked: list[type] = []
        if example_input:
            self.example_input_array = images(0)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.hooked.append(type(batch))
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.trainer.current_epoch * 100 + batch_idx)
        x, y = batch[0] if self.calls == "several" else batch
        loss = cross_entropy(self(x) if self.calls == "self" else self.net(x), y)
        if self.calls == "twice":
            loss = loss + cross_entropy(self.net(x.flip(0)), y.flip(0))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluated.append(cross_entropy(self.net(batch[0]), batch[1]).item())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.05, momentum=0.9)


def loaders(shuffle: bool = False, **options: Any) -> list[DataLoader[Any]]:
    pairs = [images(i) for i in range(6)]
    x, y = torch.cat([x for x, _ in pairs])[:COUNT], torch.cat([y for _, y in pairs])[:COUNT]
    order = torch.Generator().manual_seed(1)
    data = TensorDataset(x, y)
    held_out = TensorDataset(x[:6].flip(0), y[:6].flip(0))
    return [
        DataLoader(data, batch_size=BATCH, shuffle=shuffle, generator=order, **options),
        DataLoader(held_out, batch_size=3),
    ]


def fitted(
    cache: Any,
    *callbacks: Callback,
    data: Any = None,
    calls: str = "net",
    example_input: bool = False,
    plan: Any = None,
    start: Path | None = None,
    **options: Any,
) -> tuple[Module, FreezeOutCallback]:
    module = Module(calls, example_input)
    callback = FreezeOutCallback(plan or Frozen(2), cache=cache)
    run = trainer(callback, *callbacks, num_sanity_val_steps=1, **options)
    train, held_out = data or loaders()
    run.fit(module, train, held_out, **start_from(start))
    assert Indexed not in module.hooked
    assert "_call_impl" not in vars(module.net)
    assert "_on_before_batch_transfer" not in vars(module)
    return module, callback


def same(one: Module, other: Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return (one.losses, one.evaluated) == (other.losses, other.evaluated) and all(
        torch.equal(a, b) for a, b in pairs
    )


def of_run(callback: FreezeOutCallback) -> PrefixCache:
    assert callback.cache is not None
    return callback.cache


@contextmanager
def told(reason: str) -> Iterator[None]:
    """A warning of the cache says so, among others of Lightning."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert any(re.match(f"FreezeOut's cache: .*{reason}", str(each.message)) for each in found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calls": "self"},
        {"example_input": True},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"data": loaders(num_workers=2, persistent_workers=True)},
        {"plan": Schedule(0.4, "linear")},
    ],
)
def test_equal_batches_give_equal_bits(options: dict[str, Any]) -> None:
    plain, _ = fitted(False, **options)
    cached, callback = fitted(CACHE, **options)
    assert same(cached, plain)
    cache = of_run(callback)
    assert cache.refusals == []
    if "plan" not in options:  # the first batches show what is called
        first = options.get("accumulate_grad_batches", 1) * BATCH
        assert cache.stats.hits == (EPOCHS - 1) * COUNT - first


def test_shuffled_batches_and_validation_give_the_same_losses() -> None:
    plain, _ = fitted(False, data=loaders(shuffle=True))
    train, held_out = loaders(shuffle=True)
    cached, callback = fitted(CACHE, data=(train, held_out))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-4)
    assert cached.evaluated == pytest.approx(plain.evaluated, rel=1e-4)
    assert of_run(callback).stats.hits > COUNT
    assert callback._caching is not None
    own = callback._caching._caches[0]
    assert own is not None
    assert own.stats.hits == (EPOCHS - 1) * 6
    assert isinstance(next(iter(train)), list)  # an ordinary loader again


def test_a_run_that_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def run(cache: Any, folder: Path) -> tuple[Module, FreezeOutCallback]:
        keep = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        fitted(cache, keep, enable_checkpointing=True)
        return fitted(cache, start=folder / "epoch=0.ckpt")

    plain, _ = run(False, tmp_path / "plain")
    cached, callback = run(CACHE, tmp_path / "cached")
    assert same(cached, plain)
    assert of_run(callback).stats.hits == COUNT - BATCH


def test_validation_of_averaged_weights_is_left_to_the_model() -> None:
    plan = Schedule(0.4, "linear")  # weights have moved when they freeze
    plain, _ = fitted(False, EMAWeightAveraging(), plan=plan)
    with told("evaluation is of other weights"):
        cached, _ = fitted(CACHE, EMAWeightAveraging(), plan=plan)
    assert same(cached, plain)


@pytest.mark.parametrize("kind", ["twice", "batches", "several"])
def test_what_cannot_be_cached_is_said_and_trained_as_without(kind: str) -> None:
    says = {
        "twice": "calls the frozen .* more than once",
        "batches": "Batches is no torch DataLoader",
        "several": "several training loaders",
    }

    def run(cache: Any) -> Module:
        train, held_out = loaders()
        data: Any = {"batches": Batches(), "several": [train, train]}.get(kind, train)
        calls = kind if kind != "batches" else "net"
        return fitted(cache, data=(data, held_out), calls=calls)[0]

    with told(says[kind]):
        cached = run(CACHE)
    assert same(cached, run(False))


def test_the_examples_run_ends_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main = example("lightning_cache").main
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    (callback, cached), (_, plain) = main({"depths": "all"}, **quiet), main(False, **quiet)
    assert of_run(callback).stats.hits > 3000
    for mine, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


class Copies(Callback):
    """Keeps a copy of the module, as of the best one."""

    kept: Any

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.kept = copy.deepcopy(pl_module)
            torch.save(pl_module, io.BytesIO())


def test_a_copy_that_is_made_on_the_way_is_a_module_of_its_own() -> None:
    results = []
    for cache in (False, CACHE):
        copies = Copies()
        module, _ = fitted(cache, copies)
        trainer().validate(copies.kept, loaders()[1])
        results.append(copies.kept.evaluated[-2:])
        copies.kept.net[0].weight.data.zero_()
        assert next(module.net.parameters()).any()
    assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_that_is_compiled_as_a_whole_is_told_of() -> None:
    callback = FreezeOutCallback(Frozen(2), cache=CACHE)
    compiled: Any = torch.compile(Module(), backend="eager")
    train, held_out = loaders()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=1).fit(compiled, train, held_out)
    assert any("cache: the model is compiled as a whole" in str(each.message) for each in said)
    assert callback.cache is None
