"""The report's figures. Each function draws one and returns it; `style.save` writes it."""

import re
import textwrap
from collections.abc import Sequence
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ...schedule import Schedule
from ..runs import Run
from . import style
from .compare import Arm, Group
from .style import INK, MUTED, ORDINARY, PAPER, looks

matplotlib.use("svg")  # no window

_HALF, _FULL = 5.2, 10.7  # inches; of the page's two columns, so that type is of one size
_LAYERS = 5  # in the figure of schedules, as in the paper's
_T_0 = re.compile(r"^(\w+ (?:un)?scaled) ([0-9.e-]+)(.*)$")


def schedule_curves(
    schedule: Schedule, layers: int = _LAYERS, steps: int = 500
) -> list[list[float]]:
    """Figure 1's curves: layer i's learning rate, as a multiple of the base rate, at the steps
    0 ... `steps` of a run of that length; curves[i][s]."""
    line = schedule.timeline(layers, steps)
    factors = [schedule.factors(s, line) for s in range(steps + 1)]
    return [list(layer) for layer in zip(*factors, strict=True)]


def schedules(shown: dict[str, Schedule]) -> Figure:
    """Figure 1: the learning rate of each layer, a panel a schedule."""
    rows, columns = _grid(len(shown))
    figure, axes = _panels(rows, columns, height=2.5 * rows + 0.2, wide=True)
    for ax, (label, schedule) in zip(axes, shown.items(), strict=False):
        curves = schedule_curves(schedule)
        name = " ".join(label.split()[:2])
        hue = looks([name])[name].colour
        for i, curve in enumerate(curves):
            x = [100 * s / (len(curve) - 1) for s in range(len(curve))]
            frozen = next((s for s, rate in enumerate(curve) if rate == 0), len(curve) - 1)
            shade = 0.35 + 0.65 * i / (len(curves) - 1)
            ax.plot(x[: frozen + 1], curve[: frozen + 1], color=hue, alpha=shade, linewidth=1.5)
            ax.plot(x[frozen], 0, marker="o", markersize=3.5, color=hue, alpha=shade, clip_on=False)
        ax.set(title=_with_t_0(label), xlim=(0, 100), xlabel="% of the run")
        ax.set_ylim(0, max(map(max, curves)) * 1.06)
    for ax in axes[::columns]:
        ax.set_ylabel("rate / base rate")
    _hide_unused(axes, len(shown))
    return figure


def error_against_time(group: Group) -> Figure:
    """Figures 2 and 3: error against time saved, mean and standard deviation, a line a strategy;
    and what an ordinary run of that length reaches."""
    figure, (ax,) = _panels(1, 1, height=3.9, wide=is_wide(group))
    lines = [("ordinary run, shortened", group.ordinary, ORDINARY, "X", "--")]
    for strategy in group.strategies:
        arms = tuple(arm for arm in group.freezing if arm.strategy == strategy)
        look = looks(group.strategies)[strategy]
        lines.append((strategy, arms, look.colour, look.marker, "-"))
    for label, arms, hue, mark, dashes in lines:
        known = sorted(
            ((arm.time_saved, arm) for arm in arms if arm.time_saved is not None and arm.errors),
            key=lambda pair: pair[0],
        )
        if not known:
            continue
        ax.errorbar(
            [100 * saved for saved, _ in known],
            [100 * (arm.mean or 0) for _, arm in known],
            [100 * (arm.sd or 0) for _, arm in known],
            color=hue,
            marker=mark,
            linestyle=dashes,
            markersize=6,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            elinewidth=1.1,
            capsize=2.5,
            label=label,
            zorder=2 if mark == "X" else 3,
        )
        for saved, arm in known:
            if arm.freezes:
                ax.annotate(
                    f"{arm.t_0:g}",
                    (100 * saved, 100 * (arm.mean or 0)),
                    xytext=(6, 5),
                    textcoords="offset points",
                    fontsize=8,
                    color=hue,
                )
    ax.set(xlabel="time saved, % of the full-length ordinary run", ylabel=f"{_error(group)}, %")
    ax.margins(x=0.08, y=0.12)
    _legend(figure, ax)
    return figure


