"""FreezeOut for Keras 3: a callback, for the TensorFlow, JAX and PyTorch backends.

    model.fit(x, y, epochs=30, callbacks=[FreezeOutCallback()])

The frozen set changes a few times in a run, and each set is a static graph: when layers freeze, the
train function is built anew. Only while that runs are frozen variables not trainable, layers in
inference mode, and the optimizer's learning rate multiplied by each layer's factor. Between steps,
and whatever interrupts `fit`, the model and the optimizer are ordinary ones; checkpoints fit at any
time. How many layers are frozen follows from the optimizer's own count of iterations.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import keras
import numpy as np
from keras import ops

from ..errors import InvalidType, InvalidValue
from ..plan import (
    STAGES,
    Plan,
    Timeline,
    bound,
    check_plan,
    factors_of,
    layer_table,
    progress,
)
from ..schedule import Schedule
from ..values import whole_number
from .keras_layers import Found, find_layers, names_of, tell_given, variables_of, weights

_FEWEST = 4  # graphs that any run may have
_ROWS = 64  # updates whose factors are handed to the train function at once
_ABSENT = object()


class _Inside:
    """What holds while a train function runs, and never between: attributes of objects, set past
    their `__setattr__`, because Keras and TensorFlow would track what is set; and variables that
    are not trainable."""

    def __init__(self) -> None:
        self.attributes: list[tuple[dict[str, Any], str, Any]] = []
        self.resting: list[Any] = []
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        self._stopped: list[Any] = []

    def __enter__(self) -> None:
        try:
            for attributes, name, value in self.attributes:
                self._before.append((attributes, name, attributes.get(name, _ABSENT)))
                attributes[name] = value
            for variable in self.resting:
                if variable.trainable:
                    self._stopped.append(variable)
                    variable.trainable = False
        except BaseException:
            self.leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Undo what has been done; what is left of that if it has been interrupted."""
        while self._stopped:
            self._stopped[-1].trainable = True
            self._stopped.pop()
        while self._before:
            _put_back(*self._before[-1])
            self._before.pop()


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


class FreezeOutCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Anneals and freezes a model's layers by a plan, while `model.fit` runs.

    A frozen layer's variables do not change, have no gradient, and its norms and dropout are in
    inference mode. Between steps and when `fit` ends, however it ends, every variable is as
    trainable as before.

    Leading layers in which nothing trains, because the user has set `layer.trainable = False`, are
    frozen from the start, each as a layer of its own; the plan is for the others.

    Args:
        total_steps: updates in the whole run, with all of its calls of `fit`; by default
            `fit`'s epochs times its steps (not micro-batches, with gradient accumulation).
        schedule: the plan of what trains when: a `Schedule`, the paper's and the default; a
            `Frozen`, for layers frozen from the start; or a `Plan` of your own that never thaws.
        layers: the layers in order of execution, each a Keras layer, its name, or several. By
            default, what one symbolic pass runs: every layer that has a kernel, with the norms
            and activations that follow it. Models inside models are taken apart, other composite
            layers are not. Variables of no layer belong to the last one. What no weight has reached
            (augmentation, rescaling) is no layer, and goes on as it is.
        freeze_every: freeze only after steps that are multiples of this. Each number of frozen
            layers is a train function to be compiled. By default there are at most as many of them
            as epochs, but four in any case and never more than eight: where the plan has more, the
            smallest `freeze_every` that will do is taken. 1: as the plan says.
        keep_awake: True: layers that the user froze are left as they are, dropout in training
            mode, and count as part of the first layer that trains.

    Attributes:
        layers: what freezes together, in order: lists of Keras layers.
        timeline: when how many layers are frozen.
        freeze_steps: for each layer, after how many steps it freezes (0: from the start);
            total_steps, or None where that is not known: never.
        num_frozen: how many layers are frozen now (after `fit`: were, at its end).
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        schedule: Plan | None = None,
        layers: Sequence[Any] | None = None,
        freeze_every: int | None = None,
        keep_awake: bool = False,
    ) -> None:
        super().__init__()
        check_plan("schedule", schedule)
        if not isinstance(keep_awake, bool):
            raise InvalidType(f"keep_awake must be True or False, got {keep_awake!r}")
        self.total_steps = None if total_steps is None else whole_number("total_steps", total_steps)
        self.schedule: Plan = Schedule() if schedule is None else schedule
        self.freeze_every = (
            None if freeze_every is None else whole_number("freeze_every", freeze_every)
        )
        self.keep_awake = keep_awake
        self._found = Found([], 0, [])
        self.timeline = Timeline(1, None)
        self.num_frozen = 0
        self._given_layers = layers
        self._plan = self.schedule
        self._driven: Any = None  # the model, from the first epoch's begin until it is given back
        self._inside = _Inside()
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._epoch_start: int | None = None
        self._made = 0
        self._told_given = False

    # --- what Keras calls -----------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        self.release()  # another model, if its `fit` was interrupted
        if (other := _driver(self.model)) is not None:
            other.release()
        optimizer = _checked_optimizer(self.model)
        every = optimizer.gradient_accumulation_steps or 1
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        total = self.total_steps
        if steps is not None:
            total = total or epochs * steps // every
            if epochs * steps // every > total:
                raise InvalidValue(
                    f"total_steps must be at least the {epochs * steps // every} steps of "
                    f"{epochs} epochs, got {total}"
                )
        if not self.model.built:  # TensorFlow's `fit` would build it in the first step
            raise InvalidValue(
                f"the model {self.model.name!r} must be built before fit: call it on a batch once"
            )
        self._found = find_layers(self.model, self._given_layers, self.keep_awake)
        stages = STAGES
        if total and steps:  # epochs of the whole run, so that all its calls of `fit` have one plan
            stages = min(max(_FEWEST, -(-total * every // steps)), STAGES)
        self._plan, self.timeline = self._bound(total, stages)
        self.num_frozen = self.timeline.num_frozen(0)
        self._every = every
        self._epoch_start, self._made = None, 0
        self._over = self._told_over = False
        if not self._told_given:
            self._told_given = tell_given(self._found)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Other callbacks may have loaded a checkpoint at the beginning of training, not later.
        count = int(self.model.optimizer._iterations.numpy())
        if self._epoch_start is None:
            # Where the optimizer has come from another run, its count is ahead of this one's.
            steps = self.params.get("steps")
            self._offset = count - epoch * steps if steps is not None else count if not epoch else 0
            self._take_over()
        self._epoch_start = count - self._offset
        self._made = self._epoch_start // self._every
        self._stand_at(self._made)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Not at a batch's end: Keras would then wait for each batch's loss before the next.
        assert self._epoch_start is not None
        self._tell_over()
        self._begun = self._epoch_start + batch
        self._stand_at(self._begun // self._every)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        count = int(self.model.optimizer._iterations.numpy())
        self._made = (count - self._offset) // self._every
        self._tell_over()
        if logs is not None:
            logs["num_frozen"] = self.num_frozen

    def on_train_end(self, logs: Any = None) -> None:
        self.release()

    # --- for users ------------------------------------------------------------------------

    @property
    def layers(self) -> list[list[Any]]:
        """The layers in order of execution, each a list of the Keras layers that freeze together;
        empty before `fit` has begun."""
        return self._found.groups

    @property
    def freeze_steps(self) -> tuple[int | None, ...]:
        """For each layer the step from which on it is frozen (see `Timeline.freeze_steps`); empty
        before `fit` has begun."""
        return self.timeline.freeze_steps if self.layers else ()

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """Each layer's learning rate at a step of the run, where the optimizer's is what it is
        now; 0 once frozen."""
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        return tuple(rate * factor for factor in factors_of(self._plan, step, self.timeline))

    def summary(self) -> str:
        """What was frozen, in a line."""
        return "; ".join(progress(self.timeline, self._made))

    def __repr__(self) -> str:
        if not self.layers:
            return f"FreezeOutCallback({self.schedule})"
        of = "" if (total := self.timeline.total_steps) is None else f" of {total}"
        return (
            f"FreezeOutCallback({len(self.layers)} layers, {self.num_frozen} frozen, "
            f"step {self._made}{of}, {self.schedule})"
        )

    def __str__(self) -> str:
        """With a table of the layers, once `fit` has begun: parameters, freeze step."""
        if not self.layers:
            return f"{self!r}: the layers are found when fit begins"
        rows = [
            (group[0].name, sum(math.prod(v.shape) for u in group for v in weights(u)))
            for group in self.layers
        ]
        return f"{self!r}\n{layer_table(self.timeline, rows)}"

    def release(self) -> None:
        """Have the model train as an ordinary one: what is left of an interrupted `fit` goes. The
        next `fit` does so by itself."""
        self._inside.leave()
        if self._driven is None:
            return
        model, self._driven = self._driven, None
        while self._undo:
            _put_back(*self._undo.pop())
        model.make_train_function(force=True)

    # --- freezing -------------------------------------------------------------------------

    def _bound(self, total: int | None, stages: int) -> tuple[Plan, Timeline]:
        """The plan for the layers, and its timeline, of so many stages if the user has not said
        how often layers may freeze."""
        names = names_of(self.model)
        parts = [
            {name for u in group for name in names.get(id(u), [u.name])} for group in self.layers
        ]
        plan, timeline = bound(
            self.schedule, parts, self._found.given, total, self.freeze_every, stages
        )
        if not timeline.rises:
            raise InvalidValue(
                "a plan that thaws is not supported on Keras: the numbers of frozen layers of "
                f"{self.schedule}, {timeline.changes}, fall, and a thawed layer would go on with "
                "the momentum that it had when it was frozen"
            )
        return plan, timeline

    def _take_over(self) -> None:
        """From now on the train function is this callback's."""
        model = self.model
        if _driver(model) is not None:
            raise InvalidValue("callbacks holds two FreezeOutCallbacks: give one")
        optimizer = model.optimizer
        if not optimizer.built:  # TensorFlow's would be in the first step, for what is then trained
            optimizer.build(model.trainable_variables)
        self._variables = variables_of(model, self.layers)
        self._per_execution = model.steps_per_execution
        rows = -(-self._per_execution // self._every) + 1
        self._span, self._filled = rows, range(0)
        self._num_rows = max(_ROWS, rows)
        self._table = keras.Variable(
            np.zeros(self._num_rows * len(self.layers), np.float32),
            *(None, "float32"),
            trainable=False,
            name="freezeout_factors",
        )
        self._by_layer = self._optimizer_attributes(optimizer)
        self._stage: tuple[int, bool] | None = None
        self._driven = model
        self._make = model.make_train_function
        # Every `fit` begins with it: if there is another before the end of this one, this one was
        # interrupted.
        self._replace(vars(model), "make_train_function", self._begun_anew)
        if optimizer.use_ema:
            averages = optimizer._model_variables_moving_average
            self._averages, self._twins = list(averages), dict[int, Any]()
            self._replace(vars(optimizer), "_model_variables_moving_average", averages)

    def _tell_over(self) -> None:
        # Not where it is made: on JAX, an error there, as a warning may be, loses all weights.
        if self._over and not self._told_over:
            self._told_over = True
            warnings.warn(
                f"fit goes on after the run's total_steps = {self.timeline.total_steps} steps: "
                "these updates change no weight. Give FreezeOutCallback as many total_steps as fit "
                "makes",
                stacklevel=3,
            )

    def _begun_anew(self, force: bool = False) -> Any:
        model = self._driven
        self.release()
        return model.make_train_function(force=force)

    def _replace(self, attributes: Any, name: str, value: Any) -> None:
        """Until `release()`."""
        self._undo.append((attributes, name, attributes.get(name, _ABSENT)))
        attributes[name] = value

    def _stand_at(self, step: int) -> None:
        if self._driven is None:
            return  # release() was called while `fit` runs
        stage = (self.timeline.num_frozen(step), self.timeline.is_over(step))
        if stage != self._stage:
            self._build(*stage)
            self._stage = stage
        if step not in self._filled or step + self._span - 1 not in self._filled:
            self._fill(step)

    def _build(self, k: int, over: bool) -> None:
        """Have the train function built anew, for k frozen layers; after the run's end, for steps
        that change nothing."""
        model = self.model  # on JAX, this has the values put back into the variables
        optimizer = model.optimizer
        self.num_frozen = k
        resting = [variable for variables in self._variables[:k] for variable in variables]
        step = model.train_step

        def train_step(*arguments: Any) -> Any:
            # Not `step` itself: JAX would take its graph from another stage.
            return step(*arguments)

        own = vars(optimizer)
        attributes = [
            (vars(model), "train_step", train_step),
            *((own, name, value) for name, value in self._by_layer.items()),
            *((own, name, value) for name, value in self._left(optimizer, resting).items()),
        ]
        if over:
            attributes.append((own, "apply", partial(_counted_only, optimizer)))
        for parts in self._found.parts[: None if over else k]:
            # `layer.trainable = False` would do it for BatchNorm alone.
            attributes += [(vars(p), "call", partial(_in_inference, p.call)) for p in parts]
        on_jax = keras.config.backend() == "jax"
        if on_jax:
            attributes.append((own, "_variables", [*optimizer._variables, self._table]))
        self._inside.attributes, self._inside.resting = attributes, resting

        ordinary = model.trainable_variables, model.non_trainable_variables
        with self._inside:
            inside = model.trainable_variables, model.non_trainable_variables
            self._make(force=True)
        places = _Places(ordinary, inside) if on_jax else None
        model.train_function = partial(self._run, model.train_function, places, over)

    def _run(self, function: Callable[..., Any], places: Any, over: bool, *arguments: Any) -> Any:
        """The train function that `fit` calls."""
        with self._inside:
            if places is None:
                result = function(*arguments)
            else:
                result = self._run_on_jax(function, places, *arguments)
        self._made = (self._begun + self._per_execution) // self._every
        self._over |= over
        return result

    def _run_on_jax(
        self, function: Callable[..., Any], places: "_Places", state: Any, iterator: Any
    ) -> Any:
        """The values of all variables go in and out of the function, by whether they are trainable:
        inside others are than outside. The factors are one more of the optimizer's."""
        trainable, others, optimizer, metrics = state
        mixed = places.inside(trainable, others)
        logs, state = function((*mixed, [*optimizer, self._table.value], metrics), iterator)
        trainable, others, (*optimizer, table), metrics = state
        self._table.assign(table)
        return logs, (*places.outside(trainable, others), optimizer, metrics)

    # --- the optimizer --------------------------------------------------------------------

    def _left(self, optimizer: Any, resting: Sequence[Any]) -> dict[str, Any]:
        """The optimizer's lists of what it trains, without what is frozen. Its own variables
        (momentum and the like) stay, and are found by their old places."""
        gone = {id(variable) for variable in resting}
        every = optimizer._trainable_variables
        left = [v.trainable and id(v) not in gone for v in every]
        kept = [v for v, stays in zip(every, left, strict=True) if stays]
        lists = {
            "_trainable_variables": kept,
            "_trainable_variables_indices": {
                optimizer._var_key(v): optimizer._get_variable_index(v) for v in kept
            },
        }
        if optimizer.use_ema:
            pairs = list(zip(every, self._averages, left, strict=True))
            lists["_model_variables_moving_average"] = [a for _, a, stays in pairs if stays]
            # Where weights and averages are exchanged between steps, frozen weights stay.
            vars(optimizer)["_model_variables_moving_average"] = [
                a if stays else self._twin(v) for v, a, stays in pairs
            ]
        return lists

    def _twin(self, variable: Any) -> Any:
        """A copy of a frozen variable: not itself, since TensorFlow exchanges two variables by
        sums and differences."""
        if id(variable) not in self._twins:
            value = ops.stop_gradient(ops.copy(variable))
            twin = keras.Variable(value, dtype=variable.dtype, trainable=False)
            self._twins[id(variable)] = twin
        return self._twins[id(variable)]

    def _optimizer_attributes(self, optimizer: Any) -> dict[str, Any]:
        """What multiplies the optimizer's learning rate by each layer's factor where the optimizer
        uses it: in a variable's update, and in its weight decay."""
        layer_of = {
            optimizer._var_key(variable): i
            for i, variables in enumerate(self._variables)
            for variable in variables
        }
        update = optimizer.update_step
        decay = optimizer._apply_weight_decay
        rate = optimizer._get_current_learning_rate
        factor_of = partial(self._factor, optimizer._iterations)
        factors: list[Any] = []  # at most one: of the layer whose weights are being decayed

        def by_layer(variables: Sequence[Any]) -> Iterator[tuple[int, list[int]]]:
            layers = [layer_of[optimizer._var_key(v)] for v in variables]
            for i in sorted(set(layers)):
                yield i, [place for place, layer in enumerate(layers) if layer == i]

        def update_step(gradient: Any, variable: Any, learning_rate: Any) -> Any:
            factor = factor_of(layer_of[optimizer._var_key(variable)])
            return update(gradient, variable, ops.multiply(learning_rate, factor))

        def apply_weight_decay(variables: Sequence[Any]) -> None:
            if optimizer.weight_decay is None:
                return
            variables = [v for v in variables if optimizer._use_weight_decay(v)]
            for i, places in by_layer(variables):
                factors.append(factor_of(i))
                decay([variables[place] for place in places])
                factors.clear()

        def current_learning_rate() -> Any:
            return ops.multiply(rate(), factors[0]) if factors else rate()

        attributes: dict[str, Any] = {
            "update_step": update_step,
            "_apply_weight_decay": apply_weight_decay,
            "_get_current_learning_rate": current_learning_rate,
        }
        if hasattr(optimizer, "_parallel_update_step"):  # PyTorch: several variables at once
            parallel = optimizer._parallel_update_step

            def parallel_update_step(
                gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any
            ) -> None:
                for i, places in by_layer(variables):
                    parallel(
                        [gradients[place] for place in places],
                        [variables[place] for place in places],
                        ops.multiply(learning_rate, factor_of(i)),
                    )

            attributes["_parallel_update_step"] = parallel_update_step
        return attributes

    def _factor(self, iterations: Any, layer: int) -> Any:
        """A layer's factor for the optimizer's current iteration, as a tensor of one number."""
        step = ops.floor_divide(iterations - self._offset, self._every)
        place = ops.mod(step, self._num_rows) * len(self.layers) + layer
        return ops.take(self._table, place)

    def _fill(self, step: int) -> None:
        """Put the factors of the next updates into the table: those of update s in row s modulo the
        number of rows."""
        rows = np.zeros((self._num_rows, len(self.layers)), np.float32)
        self._filled = range(step, step + self._num_rows)
        for s in self._filled:
            if not self.timeline.is_over(s):
                rows[s % self._num_rows] = factors_of(self._plan, s, self.timeline)
        self._table.assign(rows.ravel())


class _Places:
    """Where the values of trainable and of other variables go, in two orders of the same."""

    def __init__(self, ordinary: Sequence[Sequence[Any]], inside: Sequence[Sequence[Any]]) -> None:
        place_of = {id(v): place for place, v in enumerate([*ordinary[0], *ordinary[1]])}
        self._inward = [place_of[id(v)] for v in [*inside[0], *inside[1]]]
        self._outward = sorted(range(len(self._inward)), key=self._inward.__getitem__)
        self._numbers = len(inside[0]), len(ordinary[0])

    def inside(self, trainable: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        values = [*trainable, *others]
        return _parted([values[i] for i in self._inward], self._numbers[0])

    def outside(self, trainable: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        values = [*trainable, *others]
        return _parted([values[i] for i in self._outward], self._numbers[1])


def _parted(values: list[Any], number: int) -> tuple[list[Any], list[Any]]:
    return values[:number], values[number:]


def _in_inference(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **{**kwargs, "training": False})


def _counted_only(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    """In the place of an optimizer's `apply`."""
    optimizer._iterations.assign_add(1)


def _driver(model: Any) -> FreezeOutCallback | None:
    """The callback that has a model's train function, while `fit` runs or after it was
    interrupted."""
    owner = getattr(vars(model).get("make_train_function"), "__self__", None)
    return owner if isinstance(owner, FreezeOutCallback) else None


def _checked_optimizer(model: Any) -> Any:
    optimizer = model.optimizer
    if optimizer is None:
        raise InvalidValue("the model must be compiled with an optimizer")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise InvalidType(
            "LossScaleOptimizer (mixed_float16) hides the optimizer's steps; use mixed_bfloat16, "
            "or compile with auto_scale_loss=False"
        )
    return optimizer
