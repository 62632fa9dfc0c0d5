"""`train`: one run, one folder, exactly resumable.

    freezeout train --dataset cifar10 --model wrn --depth 16 --widen-factor 1 --epochs 10

What is random in an epoch (order, crops, flips) is a function of the seed and the epoch, so a
checkpoint holds the number of batches done, and no generator but torch's own (for dropout).

Under torchrun, every rank makes its share of each batch's images; see ranks.py.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ..clock import Laps
from ..errors import CheckpointError, FreezeOutError, InvalidValue
from ..values import whole_number
from ..words import first_line
from .cached import CachedRun
from .config import TrainConfig
from .device import hardware
from .display import Display
from .job import Job, Sums, random_state, set_random_state
from .prediction import Prediction, warning
from .ranks import Ranks, launched
from .run_folder import RunFolder, resume_command
from .signals import stop_signals

_THEN = "; then "  # between the hardware that a run was begun on, and that it went on with


class Stopped(FreezeOutError):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and has saved where it stands."""

    def __init__(self, folder: Path, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}; go on with: {resume_command(folder)}")
        self.signal = number


def train(config: TrainConfig) -> Path:
    """Train what `config` describes into a new folder, and return that folder.

    Raises:
        FreezeOutError: anything in the configuration, the data or the device that is not so;
            `Stopped` on SIGINT or SIGTERM. OSError: the disk is full, say.
    """
    with launched() as ranks:
        ranks.check_equal(config.to_json())
        config.check()
        # Before data is loaded; made once all else is well.
        ranks.first(lambda: RunFolder.refuse_existing(config.folder))
        if config.tensorboard:
            ranks.first(lambda: _summary_writer() and None)
        job = ranks.each(lambda: Job(config, ranks))
        stop = _Stop()
        with stop_signals(stop.note):
            epochs, prediction = ranks.first(job.foresee)
            folder = ranks.first(
                lambda: RunFolder.create(config.folder, job.description(epochs, prediction))
            )
            return _Loop(job, folder, epochs, prediction, stop).run()


def resume(path: Path, *, device: str | None = None, data_dir: Path | None = None) -> Path:
    """Go on with the run in the folder `path`, with its own configuration, to its end.

    `device` and `data_dir`: where it goes on and finds its data; None: as it was begun. A run that
    had ended is left as it is, and said to have. Raises as `train` does, and CheckpointError for a
    folder without a run, a damaged checkpoint or one of another configuration.
    """
    with launched() as ranks:
        ranks.check_equal({"resume": str(path)})
        config, epochs, prediction, identity = ranks.each(
            lambda: _configuration(path, device, data_dir)
        )
        job = ranks.each(lambda: Job(config, ranks))
        folder = RunFolder(path)
        state = ranks.each(lambda: _checkpoint(folder, job, identity, epochs))
        stop = _Stop()
        with stop_signals(stop.note):
            loop = _Loop(job, folder, epochs, prediction, stop)
            loop.identity = identity
            if state is not None:
                ranks.each(lambda: loop.restore(state))
                if loop.epoch == epochs and ranks.first(lambda: folder.is_complete(loop.rows)):
                    if ranks.is_first:
                        print(f"{path} has been trained to its end; nothing is left to do")
                    return path
                # A kill may have come between the checkpoint and the metrics.
                ranks.first(loop.write_results)
            ranks.first(lambda: _note_hardware(folder, hardware(job.device)))
            return loop.run()


def _note_hardware(folder: RunFolder, now: str) -> None:
    """Times are compared with those of runs made on the same."""
    saved = folder.read_config()
    before = str(saved.get("hardware"))
    if now not in before.split(_THEN):
        folder.write_config({**saved, "hardware": before + _THEN + now})


