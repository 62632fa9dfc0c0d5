"""Studies: what options, files and presets describe, and what is refused."""

import re
from pathlib import Path

import pytest

from freezeout.errors import InvalidValue
from freezeout.lab.config import TrainConfig
from freezeout.lab.strategy import Strategy
from freezeout.lab.study import (
    PRESETS,
    Study,
    StudyOptions,
    impossible,
    merged,
    parse_model,
    preset_options,
    read_options,
)

SMALL = StudyOptions(
    models=("wrn-16-1",), datasets=("digits",), seeds=(3, 5), epochs=4, baselines=(2,)
)


def arms(study: Study) -> list[str]:
    return [f"{cell.folder.parent.name}/{cell.folder.name}" for cell in study.cells()]


def test_seeds_come_in_turn_and_equal_time_runs_last() -> None:
    study = Study.from_options(
        merged(SMALL, StudyOptions(strategies=("cubic scaled 0.8", "linear unscaled 0.5")))
    )
    whole = [
        "ordinary-4-epochs",
        "ordinary-2-epochs",
        "cubic-scaled-0.8",
        "linear-unscaled-0.5",
    ]
    shortened = ["cubic-0.8-equal-time", "linear-0.5-equal-time"]
    assert arms(study) == [
        f"{arm}/seed{seed}" for group in (whole, shortened) for seed in (3, 5) for arm in group
    ]


def test_cells_have_the_options_that_they_are_named_for() -> None:
    study = Study.from_options(merged(SMALL, StudyOptions(strategies=("linear unscaled 0.5",))))
    found = {
        cell.folder.parent.name: cell.config for cell in study.cells() if cell.config.seed == 5
    }
    for config in found.values():
        assert (config.model, config.depth, config.widen_factor) == ("wrn", 16, 1)
        assert (config.dataset, config.seed) == ("digits", 5)
    frozen = found["linear-unscaled-0.5"]
    assert (frozen.freezeout, frozen.how_scale, frozen.scale_lr) == (True, "linear", False)
    assert (frozen.t_0, frozen.epochs) == (0.5, 4)
    assert not found["ordinary-4-epochs"].freezeout
    assert (found["ordinary-2-epochs"].epochs, found["ordinary-2-epochs"].freezeout) == (2, False)
    assert not found["linear-0.5-equal-time"].freezeout


def test_an_equal_time_run_waits_for_its_arms_and_the_ordinary_runs_of_all_seeds() -> None:
    """Scaled or not, layers freeze at the same steps, so one shortened run does for both."""
    study = Study.from_options(
        merged(SMALL, StudyOptions(strategies=("cubic scaled", "cubic unscaled"), t_0=(0.8,)))
    )
    (cell, _) = [cell for cell in study.cells() if cell.is_equal_time]
    assert [f"{folder.parent.name}/{folder.name}" for folder in cell.waits_for] == [
        f"{arm}/seed{seed}"
        for arm in ("cubic-scaled-0.8", "cubic-unscaled-0.8", "ordinary-4-epochs")
        for seed in (3, 5)
    ]


def test_strategies_without_t_0_are_made_with_each() -> None:
    options = StudyOptions(strategies=("cubic scaled", "linear unscaled 0.5"), t_0=(0.7, 0.8))
    assert Study.from_options(options).arms() == [
        Strategy("cubic", True, 0.7),
        Strategy("cubic", True, 0.8),
        Strategy("linear", False, 0.5),
    ]


def test_cached_arms_have_a_rival_for_each_number_of_views() -> None:
    """A view costs its first visit, so that arms of other numbers of views take other times."""
    names = ("cubic scaled 0.8", "cubic scaled 0.8 cached 1 view", "cubic scaled 0.8 cached")
    study = Study.from_options(
        merged(SMALL, StudyOptions(strategies=names, seeds=(0,), images=100, baselines=()))
    )
    found = {cell.folder.parent.name: cell for cell in study.cells()}
    caches = {name: (cell.config.cache, cell.config.views) for name, cell in found.items()}
    assert caches == {
        "ordinary-4-epochs": ("off", None),
        "cubic-scaled-0.8": ("off", None),
        "cubic-scaled-0.8-cached-1-view": ("auto", 1),
        "cubic-scaled-0.8-cached": ("auto", None),
        "cubic-0.8-equal-time": ("off", None),
        "cubic-0.8-cached-1-view-equal-time": ("off", None),
        "cubic-0.8-cached-equal-time": ("off", None),
    }
    rival = found["cubic-0.8-cached-1-view-equal-time"]
    assert [folder.parent.name for folder in rival.waits_for] == [
        "cubic-scaled-0.8-cached-1-view",
        "ordinary-4-epochs",
    ]
    assert {cell.config.images for cell in found.values()} == {100}


