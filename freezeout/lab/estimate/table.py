"""An estimate as a person reads it, in 80 columns."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ...schedule import STEEP
from ...words import duration, size
from .estimate import Estimate
from .run import Run

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
    if len(estimate.runs) > 3:
        console.print(_compared(estimate, base_rate))
        # Scaled and unscaled runs cost the same.
        console.print(f"Unscaled, each costs and saves the same; its rates start at {base_rate:g}.")
    else:
        console.print(_layers(estimate))
        console.print(_runs(estimate, base_rate))
    for remark in estimate.remarks:
        console.print(f"Note: {remark}.")


def _layers(estimate: Estimate) -> Table:
    title = "layers, in the order in which they freeze"
    table = Table("layer", box=SIMPLE, title=title, title_justify="left")
    for name in ("parameters", "forward", "backward", "freezes after"):
        table.add_column(name, justify="right")
    step, run = estimate.step, estimate.runs[1]
    total = step.count.step_costs()[0]
    for layer, end in zip(step.layers, run.freeze_steps, strict=True):
        when = f"{end:,} steps, {end / run.total_steps:.0%}"
        if end in (0, run.total_steps):
            when = "never" if end else "frozen at the start"
        table.add_row(
            layer.name,
            f"{layer.parameters:,}",
            f"{layer.forward_flops / total:.1%}",
            f"{layer.backward_flops / total:.1%}",
            when,
        )
    return table


def _runs(estimate: Estimate, base_rate: float) -> Table:
    """A column a run."""
    table = Table("the run", box=SIMPLE)
    for run in estimate.runs:
        table.add_column(run.name, justify="right")
    runs = estimate.runs
    lines = {
        "epochs": [f"{run.epochs:,}" for run in runs],
        "steps": [f"{run.total_steps:,}" for run in runs],
        "layers freeze at": [_freezing(run) for run in runs],
        "FLOPs": [_number(run.flops) for run in runs],
        "FLOPs saved": [_saved(run, run.flops_saved) for run in runs],
    }
    if runs[0].seconds is not None:
        lines["time"] = [duration(run.seconds or 0.0) for run in runs]
        lines["time saved"] = [_saved(run, run.saved) for run in runs]
    if any(run.paper_saved is not None for run in runs):
        shares = [run.paper_saved for run in runs]
        lines["saved, by the paper's formula"] = [f"{s:.1%}" if s else "" for s in shares]
    lines["highest learning rate"] = [_rate(run, base_rate) for run in runs]
    for number, moment in enumerate(("memory at the start", "  halfway", "  at the end")):
        lines[moment] = [size(run.peak_bytes[number]) for run in runs]
    first = estimate.step.batch_size
    lines["batch of the same memory, then"] = [str(int(first * r.batch_growth)) for r in runs]
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table


def _compared(estimate: Estimate, base_rate: float) -> Table:
    """A row a run."""
    first = estimate.runs[0]
    measured = first.seconds is not None
    table = Table("run", box=SIMPLE)
    names = ["frozen at", "FLOPs saved", *(["time saved"] if measured else [])]
    for name in (*names, "top rate", "memory: halfway", "at the end"):
        table.add_column(name, justify="right")
    for run in estimate.runs:
        if run.schedule is not None and not run.schedule.scale_lr:
            continue
        cells = [_freezing(run), _saved(run, run.flops_saved)]
        cells += [_saved(run, run.saved)] if measured else []
        cells += [_rate(run, base_rate), *(size(peak) for peak in run.peak_bytes[1:])]
        table.add_row(run.name, *cells)
    return table


def _saved(run: Run, share: float) -> str:
    return "" if run.schedule is None else f"{share:.1%}"


def _freezing(run: Run) -> str:
    ends = [end for end in run.freeze_steps if end < run.total_steps]
    if not ends:
        return "none"
    first, last = (
        f"{end / run.total_steps:.0%}" if end else "start" for end in (ends[0], ends[-1])
    )
    return first if first == last else f"{first} to {last}"


def _rate(run: Run, base_rate: float) -> str:
    return f"{run.largest_rate:.3g}" + (" !" if run.largest_rate > STEEP * base_rate else "")


def _number(value: float) -> str:
    for unit, letter in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.0f}"