def _configuration(
    path: Path, device: str | None, data_dir: Path | None
) -> tuple[TrainConfig, int, Prediction | None, dict[str, Any]]:
    """Of the run in a folder: how to go on, the number of epochs, what the steps should cost, and
    the options as given."""
    folder = RunFolder.existing(path)
    saved = folder.read_config()
    try:
        resolved, values = saved["resolved"], saved["config"]
        epochs = whole_number("epochs", resolved["epochs"])
        prediction = Prediction.from_json(resolved["prediction"])
        asked = TrainConfig.from_json(TrainConfig.completed(values))
        config = replace(
            asked,
            out=path,
            precision=resolved["precision"],
            device=asked.device if device is None else device,
            data_dir=asked.data_dir if data_dir is None else data_dir,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/config.json is not a run's configuration") from error
    return config, epochs, prediction, values


def _checkpoint(
    folder: RunFolder, job: Job, identity: dict[str, Any], epochs: int
) -> dict[str, Any] | None:
    """The folder's checkpoint, if there is one yet. CheckpointError if it is of another run."""
    state = folder.load_checkpoint(job.device)
    if state is not None:
        _check_same(state, identity, epochs, folder.path)
    return state


def _check_same(state: dict[str, Any], mine: dict[str, Any], epochs: int, path: Path) -> None:
    theirs = state.get("config")
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{path}/checkpoint.pt is no checkpoint of a run")
    # The number of epochs that --const-time or --steps made of those asked for.
    theirs = {**theirs, "resolved epochs": state.get("epochs")}
    for name, value in {**mine, "resolved epochs": epochs}.items():
        if theirs.get(name) != value:
            raise CheckpointError(
                f"{path}/checkpoint.pt is of another configuration: its {name} is "
                f"{theirs.get(name)!r}, config.json says {value!r}"
            )


class _Loop:
    """The training loop, and where it stands."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        epochs: int,
        prediction: Prediction | None,
        stop: "_Stop",
    ) -> None:
        self.job, self.folder, self.epochs, self.stop = job, folder, epochs, stop
        self.prediction = prediction
        self.ranks = job.ranks
        self.identity = job.config.to_json()  # of the configuration, in checkpoints
        self.total_steps = job.total_steps(epochs)
        self.optimizer = job.optimizer(job.model)
        self.freezer = job.freezer(job.model, self.optimizer, self.total_steps)
        cache = job.cache(self.freezer)
        self.cached = None if cache is None else CachedRun(job, cache)
        self.rows: list[dict[str, Any]] = []  # finished epochs
        self.epoch = 0
        self.batch = 0  # batches done in this epoch
        self.sums = Sums.empty(job.device)

    def save(self) -> None:
        """Where the run stands, whatever the number of ranks; one rank's generator a rank."""
        sums = self.sums.over(self.ranks)
        random = self.ranks.gather(random_state(self.job.device))
        state = {
            "config": self.identity,
            "epochs": self.epochs,
            "epoch": self.epoch,
            "batch": self.batch,
            "rows": self.rows,
            "sums": vars(sums),
            "times": self.freezer.times.state(),
            "model": self.job.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "freezer": self.freezer.state_dict(),
            "random": random,
        }
        if self.cached is not None:
            state["cache"] = self.cached.cache.state_dict()
        self.ranks.first(lambda: self.folder.save_checkpoint(state))

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `save` was called. CheckpointError if the state is of another run."""
        try:
            self.job.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.freezer.load_state_dict(state["freezer"])
            if self.cached is not None:
                self.cached.cache.load_state_dict(state["cache"])
            self.rows, self.epoch, self.batch = state["rows"], state["epoch"], state["batch"]
            self.freezer.times.load(state["times"])
            self.sums = Sums(**state["sums"])
            if not self.ranks.is_first:  # the first has all images' sums
                self.sums = self.sums.without_images()
            # A rank that there was not keeps the generator that its number gives it.
            for random in state["random"][self.ranks.rank :][:1]:
                set_random_state(random, self.job.device)
        except FreezeOutError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder.path}/checkpoint.pt does not fit this run: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    def run(self) -> Path:
        """Train what is left, write the weights, and return the folder."""
        job, freezer, ranks, path = self.job, self.freezer, self.ranks, self.folder.path
        ranks.check_agree(freezer)
        display = Display(
            self.total_steps, freezer.step_count, len(freezer.layers), quiet=not ranks.is_first
        )
        writer = _tensorboard(job.config, path, self.epoch) if ranks.is_first else None
        self.net = ranks.wrap(job.model)
        if self.cached is not None and self.cached.cache.depths is None:
            self.cached.prepare()
        self.introduce(display)
        with display:
            while self.epoch < self.epochs:
                self.train_epoch(display)
                is_due = (self.epoch + 1) % job.config.validate_every == 0
                is_due |= self.epoch + 1 == self.epochs
                heldout = job.evaluate(self.stop_if_asked) if is_due else None
                self.rows.append(self.row(heldout))
                self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums.empty(job.device)
                self.save()
                ranks.first(self.write_results)
                _write_scalars(writer, self.rows[-1])
                display.epoch(self.rows[-1], self.epochs, self.seconds_left())
        ranks.first(lambda: self.folder.save_weights(job.model))
        if job.config.freezeout:
            costs = None if self.prediction is None else self.prediction.step_costs
            display.say(freezer.summary(costs))
            if (savings := self.savings()) is not None and (line := warning(savings)):
                display.say(line)
        if self.cached is not None:
            self.cached.cache.close()
            if (stays := self.cached.stays) is not None:
                display.say(stays)
        display.say(f"run folder: {path}")
        return path

    def write_results(self) -> None:
        """The finished epochs' metrics, and predicted beside measured costs."""
        if (savings := self.savings()) is not None:
            self.folder.write_savings(savings)
        self.folder.write_metrics(self.rows)

    def savings(self) -> dict[str, Any] | None:
        """Predicted beside measured costs, if layers freeze."""
        if self.prediction is None:
            return None
        return self.prediction.against(self.freezer.step_seconds, self.freezer.seconds_saved())

    def train_epoch(self, display: Display) -> None:
        """Make the epoch's remaining steps."""
        job, ranks, optimizer, freezer = self.job, self.ranks, self.optimizer, self.freezer
        sums = self.sums
        label = f"{self.epoch + 1}/{self.epochs}"
        start = job.steps_per_epoch * self.epoch + self.batch
        steps = min(job.steps_per_epoch - self.batch, self.total_steps - start)
        self.net.train()
        begin = time.perf_counter()
        cached = self.cached
        view = None if cached is None else cached.view(self.epoch)
        batches = job.batches(self.epoch, self.batch, view)
        laps = Laps()
        for number in range(steps):
            laps.mark("between", job.device)
            x, y, weight = next(batches)
            net = self.net if cached is None else cached.net(self.epoch, self.batch)
            loss, logits = job.loss(net, x, y)
            if number == steps - 1:
                sums.rates = [rate for rate in freezer.learning_rates if rate > 0]
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if freezer.step():
                self.net = ranks.rewrap(self.net)
            if weight:
                sums.add(loss, logits, y)
            self.batch += 1
            laps.mark("step", job.device)
            if display.live and (number % 10 == 0 or number == steps - 1):
                more = "" if cached is None else cached.progress
                display.step(freezer.step_count, label, loss.item(), freezer.num_frozen, more)
            if self.stop.agreed(ranks) is not None:
                break
        job.wait()
        sums.seconds += time.perf_counter() - begin
        sums.step_seconds += [seconds for name, seconds in laps.ended() if name == "step"]
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Between two steps or two batches of the evaluation: save and leave, if asked to."""
        number = self.stop.agreed(self.ranks)
        if number is not None:
            self.save()
            raise Stopped(self.folder.path, self.freezer.step_count, number)

    def row(self, heldout: tuple[float, float] | None) -> dict[str, Any]:
        """The epoch's line of metrics."""
        sums = self.sums.over(self.ranks)
        train_loss, train_error = sums.means()
        if not math.isfinite(train_loss):
            raise FreezeOutError(
                f"the loss is {train_loss} in epoch {self.epoch + 1}: the run diverged; "
                f"try a lower --lr than {self.job.config.lr:g}"
            )
        valid_loss, valid_error = heldout or (None, None)
        if valid_loss is not None and not math.isfinite(valid_loss):
            valid_loss = None  # JSON has no infinity
        freezer = self.freezer
        parameters = self.job.model.parameters()
        return {
            "epoch": self.epoch + 1,
            "step": freezer.step_count,
            "train_loss": train_loss,
            "train_error": train_error,
            "valid_loss": valid_loss,
            "valid_error": valid_error,
            # In the epoch's last update, of the layers that were trained in it.
            "lr_lowest": min(sums.rates),
            "lr_highest": max(sums.rates),
            "frozen_layers": freezer.num_frozen,
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "seconds": sums.seconds,
            "step_seconds": median(sums.step_seconds),
            "images_per_second": sums.images / sums.seconds,
            **({} if self.cached is None else self.cached.row()),
        }

    def seconds_left(self) -> float:
        """From the last epoch's steps; freezing makes it less."""
        steps = self.total_steps - self.freezer.step_count
        return float(steps * self.rows[-1]["step_seconds"])

    def introduce(self, display: Display) -> None:
        """Say what is going to be trained, and how to go on with it."""
        config, freezer, epochs = self.job.config, self.freezer, self.epochs
        count = sum(p.numel() for p in self.job.model.parameters())
        display.say(
            f"{config.model} ({count:,} parameters, {len(freezer.layers)} layers) on "
            f"{config.dataset}: {epochs} epochs, {freezer.total_steps} steps, "
            f"{self.job.precision} on {hardware(self.job.device)}"
            + (f", {self.ranks.size} ranks" if self.ranks.size > 1 else "")
        )
        begin, *later = freezer.timeline.changes
        if config.frozen is not None:
            display.say(f"frozen from the start: {begin[1]} of {len(freezer.layers)} layers")
        if later:
            largest = max(self.job.plan.factors(0, freezer.timeline)) * config.lr
            display.say(
                f"layers freeze from step {later[0][0]} to step {later[-1][0]}; the largest "
                f"starting rate is {largest:.4g}"
            )
        if self.cached is not None:
            display.say(self.cached.describe())
        display.say(f"if it is stopped, go on with: {resume_command(self.folder.path)}")


class _Stop:
    """Whether a signal has asked the run to stop after its step, and which."""

    signal: int | None = None

    def note(self, number: int) -> None:
        """A signal has come; if it is the second, the step is not waited for."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, ranks: Ranks) -> int | None:
        """The signal that came, to any rank: all stop after the same step."""
        return ranks.largest(self.signal or 0) or None


def _tensorboard(config: TrainConfig, path: Path, first_epoch: int) -> Any:
    if not config.tensorboard:
        return None
    # Epochs after the checkpoint, written before a kill, are shown once.
    return _summary_writer()(path, purge_step=first_epoch + 1)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidValue("--tensorboard needs: pip install 'freezeout[tensorboard]'") from error
    return SummaryWriter


def _write_scalars(writer: Any, row: dict[str, Any]) -> None:
    if writer is None:
        return
    for name, value in row.items():
        if name not in ("epoch", "step") and value is not None:
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()
