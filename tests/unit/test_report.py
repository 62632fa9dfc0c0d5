"""The report: what it compares, what it concludes, what it leaves out, and the page."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text
from scipy import stats

from freezeout.cli import main
from freezeout.errors import CheckpointError, DataError
from freezeout.lab.report import style, write_report
from freezeout.lab.report.compare import Comparison, Group, difference, group_runs
from freezeout.lab.report.figures import (
    draw_settings,
    error_against_epochs,
    error_bars,
    savings_pairs,
    schedule_curves,
    shown_schedules,
    timeline,
)
from freezeout.lab.runs import find_run_folders, read_run
from freezeout.schedule import Schedule
from tests import reference
from tests.run_folders import write_run, write_study

FIGURES = {"error_bars", "error_against_time", "error_against_epochs", "timeline", "schedules"}
SAVINGS = {"basis": "measured", "predicted_share": 0.2, "measured_share": 0.25, "depths": []}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not written, which takes most of a report's time."""
    monkeypatch.setattr(style, "save", lambda figure, path, title: f"<svg>{title}</svg>")


def groups(home: Path) -> list[Group]:
    return group_runs([read_run(path) for path in find_run_folders(home)])


def write_undecided(home: Path) -> None:
    """Seven arms, of whose difference to an ordinary run as long two seeds show nothing."""
    for seed, error in enumerate((0.199, 0.201)):
        write_run(home / f"ordinary/seed{seed}", freezeout=False, seed=seed)
        for tenths in range(1, 8):
            write_run(home / f"{tenths}/seed{seed}", t_0=tenths / 10, seed=seed, error=error)


def only(home: Path) -> tuple[Group, Comparison]:
    (group,) = groups(home)
    (comparison,) = group.comparisons
    return group, comparison


def numbers(home: Path) -> Any:
    page, _ = write_report(home)
    return json.loads((page.parent / "report.json").read_text())


# Figure 1.


@pytest.mark.parametrize("scale_lr", [True, False])
@pytest.mark.parametrize(("how_scale", "power"), [("linear", 1), ("squared", 2), ("cubic", 3)])
@pytest.mark.parametrize("t_0", ["0.5", "0.8", "0.1"])
def test_the_curves_of_figure_1_are_the_papers(
    t_0: str, how_scale: Any, power: int, scale_lr: bool
) -> None:
    layers, steps = 5, 500
    curves = schedule_curves(Schedule(float(t_0), how_scale, scale_lr), layers, steps)
    ends = reference.freeze_iterations(Fraction(t_0), power, layers, steps)
    expected = [
        [reference.learning_rate(1, s, end, steps, scale_lr) for s in range(steps + 1)]
        for end in ends
    ]
    assert len(curves) == layers
    for curve, by_hand, end in zip(curves, expected, ends, strict=True):
        # Equal but for the order of a few floating-point operations.
        assert curve == pytest.approx(by_hand, rel=1e-12, abs=1e-15)
        assert curve[0] == pytest.approx(steps / end if scale_lr else 1)
        assert curve[end - 1] > 0
        assert curve[end:] == [0] * (steps + 1 - end)


def test_a_strategy_looks_alike_in_every_report_and_no_two_look_alike_in_one() -> None:
    plain = ("cubic scaled", "linear unscaled")
    cached = tuple(f"cubic scaled cached {n} views" for n in (2, 4, 8))
    found = style.looks((*plain, *cached))
    assert len({look.colour for look in found.values()}) == 5
    assert len({look.marker for look in found.values()}) == 5
    assert {name: found[name] for name in plain} == style.looks(plain)
    assert found["cubic scaled"] == style.looks(("cubic scaled",))["cubic scaled"]
    # The plain one's colour stays free for it, though it is not in this report.
    assert found["cubic scaled"] not in style.looks(cached).values()


# Comparisons.


