"""`freezeout report`: a page, figures and numbers about the runs in a folder.

    freezeout report runs/quick

Only run folders are read (`runs.py`), and, where a sweep made them, which of them failed; torch is
not loaded. Written are

    index.html       the page, whole in itself
    report.json      every number on it
    *.svg, *.png     the figures
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from ...errors import CheckpointError, DataError
from ..runs import CONFIG, Run, encodable, find_run_folders, read_run
from ..study import STATE
from .compare import Comparison, Group, group_runs

__all__ = ["write_report"]

PAGE, NUMBERS = "index.html", "report.json"


def write_report(folder: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the report of the runs in `folder` into `out` (FOLDER/report if None).

    Returns:
        The page, and what was left out and why: damaged and unfinished runs, and failed ones.
    Raises:
        DataError: there is no finished run.
    """
    from . import figures  # matplotlib takes a second to load

    runs, left_out = _read(folder)
    groups = group_runs(runs)
    out = folder / "report" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    with figures.draw_settings():
        shown = [
            (group, _draw(group, out, prefix, written))
            for group, prefix in zip(groups, _prefixes(groups), strict=True)
        ]
        schedules = _draw_schedules(runs, out, written)
    _remove_earlier_figures(out, written)
    # The page does not name a folder outside of the one it is about.
    name = folder.name or folder.resolve().name
    from .page import page

    write_atomically(out / PAGE, encodable(page(name, shown, schedules, left_out, folder)))
    numbers = _numbers(groups, folder, left_out) | {"figures": written}
    write_atomically(out / NUMBERS, json.dumps(numbers, indent=2) + "\n")
    return out / PAGE, left_out


def _read(folder: Path) -> tuple[list[Run], list[str]]:
    """Finished runs, and a line about each that is not used."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    runs: list[Run] = []
    left_out: list[str] = []
    failed = _failed(folder)
    for path in find_run_folders(folder):
        name = str(path.relative_to(folder)) if path != folder else path.name
        error = failed.pop(path, None)
        why = "" if error is None else f"; failed: {error}"
        try:
            run = read_run(path)
        except CheckpointError as damage:
            left_out.append(f"{name}: {damage}{why}".replace(f"{path}/", ""))
            continue
        if run.is_finished:
            runs.append(run)
        else:
            done = run.epochs[-1].step if run.epochs else 0
            left_out.append(f"{name}: not finished, {done:,} of {run.total_steps:,} steps{why}")
    left_out += [f"{path.relative_to(folder)}: failed: {why}" for path, why in failed.items()]
    if not runs:
        said = f"; {left_out[0]}" if left_out else ""
        none = f"no run folder (none with a {CONFIG})" if not said else "no finished run"
        raise DataError(f"{folder} holds {none}{said}")
    return runs, left_out


def _failed(folder: Path) -> dict[Path, str]:
    """Of each run that a sweep in the folder, or below it, could not make: its error."""
    failed: dict[Path, str] = {}
    sweeps = [Path(base) for base, _, names in os.walk(folder) if STATE in names]
    for home in sorted(sweeps):
        try:
            states = json.loads((home / STATE).read_text())["runs"]
            found = {home / s["run"]: str(s["error"]) for s in states if s["status"] == "failed"}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        failed |= {path: error for path, error in found.items() if path.is_relative_to(folder)}
    return failed


def _prefixes(groups: Sequence[Group]) -> list[str]:
    """What the names of each group's files begin with: no two are alike."""
    if len(groups) == 1:
        return [""]
    prefixes: list[str] = []
    for number, group in enumerate(groups, 1):
        words = "".join(c if c.isascii() and c.isalnum() else "-" for c in group.title.lower())
        prefix = "-".join(filter(None, words.split("-")))[:80] + "-"
        while prefix in prefixes:
            prefix += f"{number}-"
        prefixes.append(prefix)
    return prefixes


def _save(figure: Any, path: Path, label: str, written: list[str]) -> str:
    """The figure as SVG; its files' names are added to `written`."""
    from . import style

    written += [f"{path.name}.svg", f"{path.name}.png"]
    return style.save(figure, path, label)


