"""FreezeOut for Keras 3: a callback, for the TensorFlow, JAX and PyTorch backends.

    model.fit(x, y, epochs=30, callbacks=[FreezeOutCallback()])

The frozen set changes a few times in a run, and each set is a static graph: when a layer freezes,
its variables stop being trainable and the train function is built anew. The optimizer stays the
user's. Its variables never change, so that checkpoints fit at any time; while `fit` runs, its
learning rate is multiplied by each layer's factor, a function of the optimizer's own count of
iterations. No state is kept anywhere else.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import keras
from keras import ops

from ..errors import FreezeOutError, InvalidType, InvalidValue, LayerOrderError
from ..schedule import Schedule
from ..values import whole_number


class FreezeOutCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Anneals and freezes a model's layers, one after another, while `model.fit` runs.

    A frozen layer's variables do not change, have no gradient, and its norms and dropout are in
    inference mode. When `fit` ends, all is as before: every variable is trainable again.

    Args:
        total_steps: updates in the whole run, with all of its calls of `fit`; by default
            `fit`'s epochs times its steps (not micro-batches, with gradient accumulation).
        schedule: when layers freeze.
        layers: the layers in order of execution, each a Keras layer, its name, or several. By
            default, what one symbolic pass runs: every layer that has a kernel, with the norms
            and activations that follow it. Models inside models are taken apart, other composite
            layers are not. Variables of no layer belong to the last one.
        freeze_every: freeze only after steps that are multiples of this: fewer graphs.

    Attributes:
        layers: what freezes together, in order: lists of Keras layers.
        freeze_steps: for each layer, after how many steps it freezes; total_steps: never.
        num_frozen: how many layers are frozen now (after `fit`: were, at its end).
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        schedule: Schedule | None = None,
        layers: Sequence[Any] | None = None,
        freeze_every: int = 1,
    ) -> None:
        super().__init__()
        if total_steps is not None:
            whole_number("total_steps", total_steps)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise InvalidType(f"schedule must be a Schedule, got {type(schedule).__name__}")
        self.total_steps = total_steps
        self.schedule = schedule or Schedule()
        self.freeze_every = whole_number("freeze_every", freeze_every)
        self.layers: list[list[Any]] = []
        self.freeze_steps: tuple[int, ...] = ()
        self.num_frozen = 0
        self._given_layers = layers
        self._undo: list[Callable[[], None]] = []
        self._epoch_start: int | None = None

    # --- what Keras calls -----------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = _checked_optimizer(self.model)
        if (other := vars(optimizer).get("_freezeout")) is not None:
            other.release()  # its `fit` was interrupted
        every = optimizer.gradient_accumulation_steps or 1
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        if self.total_steps is None and steps is None:
            raise InvalidValue(
                "total_steps must be given: how many steps an epoch has is not known beforehand"
            )
        self._total = self.total_steps or epochs * steps // every
        if steps is not None and epochs * steps // every > self._total:
            raise InvalidValue(
                f"total_steps must be at least the {epochs * steps // every} steps of "
                f"{epochs} epochs, got {self._total}"
            )
        if not self.model.built:  # TensorFlow's `fit` would build it in the first step
            raise InvalidValue(
                f"the model {self.model.name!r} must be built before fit: call it on a batch once"
            )
        self.layers = _found(self.model, self._given_layers)
        self.freeze_steps = self.schedule.freeze_steps(
            len(self.layers), self._total, self.freeze_every
        )
        self.num_frozen = 0
        self._every = every
        self._epoch_start = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Other callbacks may have loaded a checkpoint at the beginning of training, not later.
        count = int(self.model.optimizer._iterations.numpy())
        if self._epoch_start is None:
            # Where the optimizer has come from another run, its count is ahead of this one's.
            steps = self.params.get("steps")
            self._offset = count - epoch * steps if steps is not None else count if not epoch else 0
            self._take_over()
        self._epoch_start = count - self._offset
        step = self._epoch_start // self._every
        self._check_length(step + 1)
        self._stand_at(step)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Not at a batch's end: Keras would then wait for each batch's loss before the next.
        assert self._epoch_start is not None
        step = (self._epoch_start + batch) // self._every
        self._check_length(step)  # where batches are not counted, one more begins than there are
        self._stand_at(step)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["num_frozen"] = self.num_frozen

    def on_train_end(self, logs: Any = None) -> None:
        self.release()

    # --- for users ------------------------------------------------------------------------

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """Each layer's learning rate at a step of the run, where the optimizer's is what it is
        now; 0 once frozen."""
        factors = self.schedule.factors(step, len(self.layers), self._total, self.freeze_every)
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        return tuple(rate * factor for factor in factors)

    def release(self) -> None:
        """Give back the model and the optimizer as they were: after an interrupted `fit`, say."""
        if self._undo:
            model = self.model  # on JAX, this has the values put back into the variables
            while self._undo:
                self._undo.pop()()
            model.train_function = None

    # --- freezing -------------------------------------------------------------------------

    def _check_length(self, steps: int) -> None:
        if steps > self._total:
            raise FreezeOutError(f"fit goes on after the run's total_steps = {self._total} steps")

    def _stand_at(self, step: int) -> None:
        # A layer that anneals until the last step is never frozen: no step is left to save.
        ends = [end for end in self.freeze_steps if end < self._total]
        if (k := bisect_right(ends, step)) > self.num_frozen:
            self._freeze(k)

    def _freeze(self, k: int) -> None:
        """Freeze the layers up to number k, and have the train function built anew."""
        model = self.model  # on JAX, this has the values put back into the variables
        for layers, variables in list(zip(self.layers, self._variables, strict=True))[
            self.num_frozen : k
        ]:
            for layer in layers:
                for part in layer._flatten_layers():
                    self._set_inference(part)
            for variable in variables:
                variable.trainable = False
                self._undo.append(partial(setattr, variable, "trainable", True))
        self.num_frozen = k
        self._leave_out_frozen(model.optimizer)
        model.make_train_function(force=True)

    def _set_inference(self, layer: Any) -> None:
        """Have the layer called with training=False. `layer.trainable = False` would do it for
        BatchNorm alone, and would be saved with the model."""
        if layer._call_has_training_arg:
            call = layer.call
            self._replace(layer, "call", lambda *a, **kw: call(*a, **{**kw, "training": False}))

    def _leave_out_frozen(self, optimizer: Any) -> None:
        """The optimizer's lists of what it trains, without what is frozen. Its own variables
        (momentum and the like) stay, and are found by their old places."""
        kept = [v for v in optimizer._trainable_variables if v.trainable]
        if optimizer.use_ema:
            averages = optimizer._model_variables_moving_average
            pairs = zip(optimizer._trainable_variables, averages, strict=True)
            averages = [average for v, average in pairs if v.trainable]
            self._replace(optimizer, "_model_variables_moving_average", averages)
        indices = {optimizer._var_key(v): optimizer._get_variable_index(v) for v in kept}
        self._replace(optimizer, "_trainable_variables_indices", indices)
        self._replace(optimizer, "_trainable_variables", kept)

    # --- learning rates -------------------------------------------------------------------

    def _take_over(self) -> None:
        """Multiply the optimizer's learning rate by each layer's factor, for as long as `fit`
        runs, where the optimizer uses it: in a variable's update, and in its weight decay."""
        model = self.model
        optimizer = model.optimizer
        if not optimizer.built:  # TensorFlow's would be in the first step, for what is then trained
            optimizer.build(model.trainable_variables)
        self._variables = _variables(model, self.layers)
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

        self._replace(optimizer, "_freezeout", self)
        self._replace(optimizer, "update_step", update_step)
        self._replace(optimizer, "_apply_weight_decay", apply_weight_decay)
        self._replace(optimizer, "_get_current_learning_rate", current_learning_rate)
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

            self._replace(optimizer, "_parallel_update_step", parallel_update_step)
        model.make_train_function(force=True)

    def _factor(self, iterations: Any, layer: int) -> Any:
        """Eq. 1 for the optimizer's current iteration, as a tensor of one number."""
        end = self.freeze_steps[layer]
        scale = self._total / end if self.schedule.scale_lr else 1.0
        count = iterations - self._offset
        step = ops.cast(ops.floor_divide(count, self._every), "float32")
        # cos(pi x) + 1 = 2 cos(pi x / 2)**2, which keeps its precision where it comes to zero.
        half = ops.cos(ops.minimum(step, float(end)) * (math.pi / 2 / end))
        return ops.where(step < end, scale * half * half, 0.0)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object until `release()`. Past `__setattr__`, because Keras and
        TensorFlow would track what is set."""
        attributes = vars(owner)
        if name in attributes:
            before = attributes[name]
            self._undo.append(lambda: attributes.__setitem__(name, before))
        else:
            self._undo.append(lambda: attributes.__delitem__(name))
        attributes[name] = value


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


# --- layers ---------------------------------------------------------------------------------


def _found(model: Any, given: Sequence[Any] | None) -> list[list[Any]]:
    """The groups of Keras layers that freeze together, in order of execution."""
    if given is None:
        groups: list[list[Any]] = []
        for unit in _in_order(model, list(_units(model))):
            # A norm, an activation or dropout belongs to the kernel before it.
            if not groups or (_has_kernel(unit) and any(map(_has_kernel, groups[-1]))):
                groups.append([])
            groups[-1].append(unit)
    else:
        groups = [_named(model, entry) for entry in given]
        try:
            in_order = _in_order(model, [unit for group in groups for unit in group])
        except InvalidValue:
            in_order = []  # what cannot be read is taken as given
        places = {id(unit): i for i, unit in enumerate(in_order)}
        runs = [[places[id(unit)] for unit in group if id(unit) in places] for group in groups]
        for i, (one, other) in enumerate(pairwise(runs)):
            if max(one, default=-1) > min(other, default=len(places)):
                names = [", ".join(unit.name for unit in group) for group in groups[i : i + 2]]
                raise LayerOrderError(
                    f"layer {names[0]!r} runs after {names[1]!r}, and must come after it in layers"
                )
    if not any(unit.trainable_variables for group in groups for unit in group):
        raise InvalidValue("the model has no trainable variables")
    return groups


def _has_kernel(unit: Any) -> bool:
    return any(len(v.shape) > 1 for v in unit.trainable_variables)


def _units(model: Any) -> Iterator[Any]:
    """The layers of a model, and of the models inside it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _units(layer)
        else:
            yield layer