def test_mean_sd_and_time_saved(tmp_path: Path) -> None:
    group, comparison = only(write_study(tmp_path))
    labels = ["ordinary, full length", "ordinary, 300 steps", "cubic scaled 0.8"]
    assert [arm.label for arm in group.arms] == labels
    full, rival, arm = group.arms
    assert (comparison.arm, comparison.rival, group.full) == (arm, rival, full)
    errors = [0.2, 0.202, 0.204]
    assert arm.mean == pytest.approx(mean(errors))
    assert arm.sd == pytest.approx(stdev(errors))
    assert (full.time_saved, rival.time_saved) == (0, 0.25)
    assert arm.time_saved == pytest.approx(0.25)
    assert arm.seconds == pytest.approx(300 * 0.01 * 1.1)


def test_the_interval_is_students_over_pairs_of_seeds(tmp_path: Path) -> None:
    group, comparison = only(write_study(tmp_path, seeds=(0, 1, 2, 7)))
    _, rival, arm = group.arms
    each = [arm.errors[seed] - rival.errors[seed] for seed in (0, 1, 2, 7)]
    expected = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    found = comparison.to_rival
    assert found is not None
    assert found.is_paired
    assert found.n == 4
    assert found.mean == pytest.approx(mean(each))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_seeds_that_do_not_match_are_compared_by_welch(tmp_path: Path) -> None:
    first, second = (0.20, 0.21, 0.25), (0.18, 0.181, 0.20, 0.19)
    for seed, error in enumerate(first):
        write_run(tmp_path / f"a{seed}", seed=seed, error=error)
    for seed, error in enumerate(second, 10):
        write_run(tmp_path / f"b{seed}", seed=seed, error=error, freezeout=False)
    ordinary, arm = groups(tmp_path)[0].arms
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = difference(arm, ordinary)
    assert found is not None
    assert not found.is_paired
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_it_concludes_what_the_interval_allows(tmp_path: Path) -> None:
    worse = only(write_study(tmp_path / "worse", worse=0.01))[1]
    better = only(write_study(tmp_path / "better", worse=-0.01))[1]
    open_ = only(write_study(tmp_path / "open", worse=0.0))[1]
    assert "freezing does not pay here" in worse.sentence
    assert "It saves 25.0 % of the ordinary run's time." in worse.sentence
    assert "1.10 points higher" in worse.sentence
    assert "freezing pays here" in better.sentence
    assert "0.90 points lower" in better.sentence
    assert "No difference to an ordinary run of the same time can be shown with 3 seeds" in (
        open_.sentence
    )
    shown = [c.to_rival.shows for c in (worse, better, open_) if c.to_rival]
    assert shown == ["worse", "better", "nothing"]


def test_one_seed_shows_nothing(tmp_path: Path) -> None:
    _, comparison = only(write_study(tmp_path, seeds=(0,)))
    assert comparison.to_rival is not None
    assert (comparison.to_rival.low, comparison.to_rival.shows) == (None, "nothing")
    assert "no interval can be given, since there is one seed" in comparison.sentence


def test_equal_differences_claim_no_certainty(tmp_path: Path) -> None:
    """Two images of 1,600 in every seed; in floating point they differ in the last place."""
    pairs = [(0.1175, 0.11625), (0.113125, 0.111875), (0.10875, 0.1075)]
    assert len({error - usual for error, usual in pairs}) > 1
    for seed, (error, usual) in enumerate(pairs):
        write_run(tmp_path / f"ordinary{seed}", seed=seed, error=usual, freezeout=False)
        write_run(tmp_path / f"arm{seed}", seed=seed, error=error)
    _, comparison = only(tmp_path)
    assert comparison.to_rival is not None
    assert (comparison.to_rival.low, comparison.to_rival.shows) == (None, "nothing")


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_baseline_is_said_to_have_none(tmp_path: Path) -> None:
    write_run(tmp_path / "alone")
    group, comparison = only(tmp_path)
    assert "There is no ordinary run to compare with" in comparison.sentence
    assert any("There is no ordinary run here" in note for note in group.notes)
    page, _ = write_report(tmp_path)
    assert "without an ordinary run, time saved is unknown" in page.read_text()


def test_an_arm_without_a_rival_is_told_how_to_make_one(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False)
    write_run(tmp_path / "arm", step_seconds=(0.01, 0.01, 0.005, 0.005))
    _, comparison = only(tmp_path)
    assert comparison.rival is None
    assert "--no-freezeout --steps 300" in comparison.sentence


