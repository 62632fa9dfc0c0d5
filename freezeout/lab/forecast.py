"""How long the runs of a sweep that are still to come will take.

A run like one that is done takes as long as that did. For others, the cost of a step was measured
at each depth before the first run (`freezeout.profile.measure_step_costs`) and gives the run's
cost (`freezeout.cost.run_cost`), corrected by how far that was off in the runs that are done.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ..cost import run_cost
from ..errors import FreezeOutError
from .config import TrainConfig
from .runs import Run
from .study import Cell

_START_SECONDS = 5.0  # of a process and its data, until a run has shown it


@dataclass
class Forecast:
    """What is known about the cost of runs."""

    # By the folder of a network and data set:
    costs: dict[Path, list[float]] = field(default_factory=dict)  # seconds a step, at each depth
    steps_per_epoch: dict[Path, int] = field(default_factory=dict)
    layers: dict[Path, list[list[str]]] = field(default_factory=dict)  # names of their modules
    done: dict[Path, dict[Path, list[float]]] = field(  # by arm: seconds of training
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    off: dict[Path, list[float]] = field(default_factory=lambda: defaultdict(list))
    beside: list[float] = field(default_factory=list)  # seconds of runs not spent on training

    def read_costs(self, home: Path, path: Path) -> None:
        """Take measured step costs from the file in which a process left them."""
        try:
            found = json.loads(path.read_text())
            costs = [float(cost) for cost in found["step_costs_seconds"]]
            steps = int(found["steps_per_epoch"])
            names = found.get("layers", [[]] * len(costs))  # earlier versions wrote none
            layers = [[str(name) for name in layer] for layer in names]
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError):
            return  # a forecast is no reason to fail
        if costs and steps > 0 and len(layers) == len(costs):
            self.costs[home], self.steps_per_epoch[home] = costs, steps
            self.layers[home] = layers

    def learn(self, cell: Cell, run: Run, wall_seconds: float | None) -> None:
        """A run has ended; `wall_seconds`: of its process, if it was made in one go. What is known
        of step costs comes before, so that it shows how far they were off."""
        home, arm = cell.folder.parents[1], cell.folder.parent
        self.done[home][arm].append(run.seconds)
        predicted = None if cell.is_equal_time else self.predicted(home, cell.config)
        if predicted:
            self.off[home].append(run.seconds / predicted)
        if wall_seconds is not None:
            self.beside.append(max(0.0, wall_seconds - run.seconds))

    def seconds(self, cell: Cell, rival: Cell | None = None, left: float = 1.0) -> float | None:
        """Of a run's process, None while nothing is known. `rival`: of an equal-time run, one that
        it is to take as long as. `left`: the share of its steps that is still to be made."""
        training = self._training(cell, rival)
        if training is None:
            return None
        return left * training + (median(self.beside) if self.beside else _START_SECONDS)

    def _training(self, cell: Cell, rival: Cell | None) -> float | None:
        home, arm = cell.folder.parents[1], cell.folder.parent
        if done := self.done[home].get(arm):
            return median(done)
        if rival is not None:
            return self._training(rival, None)
        predicted = self.predicted(home, cell.config)
        if predicted is not None:
            return predicted * (median(self.off[home]) if self.off[home] else 1.0)
        return max((s for arm_done in self.done[home].values() for s in arm_done), default=None)

    def predicted(self, home: Path, config: TrainConfig) -> float | None:
        """Seconds of training, from the costs of steps; None if these are not known."""
        if home not in self.costs:
            return None
        costs = self.costs[home]
        total = config.steps or config.epochs * self.steps_per_epoch[home]
        try:
            timeline = config.plan.resolved(self.layers[home]).timeline(len(costs), total)
        except FreezeOutError:
            return None  # the run will fail, and say why
        return run_cost(costs, timeline.counts())
