"""Run folders as a report or a sweep reads them: without torch, and without believing them.

Only `config.json`, `metrics.jsonl` and, if it is there, `savings.json` are read; weights and
checkpoints are not needed.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..schedule import Schedule
from .config import TrainConfig
from .frozen import frozen_plan

CONFIG, METRICS, WEIGHTS, SAVINGS = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "savings.json",
)

# What a network is trained on and how, and what a run is compared with: all but the arm (whether,
# when and how layers freeze, and for how long the network is trained) and these.
_NOT_COMPARED = ("seed", "out", "device", "data_dir", "tensorboard", "validate_every")
_PROBLEM = (
    "model",
    "depth",
    "growth",
    "widen_factor",
    "dropout",
    "dataset",
    "validate",
    "augment",
    "images",
    "batch_size",
    "lr",
    "weight_decay",
    "momentum",
)
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}
_UNKNOWN = object()  # the default of an option that this version does not have
_SCHEDULE = ("freezeout", "t_0", "how_scale", "scale_lr")
_DEFAULT_SIZES = {
    "densenet": {"depth": 76, "growth": 12},
    "wrn": {"depth": 40, "widen_factor": 4},
    "vgg": {"depth": 16},
}
_NAMES = {"densenet": "DenseNet-BC", "wrn": "WRN", "vgg": "VGG"}
_CACHES = ("off", "auto", "ram", "device")  # any other names a folder


@dataclass(frozen=True)
class Epoch:
    """One line of metrics. Errors are fractions; times are seconds."""

    epoch: int
    step: int  # made by its end
    steps: int  # made in it
    train_error: float
    error: float | None  # on the held-out images
    frozen_layers: int
    seconds: float
    step_seconds: float  # median


@dataclass(frozen=True)
class Run:
    """One run, finished or not, as its folder tells it."""

    path: Path
    values: Mapping[str, Any]  # the configuration
    total_steps: int
    precision: str
    hardware: str  # and how many processes shared the work, if several
    epochs: tuple[Epoch, ...]  # finished ones
    savings: Mapping[str, Any] | None  # predicted and measured, of a run with FreezeOut
    frozen_from_start: int = 0  # layers

    @property
    def is_finished(self) -> bool:
        """Whether the metrics reach the last step."""
        return bool(self.epochs) and self.epochs[-1].step == self.total_steps

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def freezes(self) -> bool:
        """Whether layers freeze: not with t_0 = 1, unless some are frozen from the start."""
        return bool(self.values["freezeout"]) and (
            self.values["t_0"] < 1 or self.values["frozen"] is not None
        )

    @property
    def schedule(self) -> Schedule:
        """The schedule of a run with FreezeOut, for layers that are not frozen from the start."""
        return Schedule(self.values["t_0"], self.values["how_scale"], self.values["scale_lr"])

    @property
    def error(self) -> float | None:
        """On the held-out images, at the end; None if none were held out."""
        return self.epochs[-1].error if self.epochs else None

    @property
    def seconds(self) -> float:
        """Of training alone."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def asked_steps(self) -> int:
        """The length that was asked for, of a run with an epoch done: before --const-time."""
        return int(self.values["steps"] or self.values["epochs"] * self.epochs[0].steps)

    @cached_property
    def problem(self) -> tuple[tuple[str, Any], ...]:
        """What makes runs comparable: the network, the data, the options of training."""
        sizes = _DEFAULT_SIZES.get(self.values["model"], {})
        values = {name: self.values.get(name) for name in _PROBLEM}
        for name, size in sizes.items():
            values[name] = size if values[name] is None else values[name]
        return (*values.items(), ("precision", self.precision))

    @cached_property
    def arm(self) -> tuple[tuple[str, Any], ...]:
        """What the runs of one arm have in common beside the problem: the schedule, the length,
        and whatever other option was given."""
        known = {*_PROBLEM, *_NOT_COMPARED, *_SCHEDULE, "epochs", "steps", "precision"}
        others = {
            k: v
            for k, v in self.values.items()
            if k not in known and v != _DEFAULTS.get(k, _UNKNOWN)
        }
        if others.get("cache", "off") not in _CACHES:
            others["cache"] = "folder"  # which one makes no difference
        if self.freezes:
            # With t_0 = 1 the others make no difference.
            names = _SCHEDULE if self.values["t_0"] < 1 else ("freezeout", "t_0")
            others |= {k: self.values[k] for k in names}
        else:
            others.pop("const_time", None)  # nothing to make up for
        return (*sorted(others.items()), ("total_steps", self.total_steps))

    @property
    def network(self) -> str:
        """The network's name as papers write it: WRN-16-1."""
        return network_name(self.values)

    @property
    def strategy(self) -> str:
        """ "ordinary", or how layers freeze in words, without t_0."""
        return " ".join(self._words()) if self.freezes else "ordinary"

    @property
    def label(self) -> str:
        """The same with t_0, as in a study."""
        return " ".join(self._words(f"{self.values['t_0']:.12g}")) if self.freezes else "ordinary"

    def _words(self, *t_0: str) -> list[str]:
        words = []
        if self.values["t_0"] < 1:
            scaling = "scaled" if self.values["scale_lr"] else "unscaled"
            words = [self.values["how_scale"], scaling, *t_0]
        others = {k: v for k, v in self.arm if k not in (*_SCHEDULE, "total_steps")}
        if (frozen := others.pop("frozen", None)) is not None:
            words.append(f"frozen {frozen}")
        cache, views = others.pop("cache", "off"), others.pop("views", None)
        if cache != "off":
            words.append("cached" if cache == "auto" else f"cached ({cache})")
        if views is not None:
            words.append(f"{views} view" + "s" * (views != 1))
        for name, value in others.items():
            if value not in (False, None):
                words.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
        return words


