"""A study: the grid of runs that `freezeout sweep` makes, from options and a TOML file.

The names in the file are the options' names, with underscores. Torch is not imported here.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from ..errors import FreezeOutError, InvalidValue
from .config import TrainConfig
from .strategy import Strategy

PRESETS = ("quick", "mini", "paper")
STATE, STUDY = "sweep.json", "sweep.toml"  # in a sweep's folder

# The sizes in a network's name: wrn-16-1 is wrn with depth 16 and widen factor 1.
_SIZES = {
    "densenet": ("depth", "growth"),
    "wrn": ("depth", "widen_factor"),
    "vgg": ("depth",),
}


def _option(metavar: str, default: str) -> Any:
    """How the help shows an option that is None where nothing is said."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class StudyOptions:
    """What a file and the command line may say; None: not said."""

    models: Annotated[tuple[str, ...] | None, _option("NAME ...", "densenet")] = None
    """Networks: densenet-76-12, wrn-40-4, vgg-16 (sizes may be left out), timm:NAME."""
    datasets: Annotated[tuple[str, ...] | None, _option("NAME ...", "cifar100")] = None
    """cifar10, cifar100, digits."""
    strategies: Annotated[tuple[str, ...] | None, _option("TEXT ...", "'cubic scaled'")] = None
    """Such as 'cubic scaled' or 'linear unscaled', made with every --t-0, or with a t_0 of its own:
    'cubic scaled 0.8'; 'cubic scaled 0.8 frozen 5', as --frozen 5 of train, or 'frozen 5' alone;
    and 'cubic scaled 0.8 cached 4 views', as --cache auto --views 4."""
    t_0: Annotated[tuple[float, ...] | None, _option("T ...", "0.8")] = None
    """Freeze times of the first layer, for strategies that name none."""
    seeds: Annotated[tuple[int, ...] | None, _option("N ...", "0 1 2")] = None
    """Every arm is trained once with each."""
    baselines: Annotated[tuple[int, ...] | None, _option("EPOCHS ...", "none")] = None
    """Lengths of further ordinary runs; one of full length is always made."""
    equal_time: Annotated[bool | None, _option("BOOL", "true")] = None
    """For each strategy, ordinary runs shortened to its time: the rival that counts."""
    epochs: Annotated[int | None, _option("N", "100")] = None
    """Passes over the training images."""
    batch_size: Annotated[int | None, _option("N", "50")] = None
    """Images a step."""
    lr: Annotated[float | None, _option("RATE", "0.1")] = None
    """Base learning rate."""
    weight_decay: Annotated[float | None, _option("RATE", "0.0001")] = None
    """L2 penalty on every parameter."""
    momentum: Annotated[float | None, _option("NUMBER", "0.9")] = None
    """Nesterov momentum."""
    dropout: Annotated[float | None, _option("NUMBER", "0")] = None
    """Dropout probability inside the networks' blocks."""
    images: Annotated[int | None, _option("N", "all")] = None
    """Train on the first so many training images only."""
    augment: Annotated[bool | None, _option("BOOL", "true")] = None
    """Random crops, and flips where a mirror image keeps its meaning."""
    validate: Annotated[str | None, _option("NAME", "valid")] = None
    """What the error is measured on: valid (training images kept apart), test, or none."""
    validate_every: Annotated[int | None, _option("EPOCHS", "1")] = None
    """Between measurements of the error; it is always measured after the last."""
    precision: Annotated[str | None, _option("NAME", "auto")] = None
    """fp32, bf16, or auto: bf16 where the device computes it natively."""
    data_dir: Annotated[Path | None, _option("FOLDER", "download once")] = None
    """Folder that holds CIFAR's binary files or archive; nothing is downloaded then."""
    cache: Annotated[Path | None, _option("FOLDER", "in memory")] = None
    """Folder in which strategies with 'cached' keep activations, for all runs together."""
    devices: Annotated[tuple[str, ...] | None, _option("NAME ...", "auto")] = None
    """One process works on each: cuda:0 cuda:1, or cpu; auto takes the first accelerator."""
    out: Annotated[Path | None, _option("FOLDER", "runs/ and the study's name")] = None
    """The sweep's folder."""


