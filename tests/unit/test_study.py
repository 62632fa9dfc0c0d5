"""Studies: what options, files and presets describe, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from freezeout import Frozen, Schedule
from freezeout.cli import main
from freezeout.errors import FreezeOutError, InvalidValue
from freezeout.lab import sweep
from freezeout.lab.config import TrainConfig
from freezeout.lab.runs import read_run
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
from freezeout.lab.sweep_display import SweepDisplay
from freezeout.lab.worker import _train
from tests.run_folders import CONFIG, write_run

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


def test_cached_arms_may_share_a_folder(tmp_path: Path) -> None:
    names = ("frozen 2", "frozen 2 cached")
    study = Study(strategies=names, cache=tmp_path, equal_time=False, seeds=(0, 1))
    caches = [cell.config.cache for cell in study.cells()]
    assert caches == ["off", "off", str(tmp_path)] * 2
    file = tmp_path / "study.toml"
    file.write_text(study.to_toml())
    assert Study.from_options(read_options(file)).cells() == replace(study, out=study.out).cells()


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


def test_arms_with_layers_frozen_from_the_start() -> None:
    names = (
        "cubic scaled frozen 5",
        "cubic unscaled 0.8 frozen 5 cached 2 views",
        "linear unscaled 1 frozen features.3",  # no schedule is left of it
        "frozen a/b",
    )
    study = Study.from_options(merged(SMALL, StudyOptions(strategies=names, seeds=(0,))))
    found = {cell.folder.parent.name: cell.config for cell in study.cells()}
    plans = {name: config.plan for name, config in found.items() if config.freezeout}
    assert plans == {
        "cubic-scaled-0.8-frozen-5": Frozen(5, then=Schedule()),
        "cubic-unscaled-0.8-frozen-5-cached-2-views": Frozen(5, then=Schedule(scale_lr=False)),
        "frozen-features.3": Frozen(up_to="features.3", then=Schedule(1)),
        "frozen-a-b": Frozen(up_to="a/b", then=Schedule(1)),
    }
    assert found["frozen-features.3"].t_0 == 1
    rivals = [cell.folder.parent.name for cell in study.cells() if cell.is_equal_time]
    assert rivals == [
        "cubic-0.8-frozen-5-equal-time",
        "cubic-0.8-frozen-5-cached-2-views-equal-time",
        "frozen-features.3-equal-time",
        "frozen-a-b-equal-time",
    ]
    for strategy in study.arms():
        assert Strategy.parse(strategy.name) == strategy


def test_strategies_that_are_one_are_made_once() -> None:
    names = ("frozen 2", "cubic scaled frozen 2", "linear unscaled 1 frozen 2")
    study = Study.from_options(StudyOptions(strategies=names, t_0=(1.0,)))
    assert [strategy.name for strategy in study.arms()] == ["frozen 2"]


@pytest.mark.parametrize("words", [(), ("--out", "here"), ("--epochs", "1"), ("--seeds", "0")])
def test_a_sweep_of_nothing_in_particular_is_not_begun(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["sweep", *words])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err == (
        "freezeout: say what to train: a TOML file, --preset quick, mini, paper, or at least one "
        "of --models, --datasets and --strategies\n"
    )
    assert list(tmp_path.iterdir()) == []
    found: list[Study] = []
    monkeypatch.setattr(sweep, "sweep", found.append)
    main(["sweep", *words, "--models", "vgg"])
    assert [study.models for study in found] == [("vgg",)]


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
            data_dir=tmp_path / 'a "folder"',
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
        (StudyOptions(strategies=("frozen",)), "strategies has 'frozen'; a strategy is"),
        (StudyOptions(strategies=("frozen 0",)), "frozen must be a number of layers (5), "),
        (StudyOptions(strategies=("frozen 5 cubic scaled",)), "strategies has 'frozen 5 cubic"),
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
        pytest.param(f"lr = 1{'0' * 400}", "lr has a number too large", id="no float"),
        pytest.param(f"lr = 1{'0' * 5000}", "study.toml: ", id="no number"),
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


def test_the_file_that_a_sweep_writes_names_its_data_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Study.from_options(merged(SMALL, StudyOptions(data_dir=Path("data"))))
    file = tmp_path / "sweep.toml"
    file.write_text(study.to_toml())
    assert read_options(file).data_dir == tmp_path / "data"


def test_a_sweeps_own_file_goes_on_in_its_folder_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "moved"
    home.mkdir()
    study = Study.from_options(merged(SMALL, StudyOptions(out=Path("runs/mine"))))
    (home / "sweep.toml").write_text(study.to_toml())
    (home / "sweep.json").write_text("{}")
    found: list[Study] = []
    monkeypatch.setattr(sweep, "sweep", found.append)
    monkeypatch.chdir(tmp_path)
    main(["sweep", "moved/sweep.toml"])
    main(["sweep", "moved/sweep.toml", "--out", "other"])
    (home / "sweep.json").unlink()  # a study that somebody wrote
    main(["sweep", "moved/sweep.toml"])
    assert [each.out for each in found] == [Path("moved"), Path("other"), Path("runs/mine")]


# A sweep, without its processes.


def sweep_of(tmp_path: Path, **options: Any) -> sweep._Sweep:
    """Of ordinary runs of 400 steps and cubic ones, as `write_run` writes them."""
    small = StudyOptions(strategies=("cubic scaled 0.8",), seeds=(0, 1), baselines=(), out=tmp_path)
    study = Study.from_options(merged(merged(SMALL, small), StudyOptions(**options)))
    return sweep._Sweep(study, study.cells(), SweepDisplay(1), sweep._Stop())


def write_finished(folder: Path, **options: Any) -> None:
    (write_run(folder, **options) / "model.safetensors").touch()


def test_the_length_of_an_equal_time_run_is_that_of_any_that_was_begun(tmp_path: Path) -> None:
    """Also of a seed that the study does not have; a damaged folder is no reason to fail."""
    found = sweep_of(tmp_path)
    cell = next(state.cell for state in found.states.values() if state.cell.is_equal_time)
    rival = cell.folder.parent
    (write_run(rival / "seed00", freezeout=False, steps=200) / "config.json").write_text("{")
    write_run(rival / "seed7", freezeout=False, steps=250, finished=False)
    (rival / "seed7.log").touch()
    assert found.equal_time_steps(cell) == 250


def test_times_of_other_hardware_give_no_length(tmp_path: Path) -> None:
    found = sweep_of(tmp_path)
    cell = next(state.cell for state in found.states.values() if state.cell.is_equal_time)
    for folder in cell.waits_for:
        arm = folder.parent.name
        seed = int(folder.name.removeprefix("seed"))
        write_finished(folder, freezeout="cubic" in arm, seed=seed, hardware=arm)
    said = "no run of cubic-scaled-0.8 was made on the hardware of those of ordinary-4-epochs"
    with pytest.raises(FreezeOutError, match=said):
        found.equal_time_steps(cell)


@pytest.mark.parametrize(("slots", "seconds"), [(1, 2 * 11.655 + 7.2), (4, 11.655)])
def test_a_sweep_that_goes_on_knows_what_was_made(
    slots: int, seconds: float, tmp_path: Path
) -> None:
    """Steps took 2.2 times what was measured, and of the second ordinary run a quarter is left."""
    found = sweep_of(tmp_path, equal_time=False, devices=("cpu",) * slots)
    (home,) = found.homes
    write_finished(home / "ordinary-4-epochs/seed0", freezeout=False, step_seconds=0.02)
    write_run(home / "ordinary-4-epochs/seed1", freezeout=False, seed=1, finished=False)
    costs = {"step_costs_seconds": [0.01, 0.005], "steps_per_epoch": 100}
    (home / "step_costs.json").write_text(json.dumps(costs))
    found.take_what_is_done()
    assert found.forecast.off[home] == pytest.approx([2.2])
    # Cubic: 205 whole steps and 195 of half the cost, times 2.2, and 5 seconds to start. Ordinary:
    # a quarter of 8.8, and 5. With a slot for each run, the longest counts.
    assert found.seconds_left() == pytest.approx(seconds)


def test_a_forecast_knows_what_is_frozen_from_the_start(tmp_path: Path) -> None:
    names = ("frozen 1", "frozen body", "frozen 2", "frozen nowhere")
    found = sweep_of(tmp_path, strategies=names, equal_time=False, seeds=(0,))
    (home,) = found.homes
    costs = {"step_costs_seconds": [0.01, 0.004], "steps_per_epoch": 100}
    file = home / "step_costs.json"
    home.mkdir()
    configs = {s.cell.config.frozen: s.cell.config for s in found.states.values()}

    def predicted() -> list[float | None]:
        found.forecast.read_costs(home, file)
        plans = (None, "1", "body", "2", "nowhere")
        return [found.forecast.predicted(home, configs[frozen]) for frozen in plans]

    # As earlier versions wrote it, without the layers' names; the last two runs will fail.
    file.write_text(json.dumps(costs))
    assert predicted() == [pytest.approx(4), pytest.approx(1.6), None, None, None]
    file.write_text(json.dumps(costs | {"layers": [["stem", "body.0"], ["body.1", "head"]]}))
    assert predicted() == [pytest.approx(4), pytest.approx(1.6), None, None, None]
    file.write_text(json.dumps(costs | {"layers": [["stem", "body.0"], ["head"]]}))
    assert predicted()[2] == pytest.approx(1.6)
    for state in found.states.values():  # known of all, or guessed
        assert found.forecast.seconds(state.cell) is None or state.cell.config.frozen != "nowhere"


def test_a_run_goes_on_on_its_slots_device_with_the_sweeps_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freezeout.lab import train

    run = write_run(tmp_path / "run", device="cuda:7", data_dir=Path("gone"))
    configs: list[TrainConfig] = []

    def job(config: TrainConfig, ranks: object) -> None:
        configs.append(config)
        raise FreezeOutError("enough")

    monkeypatch.setattr(train, "Job", job)
    for begin in (
        lambda: _train(replace(CONFIG, out=run, device="cpu", data_dir=tmp_path)),
        lambda: train.resume(run),
    ):
        with pytest.raises(FreezeOutError, match="enough"):
            begin()
    assert [(c.device, c.data_dir) for c in configs] == [
        ("cpu", tmp_path),
        ("cuda:7", Path("gone")),
    ]
    # What its checkpoints are compared with stays.
    *_, identity = train._configuration(run, "cpu", tmp_path)
    assert (identity["device"], identity["data_dir"]) == ("cuda:7", "gone")


def test_a_run_that_goes_on_elsewhere_is_of_both_machines(tmp_path: Path) -> None:
    """So its steps are not set against those of either."""
    from freezeout.lab import train
    from freezeout.lab.run_folder import RunFolder

    run = write_run(tmp_path / "run", hardware="slow")
    for now in ("slow", "fast", "fast", "slow"):
        train._note_hardware(RunFolder(run), now)
    assert read_run(run).hardware == "slow; then fast"


def test_a_run_that_was_begun_before_an_option_was_there_goes_on(tmp_path: Path) -> None:
    from freezeout.lab import train

    run = write_run(tmp_path / "run", validate_every=7)
    saved = json.loads((run / "config.json").read_text())
    del saved["config"]["validate_every"]
    (run / "config.json").write_text(json.dumps(saved))
    config, _, _, identity = train._configuration(run, None, None)
    assert (config.validate_every, read_run(run).values["validate_every"]) == (1, 1)
    assert "validate_every" not in identity  # as in its checkpoints