def network_name(values: Mapping[str, Any]) -> str:
    """The name, as papers write it, of the network that a configuration asks for.

    >>> network_name({"model": "wrn", "depth": 16, "widen_factor": 1})
    'WRN-16-1'
    """
    model = values["model"]
    if model not in _NAMES:
        return str(model).removeprefix("timm:")
    sizes = [values.get(name) or size for name, size in _DEFAULT_SIZES[model].items()]
    return "-".join([_NAMES[model], *map(str, sizes)])


def find_run_folders(folder: Path) -> Iterator[Path]:
    """Every run folder in `folder`, or `folder` itself, in the order of their names; and every
    folder that cannot be looked into, so that `read_run` says so."""
    try:
        if (folder / CONFIG).is_file():
            yield folder
            return
        inside = sorted(path for path in folder.iterdir() if os.path.isdir(path))
    except OSError:
        yield folder
        return
    for path in inside:
        yield from find_run_folders(path)


def encodable(text: str) -> str:
    """The text as UTF-8 can hold it: a lone surrogate, as in a file name, is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_run(path: Path) -> Run:
    """What the run folder holds. CheckpointError, which names the file, if that is damaged."""
    saved = _read_json(path / CONFIG)
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path / CONFIG} holds no configuration")
    try:
        values, resolved = saved["config"], saved["resolved"]
        run = Run(
            path=path,
            values=_checked(TrainConfig.completed(values)),
            total_steps=int(resolved["total_steps"]),
            precision=encodable(str(resolved["precision"])),
            hardware=_hardware(saved),
            epochs=_read_metrics(path / METRICS),
            savings=_read_savings(path / SAVINGS),
            frozen_from_start=int(resolved.get("frozen_from_start", 0)),
        )
        _ = run.schedule
        if run.values["frozen"] is not None:
            frozen_plan(run.values["frozen"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path / CONFIG} is not a run's configuration: {said}") from error
    return run


def _hardware(saved: Mapping[str, Any]) -> str:
    """What made the run; times are comparable where this is equal."""
    processes = int(saved.get("ranks", 1))
    shared = f", {processes} processes" if processes > 1 else ""
    return encodable(str(saved.get("hardware", "unknown hardware"))) + shared


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, its known options of the right kinds."""
    names = {field.name for field in fields(TrainConfig)}
    TrainConfig.from_json({k: v for k, v in values.items() if k in names})
    for value in values.values():
        if not isinstance(value, str | int | float | None):
            raise ValueError("an option is neither a number nor a word")
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(f"an option is {value}")
    return {encodable(k): encodable(v) if isinstance(v, str) else v for k, v in values.items()}


def _read_metrics(path: Path) -> tuple[Epoch, ...]:
    """The lines of metrics; none if no epoch has ended."""
    if not path.exists():
        return ()
    epochs: list[Epoch] = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            epoch = _epoch(json.loads(line), epochs[-1].step if epochs else 0)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}, line {number} cannot be read: {said}") from error
        if epoch.epoch != number:
            raise CheckpointError(f"{path}, line {number} is of epoch {epoch.epoch}")
        epochs.append(epoch)
    return tuple(epochs)


def _epoch(row: Any, before: int) -> Epoch:
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r}")
    error = row["valid_error"]
    epoch = Epoch(
        epoch=int(row["epoch"]),
        step=int(row["step"]),
        steps=int(row["step"]) - before,
        train_error=float(row["train_error"]),
        error=None if error is None else float(error),
        frozen_layers=int(row["frozen_layers"]),
        seconds=float(row["seconds"]),
        step_seconds=float(row["step_seconds"]),
    )
    numbers = {k: v for k, v in asdict(epoch).items() if v is not None}
    odd = [k for k, v in numbers.items() if v < 0 or not math.isfinite(v)]
    if odd or not epoch.steps or not epoch.step_seconds:
        raise ValueError(f"it has an impossible {odd[0] if odd else 'number of steps or seconds'}")
    return epoch


def _read_savings(path: Path) -> Mapping[str, Any] | None:
    """Predicted and measured savings, None if there are none."""
    if not path.exists():
        return None
    savings = _read_json(path)
    if not isinstance(savings, dict) or not _is_finite(savings.get("predicted_share")):
        raise CheckpointError(f"{path} holds no savings")
    measured = savings.get("measured_share")
    if measured is not None and not _is_finite(measured):
        raise CheckpointError(f"{path} holds no savings")
    return savings


def _is_finite(value: object) -> bool:
    """Also false for whole numbers beyond all floats, which JSON may hold."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CheckpointError(f"{path} cannot be read: {said}") from error
