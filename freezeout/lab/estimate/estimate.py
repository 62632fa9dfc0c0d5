"""`estimate`: a step counted, measured, and made into what whole runs cost."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from ...cache.pays import measure_reading
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
from ...errors import FreezeOutError, InvalidValue
from ...profile import (
    Memory,
    StepCount,
    count_step,
    measure_prefix_seconds,
    measure_step_costs,
    predict_memory,
)
from ...profile.fake import faked
from ...schedule import STEEP, HowScale, Schedule
from ...words import duration, size
from ..device import choose_device, hardware, versions
from .config import EstimateConfig
from .subject import Subject, build, moved

LITTLE = 0.02  # a saving below this share is said
COMPARED_T_0 = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_READ_BYTES = 32 * 2**20  # of the batch whose reading is measured


@dataclass(frozen=True)
class LayerCost:
    """One layer: its parameters, and its share of the FLOPs of a full step."""

    name: str
    parameters: int
    forward_flops: int
    backward_flops: int  # that its freezing spares


@dataclass(frozen=True)
class CountedStep:
    """What is known of a training step without making one, at every depth k = 0 ... n - 1."""

    layers: tuple[LayerCost, ...]
    count: StepCount
    memory: Memory
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Step(CountedStep):
    """A step that may have been measured as well.

    Attributes:
        seconds: measured; None: only counted. cached_seconds: if frozen results were read.
    """

    seconds: tuple[float, ...] | None
    cached_seconds: tuple[float, ...] | None

    @property
    def costs(self) -> list[float]:
        """Seconds if they were measured, FLOPs otherwise."""
        return self.count.step_costs() if self.seconds is None else list(self.seconds)


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


@dataclass(frozen=True)
class Estimate:
    """What `freezeout estimate` tells: one step, runs (the ordinary one first), and remarks."""

    model: str
    hardware: str
    optimizer: str
    step: Step
    runs: tuple[Run, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "versions": versions()}


def estimate(config: EstimateConfig, say: Callable[[str], None] = lambda text: None) -> Estimate:
    """Count and measure one step of the model that `config` names, and predict whole runs.

    Args:
        say: told what is being done.

    Raises:
        FreezeOutError: anything in the configuration, the model or the device that is not so,
            and targets that cannot be reached.
    """
    config.check()
    device = choose_device(config.device)
    remarks: list[str] = []
    step = _step(config, device, remarks, say)
    runs = _runs(config, step, remarks)
    machine = hardware(device) if config.measure else "counted, not measured"
    return Estimate(config.model, machine, config.optimizer, step, tuple(runs), tuple(remarks))


def _step(
    config: EstimateConfig,
    device: torch.device,
    remarks: list[str],
    say: Callable[[str], None],
) -> Step:
    say("counting FLOPs and memory of one step")
    counted, reason = _without_memory(config, device)
    if counted is None and not config.measure:
        raise InvalidValue(
            f"{config.model} cannot be counted without real tensors ({reason}); leave out "
            "--no-measure"
        )
    if not config.measure and counted is not None:
        return Step(**vars(counted), seconds=None, cached_seconds=None)
    with _real_mistakes(config, device, counted):
        with torch.device(device):
            built = build(config)
        subject = Subject(config, moved(built, device), device)
        if counted is None:
            remarks.append(f"counted with real tensors, since it does not run without ({reason})")
            counted = _counted(subject)
        say(f"measuring it on {hardware(device)}")
        start = time.perf_counter()
        shape = counted.count.step_costs()
        seconds = measure_step_costs(subject.step, subject.layers, shape=shape, device=device)
        cached = _cached(subject, counted.count, seconds, device) if config.cache else None
        say(f"measured in {duration(time.perf_counter() - start)}")
    return Step(**vars(counted), seconds=tuple(seconds), cached_seconds=cached)


def _without_memory(
    config: EstimateConfig, device: torch.device
) -> tuple[CountedStep | None, str | None]:
    """The counts, from tensors without memory; or None and why there are none."""
    with torch.device("meta"):
        built = build(config)
    try:
        model, inputs = moved(built, torch.device("meta"))
        with faked(model, inputs, device) as inputs:
            return _counted(Subject(config, (model, inputs), device)), None
    except Exception as error:  # what a foreign model does with such tensors: anything
        if isinstance(error, FreezeOutError) and not _is_for_lack_of_values(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, lines[0].rstrip(".")


def _is_for_lack_of_values(error: BaseException | None) -> bool:
    """Whether the model failed because tensors without memory have no values."""
    kinds = (NotImplementedError, DataDependentOutputException, DynamicOutputShapeException)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error is not None


def _counted(subject: Subject) -> CountedStep:
    count = count_step(subject.model, subject.layers, subject.loss)
    memory = predict_memory(
        subject.step,
        subject.model,
        subject.layers,
        subject.optimizer,
        subject.batch,
        count.saved_bytes,
    )
    spared = [before - after for before, after in pairwise((*count.backward, 0))]
    layers = tuple(
        LayerCost(layer.name, sum(p.numel() for p in layer.parameters), forward, backward)
        for layer, forward, backward in zip(subject.layers, count.forward, spared, strict=True)
    )
    return CountedStep(layers, count, memory, subject.batch_size, subject.precision)


@contextmanager
def _real_mistakes(
    config: EstimateConfig, device: torch.device, counted: CountedStep | None
) -> Iterator[None]:
    """What goes wrong in a model's own step, as one line."""
    try:
        yield
    except FreezeOutError:
        raise
    except torch.OutOfMemoryError as error:
        needed = f", which needs {size(counted.memory.steps[0].peak)}" if counted else ""
        raise InvalidValue(
            f"a training step of {config.model}{needed}, does not fit into the memory of {device}; "
            "take fewer items a step, or --no-measure"
        ) from error
    except Exception as error:  # the user's own code: anything
        lines = str(error).strip().splitlines() or ["no message"]
        raise InvalidValue(
            f"a training step of {config.model} failed with {type(error).__name__}: {lines[0]}"
        ) from error
    finally:
        gc.collect()


def _cached(
    subject: Subject, count: StepCount, seconds: list[float], device: torch.device
) -> tuple[float, ...]:
    """Seconds of a step at each depth if the frozen layers' results were read from memory."""
    shape = count.prefix_costs()
    prefix = measure_prefix_seconds(subject.forward, subject.layers, shape=shape, device=device)
    # A byte, as the cache reads rows of a large tensor into a batch.
    row = max(1, _READ_BYTES // subject.batch_size)
    reading, _ = measure_reading(row, subject.batch_size, device, folder=None, total=0)
    rate = reading / (row * subject.batch_size)
    read = [0.0, *(size * rate for size in count.frontier_bytes[1:])]
    return tuple(with_cache(seconds, prefix, read))


def _runs(config: EstimateConfig, step: Step, remarks: list[str]) -> list[Run]:
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
