"""`FreezeOut`: a schedule applied to the layers of a model and to its optimizers."""

import time
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .checks import EngagedCheck, UpdateWatch, check_state, check_unchanged
from .cost import check_one_a_layer, saving_of
from .errors import FreezeOutError, InvalidType, InvalidValue
from .layers import ExampleInputs, Layer, OrderCheck, find_layers, given_layers
from .layers.layer import merged
from .optimizers import SplitOptimizer, check_optimizers
from .schedule import STEEP, Schedule, factor, whole_number
from .words import duration

_SAMPLES = 64  # step durations kept a depth, for medians


class FreezeOut:
    """Anneals and freezes a model's layers, one after another; call `step()` after each update.

        freezer = FreezeOut(model, optimizer, total_steps, example_inputs=x)
        for x, y in batches:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()

    The optimizer stays the user's: its visible groups, their learning rates and the shape of
    its `state_dict()` never change. During `optimizer.step()` alone, each layer's parameters
    get `lr * factor` (eq. 1 of the paper), on top of whatever a scheduler does to `lr`.

    Args:
        model: any module.
        optimizer: a torch optimizer over (some of) its parameters, or a list of them.
        total_steps: optimizer steps in the whole run (not epochs, not micro-batches).
        schedule: when layers freeze.
        layers: the model's layers in execution order, each a module or several, in place of
            those that `find_layers` finds; or a list that `find_layers` has returned.
        example_inputs: what one forward pass takes (see `find_layers`). Without it, modules are
            taken in the order of their definition, and the first training forward pass checks
            that they run in that order.
        freeze_every: freeze only after steps that are multiples of this.
        anneal: False: layers freeze on time, but their learning rates are left alone.

    Attributes:
        layers: the layers that count, those with anything that an optimizer trains; others
            have been joined to the next one that has.
        freeze_steps: for each layer, after how many steps it freezes; total_steps: never.

    Raises:
        InvalidValue, InvalidType: arguments out of range, an optimizer that holds none of the
            model's parameters, or one that cannot be split (LBFGS, ZeroRedundancyOptimizer).
        LayerOrderError: `layers` in another order than that of execution.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int,
        *,
        schedule: Schedule | None = None,
        layers: Sequence[Layer] | Sequence[nn.Module | Sequence[nn.Module]] | None = None,
        example_inputs: ExampleInputs = None,
        freeze_every: int = 1,
        anneal: bool = True,
    ) -> None:
        self.total_steps = whole_number("total_steps", total_steps)
        self.freeze_every = whole_number("freeze_every", freeze_every)
        self.schedule = Schedule() if schedule is None else schedule
        if not isinstance(self.schedule, Schedule):
            raise InvalidType(f"schedule must be a Schedule, got {type(schedule).__name__}")
        if not isinstance(anneal, bool):
            raise InvalidType(f"anneal must be True or False, got {anneal!r}")
        optimizers = check_optimizers(optimizer)
        self.anneal = anneal
        self.model = model
        ready = _ready_layers(layers)
        if layers is None:
            found = find_layers(model, example_inputs)
        else:
            found = ready or given_layers(model, layers, example_inputs)
        self.layers = _counted(found, optimizers)
        self.freeze_steps = self.schedule.freeze_steps(
            len(self.layers), self.total_steps, self.freeze_every
        )
        # A layer that anneals until the last step is never frozen: no step is left to save.
        self._ends = [end for end in self.freeze_steps if end < self.total_steps]
        self._step = 0
        self._kept_frozen = 0
        self._released = False
        self._factors_at: tuple[int, int] | None = None
        self._factors: tuple[float, ...] = ()
        self._clock: float | None = None
        self._seconds: dict[int, deque[float]] = {}
        self._counts: dict[int, int] = {}
        # What may raise comes before what leaves marks on the optimizers and the model.
        largest = self.schedule.largest_factor(len(self.layers), self.total_steps, freeze_every)
        if anneal and largest > STEEP:
            rate = max(float(group["lr"]) for each in optimizers for group in each.param_groups)
            warnings.warn(
                f"the first layer starts at {largest:.3g} times the base learning rate "
                f"({largest * rate:.3g}), because it freezes so early and scale_lr gives every "
                "layer the same total; a larger t_0, or scale_lr=False, starts lower",
                stacklevel=2,
            )
        layer_of = {p: i for i, layer in enumerate(self.layers) for p in layer.parameters}
        self._optimizers = [
            SplitOptimizer(each, layer_of, self._current_factors, lambda: self.num_frozen)
            for each in optimizers
        ]
        known = bool(ready) or example_inputs is not None
        self._order_check = None if known else OrderCheck(model, self.layers)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._looked = False  # whether the model was changed
        self._watch: UpdateWatch | None = UpdateWatch()
        self._engaged = EngagedCheck(model, self.layers)
        self._engaged.arm()

    # --- where the run stands -----------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Optimizer steps made so far, 0 ... total_steps."""
        return self._step

    @property
    def num_frozen(self) -> int:
        """How many layers, from the first, are frozen: a function of the step count."""
        return 0 if self._released else self._num_frozen_at(self._step)

    @property
    def next_freeze(self) -> int | None:
        """The step count at which the next layer freezes; None if none will."""
        return next(iter(self._ends[self.num_frozen :]), None)

    @property
    def order_pending(self) -> bool:
        """Whether the first training forward pass, which checks the order, is still to come."""
        return self._order_check is not None and self._order_check.pending

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The effective learning rate of each layer for the next update, 0 once frozen. Where a
        layer's parameters stand in several groups, the largest of their rates."""
        return tuple(
            rate * factor
            for rate, factor in zip(self._base_rates(), self._current_factors(), strict=True)
        )

    def step(self) -> list[Layer]:
        """Count one optimizer step; returns the layers that it froze (mostly none).

        Steps that a gradient scaler skipped count too: call it once an update, always.

        Raises:
            FreezeOutError: the run's `total_steps` steps have been made, or after `release()`.
            InvalidValue: the model has other parameters or modules than it had at first (looked
                for in the first step and when a layer freezes).
        """
        if self._released:
            raise FreezeOutError(
                "step() after release(): this FreezeOut no longer drives the model"
            )
        if self._step >= self.total_steps:
            raise FreezeOutError(
                f"step() called more than total_steps = {self.total_steps} times; to lengthen the "
                "run, build a FreezeOut with the new total_steps and load this one's state with "
                "allow_schedule_change=True"
            )
        if self._watch is not None:
            self._watch_updates(self._watch)
        if self._engaged.to_verify:
            self._engaged.verify()
        before = self.num_frozen
        after = self._num_frozen_at(self._step + 1)
        if after != before or not self._looked:
            check_unchanged(self.model, self.layers, self._names)
            self._looked = True
        self._record_duration(before)
        self._step += 1
        if after != before:
            self._apply(after)
        return self.layers[before:after]

    def forward_begins(self) -> None:
        """For frameworks that compute the loss otherwise than by calling the model (a Lightning
        module's `training_step`): a training forward pass begins, to be looked at as if it did."""
        self._engaged.begin()

    def forward_ended(self, output: Any) -> None:
        """What `forward_begins()` told of has ended, and returned this."""
        self._engaged.end(output)

    # --- saving and loading -------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step, and what is needed to refuse a state of another run; plain values only, so
        that `torch.load(..., weights_only=True)` reads it."""
        return {
            "step": self._step,
            **self._configuration(),
            "num_frozen": self._num_frozen_at(self._step),  # after release() too
            "kept_frozen": self._kept_frozen,
            "seconds": {depth: list(seconds) for depth, seconds in self._seconds.items()},
            "counts": dict(self._counts),
        }

    def load_state_dict(
        self, state: dict[str, Any], *, allow_schedule_change: bool = False
    ) -> None:
        """Stand where the saved run stood: the same layers frozen, the same rates and modes.

        Before or after the model's and the optimizers' own states, in any order.

        Args:
            state: what `state_dict()` returned.
            allow_schedule_change: take the step and the frozen layers, but go on with this
                object's schedule and total_steps (to lengthen a run, say). Layers that were
                frozen stay frozen.

        Raises:
            CheckpointError: the state is of other layers, or of another schedule or length.
        """
        if self._released:
            raise FreezeOutError("load_state_dict() after release()")
        mine = self._configuration()
        changed = check_state(state, mine, allow_schedule_change)
        check_unchanged(self.model, self.layers, self._names)
        self._step = state["step"]
        self._kept_frozen = state["num_frozen"] if changed else state["kept_frozen"]
        self._seconds = {
            int(depth): deque(seconds, maxlen=_SAMPLES)
            for depth, seconds in state.get("seconds", {}).items()
        }
        self._counts = {int(depth): count for depth, count in state.get("counts", {}).items()}
        self._clock = None
        self._factors_at = None
        self._apply(self.num_frozen, loaded=True)

    def release(self) -> None:
        """Give the model and the optimizers back as ordinary ones: every layer trains again,
        nothing of FreezeOut remains on them. State that freezing dropped starts afresh."""
        if self._released:
            return
        self._released = True
        self._apply(0)
        self._engaged.disarm()
        for optimizer in self._optimizers:
            optimizer.detach()
        if self._order_check is not None:
            self._order_check.remove()

    # --- for people ---------------------------------------------------------------------

    @property
    def step_seconds(self) -> dict[int, tuple[int, float | None]]:
        """For each number of frozen layers so far: the steps made with them, and the median
        seconds between two calls of `step()`; None before there were two in a row."""
        return {
            depth: (count, median(self._seconds[depth]) if depth in self._seconds else None)
            for depth, count in self._counts.items()
        }

    def seconds_saved(self) -> tuple[float, float] | None:
        """Seconds that freezing has saved so far, and their share of what the steps made so far
        would have taken without it; None while too little has been measured.

        From the median time between two calls of `step()` at each depth, so that pauses for
        evaluation do not count.
        """
        made = self.step_seconds
        full = made.get(0, (0, None))[1]
        if full is None or len(made) < 2:
            return None
        saved = sum(
            count * (full - seconds) for count, seconds in made.values() if seconds is not None
        )
        return saved, saved / (full * sum(count for count, _ in made.values()))

    def predicted_share(self, step_costs: Sequence[float]) -> float | None:
        """The share of the cost of the steps made so far that freezing should have saved, by the
        cost of one step with k layers frozen, k = 0 ... n - 1, in any unit (see
        `freezeout.profile`). None before the first step."""
        counts = [self._counts.get(depth, 0) for depth in range(len(self.layers))]
        check_one_a_layer(step_costs, counts)
        return saving_of(step_costs, counts) if self._counts else None

    def summary(self, step_costs: Sequence[float] | None = None) -> str:
        """One line: what was frozen, what that saved, and with `step_costs` what was predicted
        (see `predicted_share`)."""
        froze = f"froze {self._num_frozen_at(self._step)} of {len(self.layers)} layers"
        saved = self.seconds_saved()
        if saved is not None:
            seconds, share = saved
            froze += f"; {duration(seconds)} saved ({share:.0%} of the steps' time)"
        predicted = None if step_costs is None else self.predicted_share(step_costs)
        return froze if predicted is None else f"{froze}, predicted {predicted:.0%}"

    def __str__(self) -> str:
        """A table of the layers: parameters, freeze step, learning rate."""
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"FreezeOut at step {self._step} of {self.total_steps}, "
            f"{self.num_frozen} of {len(self.layers)} layers frozen",
            f"{'layer':<{width}}  {'parameters':>12}  {'freezes at':>10}  {'starts at':>10}  "
            f"{'now':>10}",
        ]
        starts = self._factors_for(0, 0)
        rates = zip(self._base_rates(), self.learning_rates, strict=True)
        for layer, end, start, (base, rate) in zip(
            self.layers, self.freeze_steps, starts, rates, strict=True
        ):
            count = sum(p.numel() for p in layer.parameters)
            when = "never" if end >= self.total_steps else str(end)
            now = "frozen" if layer.is_frozen else f"{rate:.4g}"
            lines.append(
                f"{layer.name:<{width}}  {count:>12,}  {when:>10}  {base * start:>10.4g}  {now:>10}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"FreezeOut({type(self.model).__name__}, {len(self.layers)} layers, "
            f"step {self._step} of {self.total_steps}, {self.schedule})"
        )

    # --- inside -------------------------------------------------------------------------

    def _num_frozen_at(self, step: int) -> int:
        return max(self._kept_frozen, bisect_right(self._ends, step))

    def _base_rates(self) -> list[float]:
        rates = [0.0] * len(self.layers)
        for optimizer in self._optimizers:
            for layer, rate in optimizer.base_rates():
                rates[layer] = max(rates[layer], rate)
        return rates

    def _current_factors(self) -> tuple[float, ...]:
        """Each layer's learning-rate multiplier for the next update."""
        at = (self._step, self.num_frozen)
        if self._factors_at != at:
            self._factors_at, self._factors = at, self._factors_for(*at)
        return self._factors

    def _factors_for(self, step: int, num_frozen: int) -> tuple[float, ...]:
        ends = self.freeze_steps[num_frozen:]
        if self.anneal:
            scale = self.schedule.scale_lr
            trained = [factor(step, end, self.total_steps, scale) for end in ends]
        else:
            trained = [1.0] * len(ends)
        return (0.0,) * num_frozen + tuple(trained)

    def _apply(self, num_frozen: int, loaded: bool = False) -> None:
        """Freeze the first layers and no others."""
        for i, layer in enumerate(self.layers):
            if i < num_frozen and not layer.is_frozen:
                layer.freeze()
                for optimizer in self._optimizers:
                    optimizer.drop_state(layer.parameters)
            elif i >= num_frozen and layer.is_frozen:
                layer.unfreeze(self.model.training)
        for optimizer in self._optimizers:
            optimizer.settle()
        self._engaged.arm(loaded)

    def _watch_updates(self, watch: UpdateWatch) -> None:
        updates = sum(optimizer.updates for optimizer in self._optimizers)
        if not watch.count(updates):
            self._watch = None

    def _configuration(self) -> dict[str, Any]:
        schedule = asdict(self.schedule)
        times = schedule["times"]
        return {
            "total_steps": self.total_steps,
            "freeze_every": self.freeze_every,
            "anneal": self.anneal,
            "schedule": {**schedule, "times": None if times is None else list(times)},
            "layers": [layer.name for layer in self.layers],
        }

    def _record_duration(self, depth: int) -> None:
        now = time.perf_counter()
        self._counts[depth] = self._counts.get(depth, 0) + 1
        if self._clock is not None:
            self._seconds.setdefault(depth, deque(maxlen=_SAMPLES)).append(now - self._clock)
        self._clock = now


def _ready_layers(layers: Any) -> list[Layer]:
    """The list, if it is one of layers that have been found before; else an empty one."""
    given = list(layers) if isinstance(layers, Sequence) else []
    return given if all(isinstance(layer, Layer) for layer in given) else []


def _counted(found: list[Layer], optimizers: Sequence[Optimizer]) -> list[Layer]:
    """The layers that count: those with a parameter that an optimizer trains. Others are joined
    to the next one that has; after the last, to that."""
    held = {
        p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    counted: list[Layer] = []
    waiting: list[Layer] = []
    for layer in found:
        waiting.append(layer)
        if any(p.requires_grad and p in held for p in layer.parameters):
            counted.append(merged(layer.name, waiting))
            waiting = []
    if not counted:
        raise InvalidValue(
            "the optimizer holds none of the model's parameters that require gradients "
            "(build it from model.parameters())"
        )
    if waiting:
        counted[-1] = merged(counted[-1].name, [counted[-1], *waiting])
    return counted