def error_against_epochs(group: Group) -> Figure:
    """Figure 4: the error as training goes on, with the full-length and the shortened ordinary
    run; a panel a strategy."""
    strategies = group.strategies or ("ordinary",)
    rows, columns = _grid(len(strategies))
    figure, axes = _panels(rows, columns, height=2.7 * rows + 0.6, wide=is_wide(group), share="all")
    scale = _steps_per_epoch(group)
    tops: list[float] = []

    def draw(ax: Any, arm: Arm, **look: Any) -> None:
        x, y = _curve(arm, scale)
        if not y:
            return
        ax.plot(x, y, **look)
        ax.plot(x[-1], y[-1], marker="o", markersize=4, color=look["color"])
        tops.extend(y[len(y) // 3 :])

    for ax, strategy in zip(axes, strategies, strict=False):
        arms = [arm for arm in group.freezing if arm.strategy == strategy]
        if group.full is not None:
            draw(ax, group.full, color=ORDINARY, linewidth=1.2, label="ordinary")
        for arm, shade in zip(arms, _shades(len(arms)), strict=True):
            rival, hue = group.rival_of(arm), looks(group.strategies)[strategy].colour
            draw(ax, arm, color=hue, alpha=shade, label=f"t₀ = {arm.t_0:g}")
            if rival is not None and rival is not group.full:
                look: dict[str, Any] = {
                    "color": hue,
                    "alpha": shade,
                    "linestyle": (0, (2, 1.5)),
                    "linewidth": 1.2,
                }
                draw(ax, rival, **look, label="ordinary, its time" if arm is arms[0] else None)
        ax.set(title=_filled(strategy, figure, columns), xlabel="epochs", xlim=(0, None))
        ax.tick_params(labelbottom=True)
        if ax.lines:
            ax.legend(loc="lower left", handlelength=1.6)
    for ax in axes[::columns]:
        ax.set_ylabel(f"{_error(group)}, %")
    if tops:
        low, high = min(tops), max(tops)
        axes[0].set_ylim(low - 0.08 * (high - low + 1e-3), high + 0.12 * (high - low + 1e-3))
    _hide_unused(axes, len(strategies))
    return figure


def error_bars(group: Group) -> Figure:
    """Figure 5: every arm's error, seed by seed and on average, and its difference to an ordinary
    run of the same time with the confidence interval."""
    rows = len(group.arms)
    figure, axes = _panels(1, 2, height=0.27 * rows + 1.0, wide=True)
    left, right = axes
    own = looks(group.strategies)
    for y, arm in enumerate(group.arms):
        hue = own[arm.strategy].colour if arm.freezes else ORDINARY
        errors = [100 * error for error in arm.errors.values()]
        left.plot(
            errors, [y + 0.24] * len(errors), "o", color=hue, markersize=3.5, alpha=0.6, mew=0
        )
        if arm.mean is not None:
            mark = own[arm.strategy].marker if arm.freezes else "X"
            left.errorbar(100 * arm.mean, y, xerr=100 * (arm.sd or 0), **_point(hue, mark))
    for comparison in group.comparisons:
        y, found = group.arms.index(comparison.arm), comparison.to_rival
        if found is None:
            right.text(0, y, "no rival", ha="center", va="center", fontsize=8, color=MUTED)
            continue
        look = own[comparison.arm.strategy]
        reach: Any = None
        if found.low is not None and found.high is not None:
            reach = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
        right.errorbar(100 * found.mean, y, xerr=reach, **_point(look.colour, look.marker))
    right.axvline(0, color=MUTED, linewidth=1)
    largest = max([abs(x) for x in right.get_xlim()] + [0.1])
    right.set_xlim(-largest, largest)
    left.set_yticks(range(rows), [_with_t_0(arm.label) for arm in group.arms])
    left.tick_params(axis="y", labelcolor=INK)
    right.set_yticks(range(rows), [""] * rows)
    for ax in axes:
        ax.set_ylim(rows - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
    left.set(title="Error", xlabel=f"{_error(group)}, %: mean, sd, seeds")
    right.set(title="Against an ordinary run of its time", xlabel="← better · points · worse →")
    return figure


def timeline(group: Group) -> Figure:
    """How many layers are frozen, and the seconds a step takes, epoch by epoch."""
    strategies = group.strategies or ("ordinary",)
    columns = len(strategies)
    figure, axes = _panels(2, columns, height=3.9, wide=timeline_is_wide(group), share="row")
    scale = _steps_per_epoch(group)
    for column, strategy in enumerate(strategies):
        above, below = axes[column], axes[columns + column]
        arms = [arm for arm in group.freezing if arm.strategy == strategy]
        if group.full is not None:
            x, seconds = _of_epochs(group.full, scale, "step_seconds")
            below.plot(x, seconds, color=ORDINARY, linewidth=1.2, label="ordinary")
        for arm, shade in zip(arms, _shades(len(arms)), strict=True):
            look: dict[str, Any] = {
                "color": looks(group.strategies)[strategy].colour,
                "alpha": shade,
                "label": f"t₀ = {arm.t_0:g}",
            }
            x, frozen = _of_epochs(arm, scale, "frozen_layers")
            start = arm.runs[0].frozen_from_start
            above.plot([0, *x], [start, *frozen], drawstyle="steps-post", **look)
            x, seconds = _of_epochs(arm, scale, "step_seconds")
            below.plot(x, seconds, **look)
        above.set(title=_filled(strategy, figure, columns), xlim=(0, None))
        below.set(xlabel="epochs", xlim=above.get_xlim())
        if below.lines:  # there is room below the curves: a step without backward takes a third
            columns_of_it = 2 if len(below.lines) > 3 else 1
            below.legend(
                loc="lower left",
                ncols=columns_of_it,
                handlelength=1.4,
                columnspacing=1,
                labelspacing=0.25,
            )
    for ax in axes:  # last, since the panels of a row share their limits
        ax.set_ylim(0, None)
    axes[0].set_ylabel("frozen layers")
    axes[columns].set_ylabel("milliseconds a step")
    return figure


def predicted_against_measured(group: Group) -> Figure | None:
    """Savings as predicted before and as measured in the run; None if no run has any."""
    pairs = savings_pairs(group)
    if not pairs:
        return None
    figure, (ax,) = _panels(1, 1, height=3.9)
    for strategy in dict.fromkeys(arm.strategy for arm, _, _ in pairs):
        mine = [(p, m) for arm, p, m in pairs if arm.strategy == strategy]
        x, y = zip(*mine, strict=True)
        own = looks(group.strategies)[strategy]
        look: dict[str, Any] = {
            "color": own.colour,
            "markeredgecolor": PAPER,
            "markersize": 7,
        }
        ax.plot(x, y, own.marker, **look, label=strategy, zorder=3)
    ends = [min(0.0, *(v for _, *pair in pairs for v in pair))]
    ends.append(max(v for _, *pair in pairs for v in pair) * 1.12 + 1)
    ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle="--", label="as predicted")
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set(xlabel="predicted saving, %", ylabel="measured saving, %")
    _legend(figure, ax)
    return figure


def savings_pairs(group: Group) -> list[tuple[Arm, float, float]]:
    """Of every run that has both: its arm, the predicted and the measured saving in percent. What
    a full step takes must have been measured too, so not those frozen from the start."""
    return [
        (arm, 100 * run.savings["predicted_share"], 100 * run.savings["measured_share"])
        for arm in group.freezing
        for run in arm.runs
        if run.savings is not None
        and run.savings.get("measured_share") is not None
        and run.savings.get("full_steps") != "predicted"
    ]


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels."""
    columns = 2 if count == 4 else min(3, count)
    return -(-count // columns), columns


def is_wide(group: Group) -> bool:
    """Whether figures with a panel a strategy need the page's whole width."""
    return len(group.strategies) > 2


def timeline_is_wide(group: Group) -> bool:
    """It is also where no figure of savings stands beside it."""
    return is_wide(group) or not savings_pairs(group)


def _panels(
    rows: int, columns: int, height: float, wide: bool = False, share: str = "none"
) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(_FULL if wide else _HALF, height))
    figure.set_layout_engine("constrained", w_pad=0.09)
    sharey: Any = {"all": True, "row": "row", "none": False}[share]
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share == "all", sharey=sharey)
    return figure, list(axes.flat)


