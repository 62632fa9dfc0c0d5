"""`FreezeOutCallback` in Lightning: the same bits as a plain loop, however Lightning trains."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from freezeout import FreezeOut, FreezeOutError, Frozen, Plan, Schedule
from freezeout.errors import CheckpointError, InvalidType, InvalidValue
from freezeout.integrations.lightning import FreezeOutCallback
from tests.integration.lightning_runs import (
    EPOCHS,
    Batches,
    Classifier,
    loader,
    one_run,
    start_from,
    trainer,
)
from tests.integration.processes import KILLED, process, torchrun
from tests.models import Reversed, conv_net, images, vectors
from tests.plain_loop import BATCHES, EARLY, PLANS, Row, row, same
from tests.plain_loop import train as plain

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]
TOTAL = EPOCHS * BATCHES


class History(Callback):
    """After each batch: steps made, layers frozen, learning rates."""

    def __init__(self, callback: FreezeOutCallback) -> None:
        self.callback = callback
        self.rows: list[Row] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if self.callback.freezer is not None:
            self.rows.append(row(self.callback.freezer))


def fit(
    module: LightningModule,
    *callbacks: Callback,
    data: Any = None,
    start: Any = None,
    **options: Any,
) -> tuple[FreezeOutCallback, list[Any]]:
    """One run with FreezeOut, and what happened in it."""
    mine = [each for each in callbacks if isinstance(each, FreezeOutCallback)]
    callback = mine[0] if mine else FreezeOutCallback(EARLY)
    others = [each for each in callbacks if each is not callback]
    history = History(callback)
    run = trainer(callback, history, *others, **options)
    run.fit(module, loader() if data is None else data, **start_from(start))
    return callback, history.rows


def start_net() -> nn.Module:
    torch.manual_seed(0)
    return conv_net()


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, list[Any]]:
    """The plain loop that does what `Classifier` does."""
    net = start_net()
    optimizer = AdamW(net.parameters(), 0.01)
    return net, plain(net, [optimizer], TOTAL, schedulers=[StepLR(optimizer, 4, 0.5)])


# --- equal to the plain loop ----------------------------------------------------------------


class WithInputs(Classifier):
    """Its layers are found before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = images(0)[0]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


NAMES = ["net.0", "net.4", "net.7", "net.12"]
WITH_NORMS = [["net.0", "net.1"], ["net.4", "net.5"], ["net.7", "net.8"], "net.12"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Classifier, {}),
        (WithInputs, {}),
        (Classifier, {"layers": WITH_NORMS}),
    ],
)
@pytest.mark.parametrize("limit", [{}, {"max_epochs": -1, "max_steps": TOTAL}])
def test_equal_to_the_plain_loop(
    whole: tuple[nn.Module, list[Any]],
    kind: type[Classifier],
    options: dict[str, Any],
    limit: dict[str, int],
) -> None:
    """With a scheduler of the user's, and validation before training and in its course."""
    module = kind()
    run = trainer(
        callback := FreezeOutCallback(EARLY, **options), history := History(callback), **limit
    )
    run.fit(module, loader(), loader(2))
    assert [layer.name for layer in callback.freezer.layers] == NAMES  # type: ignore[union-attr]
    net, rows = whole
    assert history.rows == rows
    assert rows[-1][:2] == (TOTAL, 3)
    assert same(module.net, net)
    assert "val_loss" in run.callback_metrics


class Given(Classifier):
    """As somebody writes it who has never heard of plans."""

    def __init__(self) -> None:
        super().__init__()
        self.net[:7].requires_grad_(False)


