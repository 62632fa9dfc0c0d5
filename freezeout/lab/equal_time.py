"""How long an ordinary run may be to take no longer than a run with FreezeOut.

A step's cost is that run's own median of the epoch, so that pauses of the machine do not count;
and it is taken relative to a step of the ordinary run of the same seed, which was made shortly
before or after, so that a machine that slows down for good slows both. Per epoch e of the arm, and
over its seeds s,

    N = sum_e  n_e * median_s( m_e,s / c_s )

is the number of ordinary steps that take the same time: n_e steps were made in the epoch, m_e,s is
their median time, and c_s the ordinary step's (the median over the ordinary run's epochs, which
are all alike). No total enters; a slow spell of some epochs in one seed of three has no effect.
Steps of different hardware are never set against each other.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from .runs import Run


def ordinary_step_seconds(run: Run) -> float:
    """Seconds of one step of a run whose steps are all alike."""
    return median(epoch.step_seconds for epoch in run.epochs)


def equal_time_steps(arm: Sequence[Run], ordinary: Sequence[Run]) -> float | None:
    """The number N of ordinary steps that take as long as one run of the arm.

    Args:
        arm: finished runs of one arm, alike but for the seed; or of arms whose layers freeze at
            the same steps. One on hardware without an ordinary run is left out.
        ordinary: finished full-length ordinary runs of the same problem. Shortened ones are made
            at other times, and would bring in how fast the machine was then.
    Returns:
        None if no run of the arm has an ordinary one on its hardware.
    """
    costs: dict[str, dict[int, float]] = defaultdict(dict)  # by hardware and seed
    for run in ordinary:
        costs[run.hardware][run.seed] = ordinary_step_seconds(run)
    known = [
        # The others' median is for a seed whose ordinary run failed.
        (run.epochs, its.get(run.seed, median(its.values())))
        for run in arm
        if (its := costs.get(run.hardware))
    ]
    if not known:
        return None
    steps = 0.0
    for same in zip(*(epochs for epochs, _ in known), strict=True):
        ratios = [e.step_seconds / cost for e, (_, cost) in zip(same, known, strict=True)]
        steps += same[0].steps * median(ratios)
    return steps
