"""`TrainConfig`: what it allows, what it is as JSON, and the name of its folder."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from freezeout import Frozen, Schedule
from freezeout.errors import CheckpointError, InvalidType, InvalidValue
from freezeout.lab.config import TrainConfig
from freezeout.lab.frozen import frozen_plan

NAN = math.nan


def test_the_defaults_are_the_papers_run() -> None:
    config = TrainConfig()
    config.check()
    assert (config.model, config.dataset, config.epochs) == ("densenet", "cifar100", 100)
    assert (config.batch_size, config.lr, config.momentum) == (50, 0.1, 0.9)
    assert config.weight_decay == 1e-4
    assert config.schedule == Schedule(0.8, "cubic", scale_lr=True)


def test_every_option_is_explained() -> None:
    text = Path(TrainConfig.__init__.__globals__["__file__"]).read_text()
    for field in fields(TrainConfig):
        assert f"    {field.name}: " in text
        assert text.partition(f"    {field.name}: ")[2].splitlines()[1].startswith('    """')


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(data_dir=Path("some/where"), out=Path("else/where"), steps=7, depth=16),
        TrainConfig(lr=0.1 + 0.2, t_0=1 / 3, how_scale="linear", scale_lr=False, const_time=True),
    ],
)
def test_json_and_back_gives_the_same_configuration(config: TrainConfig) -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "has 'colour'"),
        ({"lr": ...}, "lacks 'lr'"),
    ],
)
def test_a_configuration_of_another_version_is_refused(change: dict[str, Any], said: str) -> None:
    values = {k: v for k, v in (TrainConfig().to_json() | change).items() if v is not ...}
    with pytest.raises(CheckpointError, match=f"{said}: it was written by another version"):
        TrainConfig.from_json(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("epochs", -1), ("batch_size", 0), ("steps", 0), ("seed", -1)),
        *(("lr", 0.0), ("lr", -0.1), ("lr", NAN), ("lr", math.inf)),
        *(("weight_decay", -1e-9), ("weight_decay", NAN), ("weight_decay", math.inf)),
        *(("momentum", 1.0), ("momentum", -0.1), ("momentum", NAN)),
        *(("dropout", 1.0), ("dropout", -0.1), ("dropout", NAN)),
        *(("t_0", 0.0), ("t_0", 1.01), ("t_0", -1.0), ("t_0", NAN), ("t_0", math.inf)),
        *(("how_scale", "quartic"), ("precision", "fp16")),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=f"{name} .*got .*{value}"):
        TrainConfig(**{name: value}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 1.0), ("epochs", True), ("batch_size", "9"), ("steps", 0.5), ("seed", None)),
        *(("lr", "0.1"), ("lr", True), ("momentum", None), ("dropout", [0]), ("t_0", "1")),
        ("scale_lr", 1),
    ],
)
def test_a_value_of_another_kind_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidType, match=name):
        TrainConfig(**{name: value}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"weight_decay": 0, "momentum": 0, "dropout": 0, "lr": 1e-300, "seed": 0, "t_0": 1},
        {"epochs": 1, "batch_size": 1, "steps": 1, "lr": 1e300, "t_0": 1e-6},
        {"const_time": True},
        {"freezeout": False, "steps": 3},
    ],
)
def test_values_at_the_edge_are_allowed(values: dict[str, Any]) -> None:
    TrainConfig(**values).check()
    assert asdict(TrainConfig(**values)).items() >= values.items()


def test_constant_time_needs_something_to_lengthen() -> None:
    for config in (TrainConfig(freezeout=False), TrainConfig(steps=10)):
        with pytest.raises(InvalidValue, match="const_time needs freezeout and whole epochs"):
            replace(config, const_time=True).check()


def test_without_freezeout_no_layer_freezes_and_the_rate_is_plain_cosine() -> None:
    config = TrainConfig(freezeout=False, t_0=0.3, scale_lr=True)
    assert config.schedule.freeze_steps(5, 100) == (100,) * 5
    factors = config.plan.factors(25, config.plan.timeline(5, 100))
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi / 4))] * 5, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("5", Frozen(5)),
        ("+5", Frozen(5)),
        ("-1", Frozen(all_but_last=1)),
        ("0.5", Frozen(share=0.5)),
        (".25", Frozen(share=0.25)),
        ("1e-1", Frozen(share=0.1)),
        ("layer1", Frozen(up_to="layer1")),
        ("0.0.1", Frozen(up_to="0.0.1")),
        ("encoder.layer.3", Frozen(up_to="encoder.layer.3")),
    ],
)
def test_frozen_is_a_number_a_share_or_a_name(text: str, plan: Frozen) -> None:
    assert frozen_plan(text) == plan
    config = TrainConfig(frozen=text, t_0=0.5)
    config.check()
    assert config.plan == frozen_plan(text, Schedule(0.5))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig(t_0=0.5).plan == config.schedule == Schedule(0.5)


@pytest.mark.parametrize(
    "text", ["", "0", "-0", "0.0", "1.0", "1.5", "-0.5", "1e9", "9" * 5000, "two layers", "5\n"]
)
def test_frozen_says_what_is_allowed(text: str) -> None:
    allowed = r"frozen must be a number of layers \(5\), .* a module's name, got "
    with pytest.raises(InvalidValue, match=allowed) as error:
        TrainConfig(frozen=text).check()
    assert repr(text) in str(error.value)
    with pytest.raises(InvalidType, match="as text, got 5"):
        TrainConfig(frozen=5).check()  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="frozen='5' needs freezeout"):
        TrainConfig(frozen="5", freezeout=False).check()


def test_a_configuration_of_before_the_option_freezes_nothing_from_the_start() -> None:
    values = TrainConfig().to_json()
    del values["frozen"]
    assert TrainConfig.from_json(TrainConfig.completed(values)) == TrainConfig()


def test_the_folder_is_named_after_what_tells_runs_apart() -> None:
    base = TrainConfig()
    assert base.folder == Path("runs/densenet-cifar100-cubic-0.8-seed0")
    assert replace(base, freezeout=False).folder == Path("runs/densenet-cifar100-baseline-seed0")
    others: list[dict[str, Any]] = [
        *({}, {"model": "wrn"}, {"depth": 40}, {"depth": 40, "growth": 24}, {"widen_factor": 2}),
        *({"model": "timm:resnet/18"}, {"dataset": "digits"}, {"freezeout": False}),
        *({"t_0": 0.5}, {"how_scale": "linear"}, {"scale_lr": False}, {"seed": 1}),
        *({"frozen": "5"}, {"frozen": "-5"}, {"frozen": "0.5"}, {"frozen": "a/b"}),
    ]
    folders = [replace(base, **other).folder for other in others]
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {Path("runs")}
    assert replace(base, out=Path("here")).folder == Path("here")