_TRAIN = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "momentum",
    "dropout",
    "images",
    "augment",
    "validate",
    "validate_every",
    "precision",
    "data_dir",
)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    folder: Path
    config: TrainConfig  # of an equal-time run: of full length, until the length is known
    waits_for: tuple[Path, ...] = ()  # for an equal-time run: its arms' runs, then ordinary ones
    problem: str = ""  # network and data, in words

    @property
    def name(self) -> str:
        """In words: network, data, arm and seed."""
        return f"{self.problem}, {self.folder.parent.name}, seed {self.config.seed}"

    @property
    def is_equal_time(self) -> bool:
        return bool(self.waits_for)


@dataclass(frozen=True)
class Study:
    """A grid of runs: every network with every data set, strategy and seed."""

    models: tuple[str, ...] = ("densenet",)
    datasets: tuple[str, ...] = ("cifar100",)
    strategies: tuple[str, ...] = ("cubic scaled",)
    t_0: tuple[float, ...] = (0.8,)
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: tuple[int, ...] = ()
    equal_time: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)  # what all runs have in common
    cache: Path | None = None
    devices: tuple[str, ...] = ("auto",)
    out: Path = Path("runs/sweep")

    @classmethod
    def from_options(cls, options: StudyOptions, name: str = "sweep") -> "Study":
        """The study that the options describe; its folder is runs/NAME if they name none.

        InvalidValue for an empty or repeated choice, and for a network's or strategy's name that
        cannot be read. A value that only some runs cannot have is found when these are made.
        """
        given = {f.name: getattr(options, f.name) for f in fields(options)}
        given = {k: v for k, v in given.items() if v is not None}
        common = {k: given.pop(k) for k in _TRAIN if k in given}
        study = cls(**{"out": Path("runs") / name, **given}, train=TrainConfig(**common))
        for option in ("models", "datasets", "strategies", "t_0", "seeds", "devices"):
            if not getattr(study, option):
                raise InvalidValue(f"{option} must name at least one")
        for option in ("models", "datasets", "strategies", "t_0", "seeds", "baselines"):
            values = getattr(study, option)
            if twice := [v for v in values if values.count(v) > 1]:
                raise InvalidValue(f"{option} has {twice[0]!r} twice")
        for model in study.models:
            parse_model(model)
        study.arms()
        return study

    def arms(self) -> list[Strategy]:
        """Every arm with FreezeOut, each once."""
        read = [Strategy.parse(text) for text in self.strategies]
        return list(dict.fromkeys(strategy.at(t_0) for strategy in read for t_0 in self.t_0))

    def cells(self) -> list[Cell]:
        """Every run, in the order in which they are made.

        Seed after seed, and all arms of a seed in turn, so that a machine whose speed drifts slows
        all arms alike. A problem's equal-time runs come after its others, which say how long they
        are to be.
        """
        return [
            cell
            for model, dataset in product(self.models, self.datasets)
            for cell in self._cells_of(model, dataset)
        ]

    def _cells_of(self, model: str, dataset: str) -> list[Cell]:
        home = self.out / f"{model.replace('timm:', '').replace('/', '-')}-{dataset}"
        words = f"{model.removeprefix('timm:')} on {dataset}"
        base = replace(self.train, dataset=dataset, **parse_model(model))
        ordinary = replace(base, freezeout=False)
        arms = {f"ordinary {base.epochs} epochs": ordinary}
        for epochs in self.baselines:
            arms[f"ordinary {epochs} epochs"] = replace(ordinary, epochs=epochs)
        rivals: dict[str, list[str]] = {}
        for strategy in self.arms():
            options = strategy.options
            if strategy.cached and self.cache is not None:
                options["cache"] = str(self.cache.absolute())
            arms[strategy.name] = replace(base, **options)
            rivals.setdefault(f"{strategy.cost_name} equal time", []).append(strategy.name)

        def cell(arm: str, config: TrainConfig, seed: int, needs: tuple[str, ...] = ()) -> Cell:
            folder = home / _folder_name(arm) / f"seed{seed}"
            every = (home / _folder_name(need) / f"seed{s}" for need in needs for s in self.seeds)
            return Cell(folder, replace(config, seed=seed, out=folder), tuple(every), words)

        cells = [cell(arm, config, seed) for seed in self.seeds for arm, config in arms.items()]
        if self.equal_time:
            full = next(iter(arms))
            cells += [
                cell(rival, ordinary, seed, (*its_arms, full))
                for seed in self.seeds
                for rival, its_arms in rivals.items()
            ]
        return cells

    def to_toml(self) -> str:
        """A file that describes this study, every option in it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "train"}
        values |= {name: getattr(self.train, name) for name in _TRAIN}
        if self.cache is not None:
            values["cache"] = self.cache.absolute()
        if self.train.data_dir is not None:
            values["data_dir"] = self.train.data_dir.absolute()  # the file is read from anywhere
        # JSON's words, numbers and lists of them are TOML's too.
        return "".join(
            f"{name} = {json.dumps(value, default=str, ensure_ascii=False)}\n"
            for name, value in values.items()
            if value is not None
        )


def _folder_name(arm: str) -> str:
    return arm.replace(" ", "-").replace("/", "-")


def parse_model(name: str) -> dict[str, Any]:
    """A network's options, by its name.

    >>> parse_model("wrn-16-1")
    {'model': 'wrn', 'depth': 16, 'widen_factor': 1}
    """
    model, *sizes = name.split("-") if not name.startswith("timm:") else (name,)
    options = _SIZES.get(model, ())
    if (model not in _SIZES and not name.startswith("timm:")) or len(sizes) > len(options):
        raise InvalidValue(
            f"models has {name!r}; a network is densenet-DEPTH-GROWTH, wrn-DEPTH-WIDTH, vgg-DEPTH "
            "(sizes may be left out) or timm:NAME"
        )
    if not all(size.isascii() and size.isdigit() for size in sizes):
        raise InvalidValue(f"models has {name!r}, whose sizes are no whole numbers")
    return {"model": model, **dict(zip(options, map(int, sizes), strict=False))}


def read_options(path: Path) -> StudyOptions:
    """What a TOML file says. InvalidValue, naming the file, for one that cannot be read."""
    try:
        return _options(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # InvalidValue, and all that tomllib raises
        raise InvalidValue(f"{path}: {error}") from error
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}") from error


def folder_of_sweep(file: Path) -> Path | None:
    """The folder of the sweep that wrote the file, wherever it has been moved; None if none did."""
    is_its_own = file.name == STUDY and (file.parent / STATE).exists()
    return file.parent if is_its_own else None


def preset_options(name: str) -> StudyOptions:
    """What the preset of that name says."""
    if name not in PRESETS:
        raise InvalidValue(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    text = files(__package__).joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
    return _options(tomllib.loads(text))


def names_a_study(options: StudyOptions) -> bool:
    """Whether they say what is trained, and not only how or where."""
    return any(each is not None for each in (options.models, options.datasets, options.strategies))


def merged(below: StudyOptions, above: StudyOptions) -> StudyOptions:
    """What `below` says, where `above` says nothing."""
    said = {f.name: getattr(above, f.name) for f in fields(above)}
    return replace(below, **{k: v for k, v in said.items() if v is not None})


def _options(values: Mapping[str, Any]) -> StudyOptions:
    kinds = {name: get_args(hint)[0] for name, hint in get_type_hints(StudyOptions).items()}
    options = {}
    for name, value in values.items():
        if name not in kinds:
            near = get_close_matches(name, kinds, n=1)
            raise InvalidValue(
                f"{name!r} is no option of a study" + (f"; is it {near[0]!r}?" if near else "")
            )
        options[name] = _converted(name, value, kinds[name])
    return StudyOptions(**options)


def _converted(name: str, value: Any, kind: Any) -> Any:
    """The value of a file as the option has it: lists become tuples, text a path."""
    if each := get_args(kind):
        if not isinstance(value, list):
            raise InvalidValue(f"{name} must be a list, such as [{value!r}], got {value!r}")
        return tuple(_converted(name, item, each[0]) for item in value)
    plain: tuple[type, ...] = {Path: (str,), float: (float, int)}.get(kind, (kind,))
    if not isinstance(value, plain) or (isinstance(value, bool) and kind is not bool):
        words = {str: "text", Path: "text", int: "a whole number", float: "a number"}
        raise InvalidValue(f"{name} must be {words.get(kind, 'true or false')}, got {value!r}")
    try:
        return kind(value)
    except OverflowError as error:
        raise InvalidValue(f"{name} has a number too large") from error


def impossible(config: TrainConfig) -> str | None:
    """Why a run cannot be made, where its options alone say so."""
    try:
        config.check()
    except FreezeOutError as error:
        return str(error)
    return None
