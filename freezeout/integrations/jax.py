"""FreezeOut for JAX: one compiled step for each number of frozen layers.

    freezer = FreezeOut(loss_fn, optax.adamw(1e-3), total_steps, layers=["conv", "dense", "head"])
    state = freezer.init(params)
    for x, y in batches:
        state, loss = freezer.step(state, x, y)

`num_frozen` is static: the step with k layers frozen differentiates the loss with respect to the
other layers only, so that XLA never sees a frozen layer's backward pass, gradient or optimizer
state. There are as many graphs as stages; the next is compiled in a thread while the current one
runs.
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..cost import saving
from ..errors import CheckpointError, FreezeOutError, InvalidType, InvalidValue, LayerOrderError
from ..plan import Plan, Timeline, bound, check_plan, factors_of, layer_table, progress
from ..schedule import Schedule
from ..values import whole_number
from ..words import first_line
from .jax_order import first_out_of_order

PyTree = Any
Name = str | int


class TrainState(NamedTuple):
    """All that a run needs to go on: save its leaves, and restore them into
    `freezer.init(params, step=...)`, which has the structure that belongs to that step.

    Attributes:
        step: updates made so far; how many layers are frozen follows from it.
        params: the model's parameters, frozen ones included.
        opt_state: the optimizer's state of the layers still trained.
        model_state: what the loss function carries along (BatchNorm's statistics), or None.
    """

    step: int
    params: PyTree
    opt_state: PyTree
    model_state: PyTree = None


def learning_rates(
    learning_rate: float | optax.Schedule,
    num_layers: int,
    total_steps: int,
    schedule: Plan | None = None,
    freeze_every: int = 1,
) -> tuple[optax.Schedule, ...]:
    """The layers' learning rates as optax schedules, one a layer, for optimizers put together by
    hand.

    Each is a function of the update's number, from 0, and may be traced. It holds the layer's
    factors until the layer freezes: four bytes a step, or one number if they are all the same. With
    `optax.partition`, frozen layers would still be differentiated; `FreezeOut` avoids that.

    >>> [float(rate(0)) for rate in learning_rates(0.1, 2, 100, Schedule(0.5, "linear"))]
    [0.20000000298023224, 0.10000000149011612]
    """
    total_steps = whole_number("total_steps", total_steps)
    names = [()] * whole_number("num_layers", num_layers)
    plan, timeline = _bound(_checked_plan(schedule), names, total_steps, freeze_every)
    ends = [total_steps if end is None else end for end in timeline.freeze_steps]
    tables = [np.empty(end, np.float32) for end in ends]
    for step in range(max(ends)):
        factors = factors_of(plan, step, timeline)
        for i in range(timeline.num_frozen(step), num_layers):
            tables[i][step] = factors[i]
    base = learning_rate if callable(learning_rate) else lambda step: learning_rate

    def rate(step: Any, table: np.ndarray) -> jax.Array:
        """`table`: the factors until the layer freezes."""
        last = len(table) - 1
        if last < 0:
            return jnp.asarray(base(step) * 0.0)
        factor = table[0] if (table == table[0]).all() else jnp.asarray(table)[_within(step, last)]
        return jnp.asarray(base(step) * jnp.where(step <= last, factor, 0.0))

    return tuple(partial(rate, table=table) for table in tables)


class FreezeOut:
    """Trains a model whose layers are annealed and frozen by a plan.

    Args:
        loss_fn: `loss_fn(params, *batch) -> loss`, or, for a model with a state,
            `loss_fn(params, model_state, *batch) -> (loss, new_model_state)`. If it takes an
            argument `num_frozen`, it is told how many layers are frozen (a Python int), so that it
            may run those in evaluation mode; with a model state it must take it.
        optimizer: any optax transformation whose updates are proportional to its learning rate,
            as those of optax's own optimizers are. Each layer's updates are multiplied by the
            layer's factor, on top of a schedule of their own. Line searches (LBFGS) go only with
            plans that neither anneal nor freeze on the way, such as `Frozen(5)`.
        total_steps: updates in the whole run. None, where the plan allows it: not known beforehand.
        layers: the layers in order of execution, each the name of a part of the parameter tree
            ("encoder.block_0": keys, indices and attributes joined by dots) or several names.
            Without it, the parameters are a list or tuple, and each entry is a layer.
        schedule: the plan of what trains when: a `Schedule`, the paper's and the default; a
            `Frozen`, for layers frozen from the start; or a `Plan` of your own that never thaws.
        freeze_every: freeze only after steps that are multiples of this: fewer graphs. By default
            there are at most eight: where the plan has more, the smallest `freeze_every` that will
            do is taken. 1: as the plan says.
        has_aux: the loss function returns `(loss, aux)`, or `(loss, (new_model_state, aux))`.
        donate: let the step overwrite the state that it is given (halves the memory of what is
            trained; the old state must not be used again).
        compile_ahead: compile the next graph in a thread, as soon as a stage has begun.

    Raises:
        InvalidValue, InvalidType: arguments out of range.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        total_steps: int | None,
        *,
        layers: Sequence[Name | Sequence[Name]] | None = None,
        schedule: Plan | None = None,
        freeze_every: int | None = None,
        has_aux: bool = False,
        donate: bool = False,
        compile_ahead: bool = True,
    ) -> None:
        self.total_steps = None if total_steps is None else whole_number("total_steps", total_steps)
        self.freeze_every = (
            None if freeze_every is None else whole_number("freeze_every", freeze_every)
        )
        self.schedule = _checked_plan(schedule)
        self.optimizer = _with_extra_args(optimizer)
        self.has_aux = has_aux
        self.donate = donate
        self.compile_ahead = compile_ahead
        self.compiled: dict[int, jax.stages.Compiled] = {}
        self._loss_fn = loss_fn
        parameters = inspect.signature(loss_fn).parameters.values()
        self._tells_num_frozen = any(
            p.name == "num_frozen" or p.kind is p.VAR_KEYWORD for p in parameters
        )
        self._given_layers = None if layers is None else [_names(entry) for entry in layers]
        self._tree: _Tree | None = None
        self._plan, self._timeline = self.schedule, Timeline(1, None)
        self._graphs: dict[Any, Future[jax.stages.Compiled]] = {}
        self._seen: tuple[Any, ...] = ()  # shapes of parameters, model state and batch, once known
        self._full_flops: float | None = None
        self._told_over = False
        self._searches = False  # whether the optimizer does, along its update's line
        self._thread = ThreadPoolExecutor(1, "freezeout-compile")
        self._evaluate = jax.jit(self._loss, static_argnums=3)

    # --- where a run stands ---------------------------------------------------------------

    @property
    def timeline(self) -> Timeline:
        """When how many layers are frozen."""
        self._layout  # noqa: B018  (or an error that says what comes first)
        return self._timeline

    @property
    def freeze_steps(self) -> tuple[int | None, ...]:
        """For each layer, after how many steps it freezes (0: from the start); total_steps, or None
        where that is not known: never."""
        return self.timeline.freeze_steps

    @property
    def stages(self) -> tuple[int, ...]:
        """The numbers of frozen layers that occur in the run: as many as there are graphs."""
        return self.timeline.depths

    def num_frozen(self, step: int) -> int:
        """How many layers are frozen once `step` updates have been made."""
        return self.timeline.num_frozen(step)

    def factors(self, step: int) -> tuple[float, ...]:
        """Each layer's multiplier of the learning rate in update number `step`, from 0."""
        return factors_of(self._plan, step, self.timeline)

    def flops(self, num_frozen: int) -> float:
        """XLA's count for one step with `num_frozen` layers frozen; FreezeOutError before it has
        been compiled."""
        if num_frozen not in self.compiled:
            raise FreezeOutError(f"the step with {num_frozen} layers frozen is not compiled yet")
        return _flops(self.compiled[num_frozen])

    def flops_saved(self, steps: int | None = None) -> float:
        """The share of the FLOPs of the run, or of its first `steps` updates, that freezing saves
        against training every layer; FreezeOutError before the stages in it have been compiled.

        Where layers are frozen from the start, the step that trains every layer is compiled for
        this, to be counted."""
        counts = self._counts(None if steps is None else whole_number("steps", steps))
        # A depth that never occurs costs nothing: no step is made there.
        costs = [self.flops(k) if count else 0.0 for k, count in enumerate(counts)]
        return saving([self._flops_of_all(), *costs[1:]], counts)

    def summary(self, state: TrainState) -> str:
        """What is frozen where `state` stands, and what that saved, in a line."""
        step = int(state.step)
        parts = progress(self.timeline, step)
        stages = {k for k, count in enumerate(self._counts(step)) if count}
        if stages and stages <= self.compiled.keys():
            parts.append(f"{self.flops_saved(step):.0%} of the FLOPs saved")
        return "; ".join(parts)

    def __repr__(self) -> str:
        known = [] if self._tree is None else [f"{self._tree.num_layers} layers"]
        known += [] if self.total_steps is None else [f"{self.total_steps} steps"]
        return f"FreezeOut({', '.join([*known, str(self.schedule)])})"

    def __str__(self) -> str:
        """With a table of the layers, after `init`: parameters, freeze step."""
        if self._tree is None:
            return f"{self!r}: init(params) tells what the layers are"
        names = map(", ".join, self._tree.names)
        return (
            f"{self!r}\n{layer_table(self.timeline, [*zip(names, self._tree.sizes, strict=True)])}"
        )

    # --- training -------------------------------------------------------------------------

    def init(self, params: PyTree, model_state: PyTree = None, *, step: int = 0) -> TrainState:
        """A state that stands at `step`, with copies of the arrays and fresh optimizer state.

        `model_state` is arranged as `params` are (Flax: `{"batch_stats": ...}` or its content);
        what stands under the name of a frozen layer does not change.

        Raises:
            InvalidValue: a parameter that is no floating-point array, or belongs to no layer, or
                to two; a layer without parameters; a plan that does not go with the layers.
            InvalidType: a model state, and a loss function that does not take `num_frozen`; a line
                search, and a plan that it does not go with.
        """
        step = whole_number("step", step, minimum=0)
        if model_state is not None and not self._tells_num_frozen:
            raise InvalidType(
                "loss_fn must take num_frozen when there is a model state: frozen layers must "
                "use their stored statistics, and only loss_fn can tell them to"
            )
        tree = _Tree(params, self._given_layers)
        self._plan, self._timeline = _bound(
            self.schedule, tree.parts, self.total_steps, self.freeze_every
        )
        self._tree = tree
        self._graphs.clear()
        self.compiled.clear()
        self._seen, self._full_flops = (), None
        params, model_state = jax.tree.map(jnp.array, (params, model_state))
        whole = TrainState(0, params, self._fresh_opt_state(params, 0))
        self._searches = _has_line_search(whole.opt_state)
        self._check_search(step)
        for k in self.stages:  # an optimizer whose state cannot be divided is refused now
            self._pruned(whole, k)
        opt_state = self.optimizer.init(self._tree.split(params, self.num_frozen(step))[0])
        return TrainState(step, params, opt_state, model_state)

    def step(
        self, state: TrainState, *batch: PyTree, extra_args: Mapping[str, PyTree] | None = None
    ) -> tuple[TrainState, Any]:
        """One update: the new state, and the loss (or `(loss, aux)`).

        `extra_args`: numbers or arrays by name, for an optimizer that takes extra arguments. Those
        that optax itself uses it has without that: `value`, this batch's loss; `grad`; `value_fn`
        or `obj_fn`, the loss at other parameters. What is given here comes before them.

        Once the run's `total_steps` updates have been made, only the step is counted: no array
        changes, and a warning says so, once.

        Raises:
            LayerOrderError: the loss function uses the layers in another order (looked for
                before the first graph is compiled).
            CheckpointError: a state whose optimizer state belongs to another step.
        """
        count = whole_number("step", state.step, minimum=0)
        k = self.num_frozen(count)
        if self.timeline.is_over(count):
            return state._replace(step=count + 1), self._evaluated(state, batch, k)
        self._check_search(count)
        factors = np.asarray(self.factors(count)[k:], np.float32)
        data = (batch, dict(extra_args or {}))
        arguments = (*self._arranged(state, k), factors, *data)
        signature = _signature(data)
        key = (k, signature)
        if key not in self._graphs:
            if not self._graphs:
                self._check_order(state, batch)
            self._check_opt_state(state, k)
            self._graphs[key] = _done(self._lowered(k, arguments).compile())
            self._seen = jax.tree.map(_shape_of, (state.params, state.model_state, *data))
        compiled = self.compiled[k] = self._graphs[key].result()
        trained, opt_state, moving, out = compiled(*arguments)
        params = self._layout.merge(trained, arguments[1][0])
        model_state = self._layout.merge_state(moving, arguments[1][1])
        state = TrainState(count + 1, params, opt_state, model_state)
        if self.num_frozen(count + 1) != k:
            state = state._replace(opt_state=self._pruned(state, self.num_frozen(count + 1)))
        self._compile_next(k, signature, state, arguments)
        return state, out

    # --- inside ---------------------------------------------------------------------------

    @property
    def _layout(self) -> "_Tree":
        if self._tree is None:
            raise FreezeOutError("init(params) comes first: it tells what the layers are")
        return self._tree

    def _arranged(self, state: TrainState, k: int) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """(trained, (frozen, held), opt_state, moving): `held` is the frozen layers' model state,
        `moving` the others'."""
        trained, frozen = self._layout.split(state.params, k)
        moving, held = self._layout.split_state(state.model_state, k)
        return trained, (frozen, held), state.opt_state, moving

    def _update(
        self,
        k: int,
        trained: PyTree,
        fixed: tuple[PyTree, PyTree],
        opt_state: PyTree,
        moving: PyTree,
        factors: jax.Array,  # (layers still trained,)
        batch: tuple[PyTree, ...],
        given: dict[str, PyTree],
    ) -> tuple[PyTree, PyTree, PyTree, Any]:
        """The step that is compiled, for k frozen layers."""
        layout = self._layout
        model_state = layout.merge_state(moving, fixed[1])

        def loss_of(trained: PyTree) -> Any:
            return self._loss(layout.merge(trained, fixed[0]), model_state, batch, k)

        (loss, (new_state, aux)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)

        def value_fn(params: PyTree) -> Any:
            return loss_of(params)[0]

        extra = {"value": loss, "grad": grads, "value_fn": value_fn}
        if not self._searches:  # these refuse what they do not know
            extra["obj_fn"] = value_fn
        extra |= given
        try:
            updates, opt_state = self.optimizer.update(grads, opt_state, trained, **extra)
        except TypeError as error:
            raise InvalidType(
                f"the optimizer failed: {first_line(error)}. It was given {', '.join(extra)}; "
                "step(..., extra_args={...}) gives it others, and its update must take **extra_args"
            ) from error
        updates = layout.scaled(updates, factors, k)
        out = (loss, aux) if self.has_aux else loss
        moving = layout.split_state(new_state, k)[0]
        return optax.apply_updates(trained, updates), opt_state, moving, out

    def _loss(self, params: PyTree, model_state: PyTree, batch: Any, k: int) -> Any:
        """(loss, (model_state, aux)) of whichever of its four forms the loss function has."""
        told = {"num_frozen": k} if self._tells_num_frozen else {}
        if model_state is None:
            out = self._loss_fn(params, *batch, **told)
            loss, aux = out if self.has_aux else (out, None)
            return loss, (None, aux)
        loss, rest = self._loss_fn(params, model_state, *batch, **told)
        new_state, aux = rest if self.has_aux else (rest, None)
        before: Any = jax.tree.structure(model_state)
        after: Any = jax.tree.structure(new_state)
        if before != after:
            raise InvalidValue(f"loss_fn was given a model state {before} and returned {after}")
        return loss, (new_state, aux)

    def _lowered(self, k: int, arguments: tuple[Any, ...]) -> jax.stages.Lowered:
        donated = (1, 3, 4) if self.donate else ()  # trained, opt_state, moving
        update = jax.jit(self._update, static_argnums=0, donate_argnums=donated)
        return update.lower(k, *jax.tree.map(_shape_of, arguments))

    def _compile_next(
        self, k: int, signature: Any, state: TrainState, arguments: tuple[Any, ...]
    ) -> None:
        """Hand the next stage's graph to the thread, once, from shapes alone. It is traced here,
        since JAX's settings (precision, 64 bits) and the user's code belong to this thread."""
        change = self.timeline.next_change(state.step - 1)  # of the step that has just been made
        if not self.compile_ahead or change is None:
            return
        following = change[1]
        if (following, signature) in self._graphs:
            return
        if self.num_frozen(state.step) == k:
            state = state._replace(opt_state=self._pruned(state, following))
        ahead = self._arranged(state, following)
        factors = arguments[4][-(self._layout.num_layers - following) :]
        lowered = self._lowered(following, (*ahead, factors, *arguments[5:]))
        self._graphs[following, signature] = self._thread.submit(lowered.compile)

    def _counts(self, steps: int | None) -> list[int]:
        """The updates made with each number of frozen layers; none are after the run's end."""
        if steps is None or self.timeline.is_over(steps):
            steps = self.total_steps
        return self.timeline.counts(end=steps)

    def _evaluated(self, state: TrainState, batch: tuple[PyTree, ...], k: int) -> Any:
        """The loss (or `(loss, aux)`) of a batch for which no update is made any more."""
        if not self._told_over:
            self._told_over = True
            warnings.warn(
                f"the run goes on after its total_steps = {self.total_steps} steps: these updates "
                "change no parameter. Give FreezeOut as many total_steps as the loop makes",
                stacklevel=3,
            )
        loss, (_, aux) = self._evaluate(state.params, state.model_state, batch, k)
        return (loss, aux) if self.has_aux else loss

    def _flops_of_all(self) -> float:
        """Of a step that trains every layer, compiled to be counted where the run has none."""
        if 0 in self.compiled:
            return self.flops(0)
        if self._full_flops is None:
            if not self._seen:
                raise FreezeOutError("the step with 0 layers frozen is not compiled yet")
            params, model_state, *data = self._seen
            whole = TrainState(0, params, self._fresh_opt_state(params, 0), model_state)
            factors = np.ones(self._layout.num_layers, np.float32)
            lowered = self._lowered(0, (*self._arranged(whole, 0), factors, *data))
            self._full_flops = _flops(lowered.compile())
        return self._full_flops

    def _fresh_opt_state(self, params: PyTree, k: int) -> PyTree:
        """Shapes of the optimizer state when k layers are frozen."""
        return jax.eval_shape(self.optimizer.init, self._layout.split(params, k)[0])

    def _pruned(self, state: TrainState, k: int) -> PyTree:
        """The optimizer state without what belongs to the first k layers; the rest as it is."""
        # With None in the place of what has gone, what remains keeps its path.
        kept = dict(jax.tree_util.tree_leaves_with_path(state.opt_state))
        fresh_state = self._fresh_opt_state(state.params, k)
        fresh = jax.tree_util.tree_leaves_with_path(fresh_state)
        structure: Any = jax.tree.structure(fresh_state)
        for path, leaf in fresh:
            if path not in kept or kept[path].shape != leaf.shape:
                where = jax.tree_util.keystr(path)
                raise InvalidValue(
                    f"the optimizer state {where} cannot be divided among layers: it changes its "
                    "place or its shape when a layer is left out"
                )
        return structure.unflatten(kept[path] for path, _ in fresh)

    def _check_opt_state(self, state: TrainState, k: int) -> None:
        expected: Any = jax.tree.structure(self._fresh_opt_state(state.params, k))
        if (found := jax.tree.structure(state.opt_state)) != expected:
            raise CheckpointError(
                f"at step {state.step} {k} layers are frozen, and the optimizer state must be "
                f"{expected}, got {found}"
            )

    def _check_search(self, step: int) -> None:
        """A line search chooses the length of the update as it is; LBFGS' memory is of one set of
        weights."""
        if self._searches:
            ends = {step, 0 if self.total_steps is None else self.total_steps - 1}
            whole = all(f in (0, 1) for s in ends for f in self.factors(s))
            if not whole or len(self.stages) > 1:
                raise InvalidType(
                    "a line search (LBFGS) goes only with a plan that trains the same layers from "
                    f"beginning to end, at one rate, such as Frozen(5), not {self.schedule}: each "
                    "layer's update would be another than was searched for. Take another "
                    "optimizer, or such a plan"
                )

    def _check_order(self, state: TrainState, batch: tuple[PyTree, ...]) -> None:
        loss_of = partial(self._loss, k=0)
        traced = jax.make_jaxpr(loss_of)(state.params, state.model_state, batch)
        if late := first_out_of_order(traced.jaxpr, self._layout.layer_of):
            names = [", ".join(self._layout.names[i]) for i in late]
            raise LayerOrderError(
                f"layer {names[0]!r} works on what layer {names[1]!r} returned, and must come "
                "after it in layers"
            )


