"""`Prediction`: what a run's steps should cost at each depth, and afterwards what they did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..cost import saving
from ..errors import CheckpointError
from ..savings import SecondsSaved

KEPT = 0.7  # a depth that saves a smaller share of what was predicted is flagged
_NOTICED = 0.01  # but not where less than this share of a step was predicted
_SAMPLES = 10  # nor by fewer steps than these


@dataclass(frozen=True)
class Prediction:
    """The cost of a step with k layers frozen, k = 0 ... n - 1, predicted before the run.

    Attributes:
        basis: "measured" on this machine, in seconds, or "counted" FLOPs, whose ratios alone
            are used: the run's own first steps say what a FLOP takes.
    """

    basis: Literal["measured", "counted"]
    step_costs: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {"basis": self.basis, "step_costs": list(self.step_costs)}

    @classmethod
    def from_json(cls, values: Any) -> "Prediction | None":
        """The prediction that `to_json` wrote; None for None. CheckpointError for anything else."""
        if values is None:
            return None
        try:
            basis, costs = values["basis"], tuple(float(cost) for cost in values["step_costs"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{values!r} is no prediction of a run") from error
        if basis not in ("measured", "counted"):
            raise CheckpointError(f"a prediction is measured or counted, not {basis!r}")
        return cls(basis, costs)

    def against(
        self, made: Mapping[int, tuple[int, float | None]], saved: SecondsSaved | None
    ) -> dict[str, Any]:
        """`savings.json`: predicted and measured seconds of a step at each depth of the run so
        far, and the shares of the steps' time that were saved.

        Where layers are frozen from the start, what a full step takes is itself predicted, from
        the shallowest depth that there was.

        Args:
            made: by number of frozen layers, the steps made and the median seconds of one.
            saved: in these steps, if that is known.
        """
        timed = {depth: seconds for depth, (_, seconds) in made.items() if seconds is not None}
        has_unit = self.basis == "measured" or bool(timed)
        unit = 1.0
        if self.basis == "counted" and timed:
            unit = timed[min(timed)] / self.step_costs[min(timed)]
        full = timed.get(0, self.step_costs[0] * unit)
        depths = []
        for depth, (steps, seconds) in sorted(made.items()):
            to_save = (self.step_costs[0] - self.step_costs[depth]) * unit
            flagged = (
                seconds is not None
                and steps >= _SAMPLES
                and to_save > _NOTICED * self.step_costs[0] * unit
                and full - seconds < KEPT * to_save
            )
            depths.append(
                {
                    "frozen_layers": depth,
                    "steps": steps,
                    "predicted_step_seconds": self.step_costs[depth] * unit if has_unit else None,
                    "measured_step_seconds": seconds,
                    "flagged": flagged,
                }
            )
        counts = [made.get(depth, (0, None))[0] for depth in range(len(self.step_costs))]
        return {
            "basis": self.basis,
            "predicted_share": saving(self.step_costs, counts) if made else None,
            "measured_share": None if saved is None else saved.share,
            "full_steps": "measured" if 0 in timed else "predicted",
            "depths": depths,
        }


def warning(savings: dict[str, Any]) -> str | None:
    """A line about the depths of `savings.json` that are flagged; None if none is."""
    flagged = [depth for depth in savings["depths"] if depth["flagged"]]
    if not flagged:
        return None
    steps = sum(depth["steps"] for depth in flagged)
    depths = _listed([depth["frozen_layers"] for depth in flagged])
    return (
        f"less than {KEPT:.0%} of what was predicted was saved while the number of frozen layers "
        f"was {depths} ({steps} steps): see savings.json"
    )


def _listed(numbers: Sequence[int]) -> str:
    """Numbers, runs of them shortened.

    >>> _listed([1, 2, 3, 7])
    '1-3, 7'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
