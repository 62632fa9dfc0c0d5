"""Training cost of a run, from the cost of one step at each depth.

`step_costs[k]` is the cost of one step with the first k layers frozen, in any unit (seconds,
FLOPs); `freeze_steps[i]` is the step count after which layer i is frozen. A schedule of n layers
never freezes the last one, so there are n step costs, for k = 0 ... n - 1.
"""

from collections.abc import Sequence
from itertools import pairwise

from .errors import InvalidValue


def steps_at_depth(freeze_steps: Sequence[int], total_steps: int) -> list[int]:
    """How many of the run's steps are made with k layers frozen, for k = 0 ... n - 1.

    >>> steps_at_depth((512, 729, 1000), 1000)
    [512, 217, 271]
    """
    edges = [0, *freeze_steps[:-1], total_steps]
    return [after - before for before, after in pairwise(edges)]


def run_cost(step_costs: Sequence[float], freeze_steps: Sequence[int], total_steps: int) -> float:
    """Cost of the whole run, in the unit of `step_costs`."""
    if len(step_costs) != len(freeze_steps):
        raise InvalidValue(
            f"{len(step_costs)} step costs for {len(freeze_steps)} layers: one a layer is needed"
        )
    counts = steps_at_depth(freeze_steps, total_steps)
    return sum(count * cost for count, cost in zip(counts, step_costs, strict=True))


def saving(step_costs: Sequence[float], freeze_steps: Sequence[int], total_steps: int) -> float:
    """The share of the ordinary run's cost that freezing saves, 1 - C_f / C, at most 1.

    InvalidValue if a full step costs nothing.

    >>> saving([10.0, 6.0, 2.0], (512, 729, 1000), 1000)
    0.3036
    """
    cost = run_cost(step_costs, freeze_steps, total_steps)
    if not step_costs[0] > 0:
        raise InvalidValue(f"the cost of a full step must be positive, got {step_costs[0]}")
    return 1 - cost / (total_steps * step_costs[0])