class GivenWithInputs(Given, WithInputs):
    pass


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("plan", [Frozen(2), Frozen(up_to="net.5", then=EARLY), None])
def test_frozen_from_the_start(plan: Plan | None, inputs: bool) -> None:
    """In the first training pass already: norms count no batch, dropout draws nothing; equal to
    the plain loop in which FreezeOut is there before it."""
    kind: type[Classifier] = WithInputs if inputs else Classifier
    if plan is None:
        kind = GivenWithInputs if inputs else Given
    module, net = kind(), start_net()
    if plan is None:
        net[:7].requires_grad_(False)  # type: ignore[index]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"the layers in which nothing trains \(2: ")
        callback, rows = fit(module, FreezeOutCallback(plan or EARLY))
        optimizer = AdamW(net.parameters(), 0.01)
        mine = Frozen(2) if plan == Frozen(2) else EARLY if plan is None else Frozen(2, then=EARLY)
        expected = plain(net, [optimizer], TOTAL, schedulers=[StepLR(optimizer, 4, 0.5)], plan=mine)
    assert callback.freezer is not None
    assert callback.freezer.freeze_steps[:2] == (0, 0)
    assert rows == expected
    assert same(module.net, net)
    frozen = [name for name in before if name.startswith(("net.0.", "net.1.", "net.4.", "net.5."))]
    assert len(frozen) == 14
    assert all(torch.equal(before[name], module.state_dict()[name]) for name in frozen)
    assert all(p.requires_grad for p in module.parameters()) is (plan is not None)


def test_modes_after_validation_and_the_end() -> None:
    """Lightning saves modes around validation, and sets them again past `train()`."""
    module = Classifier()
    module.train()
    run = trainer(FreezeOutCallback(Frozen(2)))
    run.fit(module, loader(), loader(2))
    assert all(part.training for part in module.net)


def test_a_callback_that_thaws_is_refused_before_the_first_step() -> None:
    """Not at its milestone, which may be hours away."""
    from lightning.pytorch.callbacks import BackboneFinetuning

    module, thawing = Classifier(), BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    module.backbone = module.net[0]
    with pytest.raises(InvalidValue, match=r"BackboneFinetuning thaws .*Frozen\(\.\.\.\)"):
        trainer(thawing, FreezeOutCallback()).fit(module, loader())


def test_averaging_that_computes_statistics_anew_is_refused_by_name() -> None:
    """And one that averages a copy is not; nor is the former on a model without norms."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    module, average = Classifier(), StochasticWeightAveraging(0.01, 0.5)
    with pytest.raises(InvalidValue, match=r"StochasticWeightAveraging .*EMAWeightAveraging"):
        trainer(average, FreezeOutCallback(EARLY)).fit(module, loader())
    assert not any("train" in vars(part) for part in module.modules())
    callback = FreezeOutCallback(EARLY)
    trainer(EMAWeightAveraging(decay=0.5), callback).fit(module, loader(), loader(2))
    assert callback.freezer is not None
    assert callback.freezer.timeline.num_frozen(callback.freezer.step_count) > 0
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert all(int(norm.num_batches_tracked or 0) > 0 for norm in norms)


class Noisy(Classifier):
    """With noise on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.5)
        self.noise.register_forward_hook(self.look)
        self.net.insert(0, self.noise)
        self.seen: list[bool] = []

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.training:
            self.seen.append(not torch.equal(args[0], output))


def test_noise_on_the_input_goes_on_with_layers_frozen_from_the_start() -> None:
    module = Noisy()
    callback, _ = fit(module, FreezeOutCallback(Frozen(2)))
    assert callback.freezer is not None
    assert module.noise in callback.freezer.layers[-1].modules
    assert all(module.seen[1:])


def test_frozen_from_the_start_with_layers_that_are_given() -> None:
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback, _ = fit(module, FreezeOutCallback(Frozen(2), layers=WITH_NORMS))
    assert callback.freezer is not None
    assert callback.freezer.freeze_steps[:3] == (0, 0, TOTAL)
    moved = {n for n, value in module.state_dict().items() if not torch.equal(before[n], value)}
    assert {name.split(".")[1] for name in moved} == {"7", "8", "12"}