class _Tree:
    """Which leaf of a parameter tree belongs to which layer. In a divided tree, None stands in
    the place of what is not there, so that paths stay the same."""

    def __init__(self, params: PyTree, layers: list[tuple[str, ...]] | None) -> None:
        if layers is None:
            if not isinstance(params, list | tuple):
                raise InvalidType(
                    f"layers must be given for parameters in a {type(params).__name__}: their "
                    "names in order of execution"
                )
            layers = [(str(i),) for i in range(len(params))]
        self.names = layers
        self.num_layers = len(layers)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self._structure: Any = jax.tree.structure(params)
        self.layer_of = [self._find(path, leaf) for path, leaf in leaves]
        for i, names in enumerate(layers):
            if i not in self.layer_of:
                raise InvalidValue(f"layer {', '.join(names)!r} has no parameters in the tree")
        # Of each layer, the names of the parts of the tree that are in it.
        self.parts = [{*names} for names in layers]
        self.sizes = [0] * len(layers)
        for (path, leaf), i in zip(leaves, self.layer_of, strict=True):
            self.parts[i].update(_parents(path, layers[i]))
            self.sizes[i] += leaf.size

    def _find(self, path: Any, leaf: Any) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(
            leaf.dtype, jnp.floating
        ):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise InvalidValue(
                f"params.{name} must be an array of floating-point numbers, got {kind}; of an "
                "Equinox model, pass equinox.filter(model, equinox.is_inexact_array)"
            )
        owners = self._owners(name)
        if len(owners) != 1:
            found = " and ".join(repr(", ".join(self.names[i])) for i in owners)
            raise InvalidValue(
                f"params.{name} must belong to one of the layers, got {found or 'none'}"
            )
        return owners[0]

    def _owners(self, name: str) -> list[int]:
        return [
            i
            for i, names in enumerate(self.names)
            if any(name == each or name.startswith(each + ".") for each in names)
        ]

    def split(self, params: PyTree, k: int) -> tuple[PyTree, list[Any]]:
        """The tree with None for the first k layers, and their leaves."""
        leaves = jax.tree.leaves(params)
        pairs = list(zip(leaves, self.layer_of, strict=True))
        trained = self._structure.unflatten(x if layer >= k else None for x, layer in pairs)
        return trained, [x for x, layer in pairs if layer < k]

    def merge(self, trained: PyTree, frozen: Sequence[Any]) -> PyTree:
        """The whole tree of its two parts."""
        k = sorted(self.layer_of)[len(frozen)]  # the first layer that is not among them
        parts = {True: iter(jax.tree.leaves(trained)), False: iter(frozen)}
        return self._structure.unflatten(next(parts[layer >= k]) for layer in self.layer_of)

    def scaled(self, updates: PyTree, factors: jax.Array, k: int) -> PyTree:
        """Each layer's updates times its factor, in the updates' own type."""
        factor_of = iter([layer - k for layer in self.layer_of if layer >= k])
        return jax.tree.map(lambda u: u * factors[next(factor_of)].astype(u.dtype), updates)

    def split_state(self, model_state: PyTree, k: int) -> tuple[PyTree, PyTree]:
        """What may change when k layers are frozen, and what may not; None in their places."""
        moves = jax.tree_util.tree_map_with_path(
            lambda path, _: not any(i < k for i in self._state_owners(path)), model_state
        )
        moving = jax.tree.map(lambda x, m: x if m else None, model_state, moves)
        return moving, jax.tree.map(lambda x, m: None if m else x, model_state, moves)

    def _state_owners(self, path: Any) -> list[int]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        inner = jax.tree_util.keystr(path[1:], simple=True, separator=".")
        return self._owners(name) or self._owners(inner)

    @staticmethod
    def merge_state(moving: PyTree, held: PyTree) -> PyTree:
        return jax.tree.map(
            lambda a, b: b if a is None else a, moving, held, is_leaf=lambda x: x is None
        )


