"""An estimate drawn: learning rates, as in the paper's Figure 1, and the cost that is saved."""

import io
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from ...errors import InvalidValue
from .estimate import Estimate

_POINTS = 200


def draw(estimate: Estimate, path: Path) -> None:
    """Draw the estimate's first run with freezing into `path` (.png, .svg or .pdf).

    Above, each layer's learning rate over the run. Below, the cost of each step: the forward pass
    of all layers, and of each layer what its backward pass costs until it is frozen; the hatched
    area is what freezing saves. Raises InvalidValue without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidValue("--plot needs: pip install 'freezeout[lab]' (matplotlib)") from error
    run = estimate.runs[1]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 6.4), layout="constrained")
        rates, costs = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        colors = mpl.colormaps["viridis"]
        n = len(run.freeze_steps)
        shades = [colors(0.05 + 0.85 * i / max(1, n - 1)) for i in range(n)]
        _rates(rates, estimate, shades)
        _costs(costs, estimate, shades)
        figure.suptitle(
            f"{estimate.model}, {run.name}: "
            f"{run.saved:.1%} of the {'time' if run.seconds is not None else 'FLOPs'} saved"
        )
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], dpi=160)
    write_atomically(path, drawn.getvalue())


def _rates(axes: Any, estimate: Estimate, shades: list[Any]) -> None:
    run = estimate.runs[1]
    plan, timeline = run.plan, run.timeline
    base = run.largest_rate / max(plan.factors(0, timeline))
    for layer, (end, shade) in enumerate(zip(run.freeze_steps, shades, strict=True)):
        if end == 0:  # frozen from the start: it has no rate
            continue
        steps = [end * i // _POINTS for i in range(_POINTS + 1)]
        axes.plot(
            [step / run.total_steps for step in steps],
            [base * plan.factors(step, timeline)[layer] for step in steps],
            color=shade,
            linewidth=1,
        )
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.set_title("each layer's learning rate (dark: first layers)", loc="left", fontsize=9)


def _costs(axes: Any, estimate: Estimate, shades: list[Any]) -> None:
    run, costs = estimate.runs[1], estimate.step.costs
    ends = [end / run.total_steps for end in run.freeze_steps]
    # What layer i's freezing spares; the last entry is what the last depth still costs.
    spared = [costs[i] - costs[i + 1] for i in range(len(costs) - 1)]
    shares = [max(0.0, cost) / costs[0] for cost in spared]
    rest = 1 - sum(shares)
    axes.fill_between([0, 1], 0, rest, color="0.82", linewidth=0)
    axes.text(0.01, rest / 2, "forward pass and last layer", va="center", color="0.25")
    top = 1.0
    for share, end, shade in zip(shares, ends, shades, strict=False):
        axes.fill_between([0, end], top - share, top, color=shade, linewidth=0)
        axes.fill_between(
            [end, 1], top - share, top, facecolor="none", edgecolor="0.6", hatch="////", linewidth=0
        )
        axes.plot([end, end], [top - share, top], color="0.15", linewidth=1)
        top -= share
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_ylabel("cost of a step, share of a full one")
    axes.set_xlabel("share of the run")
    kind = "seconds" if estimate.step.seconds is not None else "FLOPs"
    axes.set_title(
        f"{kind} of each layer's backward pass until it is frozen; hatched: saved",
        loc="left",
        fontsize=9,
    )