def test_an_ordinary_run_within_3_percent_of_the_time_is_the_rival(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False)
    write_run(tmp_path / "arm", step_seconds=(0.01, 0.01, 0.005, 0.005))
    write_run(tmp_path / "near", freezeout=False, steps=308)
    assert only(tmp_path)[1].rival is not None
    (tmp_path / "near").rename(tmp_path.with_name("elsewhere"))
    write_run(tmp_path / "far", freezeout=False, steps=310)
    assert only(tmp_path)[1].rival is None


@pytest.mark.usefixtures("undrawn")
def test_different_data_sets_are_never_mixed(tmp_path: Path) -> None:
    write_study(tmp_path / "ten")
    write_run(tmp_path / "digits", dataset="digits", freezeout=False, error=0.01)
    write_run(tmp_path / "other", freezeout=False, error=0.01, validate="valid")
    titles = [group.title for group in groups(tmp_path)]
    assert len(titles) == 3
    assert titles.count("WRN-16-1 on handwritten digits") == 1
    assert sum("error on valid" in title for title in titles) == 1
    page, _ = write_report(tmp_path)
    assert all(title in page.read_text() for title in titles)


def test_a_size_left_out_is_the_networks_own(tmp_path: Path) -> None:
    write_run(tmp_path / "given", model="vgg", depth=16, widen_factor=None, freezeout=False)
    write_run(tmp_path / "left_out", model="vgg", depth=None, widen_factor=None)
    assert [group.title for group in groups(tmp_path)] == ["VGG-16 on CIFAR-10"]


@pytest.mark.usefixtures("undrawn")
def test_different_hardware_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False, hardware="fast")
    write_run(tmp_path / "arm", hardware="slow", step_seconds=(0.01, 0.01, 0.005, 0.005))
    write_run(tmp_path / "near", freezeout=False, steps=300, hardware="slow")
    group, comparison = only(tmp_path)
    assert any("different hardware (fast; slow)" in note for note in group.notes)
    assert (comparison.arm.time_saved, comparison.rival) == (None, None)
    assert comparison.sentence == (
        "It was made on other hardware than the ordinary runs, so the time it saved is unknown."
    )
    page, _ = write_report(tmp_path)
    assert comparison.sentence in page.read_text()


def test_a_disturbed_machine_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "quiet/run", freezeout=False, step_seconds=(0.010, 0.011, 0.01, 0.0105))
    write_run(tmp_path / "loud/run", freezeout=False, step_seconds=(0.010, 0.011, 0.02, 0.02))
    (quiet,), (loud,) = groups(tmp_path / "quiet"), groups(tmp_path / "loud")
    assert quiet.notes == ()
    assert "took 94 % longer in some epochs" in loud.notes[0]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False)
    write_run(tmp_path / "again", freezeout=False)
    (group,) = groups(tmp_path)
    assert [len(arm.runs) for arm in group.arms] == [1]
    assert any("made twice" in note for note in group.notes)


# Which runs are compared.


def test_a_difference_over_fewer_seeds_says_so(tmp_path: Path) -> None:
    write_study(tmp_path)
    shutil.rmtree(tmp_path / "rival/seed2")
    group, comparison = only(tmp_path)
    assert comparison.to_rival is not None
    assert comparison.to_rival.n == 2
    (note,) = group.notes
    assert note == (
        "The seeds of cubic scaled 0.8 are not those of “ordinary, 300 steps”: differences to it "
        "are over those that both have, 0, 1."
    )


@pytest.mark.usefixtures("undrawn")
def test_a_difference_over_fewer_seeds_has_its_own_n(tmp_path: Path) -> None:
    page, _ = write_report(write_study(tmp_path))
    assert ">n=" not in page.read_text()
    shutil.rmtree(tmp_path / "rival/seed2")
    page, _ = write_report(tmp_path)
    assert page.read_text().count(">n=2<") == 1


