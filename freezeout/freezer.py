"""`FreezeOut`: a plan of what trains when, applied to a model's layers and to its optimizers."""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from operator import attrgetter
from types import TracebackType
from typing import Any, Never, Self
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from .checks import (
    EngagedCheck,
    GradientWatch,
    UpdateWatch,
    check_state,
    check_unchanged,
    hooked,
)
from .cost import check_one_a_layer, saving
from .errors import CheckpointError, FreezeOutError, InvalidType, InvalidValue
from .layers import ExampleInputs, Layer, OrderCheck, find_layers, given_layers
from .layers.marks import is_stopped, take_off
from .layers.names import plain_parameter_names
from .optimizers import SplitOptimizer, check_optimizers, rate_of
from .plan import Plan, Timeline, check_plan, factors_of, given_layers_are, progress
from .planned import held_by, plan_layers
from .savings import BytesSaved, SecondsSaved, StepTimes, bytes_saved, flops_saved, seconds_saved
from .schedule import STEEP, Schedule, refuse_options
from .trial import check_rates
from .values import plain, whole_number
from .words import duration, size

_requires_grad = attrgetter("requires_grad")

_DRIVING: "WeakSet[FreezeOut]" = WeakSet()  # those that have not been released


class FreezeOut:
    """Anneals and freezes a model's layers by a plan; call `step()` after each update.

        with FreezeOut(model, optimizer, total_steps, example_inputs=x) as freezer:
            for x, y in batches:
                criterion(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                freezer.step()

    At the end of the `with` block, or when `release()` is called, the model is an ordinary one
    again. The optimizer stays the user's: its visible groups, their learning rates and the shape
    of its `state_dict()` never change. During `optimizer.step()` alone, each layer's parameters
    get `lr * factor` (eq. 1 of the paper), on top of whatever a scheduler does to `lr`.

    Leading layers in which nothing trains, because the user has called `requires_grad_(False)` on
    them, are frozen from the start, each as a layer of its own; the plan is for the others.

    Args:
        model: any module. If an earlier FreezeOut has left it frozen, it is thawed first.
        optimizer: a torch optimizer over (some of) its parameters, or a list of them.
        total_steps: optimizer steps in the whole run (not epochs, not micro-batches). None, where
            the plan allows it: not known beforehand.
        schedule: the plan of what trains when: a `Schedule`, the paper's and the default; a
            `Frozen`, for layers frozen from the start; or a `Plan` of your own.
        layers: the model's layers in execution order, each a module or several, in place of
            those that `find_layers` finds; or a list that `find_layers` has returned.
        example_inputs: what one forward pass takes (see `find_layers`). Without it, modules are
            taken in the order of their definition, and the first training forward pass (or, if
            the model itself is not called, the first step) checks that they run in that order.
        freeze_every: freeze only after steps that are multiples of this.
        anneal: False: layers freeze on time, but their learning rates are left alone, and groups
            stay whole.
        keep_awake: True: layers that the user froze are left as they are, norms and dropout in
            training mode, and count as part of the first layer that trains; they are not cached
            until that is frozen.

    Attributes:
        layers: the layers that count: those with anything that an optimizer trains, and in front of
            them those that the user froze. Others have been joined to the next one that counts.
        schedule: the plan, as given.
        timeline: when how many layers are frozen.
        times: the seconds of steps, in this process; no part of `state_dict()`.

    Raises:
        InvalidValue, InvalidType: arguments out of range, a plan that does not go with the layers,
            an optimizer that holds none of the model's parameters, or that was built while the
            model was frozen in part, or one that cannot be split (LBFGS, ZeroRedundancyOptimizer)
            or not give layers the rates that the plan asks for (see `trial.py`).
        LayerOrderError: `layers` in another order than that of execution.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        total_steps: int | None,
        *,
        schedule: Plan | None = None,
        layers: Sequence[Layer] | Sequence[nn.Module | Sequence[nn.Module]] | None = None,
        example_inputs: ExampleInputs = None,
        freeze_every: int = 1,
        anneal: bool = True,
        keep_awake: bool = False,
        **unknown: Never,
    ) -> None:
        refuse_options("FreezeOut", unknown, signature(FreezeOut).parameters)
        self.total_steps = None if total_steps is None else whole_number("total_steps", total_steps)
        self.freeze_every = whole_number("freeze_every", freeze_every)
        check_plan("schedule", schedule)
        self.schedule: Plan = Schedule() if schedule is None else schedule
        for name, value in (("anneal", anneal), ("keep_awake", keep_awake)):
            if not isinstance(value, bool):
                raise InvalidType(f"{name} must be True or False, got {value!r}")
        optimizers = check_optimizers(optimizer)
        self.anneal = anneal
        self.model = model
        if isinstance(model, nn.Module):
            _take_over(model, optimizers)
        ready = _ready_layers(layers)
        held = held_by(optimizers)
        if layers is None:
            found = find_layers(model, example_inputs, trained=held)
        else:
            found = ready or given_layers(model, layers, example_inputs, trained=held)
        planned = plan_layers(
            model,
            found,
            optimizers,
            self.schedule,
            self.total_steps,
            freeze_every=self.freeze_every,
            keep_awake=keep_awake,
        )
        self.layers, self._plan, self.timeline = planned.layers, planned.plan, planned.timeline
        self._step = 0
        self._released = False
        self._factors_at: tuple[int, int] | None = None
        self._factors: tuple[float, ...] = ()
        self.times = StepTimes()
        self._caches: list[Any] = []  # weak references
        self._frozen_parameters: tuple[nn.Parameter, ...] = ()
        self._told: set[str] = set()
        # What may raise comes before what leaves marks on the optimizers and the model.
        anneals, differ = self._rates_planned()
        check_rates(optimizers, anneals, differ)
        groups = [group for each in optimizers for group in each.param_groups]
        # A scheduler that warms up has made the rate of now a small one, or zero.
        self._check_factors(max(float(g.get("initial_lr", rate_of(g))) for g in groups))
        self._names = plain_parameter_names(model)
        layer_of = {p: i for i, layer in enumerate(self.layers) for p in layer.parameters}
        names = {p: (self._names[p], self.layers[i].name) for p, i in layer_of.items()}
        self._optimizers = [
            SplitOptimizer(
                each,
                layer_of,
                self._current_factors,
                lambda: self.num_frozen,
                lambda: self.timeline.is_over(self._step),
                names,
                differ,
            )
            for each in optimizers
        ]
        known = bool(ready) or example_inputs is not None
        self._order_check = None if known else OrderCheck(model, self.layers, layers is None)
        self._looked = False  # whether the model was changed
        self._watch: UpdateWatch | None = UpdateWatch()
        self._engaged = EngagedCheck(model, self.layers)
        self._tell_left_out(held)
        self._gradients = GradientWatch(self.layers, optimizers, self.timeline)
        self._apply(self.num_frozen)
        _DRIVING.add(self)
        if planned.given:
            _tell_given(self.layers[: planned.given])
        if not any(self.timeline.depths):
            self._tell_idle()

    def _check_factors(self, base_rate: float) -> None:
        if not self.anneal:
            return
        factors = factors_of(self._plan, 0, self.timeline)
        largest = max(factors)
        if largest > STEEP:
            name = self.layers[factors.index(largest)].name
            rate = f" ({largest * base_rate:.3g})" if base_rate else ""
            warnings.warn(
                f"layer {name!r} starts at {largest:.3g} times the base learning rate{rate}, "
                "because it freezes so early and scale_lr gives "
                "every layer the same total; a larger t_0, or scale_lr=False, starts lower",
                stacklevel=3,
            )

    def _tell_left_out(self, held: set[nn.Parameter]) -> None:
        """Name the parameters that train, but in no optimizer that is known."""
        out = [
            (self._names[p], layer.name)
            for layer in self.layers[self.num_frozen :]
            for p in layer.parameters
            if p.requires_grad and p not in held
        ]
        if out:
            shown = ", ".join(repr(name) for name, _ in out[:3]) + ", ..." * (len(out) > 3)
            warnings.warn(
                f"{len(out)} parameters require gradients, but are in no optimizer that FreezeOut "
                f"was given ({shown}): their learning rates are not annealed, and they stop with "
                f"the layer that they are part of ({out[0][1]!r} first). Give FreezeOut all "
                "optimizers, as a list, or call requires_grad_(False) on what does not train",
                stacklevel=3,
            )

    def _tell_idle(self) -> None:
        """Say why no layer will ever be frozen, unless the plan itself wants that."""
        count, end = len(self.layers), self.total_steps
        if count == 1:
            why = (
                f"the model is one layer ({self.layers[0].name!r}), and the last never freezes; "
                "pass layers=, a list of the modules that are to freeze one by one"
            )
        elif any(self._plan.timeline(count, end, 1).depths):
            why = f"freeze_every={self.freeze_every} leaves no step for it in a run of {end}"
        else:
            return
        warnings.warn(f"no layer will be frozen, and nothing saved: {why}", stacklevel=3)

    def _rates_planned(self) -> tuple[bool, bool]:
        """Whether the plan gives a layer that trains another rate than its group's, and whether it
        gives layers different ones, at any of many steps of the run."""
        last = (self.total_steps or 1) - 1
        steps = {last * i // 50 for i in range(51)}
        steps |= {step - i for step, _ in self.timeline.changes for i in (0, 1)}
        factors = [
            set(self._factors_for(step)[self.timeline.num_frozen(step) :])
            for step in steps
            if step >= 0 and (self.total_steps is None or step <= last)
        ]
        return any(each != {1} for each in factors), any(len(each) > 1 for each in factors)

    # --- where the run stands -----------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Optimizer steps made so far, 0 ... total_steps."""
        return self._step

    @property
    def num_frozen(self) -> int:
        """How many layers, from the first, are frozen: what the timeline says of the step count;
        after `release()` none."""
        return 0 if self._released else self.timeline.num_frozen(self._step)

    @property
    def freeze_steps(self) -> tuple[int | None, ...]:
        """For each layer, after how many steps it is first frozen (0: from the start); total_steps,
        or None where that is not known: never."""
        return self.timeline.freeze_steps

    @property
    def next_freeze(self) -> int | None:
        """The step count at which the next layer freezes; None if none will."""
        step = self._step
        while not self._released and (change := self.timeline.next_change(step)) is not None:
            if change[1] > self.timeline.num_frozen(step):
                return change[0]
            step = change[0]
        return None

    @property
    def is_unfinished(self) -> bool:
        """Whether something is still planned: layers that freeze or thaw, rates that change."""
        if self._released or self.total_steps is None:
            return self.next_freeze is not None
        return self.timeline.next_change(self._step) is not None or (
            self._step < self.total_steps
            and self._factors_for(self._step) != self._factors_for(self.total_steps)
        )

    @property
    def order_pending(self) -> bool:
        """Whether the first training forward pass, which checks the order, is still to come."""
        return self._order_check is not None and self._order_check.pending

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The effective learning rate of each layer for the next update, 0 once frozen. Where a
        layer's parameters stand in several groups, the largest of their rates. After `release()`
        the optimizer's own."""
        if self._released:
            return tuple(self._base_rates())
        return tuple(
            rate * factor
            for rate, factor in zip(self._base_rates(), self._current_factors(), strict=True)
        )

    def step(self) -> list[Layer]:
        """Count one optimizer step; returns the layers that it froze or thawed (mostly none).

        Steps that a gradient scaler skipped count too: call it once an update, always. Updates
        after the run's `total_steps` change no parameter, and a warning says so, once.

        Raises:
            FreezeOutError: after `release()`.
            InvalidValue: the model has other parameters or modules than it had at first (looked
                for in the first step and when a layer freezes).
        """
        if self._released:
            raise FreezeOutError(
                "step() after release(): this FreezeOut no longer drives the model (a later one "
                "over the same parameters releases an earlier one)"
            )
        if self._watch is not None:
            self._watch_updates(self._watch)
        if self._engaged.to_verify:
            self._engaged.verify()
        self._gradients.stepped()
        if any(map(_requires_grad, self._frozen_parameters)):
            self._hold()
        if self.timeline.is_over(self._step):
            self._tell_over()
            return []
        before = self.num_frozen
        after = self.timeline.num_frozen(self._step + 1)
        if after != before or not self._looked:
            check_unchanged(self.model, self.layers, self._names)
            self._tell_hooks()
            self._looked = True
        if self._order_check is not None:
            self._check_order(after > before)
        self.times.record(before, self.layers[-1].parameters[0].device)
        self._step += 1
        if after != before:
            self._apply(after)
        return self.layers[min(before, after) : max(before, after)]

    def attach(self, cache: Any) -> None:
        """For caches: `summary()` says what that of the cache does, as long as it is there."""
        self._caches.append(weakref.ref(cache))

    def served(self) -> None:
        """For caches: in the step that goes on, what frozen layers compute was read and not
        computed, so its duration is one of its own kind."""
        self.times.served = True

    def forward_begins(self) -> None:
        """For frameworks that compute the loss otherwise than by calling the model (a Lightning
        module's `training_step`): a training forward pass begins, to be looked at as if it did."""
        self._engaged.begin()

    def forward_ended(self, output: Any) -> None:
        """What `forward_begins()` told of has ended, and returned this."""
        self._engaged.end(output)

    # --- saving and loading -------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step, the changes of the timeline, and what is needed to refuse a state of another
        run; plain values only, so that `torch.load(..., weights_only=True)` reads it."""
        numbers = [optimizer.numbers() for optimizer in self._optimizers]
        return {
            **({"numbers": numbers} if any(numbers) else {}),
            "step": self._step,
            "changes": [list(change) for change in self.timeline.changes],
            **self._configuration(),
            "num_frozen": self.timeline.num_frozen(self._step),  # for readers; not read here
        }

    def load_state_dict(
        self, state: dict[str, Any], *, allow_schedule_change: bool = False
    ) -> None:
        """Stand where the saved run stood: the same layers frozen, the same rates and modes.

        Before or after the model's and the optimizers' own states, in any order.

        Args:
            state: what `state_dict()` returned.
            allow_schedule_change: take the step and the frozen layers, but go on with this
                object's plan and total_steps (to lengthen a run, say). Layers that were
                frozen stay frozen.

        Raises:
            CheckpointError: the state is of other layers, or of another plan or length.
        """
        if self._released:
            raise FreezeOutError("load_state_dict() after release()")
        changed = check_state(state, self._configuration(), allow_schedule_change)
        step = state["step"]
        try:
            theirs = Timeline(
                len(self.layers), state["total_steps"], tuple(map(tuple, state["changes"]))
            )
            if changed:
                planned = self._plan.timeline(len(self.layers), self.total_steps, self.freeze_every)
                depth = max(theirs.num_frozen(step), planned.num_frozen(step))
                planned = planned.changed(step, depth)
                past = [change for change in theirs.changes if change[0] < step]
                following = [change for change in planned.changes if change[0] > step]
                changes = [*past, (step, depth), *following]
                theirs = Timeline.of(len(self.layers), self.total_steps, changes)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"this is no FreezeOut state: {error}") from error
        numbers = state.get("numbers", [[] for _ in self._optimizers])
        if len(numbers) != len(self._optimizers):
            raise CheckpointError(
                f"the checkpoint is of {len(numbers)} optimizers, this FreezeOut has "
                f"{len(self._optimizers)}"
            )
        check_unchanged(self.model, self.layers, self._names)
        self.timeline, self._step, self.times = theirs, step, StepTimes(since=step)
        self._factors_at = None
        for optimizer, its in zip(self._optimizers, numbers, strict=True):
            optimizer.load_numbers(its)
        self._apply(self.num_frozen, loaded=True)

    def release(self) -> None:
        """Give the model and the optimizers back as ordinary ones: every layer trains again,
        nothing of FreezeOut remains on them. State that freezing dropped starts afresh."""
        if self._released:
            return
        self._released = True
        self._apply(0)
        self._engaged.disarm()
        self._gradients.remove()
        for optimizer in self._optimizers:
            optimizer.detach()
        if self._order_check is not None:
            self._order_check.remove()
        take_off(self.model)
        _DRIVING.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidType(
            "a FreezeOut cannot be copied or pickled, as it drives one model and its optimizers: "
            "keep freezer.state_dict(), which load_state_dict() of another one takes (and keep it "
            "out of the model's attributes, where the model is to be copied)"
        )

    # --- for people ---------------------------------------------------------------------

    @property
    def step_seconds(self) -> dict[int, tuple[int, float | None]]:
        """For each number of frozen layers in this process: the steps made with them, and the
        median seconds between two calls of `step()`; None before there were two in a row."""
        return self.times.by_depth()

    def seconds_saved(self) -> SecondsSaved | None:
        """Seconds that freezing, and a cache, have saved in the steps made in this process, against
        training every layer, from the median time between two calls of `step()` with each number of
        frozen layers, so that pauses for evaluation do not count.

        None while too little was timed: there must have been five steps with all layers trained.
        Where layers are frozen from the start there are none: see `flops_saved`.
        """
        return seconds_saved(self.times)

    def flops_saved(self) -> float | None:
        """The share of the network's computation, in counted FLOPs, that freezing, and a cache,
        have left out in the steps made in this process. None before there are any, or without
        `example_inputs`."""
        return flops_saved(self.times.counts, self.layers)

    def bytes_saved(self) -> BytesSaved:
        """Bytes of gradients, optimizer state and activations that the layers which are frozen now
        (after `release()`: were, at its time) do not take."""
        frozen = self.layers[: self.timeline.num_frozen(self._step)]
        states = [optimizer.state_bytes() for optimizer in self._optimizers]
        return bytes_saved(frozen, states, self._engaged.rows)

    def predicted_share(self, step_costs: Sequence[float]) -> float | None:
        """The share of the cost of the steps made so far that freezing should have saved, by the
        cost of one step with k layers frozen, k = 0 ... n - 1, in any unit (see
        `freezeout.profile`). None before the first step."""
        counts = self.timeline.counts(end=self._step)
        check_one_a_layer(step_costs, counts)
        return saving(step_costs, counts) if self._step else None

    def summary(self, step_costs: Sequence[float] | None = None) -> str:
        """What was frozen, and what that saved against training every layer, in a line; with
        `step_costs` also what was predicted (see `predicted_share`)."""
        depth = self.timeline.num_frozen(self._step)
        parts = progress(self.timeline, self._step)
        saved, flops = self.seconds_saved(), self.flops_saved()
        if saved is not None and saved.seconds:
            line = f"{duration(saved.seconds)} saved ({saved.share:.0%} of the steps' time)"
            if self.times.since:
                line += f", since step {self.times.since}"
            parts.append(line)
        elif saved is not None:
            parts.append("no time saved: steps with frozen layers took as long as the others")
        elif depth:
            of_flops = "" if flops is None else f"{flops:.0%} of the network's FLOPs saved; "
            trained = (0, False) in self.times.counts
            why = "too few steps were timed" if trained else "no step trained all layers"
            parts.append(f"{of_flops}time saved is not known, as {why}")
        if step_costs is not None and (share := self.predicted_share(step_costs)) is not None:
            parts[-1] += f", predicted {share:.0%}"
        if depth:
            kept = self.bytes_saved()
            kinds = {
                "gradients": kept.gradients,
                "optimizer state": kept.optimizer_state,
                "activations": kept.activations,
            }
            words = [f"{size(count)} of {kind}" for kind, count in kinds.items() if count]
            if words:
                parts.append(f"a step takes {_joined(words)} less")
        caches = [cache for each in self._caches if (cache := each()) is not None]
        return "; ".join([*parts, *(cache.summary() for cache in caches)])

    def __str__(self) -> str:
        """A table of the layers: parameters, freeze step, learning rate; `lr` is the optimizer's,
        whatever a scheduler makes of it."""
        depth = self.timeline.num_frozen(self._step)
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        state = f"{depth} of {len(self.layers)} layers " + ("were " if self._released else "")
        lines = [
            f"FreezeOut {'released at' if self._released else 'at'} step {self._step}{of}, "
            f"{state}frozen",
            f"{'layer':<{width}}  {'parameters':>12}  {'freezes at':>10}  {'starts at':>12}  "
            f"{'now':>10}",
        ]
        starts = self._factors_for(0)
        rows = zip(self.layers, self.freeze_steps, starts, self.learning_rates, strict=True)
        for i, (layer, end, start, rate) in enumerate(rows):
            count = sum(p.numel() for p in layer.parameters)
            when = "never" if end in (None, self.total_steps) else "start" if not end else str(end)
            now = f"{rate:.4g}" if i >= depth else "was frozen" if self._released else "frozen"
            first = f"{start:.4g} x lr" if start else "0"
            lines.append(f"{layer.name:<{width}}  {count:>12,}  {when:>10}  {first:>12}  {now:>10}")
        if not self._released and any(self.timeline.depths):
            lines.append(
                "The .grad of frozen parameters is None: loops over gradients need "
                "`if p.grad is not None`."
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        return (
            f"FreezeOut({type(self.model).__name__}, {len(self.layers)} layers, "
            f"step {self._step}{of}, {self.schedule})"
        )

    # --- inside -------------------------------------------------------------------------

    def _base_rates(self) -> list[float]:
        rates = [0.0] * len(self.layers)
        for optimizer in self._optimizers:
            for layer, rate in optimizer.base_rates():
                rates[layer] = max(rate, rates[layer])
        return rates

    def _current_factors(self) -> tuple[float, ...]:
        """Each layer's learning-rate multiplier for the next update."""
        at = (self._step, self.num_frozen)
        if self._factors_at != at:
            self._factors_at, self._factors = at, self._factors_for(self._step)
        return self._factors

    def _factors_for(self, step: int) -> tuple[float, ...]:
        if self.anneal:
            return tuple(self._plan.factors(step, self.timeline))
        return Plan.factors(self._plan, step, self.timeline)

    def _apply(self, num_frozen: int, loaded: bool = False) -> None:
        """Freeze the first layers and no others."""
        for i, layer in enumerate(self.layers):
            if i < num_frozen and not layer.is_frozen:
                for optimizer in () if loaded else self._optimizers:
                    optimizer.rest(layer.parameters)
                layer.freeze(self.model)
                for optimizer in self._optimizers:
                    optimizer.drop_state(layer.parameters)
            elif i >= num_frozen and layer.is_frozen:
                layer.unfreeze()
        self._frozen_parameters = tuple(self._parameters_of(num_frozen))
        for optimizer in self._optimizers:
            optimizer.settle()
        self._engaged.arm(loaded)

    def _hold(self) -> None:
        """Something has made frozen parameters require a gradient: undo it, and say so."""
        undone = [
            (self._names[p], layer.name)
            for layer in self.layers[: self.num_frozen]
            for p in layer.hold()
        ]
        name, layer = undone[0]
        self._tell(
            "requires_grad",
            f"something set requires_grad on {len(undone)} parameters of frozen layers ({name!r} "
            f"of {layer!r} first); it is undone in each step, and they are not trained. To train "
            "them, choose a plan that does not freeze them, or call release()",
        )

    def _check_order(self, freezes: bool) -> None:
        if self.order_pending:
            assert self._order_check is not None
            self._order_check.stepped(freezes)
        if not self.order_pending:
            self._order_check = None

    def _parameters_of(self, depth: int) -> Iterator[nn.Parameter]:
        return (p for layer in self.layers[:depth] for p in layer.parameters)

    def _tell_hooks(self) -> None:
        """That hooks on parameters which are frozen, now or later, will not be called."""
        names = {p: self._names[p] for p in self._parameters_of(max(self.timeline.depths))}
        if (found := hooked(names)) is not None:
            name, hook = found
            self._tell(
                "hooks",
                f"parameter {name!r} has a gradient hook ({hook}), which is not called while its "
                "layer is frozen: there is no gradient then, and .grad is None. What waits for it, "
                "or collects the gradients of all parameters, must do without",
            )

    def _tell_over(self) -> None:
        self._tell(
            "over",
            f"the run goes on after its total_steps = {self.total_steps} steps: these updates "
            "change no parameter. Give FreezeOut as many total_steps as the loop makes",
        )

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, stacklevel=4)

    def _watch_updates(self, watch: UpdateWatch) -> None:
        updates = sum(optimizer.updates for optimizer in self._optimizers)
        if not watch.count(updates):
            self._watch = None

    def _configuration(self) -> dict[str, Any]:
        return {
            "total_steps": self.total_steps,
            "freeze_every": self.freeze_every,
            "anneal": self.anneal,
            "plan": plain(self._plan.describe()),
            "layers": [layer.name for layer in self.layers],
        }


