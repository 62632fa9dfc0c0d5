"""`TrainConfig`: the options of one training run. Torch is not imported here, so that the command
line answers at once."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ..errors import CheckpointError, InvalidType, InvalidValue
from ..plan import Plan
from ..schedule import HowScale, Schedule
from ..values import whole_number
from .frozen import frozen_plan

PRECISIONS = ("auto", "fp32", "bf16")
CACHE_DTYPES = ("auto", "fp32", "bf16", "fp16")
VIEWS = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Options that a run may have been begun without, and what it did. Without another, a
# configuration is damaged: a default in its place would train something else.
_ADDED_LATER = {"validate_every": 1, "frozen": None}


@dataclass(frozen=True)
class TrainConfig:
    """Train one network, with FreezeOut or without, into one run folder.

    Without options this is the paper's default run: DenseNet-BC-76 on CIFAR-100, 100 epochs.
    """

    model: str = "densenet"
    """densenet, wrn, vgg, or timm:NAME where timm is installed."""
    depth: int | None = None
    """Layers of the network: 76 for densenet, 40 for wrn, 16 for vgg if not given."""
    growth: int | None = None
    """densenet: channels that a unit adds (12 if not given)."""
    widen_factor: int | None = None
    """wrn: width multiplier (4 if not given)."""
    dropout: float = 0.0
    """Dropout probability inside the network's blocks."""
    dataset: str = "cifar100"
    """cifar10, cifar100 (downloaded once), or digits (built in)."""
    data_dir: Path | None = None
    """Folder that holds CIFAR's binary files or archive; nothing is downloaded then."""
    validate: str = "valid"
    """What the error is measured on: valid (the last 5,000 training images, kept out of
    training), test, or none."""
    validate_every: int = 1
    """Epochs between measurements of the error; it is always measured after the last."""
    augment: bool = True
    """Random crops, and flips where a mirror image keeps its meaning."""
    images: int | None = None
    """Train on the first so many training images only."""
    epochs: int = 100
    """Passes over the training images."""
    steps: int | None = None
    """Stop after this many steps in place of whole epochs; schedules end there too."""
    batch_size: int = 50
    """Images a step."""
    lr: float = 0.1
    """Base learning rate, before each layer's factor."""
    weight_decay: float = 1e-4
    """L2 penalty on every parameter."""
    momentum: float = 0.9
    """Nesterov momentum."""
    freezeout: bool = True
    """Freeze layers; --no-freezeout trains all to the end, with cosine annealing."""
    t_0: float = 0.8
    """When the first layer freezes, as a fraction of the run before --how-scale's power."""
    how_scale: str = "cubic"
    """linear, squared or cubic: the power that freeze times are raised to."""
    scale_lr: bool = True
    """Start early layers at higher rates, so that every layer's rates have the same sum."""
    frozen: str | None = None
    """First layers frozen from the start: a number (5), all but the last ones (-1), a share (0.5),
    or a module's name (layer1); the freeze times are those of the rest."""
    const_time: bool = False
    """Train more epochs, so that the predicted time equals that of a run without freezing."""
    cache: str = "off"
    """Keep what frozen layers compute of each image: off, ram, auto (in memory, where measured to
    save time), or the path of a folder, which any number of runs may share."""
    views: int | None = None
    """Augmented versions of each image, once they are cached (4 if not given; before that, and
    without a cache, every version is new)."""
    cache_budget: str | None = None
    """Bytes that cached activations may take, such as 8G (half of the free memory, or 0.9 of the
    free disk, if not given)."""
    cache_dtype: str = "auto"
    """Numbers in the cache: fp32, bf16, fp16, or auto: as the network computes them."""
    seed: int = 0
    """Seed of the weights, the order of images and their augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first accelerator, else the CPU."""
    precision: str = "auto"
    """fp32, bf16, or auto: bf16 where the device computes it natively."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    out: Path | None = None
    """Run folder, which must not exist (runs/MODEL-DATASET-SCHEDULE-seedN if not given)."""

    def check(self) -> None:
        """Raise InvalidValue or InvalidType for the first value that is not allowed."""
        for name in ("epochs", "batch_size", "validate_every"):
            whole_number(name, getattr(self, name))
        if whole_number("seed", self.seed, minimum=0) >= 2**63:
            raise InvalidValue(f"seed must be below 2**63, got {self.seed}")
        for name in ("steps", "images", "views"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        check_number("lr", self.lr, 0, math.inf, above=True)
        check_number("weight_decay", self.weight_decay, 0, math.inf)
        check_number("momentum", self.momentum, 0, 1)
        check_number("dropout", self.dropout, 0, 1)
        if self.precision not in PRECISIONS:
            raise InvalidValue(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        _ = self.plan, self.cache_bytes
        if self.frozen is not None and not self.freezeout:
            raise InvalidValue(
                f"frozen={self.frozen!r} needs freezeout: with --no-freezeout every layer trains "
                "to the end; for cosine annealing of the rest give --t-0 1"
            )
        if self.cache_dtype not in CACHE_DTYPES:
            raise InvalidValue(
                f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}"
            )
        if self.cache == "":
            raise InvalidValue("cache must be off, auto, ram or a folder, got ''")
        if self.cache != "off" and not self.freezeout:
            raise InvalidValue("cache needs freezeout: without it no layer is ever frozen")
        if self.const_time and (not self.freezeout or self.steps is not None):
            raise InvalidValue("const_time needs freezeout and whole epochs, not steps")

    @property
    def schedule(self) -> Schedule:
        """Of the layers that are not frozen from the start; without FreezeOut plain cosine
        annealing."""
        how_scale: HowScale = self.how_scale  # type: ignore[assignment]  # Schedule checks it
        schedule = Schedule(self.t_0, how_scale, self.scale_lr)
        return schedule if self.freezeout else Schedule(t_0=1)

    @property
    def plan(self) -> Plan:
        """What trains when, as the options describe it."""
        return self.schedule if self.frozen is None else frozen_plan(self.frozen, self.schedule)

    @property
    def cache_bytes(self) -> int | None:
        """`cache_budget` as a number."""
        if self.cache_budget is None:
            return None
        text = self.cache_budget.strip().upper().removesuffix("B")
        unit = text[-1:] if text[-1:] in _UNITS else ""
        try:
            size = float(text.removesuffix(unit)) * _UNITS[unit]
        except ValueError:
            size = 0.0
        if not 1 <= size < 2**62:
            raise InvalidValue(
                f"cache_budget must be a number of bytes such as 500M or 8G, got "
                f"{self.cache_budget!r}"
            )
        return int(size)

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or a name made of what tells runs apart."""
        if self.out is not None:
            return self.out
        sizes = {"": self.depth, "k": self.growth, "w": self.widen_factor}
        size = "".join(f"-{letter}{n}" for letter, n in sizes.items() if n is not None)
        if self.freezeout:
            strategy = f"{self.how_scale}-{self.t_0:g}" + ("" if self.scale_lr else "-unscaled")
            if self.frozen is not None:
                strategy += f"-frozen-{self.frozen.replace('/', '-')}"
            strategy += "-const-time" if self.const_time else ""
        else:
            strategy = "baseline"
        model = self.model.replace("timm:", "").replace("/", "-")
        return Path("runs") / f"{model}{size}-{self.dataset}-{strategy}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @staticmethod
    def completed(values: dict[str, Any]) -> dict[str, Any]:
        """What `to_json` of an older version wrote, with the options that came after it."""
        return {**_ADDED_LATER, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The configuration that `to_json` wrote. CheckpointError if it is another's."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = sorted(set(values) ^ names)[0]
            raise CheckpointError(
                f"the run's configuration {'lacks' if odd in names else 'has'} {odd!r}: it was "
                "written by another version"
            )
        for field in fields(cls):
            if not isinstance(values[field.name], _plain_types(field.type)):
                raise CheckpointError(
                    f"the run's configuration has {field.name} = {values[field.name]!r}, which "
                    f"is no {field.type}"
                )
        paths = {k: Path(values[k]) for k in ("data_dir", "out") if values[k] is not None}
        return cls(**(values | paths))


def _plain_types(annotation: Any) -> tuple[type, ...]:
    """What a field may be in JSON: a path is a string there, and a number may lack its point."""
    plain = {Path: (str,), float: (float, int)}
    return tuple(
        each for kind in get_args(annotation) or (annotation,) for each in plain.get(kind, (kind,))
    )


def check_number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    """InvalidType or InvalidValue unless `value` is in [low, high), or (low, high) if `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(f"{name} must be a number, got {value!r}")
    if not (low < value if above else low <= value) or not value < high:  # NaN fails too
        bracket = "(" if above else "["
        raise InvalidValue(f"{name} must be in {bracket}{low:g}, {high:g}), got {value}")
