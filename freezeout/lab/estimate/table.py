"""An estimate as a person reads it."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..display import duration
from .estimate import STEEP, Estimate, Run, size

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(estimate: Estimate, console: Console, base_rate: float) -> None:
    """Print the layers, the runs and the remarks."""
    step = estimate.step
    parameters = sum(layer.parameters for layer in step.layers)
    console.print(
        f"{estimate.model}: {parameters:,} parameters in {len(step.layers)} layers, "
        f"{step.batch_size} items a step, {step.precision}, {estimate.optimizer}; "
        f"{estimate.hardware}"
    )
    compared = len(estimate.runs) > 3  # scaled and unscaled runs cost the same: shown once
    if not compared:
        console.print(_layers(estimate))
    console.print(_runs(estimate, base_rate, compared))
    if compared:
        console.print(f"Unscaled, each costs and saves the same; its rates start at {base_rate:g}.")
    last = estimate.runs[1]
    if not compared and last.batch_growth >= 1.1:
        console.print(
            f"In the last steps memory would hold batches {last.batch_growth:.1f} times as large."
        )
    for remark in estimate.remarks:
        console.print(f"Note: {remark}.")


def _layers(estimate: Estimate) -> Table:
    table = Table(
        "layer", box=SIMPLE, title="layers, in the order in which they freeze", title_justify="left"
    )
    for name in ("parameters", "forward", "backward", "freezes after"):
        table.add_column(name, justify="right")
    step, run = estimate.step, estimate.runs[1]
    total = step.count.step_costs()[0]
    for layer, end in zip(step.layers, run.freeze_steps, strict=True):
        never = end >= run.total_steps
        table.add_row(
            layer.name,
            f"{layer.parameters:,}",
            f"{layer.forward_flops / total:.1%}",
            f"{layer.backward_flops / total:.1%}",
            "never" if never else f"{end:,} steps, {end / run.total_steps:.0%}",
        )
    return table


def _runs(estimate: Estimate, base_rate: float, compared: bool) -> Table:
    first = estimate.runs[0]
    measured = first.seconds is not None
    same_length = len({run.total_steps for run in estimate.runs}) == 1
    title = f"runs of {first.epochs} epochs, {first.total_steps:,} steps" if same_length else "runs"
    table = Table("run", box=SIMPLE, title=title, title_justify="left")
    names = [] if same_length else ["epochs"]
    names += ["freezing", "FLOPs"]
    names += ["FLOPs saved", "time", "time saved"] if measured else ["FLOPs saved"]
    names += ["highest rate", "memory: start", "middle", "end"]
    paper = any(run.paper_saved is not None for run in estimate.runs)
    names += ["paper's formula"] if paper else []
    for name in names:
        table.add_column(name, justify="right")
    for run in estimate.runs:
        if compared and run.schedule is not None and not run.schedule.scale_lr:
            continue
        cells = [] if same_length else [str(run.epochs)]
        cells += [_freezing(run), _number(run.flops)]
        is_ordinary = run.schedule is None
        if measured:
            cells += ["" if is_ordinary else f"{run.flops_saved:.1%}", duration(run.seconds or 0.0)]
        cells += ["" if is_ordinary else f"{run.saved:.1%}", _rate(run, base_rate)]
        cells += [size(peak) for peak in run.peak_bytes]
        if paper:
            cells.append("" if run.paper_saved is None else f"{run.paper_saved:.1%}")
        table.add_row(run.name, *cells)
    return table


def _freezing(run: Run) -> str:
    ends = [end for end in run.freeze_steps if end < run.total_steps]
    if not ends:
        return "none"
    return f"{ends[0] / run.total_steps:.0%} to {ends[-1] / run.total_steps:.0%}"


def _rate(run: Run, base_rate: float) -> str:
    return f"{run.largest_rate:.3g}" + (" !" if run.largest_rate > STEEP * base_rate else "")


def _number(value: float) -> str:
    for unit, letter in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.0f}"
