"""Training cost of a run, from the cost of one step at each depth.

`step_costs[k]` is the cost of one step with the first k layers frozen, in any unit (seconds,
FLOPs); `freeze_steps[i]` is the step count after which layer i is frozen. A schedule of n layers
never freezes the last one, so there are n step costs, for k = 0 ... n - 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from .errors import InvalidValue
from .schedule import POWERS, Schedule, whole_number


def steps_at_depth(freeze_steps: Sequence[int], total_steps: int) -> list[int]:
    """How many of the run's steps are made with k layers frozen, for k = 0 ... n - 1.

    >>> steps_at_depth((512, 729, 1000), 1000)
    [512, 217, 271]
    """
    edges = [0, *freeze_steps[:-1], total_steps]
    return [after - before for before, after in pairwise(edges)]


def run_cost(step_costs: Sequence[float], freeze_steps: Sequence[int], total_steps: int) -> float:
    """Cost of the whole run, in the unit of `step_costs`."""
    check_one_a_layer(step_costs, freeze_steps)
    return _cost_of(step_costs, steps_at_depth(freeze_steps, total_steps))


def saving(step_costs: Sequence[float], freeze_steps: Sequence[int], total_steps: int) -> float:
    """The share of the ordinary run's cost that freezing saves, 1 - C_f / C, at most 1.

    InvalidValue if a full step costs nothing.

    >>> saving([10.0, 6.0, 2.0], (512, 729, 1000), 1000)
    0.3036
    """
    check_one_a_layer(step_costs, freeze_steps)
    return saving_of(step_costs, steps_at_depth(freeze_steps, total_steps))


def saving_of(step_costs: Sequence[float], counts: Sequence[int]) -> float:
    """`saving` of any steps: `counts[k]` were made with k layers frozen.

    >>> saving_of([10.0, 6.0, 2.0], [512, 217, 271])
    0.3036
    """
    check_one_a_layer(step_costs, counts)
    if not step_costs[0] > 0:
        raise InvalidValue(f"the cost of a full step must be positive, got {step_costs[0]}")
    return 1 - _cost_of(step_costs, counts) / (sum(counts) * step_costs[0])


def _cost_of(step_costs: Sequence[float], counts: Sequence[int]) -> float:
    return sum(count * cost for count, cost in zip(counts, step_costs, strict=True))


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
) -> float:
    """The latest t_0, to three decimals, with which `schedule` saves at least the share `target`.

    Raises:
        InvalidValue: `target` is not in (0, 1), or more than the earliest t_0, 0.001, saves; the
            message says how much that is.

    >>> t_0_for_saving([10.0, 6.0, 2.0], 0.3, Schedule(), 1000)
    0.802
    """
    if isinstance(target, bool) or not 0 < target < 1:
        raise InvalidValue(f"the target saving must be a share in (0, 1), got {target}")

    def saved(t_0: float) -> float:
        steps = replace(schedule, t_0=t_0).freeze_steps(len(step_costs), total_steps, freeze_every)
        return saving(step_costs, steps, total_steps)

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
    budget: float, step_costs: Sequence[float], schedule: Schedule, steps_per_epoch: int
) -> int:
    """The largest number of whole epochs whose run, with `schedule`, costs at most `budget`, in
    the unit of `step_costs`; 0 if not even one does.

    >>> epochs_within(5000.0, [10.0, 6.0, 2.0], Schedule(), steps_per_epoch=100)
    7
    """

    def fits(epochs: int) -> bool:
        steps = epochs * steps_per_epoch
        freezing = schedule.freeze_steps(len(step_costs), steps)
        return run_cost(step_costs, freezing, steps) <= budget

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
    epochs: int, step_costs: Sequence[float], schedule: Schedule, steps_per_epoch: int
) -> int:
    """How many epochs with `schedule` cost what `epochs` without freezing do, to the nearest.

    >>> epochs_of_equal_cost(100, [10.0, 6.0, 2.0], Schedule(), steps_per_epoch=10)
    144
    """
    ordinary = step_costs[0] * epochs * steps_per_epoch

    def distance(candidate: int) -> float:
        steps = candidate * steps_per_epoch
        freezing = schedule.freeze_steps(len(step_costs), steps)
        return abs(run_cost(step_costs, freezing, steps) - ordinary)

    # The cost is all but proportional to the length, so the ratio is within an epoch of it.
    steps = epochs * steps_per_epoch
    ratio = 1 - saving(step_costs, schedule.freeze_steps(len(step_costs), steps), steps)
    guess = round(epochs / ratio)
    return min(range(max(1, guess - 2), guess + 3), key=distance)


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
    if schedule.times is not None:
        raise InvalidValue("the paper's estimate is for t_0 and how_scale, not for given times")
    n, t_0, power = len(costs), schedule.t_0, POWERS[schedule.how_scale]
    times = [(t_0 + (1 - t_0) * i / n) ** power for i in range(n)]
    spent = sum((1 + t) * c for t, c in zip(times, costs, strict=True))
    share = 1 - spent / (2 * sum(costs))
    return share * 1.3 if power == 1 else share