def _remove_earlier_figures(out: Path, written: Sequence[str]) -> None:
    """Those that an earlier report wrote here and this one did not."""
    try:
        names = json.loads((out / NUMBERS).read_text())["figures"]
        earlier = [Path(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in earlier:
        is_plain = name.parent == Path() and name.suffix in (".svg", ".png")
        if is_plain and str(name) not in written and (out / name).is_file():
            (out / name).unlink()


def _draw(group: Group, out: Path, prefix: str, written: list[str]) -> list[Any]:
    """The figures of a group, in the page's order, written as files on the way."""
    from . import figures
    from .page import Shown

    has_errors = any(arm.errors for arm in group.arms)
    shown: list[Any] = []

    def add(
        name: str, title: str, caption: str, figure: Any, without: str, wide: bool = False
    ) -> None:
        if figure is None:
            shown.append(Shown(title, without, None))
            return
        label = escape(f"{title}: {group.title}", quote=True)
        svg = _save(figure, out / f"{prefix}{name}", label, written)
        shown.append(Shown(title, caption, svg, wide))

    no_errors = "the runs held out no images, so no error was measured."
    add(
        "error_bars",
        "Error, and its difference at equal time",
        "Left: dots are seeds, with mean and standard deviation. Right: mean and 95 % interval; "
        "an interval that holds zero decides nothing. (The paper's Figure 5.)",
        figures.error_bars(group) if has_errors else None,
        no_errors,
        wide=True,
    )
    add(
        "error_against_time",
        "Error against time saved",
        "Mean and standard deviation over seeds; numbers are t₀. A strategy pays where it lies "
        "below the dashed line. (The paper's Figures 2 and 3.)",
        figures.error_against_time(group) if has_errors and group.full else None,
        no_errors if not has_errors else "without an ordinary run, time saved is unknown.",
        wide=figures.is_wide(group),
    )
    add(
        "error_against_epochs",
        "Error against epochs",
        "Mean over seeds, after each epoch; dashed, the ordinary run shortened to the same time. "
        "The first epochs may leave the chart. (The paper's Figure 4.)",
        figures.error_against_epochs(group) if has_errors else None,
        no_errors,
        wide=figures.is_wide(group),
    )
    add(
        "timeline",
        "Frozen layers, and what a step takes",
        "Frozen layers at the end of each epoch, and each epoch's median step; mean over seeds.",
        figures.timeline(group),
        "",
        wide=figures.timeline_is_wide(group),
    )
    add(
        "predicted_against_measured",
        "Predicted and measured savings",
        "Each point is a run: the saving predicted from the cost of a step at each depth, and that "
        "measured while it trained.",
        figures.predicted_against_measured(group),
        "the runs hold no savings.json with a measured saving.",
    )
    return shown


def _draw_schedules(runs: Sequence[Run], out: Path, written: list[str]) -> Any:
    from . import figures
    from .page import Shown

    shown = figures.shown_schedules(runs)
    if not shown:
        return None
    title = "Learning rates of five layers"
    caption = (
        "From the first layer, pale, to the last; a dot marks where a layer freezes. Scaled "
        "strategies start early layers at higher rates. (The paper's Figure 1.)"
    )
    svg = _save(figures.schedules(shown), out / "schedules", title, written)
    return Shown(title, caption, svg, True)


def _numbers(groups: Sequence[Group], root: Path, left_out: Sequence[str]) -> dict[str, Any]:
    """Every number on the page."""
    return {
        "groups": [
            {
                "title": group.title,
                "problem": dict(group.arms[0].runs[0].problem),
                "arms": [
                    {
                        "arm": arm.label,
                        "steps": arm.steps,
                        "equal_time_steps": arm.ordinary_steps,
                        "error_mean": arm.mean,
                        "error_sd": arm.sd,
                        "n": len(arm.errors),
                        "seconds_median": arm.seconds,
                        "time_saved": arm.time_saved,
                        "runs": [
                            {
                                "run": str(run.path.relative_to(root)),
                                "seed": run.seed,
                                "error": run.error,
                                "seconds": run.seconds,
                            }
                            for run in arm.runs
                        ],
                    }
                    for arm in group.arms
                ],
                "comparisons": [_comparison(each) for each in group.comparisons],
                "notes": group.notes,
            }
            for group in groups
        ],
        "left_out": list(left_out),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "arm": comparison.arm.label,
        "rival": comparison.rival.label if comparison.rival else None,
        "difference_to_rival": asdict(comparison.to_rival) if comparison.to_rival else None,
        "difference_to_full_length": asdict(comparison.to_full) if comparison.to_full else None,
        "conclusion": comparison.sentence,
    }
