"""The layers of a Keras model: which freeze together, in which order, and which are data's side."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import keras
from keras import ops

from ..errors import InvalidType, InvalidValue, LayerOrderError
from ..plan import given_layers_are


class Found(NamedTuple):
    """The layers that count.

    Attributes:
        groups: what freezes together, in order of execution: lists of Keras layers.
        given: so many of them, the first ones, the user froze.
        parts: for each group, the layers in it that are in inference mode once it is frozen.
    """

    groups: list[list[Any]]
    given: int
    parts: list[list[Any]]


def find_layers(model: Any, layers: Sequence[Any] | None, keep_awake: bool) -> Found:
    """The layers of a model that count; `layers` and `keep_awake` as `FreezeOutCallback`'s.

    What no weight has reached is the data's side, augmentation say. It is in no group; where it is
    inside of a layer of the user's that is in one, it keeps its mode.

    Raises:
        InvalidValue: nothing trains, or the order is not given and cannot be found.
        InvalidType, LayerOrderError: wrong `layers`.
    """
    if layers is None:
        order, on_data = _traced(model)
        places = {id(part): i for i, part in enumerate(order)}
        units = [unit for unit, _ in _units(model) if id(unit) in places.keys() - on_data]
        groups: list[list[Any]] = []
        for unit in sorted(units, key=lambda unit: places[id(unit)]):
            # A norm, an activation or dropout belongs to the kernel before it.
            if not groups or (_has_kernel(unit) and any(map(_has_kernel, groups[-1]))):
                groups.append([])
            groups[-1].append(unit)
    else:
        groups = [_named(model, entry) for entry in layers]
        try:
            order, on_data = _traced(model)
        except InvalidValue:  # what cannot be read is taken as given
            units = [unit for group in groups for unit in group]
            order = []
            on_data = {id(unit) for unit in takewhile(lambda unit: not weights(unit), units)}
        groups = [[unit for unit in group if id(unit) not in on_data] for group in groups]
        groups = [group for group in groups if group]
        _check_order(groups, order)
    groups, given = _counted(model, groups, keep_awake)
    return Found(groups, given, [list(_sleepers(group, on_data)) for group in groups])


def tell_given(found: Found) -> bool:
    """That dropout in layers which the user froze is off, if there is any."""
    parts = (part for parts in found.parts[: found.given] for part in parts)
    rates = (getattr(part, name, None) for part in parts for name in _RATES)
    tell = any(isinstance(rate, float) and rate > 0 for rate in rates)
    if tell:
        names = [group[0].name for group in found.groups[: found.given]]
        warnings.warn(
            f"{given_layers_are(names)}, their dropout off; "
            "FreezeOutCallback(..., keep_awake=True) leaves these as they are",
            stacklevel=2,
        )
    return tell


_RATES = ("rate", "stddev", "dropout", "_dropout", "recurrent_dropout")


def names_of(model: Any) -> dict[int, list[str]]:
    """What layers may be called by, by their ids: their own name, and that behind the names of the
    models that they are in, joined by dots."""
    return {
        id(unit): [".".join([*inside[i:], unit.name]) for i in range(len(inside) + 1)]
        for unit, inside in _units(model)
    }


def weights(unit: Any) -> list[Any]:
    """What trains in a layer unless the user has frozen it."""
    return [v for part in unit._flatten_layers() for v in part._trainable_variables]


def variables_of(model: Any, groups: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Each layer's trainable variables; a shared one belongs to the last layer that has it, and
    one that no layer has to the last of all."""
    owner = {id(v): len(groups) - 1 for v in model.trainable_variables}
    owner |= {id(v): i for i, group in enumerate(groups) for u in group for v in u.variables}
    return [[v for v in model.trainable_variables if owner[id(v)] == i] for i in range(len(groups))]


def _counted(model: Any, groups: list[list[Any]], keep_awake: bool) -> tuple[list[list[Any]], int]:
    """The layers that count, and how many of them, the first ones, the user froze. Others in which
    nothing trains are joined to the next one; after the last, to that."""
    trainable = {id(v) for v in model.trainable_variables}
    trains = [any(id(v) in trainable for u in group for v in u.variables) for group in groups]
    if not any(trains):
        raise InvalidValue("the model has no trainable variables")
    given = 0
    # Of what has no weights at all the user has not frozen anything.
    while not keep_awake and not trains[given] and any(map(weights, groups[given])):
        given += 1
    counted, waiting = groups[:given], []
    for group, counts in zip(groups[given:], trains[given:], strict=True):
        waiting.extend(group)
        if counts:
            counted.append(waiting)
            waiting = []
    counted[-1] = [*counted[-1], *waiting]
    return counted, given