def _named(model: Any, entry: Any) -> list[Any]:
    entries = entry if isinstance(entry, list | tuple) else [entry]
    layers = [model.get_layer(each) if isinstance(each, str) else each for each in entries]
    for layer in layers:
        if not isinstance(layer, keras.Layer):
            raise InvalidType(f"layers must hold Keras layers or their names, got {layer!r}")
    return layers


def _variables(model: Any, layers: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Each layer's trainable variables; a shared one belongs to the last layer that has it, and
    one that no layer has to the last of all."""
    owner = {id(v): len(layers) - 1 for v in model.trainable_variables}
    owner |= {id(v): i for i, group in enumerate(layers) for u in group for v in u.variables}
    return [[v for v in model.trainable_variables if owner[id(v)] == i] for i in range(len(layers))]


class _Pass(keras.Operation):  # type: ignore[misc]
    """A forward pass of a model that Keras can run on shapes alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def call(self, inputs: Any) -> Any:
        return self.model(inputs, training=False)


def _in_order(model: Any, units: Sequence[Any]) -> list[Any]:
    """Those units that run, in the order of their last calls, from one symbolic pass."""
    calls: list[int] = []
    before = [vars(unit).get("call") for unit in units]

    def watched(number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(number)
        return call(*args, **kwargs)

    for number, unit in enumerate(units):
        vars(unit)["call"] = partial(watched, number, unit.call)
    try:
        _Pass(model).compute_output_spec(_inputs(model))
    except Exception as error:
        raise InvalidValue(
            f"give layers=[...], in order of execution: a symbolic pass of {model.name!r}, which "
            f"would tell it, failed: {error}"
        ) from error
    finally:
        for unit, call in zip(units, before, strict=True):
            del vars(unit)["call"]
            if call is not None:
                vars(unit)["call"] = call
    last = {number: place for place, number in enumerate(calls)}
    return [units[number] for number in sorted(last, key=last.__getitem__)]


def _inputs(model: Any) -> Any:
    """Symbolic inputs, of the shapes that the model was built with."""
    try:
        return model.input
    except AttributeError:
        config = model.get_build_config()
    return _tensors(config["input_shape"])


def _tensors(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: _tensors(each) for name, each in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return keras.KerasTensor(tuple(shapes))
    return [_tensors(each) for each in shapes]