@pytest.mark.usefixtures("undrawn")
def test_a_longer_ordinary_run_is_not_the_full_length(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_run(tmp_path / "long", freezeout=False, epochs=8)
    group, comparison = only(tmp_path)
    labels = [arm.label for arm in group.arms if not arm.freezes]
    assert labels == ["ordinary, 800 steps", "ordinary, full length", "ordinary, 300 steps"]
    assert group.full is group.arms[1]
    assert group.arms[0].time_saved == -1
    assert "It saves 25.0 % of the ordinary run's time." in comparison.sentence
    page, _ = write_report(tmp_path)
    assert "−100.0 %" in page.read_text()


def test_const_time_is_beside_the_length_that_was_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False)
    write_run(tmp_path / "long", freezeout=False, epochs=6)
    write_run(tmp_path / "arm", const_time=True, total_steps=600)
    group, comparison = only(tmp_path)
    assert group.full is not None
    assert group.full.steps == 400
    assert comparison.rival is group.arms[0]
    assert "It costs 50.0 % more time." in comparison.sentence


@pytest.mark.usefixtures("undrawn")
def test_arms_asked_for_other_lengths_are_groups_of_their_own(tmp_path: Path) -> None:
    for epochs in (2, 4, 10, 12):
        write_run(tmp_path / f"ordinary{epochs}", freezeout=False, epochs=epochs)
    write_run(tmp_path / "short", epochs=4)
    write_run(tmp_path / "long", epochs=10)
    assert [(group.title, [arm.label for arm in group.arms]) for group in groups(tmp_path)] == [
        (
            "WRN-16-1 on CIFAR-10, 4 epochs",
            ["ordinary, full length", "ordinary, 200 steps", "cubic scaled 0.8"],
        ),
        (
            "WRN-16-1 on CIFAR-10, 10 epochs",
            [
                "ordinary, 1,200 steps",
                "ordinary, full length",
                "ordinary, 400 steps",
                "ordinary, 200 steps",
                "cubic scaled 0.8",
            ],
        ),
    ]
    page, _ = write_report(tmp_path)
    assert "· 6 runs<" in page.read_text()  # each counted once


def test_of_rivals_that_are_near_the_one_with_the_same_seeds_is_taken(tmp_path: Path) -> None:
    write_study(tmp_path)
    for path in (tmp_path / "rival").iterdir():
        shutil.rmtree(path)
    write_run(tmp_path / "rival/seed9", freezeout=False, steps=300, seed=9)
    for seed in (0, 1):
        write_run(tmp_path / f"other/seed{seed}", freezeout=False, steps=304, seed=seed)
    _, comparison = only(tmp_path)
    assert comparison.rival is not None
    assert comparison.rival.steps == 304


def test_scaled_and_unscaled_arms_have_one_time(tmp_path: Path) -> None:
    """Their layers freeze at the same steps, and a sweep makes one rival for both."""
    write_run(tmp_path / "ordinary", freezeout=False)
    write_run(tmp_path / "scaled", step_seconds=(0.01, 0.01, 0.005, 0.005))
    write_run(tmp_path / "unscaled", scale_lr=False, step_seconds=(0.01, 0.01, 0.006, 0.006))
    write_run(tmp_path / "other", how_scale="linear")
    (group,) = groups(tmp_path)
    found = {arm.label: arm.ordinary_steps for arm in group.freezing}
    assert found == {
        "cubic scaled 0.8": pytest.approx(310),
        "cubic unscaled 0.8": pytest.approx(310),
        "linear scaled 0.8": pytest.approx(400),
    }


def test_caches_in_different_folders_are_one_arm(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False)
    for seed in (0, 1):
        write_run(tmp_path / f"arm{seed}", cache=f"/disk/cache{seed}", seed=seed)
    _, comparison = only(tmp_path)
    assert comparison.arm.label == "cubic scaled 0.8 cached (folder)"
    assert len(comparison.arm.runs) == 2


# Bad input.