def _filled(title: str, figure: Figure, columns: int) -> str:
    """In lines that are no longer than a panel is wide; an inch takes 12 letters."""
    return textwrap.fill(title, max(1, int(12 * figure.get_figwidth() / columns)))


def _hide_unused(axes: Sequence[Any], used: int) -> None:
    for ax in axes[used:]:
        ax.set_visible(False)


def _legend(figure: Figure, ax: Any) -> None:
    """Above the axes, where it hides nothing."""
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", handlelength=2.2, ncols=3, columnspacing=1.4)


def _point(hue: str, mark: str) -> dict[str, Any]:
    return {
        "color": hue,
        "marker": mark,
        "markersize": 7,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
        "elinewidth": 1.4,
        "capsize": 3,
        "zorder": 3,
    }


def _with_t_0(label: str) -> str:
    """ "cubic scaled 0.8 frozen 5" as "cubic scaled frozen 5, t₀ = 0.8"."""
    return _T_0.sub(r"\1\3, t₀ = \2", label)


def _error(group: Group) -> str:
    return "test error" if group.is_test else "validation error"


def _shades(count: int) -> list[float]:
    """Opacities, the last the strongest."""
    return [1 - 0.6 * (count - 1 - i) / max(1, count - 1) for i in range(count)]


def _steps_per_epoch(group: Group) -> int:
    return max(run.epochs[0].steps for arm in group.arms for run in arm.runs)