def test_an_order_of_definition_that_misleads_is_refused_in_the_first_step() -> None:
    class Misleading(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = Reversed()  # type: ignore[assignment]

    module = Misleading()
    data: Any = DataLoader([vectors(i) for i in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="give the module an example_input_array"):
        fit(module, FreezeOutCallback(Frozen(1)), data=data)
    assert all(p.requires_grad for p in module.parameters())
    assert not any("train" in vars(part) for part in module.modules())


class Clipped(Classifier):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def test_accumulation_and_clipping() -> None:
    """Five batches an epoch, two a step, and the fifth one by itself."""
    module = Clipped()
    _, rows = fit(module, accumulate_grad_batches=2, gradient_clip_val=0.5)
    net = start_net()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    expected = plain(net, [optimizer], 9, accumulate=2, clip=0.5)
    assert rows == expected[1:]  # the first batch makes no step, so there is no freezer yet
    assert rows[-1][:2] == (9, 3)
    assert same(module.net, net)


class TwoOptimizers(Classifier):
    """Steps by hand, of two optimizers and their schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = cast(list[Any], self.optimizers())
        self.manual_backward(cast(Tensor, loss))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in cast(list[LRScheduler], self.lr_schedulers()):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        return two_optimizers(self.net)


def two_optimizers(net: nn.Module) -> tuple[list[Optimizer], list[LRScheduler]]:
    first = [net.get_parameter("0.weight"), net.get_parameter("4.weight")]
    rest = [p for p in net.parameters() if all(p is not each for each in first)]
    optimizers = [SGD(first, 0.1, momentum=0.9), AdamW(rest, 0.01)]
    return optimizers, [StepLR(each, 3, 0.5) for each in optimizers]


def test_manual_optimization_with_two_optimizers() -> None:
    """Each batch is one step, though Lightning counts two."""
    module = TwoOptimizers()
    _, rows = fit(module)
    net = start_net()
    optimizers, schedulers = two_optimizers(net)
    assert rows == plain(net, optimizers, TOTAL, schedulers=schedulers)
    assert same(module.net, net)


class Adversarial(LightningModule):
    """A generator and a discriminator, each trained while the other's gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
        self.discriminator = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
        self.automatic_optimization = False

    def losses(self, x: Tensor) -> Any:
        """One after the other, each to be followed by its optimizer's step."""
        yield (
            self.discriminator(x).square().mean()
            - self.discriminator(self.generator(x).detach()).mean()
        )
        yield self.discriminator(self.generator(x)).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        losses = self.losses(batch[0])
        for optimizer in reversed(cast(list[Any], self.optimizers())):
            with optimizer.toggle_model():
                self.manual_backward(next(losses))
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [SGD(part.parameters(), 0.05, momentum=0.9) for part in parts]


def test_manual_optimization_with_toggled_optimizers() -> None:
    data: Any = torch.utils.data.DataLoader([vectors(i) for i in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]
    schedule = Schedule(times=(0.5, 1.0, 1.0, 1.0))  # through the discriminator it learns
    module, net = Adversarial(), Adversarial()
    callback, rows = fit(module, FreezeOutCallback(schedule), data=data)
    assert callback.freezer is not None
    assert [layer.name for layer in callback.freezer.layers] == [
        "generator.0",
        "generator.2",
        "discriminator.0",
        "discriminator.2",
    ]
    optimizers = net.configure_optimizers()
    layers = [net.generator[0], net.generator[2], net.discriminator[0], net.discriminator[2]]
    freezer = FreezeOut(net, optimizers, TOTAL, schedule=schedule, layers=layers)
    expected = []
    for step in range(TOTAL):
        losses = net.losses(vectors(step % BATCHES)[0])
        for optimizer in reversed(optimizers):
            for each in optimizers:
                each.zero_grad()
            torch.autograd.backward(next(losses))
            optimizer.step()
        freezer.step()
        expected.append(row(freezer))
    assert rows == expected
    assert same(module, net)


def test_bf16_autocast() -> None:
    module = Classifier()
    _, rows = fit(module, precision="bf16-mixed")
    net = start_net()
    optimizer = AdamW(net.parameters(), 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(net, [optimizer], TOTAL, schedulers=[StepLR(optimizer, 4, 0.5)])
    assert rows == expected
    # Autocast keeps cast weights within one block, which here is the whole loop.
    for mine, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        assert torch.isfinite(mine).all()
        assert mine.shape == theirs.shape


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_killed_in_an_epoch_and_resumed(tmp_path: Path, plan: str) -> None:
    """By SIGKILL, after the first freeze; equal to a run that was left alone."""
    torch.set_num_threads(1)
    alone = Classifier()
    fit(alone, FreezeOutCallback(PLANS[plan]), data=Batches())
    ended = process("-m", "tests.integration.lightning_runs", tmp_path, 8, plan)
    assert ended.returncode == KILLED, ended.stderr
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert saved["callbacks"]["FreezeOutCallback"]["freezer"]["num_frozen"] == (
        1 if plan == "early" else 2
    )
    assert same(one_run(tmp_path, -1, plan), alone)


class Backwards(Classifier):
    """Its modules are defined last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Reversed()  # type: ignore[assignment]


def test_resumed_with_the_layers_of_the_checkpoint(tmp_path: Path) -> None:
    """Which its first step would tell only when it has run."""
    data: Any = torch.utils.data.DataLoader([vectors(i) for i in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]
    keep = ModelCheckpoint(tmp_path, filename="two", every_n_epochs=2, save_top_k=-1)
    whole, resumed = Backwards(), Backwards()
    fit(whole, keep, data=data, enable_checkpointing=True)
    callback, rows = fit(resumed, data=data, start=tmp_path / "two.ckpt")
    assert callback.freezer is not None
    assert [layer.name for layer in callback.freezer.layers] == [
        "net.stem",
        "net.middle",
        "net.head",
    ]
    assert rows[0][:2] == (11, 2)
    assert same(resumed, whole)


def test_a_finished_run_is_lengthened_when_that_is_allowed(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=EPOCHS)
    fit(Classifier(), keep, enable_checkpointing=True)
    saved = tmp_path / "end.ckpt"
    with pytest.raises(CheckpointError, match="total_steps was 15 and is now 20"):
        fit(Classifier(), start=saved, max_epochs=4)
    longer = FreezeOutCallback(EARLY, allow_schedule_change=True)
    _, rows = fit(Classifier(), longer, start=saved, max_epochs=4)
    assert [depth for _, depth, _ in rows] == [3] * 5


def test_a_checkpoint_without_freezeout_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1)
    trainer(keep, enable_checkpointing=True, max_epochs=1).fit(Classifier(), loader())
    with pytest.raises(CheckpointError, match="of step 5, was saved without FreezeOutCallback"):
        fit(Classifier(), start=tmp_path / "end.ckpt")


class Other(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[12] = nn.Sequential(nn.Linear(4, 3))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1)
    fit(Classifier(), keep, enable_checkpointing=True, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"of another model: this one has no 'net\.12"):
        fit(Other(), start=tmp_path / "end.ckpt")


# --- several processes ----------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks(tmp_path: Path, plan: str) -> None:
    """Under the DDP strategy, whole and resumed, as in a plain loop with DDP and rewrap()."""
    ended = torchrun("-m", "tests.integration.lightning_runs", "ddp", tmp_path / "found", plan)
    assert ended.returncode == 0, ended.stderr
    ranks = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    for found in ranks:
        start = "" if plan == "early" else ", 1 of them from the start"
        assert found["summary"] == f"froze 3 of 4 layers{start}"
        for name in ("lightning", "resumed", "plain"):
            expected = ranks[0]["plain"]
            assert all(torch.equal(found[name][key], expected[key]) for key in expected), name


# --- what is said ---------------------------------------------------------------------------


class Logger(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


def test_the_logger_and_the_progress_bar_show_what_is_frozen() -> None:
    logger = Logger()
    run = trainer(FreezeOutCallback(EARLY), logger=logger, log_every_n_steps=1)
    run.fit(Classifier(), loader())
    depths = [r["freezeout/num_frozen"] for r in logger.rows if "freezeout/num_frozen" in r]
    assert depths == [0] * 5 + [1] * 3 + [2] * 3 + [3] * 4
    assert all(0 < r["freezeout/flops_saved"] < 1 for r in logger.rows[8:] if "loss" in r)
    assert run.progress_bar_metrics == {"frozen": 3.0}


def test_the_module_is_an_ordinary_one_afterwards() -> None:
    module = Classifier()
    callback, _ = fit(module)
    assert callback.freezer is not None
    assert callback.freezer.summary().startswith("froze 3 of 4 layers")
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any("train" in vars(m) for m in module.modules())
    copy.deepcopy(module)


def test_fitting_twice() -> None:
    """In another trainer a run of its own; in the same one, further on only where allowed."""
    callback = FreezeOutCallback(EARLY)
    first, second = Classifier(), Classifier()
    fit(first, callback)
    _, rows = fit(second, callback)
    assert rows[-1][:2] == (TOTAL, 3)
    assert same(first, second)

    run = trainer(callback, max_epochs=2)
    run.fit(module := Classifier(), loader())
    run.fit_loop.max_epochs = 3
    with pytest.raises(CheckpointError, match="allow_schedule_change"):
        run.fit(module, loader())
    callback.allow_schedule_change = True
    run.fit(module, loader())
    assert callback.freezer is not None
    assert callback.freezer.step_count == 15


class Failing(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 7:
            raise ValueError("enough")


def test_after_an_exception_the_module_is_an_ordinary_one() -> None:
    module = Failing()
    with pytest.raises(ValueError, match="enough"):
        fit(module)
    assert all(p.requires_grad for p in module.parameters())


# --- what is refused, and what is warned of -------------------------------------------------


def warnings_of(work: Callable[[], object]) -> list[str]:
    """Wherever in Lightning they are said to come from."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    return [str(each.message) for each in said]


def test_the_number_of_steps_must_be_known() -> None:
    with pytest.raises(InvalidValue, match=r"give Trainer\(max_steps=\.\.\.\), or"):
        fit(Classifier(), max_epochs=-1)
    with pytest.raises(InvalidValue, match="total_steps must be at least 1, got 0"):
        FreezeOutCallback(total_steps=0)
    with pytest.raises(InvalidType, match=r"schedule must be a plan, such as .* got str"):
        FreezeOutCallback("cubic")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match=r"'net\.99', which is no module of the model"):
        fit(Classifier(), FreezeOutCallback(layers=["net.99"]))


class EveryOther(TwoOptimizers):
    """A step every two batches, which Lightning cannot know."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = Classifier.training_step(self, batch, batch_idx)
        self.manual_backward(cast(Tensor, loss))
        if batch_idx % 2:
            for optimizer in cast(list[Any], self.optimizers()):
                optimizer.step()
                optimizer.zero_grad()


def test_manual_accumulation_is_told_of_and_total_steps_helps() -> None:
    said = warnings_of(lambda: fit(EveryOther()))
    (mine,) = [each for each in said if "FreezeOut" in each]
    assert mine == (
        "the run made 6 steps, but its schedule was for 15: layers froze too late, and learning "
        "rates did not reach zero; give FreezeOutCallback(total_steps=6)"
    )
    _, rows = fit(EveryOther(), FreezeOutCallback(EARLY, total_steps=6))
    assert rows[-1][:2] == (6, 3)


class Backward(TwoOptimizers):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = Classifier.training_step(self, batch, batch_idx)
        assert loss is not None
        torch.autograd.backward(loss)
        cast(list[Any], self.optimizers())[0].step()


def test_a_backward_pass_that_lightning_does_not_see_is_refused() -> None:
    with pytest.raises(FreezeOutError, match=r"call self\.manual_backward\(loss\)"):
        fit(Backward())


class Sparse(Classifier):
    """No loss in the first two batches."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if self.global_step < 2:
            return None
        return super().training_step(batch, batch_idx)


def test_batches_without_a_loss() -> None:
    """Lightning counts them as steps; the layers are found in the first one that has a loss."""
    callback = FreezeOutCallback(EARLY, total_steps=13)
    _, rows = fit(Sparse(), callback)
    assert rows[-1][:2] == (13, 3)


class Reentrant(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        for part in self.net:
            x = checkpoint(part, x.requires_grad_(), use_reentrant=True)
        return cross_entropy(x, y)


def test_reentrant_checkpointing_is_refused_though_only_training_step_is_called() -> None:
    with pytest.raises(FreezeOutError, match="use_reentrant=False"):
        fit(Reentrant())


class Kept(Classifier):
    """Its output hangs on a frozen weight that was used before the freeze."""

    kept: Tensor | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        if self.global_step == 0:  # its layers are found now
            return loss
        if self.kept is None or self.global_step < 6:
            weight = self.net.get_parameter("0.weight")
            self.kept = weight.sum() - weight.detach().sum()
        return loss + self.kept


def test_freezing_is_checked_though_only_training_step_is_called() -> None:
    said = warnings_of(lambda: fit(Kept()))
    (mine,) = [each for each in said if "engage" in each]
    assert "parameter 'net.0.weight' of frozen layer 'net.0' is still in the graph" in mine


class Strange(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model = nn.Sequential(pl_module)


def test_other_strategies_are_refused() -> None:
    """Here one that wraps the module in something of its own."""
    with pytest.raises(InvalidValue, match="with the DDP strategy, not with SingleDeviceStrategy"):
        fit(WithInputs(), Strange())
