"""What whole runs cost and save, with one schedule or with all of them, from the cost of a step."""

from dataclasses import dataclass, replace
from typing import get_args

from ...cost import (
    epochs_within,
    paper_costs,
    paper_saving,
    run_cost,
    saving,
    t_0_for_saving,
    with_cache,
)
from ...errors import InvalidValue
from ...plan import Frozen, Plan, Timeline
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
        schedule: of the layers after the first `frozen` ones, which are frozen from the start;
            None: the ordinary run. freeze_steps: of each layer; total_steps: never.
        saved: share of the seconds, or of the FLOPs where none were measured.
        largest_rate: the highest starting learning rate.
        peak_bytes: in the first step, halfway, and in the last. batch_growth: by what factor the
            batch may grow by then for the peak to stay as it was at first.
        paper_saved: what the paper's formula says; None for other networks than DenseNet.
    """

    name: str
    schedule: Schedule | None
    frozen: int
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

    @property
    def plan(self) -> Plan:
        """What trains when."""
        return plan_of(self.schedule, self.frozen)

    @property
    def timeline(self) -> Timeline:
        """When how many layers are frozen."""
        return self.plan.timeline(len(self.freeze_steps), self.total_steps)


def plan_of(schedule: Schedule | None, frozen: int) -> Plan:
    """The schedule, or none, for the layers after so many that are frozen from the start."""
    return Frozen(frozen, then=schedule or Schedule(t_0=1))


def runs_of(config: EstimateConfig, step: Step, remarks: list[str]) -> list[Run]:
    """The ordinary run and those that `config` asks for; remarks about them are added.

    InvalidValue for targets that cannot be reached.
    """
    steps_per_epoch = -(-config.images // step.batch_size)
    total_steps = config.epochs * steps_per_epoch
    schedule = config.schedule
    costs = step.costs
    if config.target_saving is not None:
        t_0 = t_0_for_saving(costs, config.target_saving, schedule, total_steps, frozen=step.frozen)
        schedule = replace(schedule, t_0=t_0)
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
            epochs = _fitting(config, step, of_kind, each, steps_per_epoch)
        runs.append(_run(config, step, each, epochs, epochs * steps_per_epoch, cached))
    chosen = runs[1]
    steep = [run for run in runs if run.largest_rate > STEEP * config.lr]
    if steep and not config.compare:
        remarks.append(
            f"the first layer to train starts at {chosen.largest_rate / config.lr:.3g} times the "
            "base learning rate, because it freezes so early and rates are scaled; that many "
            "networks do not bear: see --no-scale-lr"
        )
    elif steep:
        remarks.append(
            f"rates marked ! start above {STEEP:g} times the base learning rate: many networks do "
            "not bear that"
        )
    best = max(runs[1:], key=lambda run: run.saved)
    if config.target_saving is not None and chosen.schedule == replace(schedule, t_0=1):
        remarks.append(
            f"the {chosen.frozen} layers that are frozen from the start save {chosen.saved:.1%} by "
            "themselves"
        )
    if best.saved < LITTLE:
        remarks.append(
            f"this saves less than {LITTLE:.0%}: {_why_little(step, best)}; freezing hardly pays "
            "here"
        )
    return runs


def _plan(step: Step, schedule: Schedule | None) -> Plan:
    """Of the run with this schedule; None: of the ordinary one."""
    return plan_of(schedule, step.given if schedule is None else step.frozen)


def _fitting(
    config: EstimateConfig,
    step: Step,
    costs: list[float],
    schedule: Schedule | None,
    steps_per_epoch: int,
) -> int:
    plan = _plan(step, schedule)
    epochs = epochs_within(config.budget_seconds, costs, plan, steps_per_epoch)
    if epochs == 0:
        least = run_cost(costs, plan.timeline(len(costs), steps_per_epoch).counts())
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
    plan = _plan(step, schedule)
    timeline = plan.timeline(n, total_steps)
    counts = timeline.counts()
    flops = step.count.step_costs()
    if cached:
        flops = with_cache(flops, step.count.prefix_costs(), [0.0] * n)
    flops_saved = saving(flops, counts)
    # No result is read before a layer is frozen: a full step costs the same with a cache.
    own = step.cached_seconds if cached else step.seconds
    depths = [timeline.num_frozen(at) for at in (0, total_steps // 2, total_steps - 1)]
    peaks = [step.memory.steps[depth].peak for depth in depths]
    return Run(
        name=_name(config, step, schedule) + (", cached" if cached else ""),
        schedule=schedule,
        frozen=timeline.num_frozen(0),
        epochs=epochs,
        total_steps=total_steps,
        freeze_steps=tuple(total_steps if end is None else end for end in timeline.freeze_steps),
        flops=run_cost(flops, counts),
        flops_saved=flops_saved,
        seconds=None if own is None else run_cost(own, counts),
        saved=flops_saved if own is None else saving(own, counts),
        largest_rate=max(plan.factors(0, timeline)) * config.lr,
        peak_bytes=(peaks[0], peaks[1], peaks[2]),
        batch_growth=step.memory.batch_growth(depths[2]),
        paper_saved=None if cached or timeline.num_frozen(0) else _paper_saved(config, schedule),
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
    if half > 0.6 * n:
        return (
            f"the cost sits in the last layers (half of what can be spared is behind layer "
            f"{half} of {n}), and these freeze late"
        )
    first = run.timeline.counts()[run.frozen] / run.total_steps
    if first == 1:
        return f"no more than the first {run.frozen} layers freeze, which cost little"
    more = "another" if run.frozen else "the first"
    return f"{first:.0%} of the run is over when {more} layer freezes"


def _name(config: EstimateConfig, step: Step, schedule: Schedule | None) -> str:
    """A run as a person says it."""
    if schedule is None or config.frozen is None:
        return name_of(schedule)
    words = [] if schedule.t_0 == 1 else [name_of(schedule)]
    return " ".join([*words, f"frozen {step.frozen}"])


def name_of(schedule: Schedule | None) -> str:
    """A schedule as a person says it."""
    if schedule is None:
        return "ordinary"
    return f"{schedule.how_scale} {schedule.t_0:g}{'' if schedule.scale_lr else ' unscaled'}"