def _sleepers(group: Iterable[Any], on_data: set[int]) -> Iterator[Any]:
    """The layers, at any depth, that have a mode and freeze with this group."""

    def with_mode(layer: Any) -> Iterator[Any]:
        return (part for part in layer._flatten_layers() if part._call_has_training_arg)

    for unit in group:
        for part in with_mode(unit):
            # Whatever hands its own mode on to the data's side keeps that, too.
            if not any(id(inner) in on_data for inner in with_mode(part)):
                yield part


def _has_kernel(unit: Any) -> bool:
    return any(len(v.shape) > 1 for v in weights(unit))


def _units(model: Any, inside: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The layers of a model, and of the models inside it, with the names of these."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _units(layer, (*inside, layer.name))
        else:
            yield layer, inside


def _named(model: Any, entry: Any) -> list[Any]:
    entries = entry if isinstance(entry, list | tuple) else [entry]
    layers = [model.get_layer(each) if isinstance(each, str) else each for each in entries]
    for layer in layers:
        if not isinstance(layer, keras.Layer):
            raise InvalidType(f"layers must hold Keras layers or their names, got {layer!r}")
    return layers


# --- the order of execution -----------------------------------------------------------------


def _check_order(groups: Sequence[Sequence[Any]], order: Sequence[Any]) -> None:
    places = {id(part): i for i, part in enumerate(order)}
    runs = [[places[id(unit)] for unit in group if id(unit) in places] for group in groups]
    for i, (one, other) in enumerate(pairwise(runs)):
        if max(one, default=-1) > min(other, default=len(places)):
            names = [", ".join(unit.name for unit in group) for group in groups[i : i + 2]]
            raise LayerOrderError(
                f"layer {names[0]!r} runs after {names[1]!r}, and must come after it in layers"
            )


class _Pass(keras.Operation):  # type: ignore[misc]
    """A training forward pass of a model that Keras can run on shapes alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def call(self, inputs: Any) -> Any:
        return self.model(inputs, training=True)


def _traced(model: Any) -> tuple[list[Any], set[int]]:
    """The parts of a model that run, at any depth, in the order of their last calls; and the ids of
    those on the data's side: without weights, and no weight has reached what they are given. Both
    from one symbolic pass.

    Data are the inputs, what such a part returns, and whatever there is before the first weights.
    """
    parts = model._flatten_layers()
    before = [vars(part).get("call") for part in parts]
    calls: list[int] = []
    behind: set[int] = set()  # numbers of parts that have been called on something else than data
    data: dict[int, Any] = {}  # tensors, which are kept so that their ids stay theirs
    reached = False

    def watched(number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        if parts[number] is model:  # once more where the backend tries several sizes
            calls.clear()
            behind.clear()
            data.clear()
            data.update(_tensors((args, kwargs)))
            reached = False
        calls.append(number)
        if reached and not _tensors((args, kwargs)).keys() <= data.keys():
            behind.add(number)
        # When a model uses weights of its own is not known; of other layers, from the start.
        reached |= bool(parts[number]._trainable_variables) and not isinstance(
            parts[number], keras.Model
        )
        out = call(*args, **kwargs)
        if number not in behind and not weights(parts[number]):
            data.update(_tensors(out))
        return out

    for number, part in enumerate(parts):
        vars(part)["call"] = partial(watched, number, part.call)
    try:
        _Pass(model).compute_output_spec(_inputs(model))
    except Exception as error:
        raise InvalidValue(
            f"give layers=[...], in order of execution: a symbolic pass of {model.name!r}, which "
            f"would tell it, failed: {error}"
        ) from error
    finally:
        for part, call in zip(parts, before, strict=True):
            del vars(part)["call"]
            if call is not None:
                vars(part)["call"] = call
    last = {number: place for place, number in enumerate(calls)}
    order = [parts[number] for number in sorted(last, key=last.__getitem__)]
    return order, {
        id(parts[number]) for number in last.keys() - behind if not weights(parts[number])
    }


def _tensors(tree: Any) -> dict[int, Any]:
    """The tensors in a tree, by their ids."""
    return {id(leaf): leaf for leaf in keras.tree.flatten(tree) if ops.is_tensor(leaf)}


def _inputs(model: Any) -> Any:
    """Symbolic inputs, of the shapes that the model was built with."""
    try:
        return model.input
    except AttributeError:
        config = model.get_build_config()
    return _of_shapes(config["input_shape"])


def _of_shapes(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: _of_shapes(each) for name, each in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return keras.KerasTensor(tuple(shapes))
    return [_of_shapes(each) for each in shapes]
