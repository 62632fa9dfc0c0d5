"""Training cost of a run, from the cost of one step at each depth.

`step_costs[k]` is the cost of one step with the first k layers frozen, in any unit (seconds,
FLOPs); `counts[k]` is how many of the run's steps are made so (`Timeline.counts()`). The last of n
layers is never frozen, so there are n of each, for k = 0 ... n - 1.
"""

from collections.abc import Sequence
from dataclasses import replace

from .errors import InvalidValue
from .plan import Frozen, Plan
from .schedule import POWERS, Schedule
from .values import fraction, whole_number


def run_cost(step_costs: Sequence[float], counts: Sequence[int]) -> float:
    """Cost of the whole run, in the unit of `step_costs`."""
    check_one_a_layer(step_costs, counts)
    return sum(count * cost for count, cost in zip(counts, step_costs, strict=True))


def saving(step_costs: Sequence[float], counts: Sequence[int]) -> float:
    """The share of the cost of a run that trains every layer that freezing saves, 1 - C_f / C, at
    most 1.

    InvalidValue if a full step costs nothing.

    >>> saving([10.0, 6.0, 2.0], [512, 217, 271])
    0.3036
    """
    spent = run_cost(step_costs, counts)
    if not step_costs[0] > 0:
        raise InvalidValue(f"the cost of a full step must be positive, got {step_costs[0]}")
    return 1 - spent / (sum(counts) * step_costs[0])


def check_one_a_layer(step_costs: Sequence[float], layers: Sequence[object]) -> None:
    """InvalidValue unless there is a cost for each layer: n layers have n depths, 0 ... n - 1."""
    if len(step_costs) != len(layers):
        raise InvalidValue(
            f"{len(step_costs)} step costs for {len(layers)} layers: one a layer is needed"
        )


def with_cache(
    step_costs: Sequence[float], prefix_costs: Sequence[float], read_costs: Sequence[float]
) -> list[float]:
    """Step costs where frozen layers' results are read in place of being computed again.

    `prefix_costs[k]` is what the first k layers' forward pass costs, frozen; `read_costs[k]` what
    reading their result costs. Where reading costs more, the layers are run.

    >>> with_cache([10.0, 6.0, 4.0], [0.0, 2.0, 3.0], [0.0, 5.0, 1.0])
    [10.0, 6.0, 2.0]
    """
    triples = zip(step_costs, prefix_costs, read_costs, strict=True)
    return [step - prefix + min(prefix, read) for step, prefix, read in triples]


def t_0_for_saving(
    step_costs: Sequence[float],
    target: float,
    schedule: Schedule,
    total_steps: int,
    freeze_every: int = 1,
    frozen: int = 0,
) -> float:
    """The latest t_0, to three decimals, with which `schedule` saves at least the share `target`.

    Args:
        frozen: layers in front that are frozen from the start; `schedule` is for the others.

    Raises:
        InvalidValue: `target` is not in (0, 1), or more than the earliest t_0, 0.001, saves; the
            message says how much that is.

    >>> t_0_for_saving([10.0, 6.0, 2.0], 0.3, Schedule(), 1000)
    0.802
    """
    fraction("the target saving", target, one=False)

    def saved(t_0: float) -> float:
        plan = Frozen(frozen, then=replace(schedule, t_0=t_0))
        return saving(
            step_costs, plan.timeline(len(step_costs), total_steps, freeze_every).counts()
        )

    # Every one is tried: measured costs need not fall at every depth, nor savings with t_0.
    candidates = [thousandth / 1000 for thousandth in range(1000, 0, -1)]
    found = next((t_0 for t_0 in candidates if saved(t_0) >= target), None)
    if found is None:
        most = max(map(saved, candidates))
        raise InvalidValue(
            f"a saving of {target:.1%} cannot be reached: {schedule.how_scale} freezing saves at "
            f"most {most:.1%} here, whatever t_0 is"
        )
    return found


def epochs_within(
    budget: float,
    step_costs: Sequence[float],
    plan: Plan,
    steps_per_epoch: int,
    freeze_every: int = 1,
) -> int:
    """The largest number of whole epochs whose run, with `plan`, costs at most `budget`, in
    the unit of `step_costs`; 0 if not even one does.

    >>> epochs_within(5000.0, [10.0, 6.0, 2.0], Schedule(), steps_per_epoch=100)
    7
    """

    def fits(epochs: int) -> bool:
        line = plan.timeline(len(step_costs), epochs * steps_per_epoch, freeze_every)
        return run_cost(step_costs, line.counts()) <= budget

    if not fits(1):
        return 0
    most, too_many = 1, 2
    while fits(too_many):
        most, too_many = too_many, 2 * too_many
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def epochs_of_equal_cost(
    epochs: int,
    step_costs: Sequence[float],
    plan: Plan,
    steps_per_epoch: int,
    freeze_every: int = 1,
) -> int:
    """How many epochs with `plan` cost what `epochs` without freezing do, to the nearest.

    >>> epochs_of_equal_cost(100, [10.0, 6.0, 2.0], Schedule(), steps_per_epoch=10)
    144
    """
    ordinary = step_costs[0] * epochs * steps_per_epoch

    def counts(candidate: int) -> list[int]:
        steps = candidate * steps_per_epoch
        return plan.timeline(len(step_costs), steps, freeze_every).counts()

    def distance(candidate: int) -> float:
        return abs(run_cost(step_costs, counts(candidate)) - ordinary)

    # All but proportional to the length; a coarse freeze_every makes it go up in leaps.
    most = epochs_within(ordinary, step_costs, plan, steps_per_epoch, freeze_every)
    return min(range(max(1, most - 2), most + 4), key=distance)


# --- the paper's own estimate --------------------------------------------------------------


def paper_costs(depth: int = 76, growth: int = 12) -> list[int]:
    """Cost of each layer of DenseNet-BC as the paper's code counts it (eq. 3).

    Multiplications of one forward pass an image: the stem, and each unit's 1x1 and 3x3
    convolutions, on maps of 1024, 256 and 64 places. Transitions, norms and the classifier are
    left out. See docs/estimate.md for what that makes of it.

    >>> paper_costs(10, 12)
    [663552, 6488064, 1474560, 368640]
    """
    whole_number("depth", depth, minimum=10)
    whole_number("growth", growth)
    units = (depth - 4) // 6
    costs, multiple = [54 * growth * 1024], 2
    for places in (1024, 256, 64):
        for _ in range(units):
            costs.append((4 * multiple * growth**2 + 36 * growth**2) * places)
            multiple += 1
        multiple //= 2
    return costs


def paper_saving(costs: Sequence[float], schedule: Schedule) -> float:
    """The share saved by the paper's own formula (eq. 2), its factor for linear times included:

        1 - sum((1 + t_i) c_i) / (2 sum(c_i)),   t_i = (t_0 + (1 - t_0) i / n) ** p

    times 1.3 if p = 1. It takes a backward pass to cost as much as a forward pass, and divides i
    by n, not n - 1.

    >>> round(paper_saving(paper_costs(76, 12), Schedule(0.8, "cubic")), 10)
    0.1778133025
    """
    if schedule.t_0 is None or schedule.how_scale is None:
        raise InvalidValue("the paper's estimate is for t_0 and how_scale, not for given times")
    n, t_0, power = len(costs), schedule.t_0, POWERS[schedule.how_scale]
    times = [(t_0 + (1 - t_0) * i / n) ** power for i in range(n)]
    spent = sum((1 + t) * c for t, c in zip(times, costs, strict=True))
    share = 1 - spent / (2 * sum(costs))
    return share * 1.3 if power == 1 else share