# --- small things ---------------------------------------------------------------------------


def _checked_plan(schedule: Plan | None) -> Plan:
    check_plan("schedule", schedule)
    return Schedule() if schedule is None else schedule


def _bound(
    schedule: Plan,
    names: Sequence[Collection[str]],
    total_steps: int | None,
    freeze_every: int | None,
) -> tuple[Plan, Timeline]:
    """See `freezeout.plan.bound`. InvalidValue also if the plan thaws."""
    plan, timeline = bound(schedule, names, 0, total_steps, freeze_every)
    if not timeline.rises:
        raise InvalidValue(
            "a plan that thaws is not supported on JAX: the numbers of frozen layers of "
            f"{schedule}, {timeline.changes}, fall, and a frozen layer's optimizer state is gone "
            "from the state"
        )
    return plan, timeline


def _with_extra_args(optimizer: Any) -> Any:
    """Also of classes, such as MultiSteps, whose update takes extra arguments although they are not
    marked as such."""
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


def _has_line_search(opt_state: PyTree) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _SEARCHES))
    return any(isinstance(node, _SEARCHES) for node in nodes)


_SEARCHES = (
    optax.ScaleByLBFGSState,
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)


def _within(step: Any, last: int) -> jax.Array:
    return jnp.clip(jnp.asarray(step), 0, last).astype(int)