def damaged(home: Path) -> dict[str, str]:
    """A finished study, and beside it runs that cannot be used: what each must be said to be."""
    write_study(home)
    write_run(home / "stopped", seed=9, finished=False)
    half = write_run(home / "half", seed=9) / "metrics.jsonl"
    half.write_text(half.read_text()[:-30])
    odd = write_run(home / "odd", seed=9) / "metrics.jsonl"
    odd.write_text(odd.read_text().replace('"seconds": ', '"seconds": -'))
    (write_run(home / "binary", seed=9) / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (write_run(home / "foreign", seed=9) / "config.json").write_text("[]")
    cut = write_run(home / "cut", seed=9) / "config.json"
    cut.write_text(cut.read_text()[:100])
    wrong = write_run(home / "wrong", seed=9) / "config.json"
    wrong.write_text(wrong.read_text().replace('"t_0": 0.8', '"t_0": 8'))
    (write_run(home / "unstarted", seed=9) / "metrics.jsonl").unlink()
    endless = write_run(home / "endless", seed=9) / "metrics.jsonl"
    endless.write_text(endless.read_text().replace('"step": 100', '"step": 1e999'))
    long = write_run(home / "long", seed=9) / "config.json"
    long.write_text(long.read_text().replace('"total_steps": 400', '"total_steps": Infinity'))
    huge = write_run(home / "huge", seed=9) / "config.json"
    huge.write_text(huge.read_text().replace('"lr": 0.1', f'"lr": 1{"0" * 400}'))
    for name, share in (("all", "Infinity"), ("none", "NaN")):
        saved = write_run(home / name, seed=9, savings=SAVINGS) / "savings.json"
        saved.write_text(saved.read_text().replace("0.25", share))
    (home / "weird").mkdir()
    (home / "weird/config.json").write_text('{"name": "no run"}')
    return {
        "stopped": "not finished, 300 of 400 steps",
        "half": "metrics.jsonl, line 4 cannot be read",
        "odd": "metrics.jsonl, line 1 cannot be read: it has an impossible seconds",
        "binary": "metrics.jsonl cannot be read: it is no text",
        "foreign": "config.json holds no configuration",
        "cut": "config.json cannot be read",
        "wrong": "config.json is not a run's configuration: t_0 must be in (0, 1], got 8",
        "unstarted": "not finished, 0 of 400 steps",
        "endless": "metrics.jsonl, line 1 cannot be read: cannot convert float infinity",
        "long": "config.json is not a run's configuration: cannot convert float infinity",
        "huge": "config.json is not a run's configuration: int too large to convert to float",
        "all": "savings.json holds no savings",
        "none": "savings.json holds no savings",
        "weird": "config.json is not a run's configuration: lacks 'config'",
    }


@pytest.mark.usefixtures("undrawn")
def test_runs_that_cannot_be_used_are_named_and_the_rest_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = damaged(tmp_path / "mixed")
    write_study(tmp_path / "clean")
    main(["report", str(tmp_path / "mixed")])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        (line,) = [line for line in lines if line.startswith(f"freezeout: warning: {name}: ")]
        assert reason in line
    mixed = json.loads((tmp_path / "mixed/report/report.json").read_text())
    assert mixed["groups"] == numbers(tmp_path / "clean")["groups"]
    page = (tmp_path / "mixed/report/index.html").read_text()
    assert "Not used" in page
    assert page.count("<li>") >= len(expected)


@pytest.mark.parametrize("content", ["nothing", "no folder", "unfinished"])
def test_a_folder_without_a_finished_run_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    if content != "no folder":
        home.mkdir()
    if content == "unfinished":
        write_run(home / "run", finished=False)
    with pytest.raises(SystemExit) as end:
        main(["report", str(home)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("freezeout: ")
    assert str(home) in line
    reasons = {
        "nothing": "holds no run folder",
        "no folder": "is no folder",
        "unfinished": "no finished run; run: not finished, 300 of 400 steps",
    }
    assert reasons[content] in line
    assert not (home / "report").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_a_sweep_could_not_make_is_on_the_page(tmp_path: Path) -> None:
    write_study(tmp_path)
    states = [
        {"run": "cubic/seed0", "status": "finished", "error": None},
        {"run": "cubic/seed8", "status": "failed", "error": "the loss is <nan>"},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": states}))
    page, left_out = write_report(tmp_path)
    assert left_out == ["cubic/seed8: failed: the loss is <nan>"]
    assert "the loss is &lt;nan&gt;" in page.read_text()


@pytest.mark.usefixtures("undrawn")
def test_runs_that_measured_no_error_are_reported_without(tmp_path: Path) -> None:
    write_run(tmp_path / "ordinary", freezeout=False, error=None, validate="none")
    write_run(tmp_path / "arm", error=None, validate="none")
    page, _ = write_report(tmp_path)
    assert "no error was measured" in page.read_text()
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page.read_text(), flags=re.DOTALL).lower()


@pytest.mark.usefixtures("undrawn")
def test_a_failed_run_is_named_once_with_what_it_left(tmp_path: Path) -> None:
    home = write_study(tmp_path / "sweep")
    write_run(home / "stopped/seed8", seed=8, finished=False)
    (write_run(home / "damaged/seed8", seed=8) / "config.json").write_text("[]")
    (home / "sweep.json").write_text(
        json.dumps(
            {
                "runs": [
                    {"run": f"{arm}/seed{seed}", "status": "failed", "error": f"{arm} went wrong"}
                    for arm, seed in (("gone", 8), ("cubic", 0), ("stopped", 8), ("damaged", 8))
                ]
            }
        )
    )
    _, left_out = write_report(tmp_path)
    assert left_out == [
        "sweep/damaged/seed8: config.json holds no configuration; failed: damaged went wrong",
        "sweep/stopped/seed8: not finished, 300 of 400 steps; failed: stopped went wrong",
        "sweep/gone/seed8: failed: gone went wrong",
    ]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("question", ["iterdir", "is_file"])
def test_a_folder_that_cannot_be_looked_into_is_named(
    question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path)
    (tmp_path / "locked").mkdir()
    answer = getattr(Path, question)

    def refuse(path: Path) -> Any:
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied")
        return answer(path)

    monkeypatch.setattr(Path, question, refuse)
    _, (line,) = write_report(tmp_path)
    assert line.startswith("locked: config.json cannot be read: ")


@pytest.mark.usefixtures("undrawn")
def test_text_that_is_no_unicode_is_written_out(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_run(home / os.fsdecode(b"run\xff"), freezeout=False, hardware="processor \ud800")
    write_run(home / "arm", dataset="\ud801")
    page, _ = write_report(home)
    text = page.read_text(encoding="utf-8")
    assert all(written in text for written in (r"run\udcff", r"processor \ud800", r"\ud801"))


# The page.


class Page(HTMLParser):
    """What a page has in it: tags, ids, and everything that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href", "data", "action") and value is not None:
                self.loads.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's folder, of a study with savings."""
    home = tmp_path_factory.mktemp("study")
    write_study(home)
    write_run(home / "linear", how_scale="linear", t_0=0.5, scale_lr=False, savings=SAVINGS)
    return write_report(home)[0].parent


def test_the_page_is_whole_in_itself(reported: Path) -> None:
    text = (reported / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags["svg"] == len(FIGURES) + 1  # and the savings'
    assert page.tags["script"] == 0
    assert [load for load in page.loads if not load.startswith(("#", "data:,"))] == []
    assert re.findall(r"url\((?!#)|@import", text) == []
    assert [name for name, count in page.ids.items() if count > 1] == []
    for used in re.findall(r"""(?:url\(#|href="#)([^)"]+)""", text):
        assert used in page.ids


def test_the_page_follows_light_dark_and_paper(reported: Path) -> None:
    text = (reported / "index.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    # No colour is fixed: all are the page's.
    assert re.findall(r"#[0-9a-fA-F]{6}\b", figures) == []
    assert set(re.findall(r"var\((--[a-z]+)\)", figures)) >= {"--paper", "--ink", "--blue"}


def test_every_figure_is_a_file_too(reported: Path) -> None:
    for name in [*FIGURES, "predicted_against_measured"]:
        root = ElementTree.parse(reported / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert "prefers-color-scheme: dark" in (reported / f"{name}.svg").read_text()
        assert (reported / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_report(tmp_path: Path) -> None:
    write_study(tmp_path / "home")
    first, second = (write_report(tmp_path / "home", tmp_path / n)[0].parent for n in "ab")
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.usefixtures("undrawn")
def test_without_savings_a_sentence_stands_in_for_the_figure(tmp_path: Path) -> None:
    page, _ = write_report(write_study(tmp_path))
    assert "the runs hold no savings.json with a measured saving" in page.read_text()
    assert not (page.parent / "predicted_against_measured.svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_report_does_not_read_itself_nor_name_other_folders(tmp_path: Path) -> None:
    home = write_study(tmp_path / "home")
    first = numbers(home)
    assert numbers(home) == first
    assert str(tmp_path) not in (home / "report/index.html").read_text()
    assert str(tmp_path) not in (home / "report/report.json").read_text()


@pytest.mark.usefixtures("undrawn")
def test_one_run_folder_is_a_report_as_well(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", freezeout=False)
    page, left_out = write_report(run)
    assert left_out == []
    assert "WRN-16-1 on CIFAR-10" in page.read_text()


@pytest.mark.usefixtures("undrawn")
def test_cached_arms_are_told_apart_by_name(tmp_path: Path) -> None:
    """And a slower step in a later panel does not leave the chart."""
    write_run(tmp_path / "full", freezeout=False)
    write_run(tmp_path / "plain")
    write_run(tmp_path / "auto", cache="auto", views=1)
    write_run(tmp_path / "ram", cache="ram", views=4, step_seconds=(0.03, 0.03, 0.01, 0.01))
    (group,) = groups(tmp_path)
    assert set(group.strategies) == {
        "cubic scaled",
        "cubic scaled cached 1 view",
        "cubic scaled cached (ram) 4 views",
    }
    lowest = timeline(group).axes[-1]
    assert lowest.get_ylim()[1] >= 30
    assert lowest.get_ylim()[0] == 0


@pytest.mark.parametrize("views", [(1, 2, 4, 8), (1, 2)])
def test_titles_of_panels_beside_each_other_do_not_touch(
    tmp_path: Path, views: tuple[int, ...]
) -> None:
    write_run(tmp_path / "full", freezeout=False)
    write_run(tmp_path / "plain")
    for count in views:
        write_run(tmp_path / str(count), cache="auto", views=count)
    (group,) = groups(tmp_path)
    for draw in (timeline, error_against_epochs):
        with draw_settings():
            figure = draw(group)
            figure.canvas.draw()
            texts = figure.findobj(Text)
            titles = [text for text in texts if text.get_text().startswith("cubic scaled")]
            boxes = [title.get_window_extent() for title in titles]
        assert len(boxes) == 1 + len(views)
        assert all(box.x1 < figure.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.usefixtures("undrawn")
def test_many_undecided_arms_are_told_in_one_sentence(tmp_path: Path) -> None:
    write_undecided(tmp_path)
    page, _ = write_report(tmp_path)
    assert "7 of 7 arms" in page.read_text()
    assert page.read_text().count('class="tag') == 1


@pytest.mark.usefixtures("undrawn")
def test_an_arm_without_an_interval_is_told_by_itself(tmp_path: Path) -> None:
    write_undecided(tmp_path)
    write_run(tmp_path / "alone", t_0=0.8, step_seconds=(0.01, 0.01, 0.005, 0.005))
    write_run(tmp_path / "once", t_0=0.9)
    page, _ = write_report(tmp_path)
    assert "7 of 9 arms" in page.read_text()
    assert page.read_text().count('class="tag') == 3
    assert "make one with --no-freezeout --steps 300." in page.read_text()
    assert "no interval can be given, since there is one seed." in page.read_text()


def test_figures_have_names_of_their_own_and_earlier_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sketch(figure: object, path: Path, title: str) -> str:
        path.with_suffix(".svg").touch()
        path.with_suffix(".png").touch()
        return "<svg></svg>"

    monkeypatch.setattr(style, "save", sketch)
    home = tmp_path / "home"
    write_run(home / "all", freezeout=False)
    for images in (10_000, 20_000):
        write_run(home / f"part{images}", freezeout=False, images=images)
    assert sum("first 10,000 images" in group.title for group in groups(home)) == 1
    first = numbers(home)["figures"]
    assert len(first) == len(set(first)) >= 3 * 2 * 2
    report = home / "report"
    assert {path.name for path in report.iterdir()} == {*first, "index.html", "report.json"}

    # What the report did not write, or could not have, is left alone.
    for name in ("../outside.png", "notes.txt", "mine.png"):
        (report / name).touch()
    found = json.loads((report / "report.json").read_text())
    found["figures"] += ["../outside.png", "notes.txt", ".."]
    (report / "report.json").write_text(json.dumps(found))
    for images in (10_000, 20_000):
        shutil.rmtree(home / f"part{images}")
    second = numbers(home)["figures"]
    assert not {*first} & {*second}
    assert {path.name for path in report.iterdir()} == {
        *second,
        "index.html",
        "report.json",
        "notes.txt",
        "mine.png",
    }
    assert (home / "outside.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_numbers_are_those_of_the_run_folders(tmp_path: Path) -> None:
    found = numbers(write_study(tmp_path))
    (group,) = found["groups"]
    runs = [run for arm in group["arms"] for run in arm["runs"]]
    assert len(runs) == 9
    for run in runs:
        rows = (tmp_path / run["run"] / "metrics.jsonl").read_text().splitlines()
        assert run["error"] == json.loads(rows[-1])["valid_error"]
        assert math.isclose(run["seconds"], sum(json.loads(row)["seconds"] for row in rows))


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from freezeout.cli import main\n"
        "main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    home = write_study(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", code, "report", str(home)], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_data_error_is_what_a_library_user_gets(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_report(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_arms_with_layers_frozen_from_the_start(tmp_path: Path) -> None:
    """Each arm has a name of its own; where the others only anneal, the schedule is no matter."""
    write_run(tmp_path / "full", freezeout=False)
    write_run(tmp_path / "plain")
    write_run(tmp_path / "two", frozen="2", step_seconds=0.006)
    write_run(tmp_path / "both", frozen="2", cache="auto", views=4)
    for seed, how_scale in enumerate(("cubic", "linear")):
        write_run(tmp_path / how_scale, frozen="3", t_0=1, how_scale=how_scale, seed=seed)
    (group,) = groups(tmp_path)
    assert [(arm.label, arm.strategy, len(arm.runs)) for arm in group.freezing] == [
        ("cubic scaled 0.8", "cubic scaled", 1),
        ("cubic scaled 0.8 frozen 2", "cubic scaled frozen 2", 1),
        ("cubic scaled 0.8 frozen 2 cached 4 views", "cubic scaled frozen 2 cached 4 views", 1),
        ("frozen 3", "frozen 3", 2),
    ]
    two = next(arm for arm in group.freezing if arm.strategy == "cubic scaled frozen 2")
    assert two.time_saved == pytest.approx(0.4)
    # From the beginning of the run on, two layers are frozen.
    with draw_settings():
        panels = timeline(group).axes[: len(group.strategies)]
        bars = [tick.get_text() for tick in error_bars(group).axes[0].get_yticklabels()]
    starts = [next(iter(panel.lines[0].get_ydata())) for panel in panels]  # type: ignore[arg-type]
    assert starts == [0, 2, 2, 3]
    assert "cubic scaled frozen 2, t₀ = 0.8" in bars
    assert "frozen 3" in bars
    # Figure 1 is of layers that freeze one after another.
    assert list(shown_schedules([run for arm in group.freezing for run in arm.runs])) == [
        "cubic scaled 0.8"
    ]
    page, left_out = write_report(tmp_path)
    assert left_out == []
    assert "cubic scaled 0.8 frozen 2 cached 4 views" in page.read_text()


def test_savings_against_predicted_full_steps_are_not_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "full", freezeout=False)
    for name, how in (("old", {}), ("new", {"full_steps": "measured"})):
        write_run(tmp_path / name, seed=len(how), savings=SAVINGS | how)
    write_run(tmp_path / "two", frozen="2", savings=SAVINGS | {"full_steps": "predicted"})
    (group,) = groups(tmp_path)
    assert [arm.label for arm, _, _ in savings_pairs(group)] == ["cubic scaled 0.8"] * 2


def test_a_folder_whose_frozen_layers_cannot_be_is_left_out(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", frozen="2") / "config.json"
    config.write_text(config.read_text().replace('"frozen": "2"', '"frozen": "0"'))
    with pytest.raises(CheckpointError, match=r"not a run's configuration: frozen must be .*'0'"):
        read_run(tmp_path / "run")