def _curve(arm: Arm, scale: int) -> tuple[list[float], list[float]]:
    """Epochs done, and the mean error over seeds in percent where it was measured."""
    x, y = [], []
    for same in zip(*(run.epochs for run in arm.runs), strict=True):
        errors = [epoch.error for epoch in same if epoch.error is not None]
        if errors:
            x.append(same[0].step / scale)
            y.append(100 * mean(errors))
    return x, y


def _of_epochs(arm: Arm, scale: int, name: str) -> tuple[list[float], list[float]]:
    """Epochs done, and the mean of a column of metrics; seconds as milliseconds."""
    factor = 1000 if name == "step_seconds" else 1
    epochs = list(zip(*(run.epochs for run in arm.runs), strict=True))
    return (
        [same[0].step / scale for same in epochs],
        [factor * mean(getattr(epoch, name) for epoch in same) for same in epochs],
    )


def draw_settings() -> Any:
    """The context in which figures are drawn and saved."""
    return matplotlib.rc_context(style.settings())  # type: ignore[arg-type]


def shown_schedules(runs: Sequence[Run]) -> dict[str, Schedule]:
    """The schedules of Figure 1, of layers that are not frozen from the start: those of the runs
    if they are six at most, else one a strategy, with the middle one of its t_0."""
    found: dict[str, dict[float, Schedule]] = {}
    for run in runs:
        if run.freezes and run.values["t_0"] < 1:
            name = " ".join(run.strategy.split()[:2])
            found.setdefault(name, {})[float(run.values["t_0"])] = run.schedule
    if sum(map(len, found.values())) > 6:
        found = {
            name: {t: by_t[t] for t in [sorted(by_t)[len(by_t) // 2]]}
            for name, by_t in found.items()
        }
    return {f"{name} {t:g}": by_t[t] for name, by_t in sorted(found.items()) for t in sorted(by_t)}