def _flops(compiled: jax.stages.Compiled) -> float:
    counted: Any = compiled.cost_analysis()
    return float(counted["flops"])


def _parents(path: Any, names: Sequence[str]) -> Iterator[str]:
    """The names of what a leaf is in, those outside its layer left out."""
    for end in range(1, len(path)):
        name = jax.tree_util.keystr(path[:end], simple=True, separator=".")
        if any(name.startswith(each + ".") for each in names):
            yield name


def _names(entry: Name | Iterable[Name]) -> tuple[str, ...]:
    names = (entry,) if isinstance(entry, str | int) else tuple(entry)
    return tuple(map(str, names))


def _signature(batch: PyTree) -> Any:
    """What a compiled step fixes about a batch: structure, shapes and types."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((x.shape, x.dtype, x.sharding) for x in map(_shape_of, leaves))


def _shape_of(x: Any) -> Any:
    """What a graph is compiled for: shape, type, and place, where the user has chosen one."""
    placed = x.sharding if isinstance(x, jax.Array) and x.committed else None
    struct: Any = jax.ShapeDtypeStruct
    return struct(np.shape(x), jax.dtypes.result_type(x), sharding=placed)


def _done(compiled: jax.stages.Compiled) -> "Future[jax.stages.Compiled]":
    future: Future[jax.stages.Compiled] = Future()
    future.set_result(compiled)
    return future