def test_every_network_meets_every_data_set_in_a_folder_of_its_own() -> None:
    options = StudyOptions(models=("vgg", "timm:resnet18"), datasets=("cifar10", "digits"))
    homes = {cell.folder.parents[1].name for cell in Study.from_options(options).cells()}
    assert homes == {"vgg-cifar10", "vgg-digits", "resnet18-cifar10", "resnet18-digits"}


def test_no_two_runs_share_a_folder() -> None:
    for name in PRESETS:
        folders = [cell.folder for cell in Study.from_options(preset_options(name), name).cells()]
        assert len(set(folders)) == len(folders) > 0


def test_every_run_of_the_presets_is_possible() -> None:
    for name in PRESETS:
        cells = Study.from_options(preset_options(name), name).cells()
        assert [reason for cell in cells if (reason := impossible(cell.config))] == []


def test_the_file_that_a_sweep_writes_describes_it(tmp_path: Path) -> None:
    options = merged(
        SMALL,
        StudyOptions(
            strategies=("cubic scaled", "linear unscaled 0.5"),
            t_0=(0.25, 1),
            equal_time=False,
            lr=1e-5,
            data_dir=Path('a "folder"'),
            images=1000,
            devices=("cuda:0", "cuda:1"),
            out=tmp_path / "sweep",
        ),
    )
    study = Study.from_options(options)
    file = tmp_path / "sweep.toml"
    file.write_text(study.to_toml())
    again = Study.from_options(read_options(file), "another name")
    assert again == study
    assert again.cells() == study.cells()


def test_what_nothing_is_said_about_is_as_in_train() -> None:
    assert Study.from_options(StudyOptions()).train == TrainConfig()
    assert Study.from_options(StudyOptions(), "mine").out == Path("runs/mine")


def test_networks_names() -> None:
    assert parse_model("densenet-40-24") == {"model": "densenet", "depth": 40, "growth": 24}
    assert parse_model("vgg") == {"model": "vgg"}
    assert parse_model("timm:vit-like.x-1") == {"model": "timm:vit-like.x-1"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (StudyOptions(models=("resnet-18",)), "models has 'resnet-18'; a network is"),
        (StudyOptions(models=("wrn-16-1-2",)), "models has 'wrn-16-1-2'"),
        (StudyOptions(models=("wrn-x",)), "sizes are no whole numbers"),
        (StudyOptions(strategies=("cubik scaled",)), "strategies has 'cubik scaled'"),
        (StudyOptions(strategies=("cubic",)), "a strategy is linear, squared or cubic, then"),
        (StudyOptions(strategies=("cubic scaled high",)), "strategies has 'cubic scaled high'"),
        (StudyOptions(strategies=("cubic scaled 0.5 0.6",)), "strategies has"),
        (StudyOptions(strategies=("cubic scaled 0.5 cached views",)), "strategies has"),
        (StudyOptions(strategies=("cubic scaled 0.5.5",)), "strategies has 'cubic scaled 0.5.5'"),
        (StudyOptions(seeds=()), "seeds must name at least one"),
        (StudyOptions(t_0=(0.5, 0.5)), "t_0 has 0.5 twice"),
        (StudyOptions(devices=()), "devices must name at least one"),
    ],
)
def test_what_cannot_be_read_is_refused(options: StudyOptions, said: str) -> None:
    with pytest.raises(InvalidValue, match=re.escape(said)):
        Study.from_options(options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs = ", "study.toml: "),
        ("epoch = 3", "'epoch' is no option of a study; is it 'epochs'?"),
        ("models = 'wrn'", "models must be a list"),
        ("seeds = ['one']", "seeds must be a whole number, got 'one'"),
        ("seeds = [true]", "seeds must be a whole number, got True"),
        ("equal_time = 1", "equal_time must be true or false, got 1"),
        ("lr = 'high'", "lr must be a number, got 'high'"),
        ("out = 3", "out must be text, got 3"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=re.escape(said)):
        read_options(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="cannot be read: No such file"):
        read_options(tmp_path / "study.toml")


def test_a_whole_number_may_stand_for_a_fraction(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text("t_0 = [1]\nlr = 1\n")
    assert read_options(file) == StudyOptions(t_0=(1.0,), lr=1.0)