def thaw(model: nn.Module) -> bool:
    """Make an ordinary model of one that still carries freezing, after an interrupted run, say:
    whatever drives it is released, every parameter that was trained trains again, and modules have
    the mode that they were last asked to have. What the user froze himself stays so.

    Returns:
        Whether anything was frozen.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(f"thaw() takes a model, a torch.nn.Module, got {type(model).__name__}")
    found = False
    drivers = list(_DRIVING)
    parameters = set(model.parameters()) if drivers else set()
    for freezer in drivers:
        if not parameters.isdisjoint(freezer.model.parameters()):
            found |= freezer.num_frozen > 0
            freezer.release()
    return take_off(model) or found


def _take_over(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Thaw a model that an earlier FreezeOut has left frozen, and say so. InvalidValue if the
    optimizers were built without what was frozen."""
    held = held_by(optimizers)
    for name, parameter in model.named_parameters():
        if is_stopped(parameter) and parameter not in held:
            raise InvalidValue(
                f"the optimizer does not hold parameter {name!r}, which an earlier FreezeOut has "
                "left frozen: call freezeout.thaw(model), then build the optimizer once more"
            )
    if not thaw(model):
        return
    warnings.warn(
        "an earlier FreezeOut had left the model frozen in part; all of it trains again now. Use "
        "`with FreezeOut(...) as freezer:`, or call release() when a run ends",
        stacklevel=4,
    )


def _ready_layers(layers: Any) -> list[Layer]:
    """The list, if it is one of layers that have been found before; else an empty one."""
    given = list(layers) if isinstance(layers, Sequence) else []
    return given if all(isinstance(layer, Layer) for layer in given) else []


def _tell_given(layers: Sequence[Layer]) -> None:
    """That layers which the user froze are in evaluation mode, where that makes a difference."""
    if any(_has_modes(module) for layer in layers for module in layer.modules):
        warnings.warn(
            f"{given_layers_are([layer.name for layer in layers])}, their norms and dropout in "
            "evaluation mode; FreezeOut(..., keep_awake=True) leaves these as they are",
            stacklevel=3,
        )


def _has_modes(module: nn.Module) -> bool:
    """Whether it computes otherwise in training: norms with statistics, dropout of any kind."""
    drops = (getattr(module, name, 0.0) for name in ("p", "drop_prob"))
    return getattr(module, "running_mean", None) is not None or (
        "Drop" in type(module).__name__ and any(isinstance(p, float) and p > 0 for p in drops)
    )


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
