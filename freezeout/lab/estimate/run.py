"""What whole runs cost and save, with one schedule or with all of them, from the cost of a step."""

from dataclasses import dataclass, replace
from typing import get_args

from ...cost import (
    epochs_within,
    paper_costs,
    paper_saving,
    run_cost,
    saving,
    steps_at_depth,
    t_0_for_saving,
    with_cache,
)
from ...errors import InvalidValue
from ...schedule import STEEP, HowScale, Schedule
from ...words import duration
from .config import EstimateConfig
from .step import Step

LITTLE = 0.02  # a saving below this share is said
COMPARED_T_0 = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Run:
    """What one whole run costs and saves. Shares are of the ordinary run's cost.

    Attributes:
        schedule: None: the ordinary run. freeze_steps: of each layer; total_steps: never.
        saved: share of the seconds, or of the FLOPs where none were measured.
        largest_rate: the highest starting learning rate.
        peak_bytes: in the first step, halfway, and in the last. batch_growth: by what factor the
            batch may grow by then for the peak to stay as it was at first.
        paper_saved: what the paper's formula says; None for other networks than DenseNet.
    """

    name: str
    schedule: Schedule | None
    epochs: int
    total_steps: int
    freeze_steps: tuple[int, ...]
    flops: float
    flops_saved: float
    seconds: float | None
    saved: float
    largest_rate: float
    peak_bytes: tuple[int, int, int]
    batch_growth: float
    paper_saved: float | None


def runs_of(config: EstimateConfig, step: Step, remarks: list[str]) -> list[Run]:
    """The ordinary run and those that `config` asks for; remarks about them are added.

    InvalidValue for targets that cannot be reached.
    """
    steps_per_epoch = -(-config.images // step.batch_size)
    total_steps = config.epochs * steps_per_epoch
    schedule = config.schedule
    costs = step.costs
    if config.target_saving is not None:
        schedule = replace(
            schedule, t_0=t_0_for_saving(costs, config.target_saving, schedule, total_steps)
        )
    schedules: list[Schedule | None] = [None, schedule]
    if config.compare:
        schedules[1:] = [
            Schedule(t_0, how_scale, scale_lr)
            for how_scale in get_args(HowScale)
            for scale_lr in (True, False)
            for t_0 in COMPARED_T_0
        ]
    kinds = [(each, False) for each in schedules]
    if step.cached_seconds is not None:
        kinds += [(each, True) for each in schedules[1:]]
    runs = []
    for each, cached in kinds:
        epochs = config.epochs
        if config.time_budget is not None:
            of_kind = list(step.cached_seconds or ()) if cached else costs
            epochs = _fitting(config, of_kind, each, steps_per_epoch)
        runs.append(_run(config, step, each, epochs, epochs * steps_per_epoch, cached))
    chosen = runs[1]
    steep = [run for run in runs if run.largest_rate > STEEP * config.lr]
    if steep and not config.compare:
        remarks.append(
            f"the first layer starts at {chosen.largest_rate / config.lr:.3g} times the base "
            "learning rate, because it freezes so early and rates are scaled; that many networks "
            "do not bear: see --no-scale-lr"
        )
    elif steep:
        remarks.append(
            f"rates marked ! start above {STEEP:g} times the base learning rate: many networks do "
            "not bear that"
        )
    best = max(runs[1:], key=lambda run: run.saved)
    if best.saved < LITTLE:
        remarks.append(
            f"this saves less than {LITTLE:.0%}: {_why_little(step, best)}; freezing hardly pays "
            "here"
        )
    return runs


def _fitting(
    config: EstimateConfig, costs: list[float], schedule: Schedule | None, steps_per_epoch: int
) -> int:
    budget, times = config.budget_seconds, schedule or Schedule(t_0=1)
    epochs = epochs_within(budget, costs, times, steps_per_epoch)
    if epochs == 0:
        least = run_cost(costs, times.freeze_steps(len(costs), steps_per_epoch), steps_per_epoch)
        raise InvalidValue(
            f"not one epoch fits into {config.time_budget}: it takes {duration(least)}"
        )
    return epochs


def _run(
    config: EstimateConfig,
    step: Step,
    schedule: Schedule | None,
    epochs: int,
    total_steps: int,
    cached: bool,
) -> Run:
    n = len(step.layers)
    times = schedule or Schedule(t_0=1)
    freeze_steps = times.freeze_steps(n, total_steps)
    flops = step.count.step_costs()
    if cached:
        flops = with_cache(flops, step.count.prefix_costs(), [0.0] * n)
    flops_saved = saving(flops, freeze_steps, total_steps)
    # No result is read before a layer is frozen: a full step costs the same with a cache.
    own = step.cached_seconds if cached else step.seconds
    depths = [sum(f <= at for f in freeze_steps) for at in (0, total_steps // 2, total_steps - 1)]
    peaks = [step.memory.steps[depth].peak for depth in depths]
    return Run(
        name=name_of(schedule) + (", cached" if cached else ""),
        schedule=schedule,
        epochs=epochs,
        total_steps=total_steps,
        freeze_steps=freeze_steps,
        flops=run_cost(flops, freeze_steps, total_steps),
        flops_saved=flops_saved,
        seconds=None if own is None else run_cost(own, freeze_steps, total_steps),
        saved=flops_saved if own is None else saving(own, freeze_steps, total_steps),
        largest_rate=times.largest_factor(n, total_steps) * config.lr,
        peak_bytes=(peaks[0], peaks[1], peaks[2]),
        batch_growth=step.memory.batch_growth(depths[2]),
        paper_saved=None if cached else _paper_saved(config, schedule),
    )


def _paper_saved(config: EstimateConfig, schedule: Schedule | None) -> float | None:
    if config.model != "densenet" or schedule is None:
        return None
    return paper_saving(paper_costs(config.depth or 76, config.growth or 12), schedule)


def _why_little(step: Step, run: Run) -> str:
    """Why a run saves little: in the network's shape, or in its schedule."""
    costs = step.costs
    n = len(costs)
    most = 1 - costs[-1] / costs[0]
    if n == 1:
        return "the network is one layer, and the last layer never freezes"
    if most < 0.1:
        return f"with all but the last layer frozen a step still costs {1 - most:.0%} of a full one"
    # Half of what can be spared lies behind this layer.
    half = next(k for k, cost in enumerate(costs) if costs[0] - cost >= most * costs[0] / 2)
    counts = steps_at_depth(run.freeze_steps, run.total_steps)
    if half > 0.6 * n:
        return (
            f"the cost sits in the last layers (half of what can be spared is behind layer "
            f"{half} of {n}), and these freeze late"
        )
    return f"{counts[0] / run.total_steps:.0%} of the run is over when the first layer freezes"


def name_of(schedule: Schedule | None) -> str:
    """A schedule as a person says it."""
    if schedule is None:
        return "ordinary"
    return f"{schedule.how_scale} {schedule.t_0:g}{'' if schedule.scale_lr else ' unscaled'}"
