"""Whether a loss function uses its layers in the order given, read from its jaxpr.

Only a prefix saves work: a frozen layer behind a trained one still carries the gradient. So layer
i's parameters must never meet a value that comes from a layer behind it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core


class _Mark(NamedTuple):
    """What is known of a value: the last layer whose parameters are in it, through data, -1 for
    none; and the layer, if one layer's parameters alone made it (a weight, transposed or cast)."""

    depth: int
    weight: int | None


_DATA = _Mark(-1, None)


def first_out_of_order(jaxpr: Any, layer_of: Sequence[int]) -> tuple[int, int] | None:
    """(i, j), i < j, where layer i's parameters are applied to what comes from layer j.

    Args:
        jaxpr: of the loss, a function of the parameters first, then of anything else.
        layer_of: the layer of each parameter, in the order of the inputs.
    """
    marks = [_Mark(-1, layer) for layer in layer_of]
    marks += [_DATA] * (len(jaxpr.invars) - len(marks))
    return next(_walk(jaxpr, marks, []), None)


def _walk(jaxpr: Any, marks: Sequence[_Mark], outputs: list[_Mark]) -> Iterator[tuple[int, int]]:
    known: dict[Any, _Mark] = dict(zip(jaxpr.invars, marks, strict=True))

    def mark_of(atom: Any) -> _Mark:
        return _DATA if isinstance(atom, core.Literal) else known.get(atom, _DATA)

    for eqn in jaxpr.eqns:
        called = _called(eqn)
        if called is not None:
            results: list[_Mark] = []
            yield from _walk(called, [mark_of(atom) for atom in eqn.invars], results)
        else:
            # Single numbers have no place in the order: the sum of a penalty on a weight is one,
            # which the loss adds to what the last layer returned.
            inputs = [mark_of(atom) for atom in eqn.invars if atom.aval.size > 1]
            weights = {mark.weight for mark in inputs if mark.weight is not None}
            depth = max((mark.depth for mark in map(mark_of, eqn.invars)), default=-1)
            yield from ((i, depth) for i in sorted(weights) if i < depth)
            alone = len(weights) == 1 and all(mark.weight is not None for mark in inputs)
            mark = _Mark(-1, *weights) if alone else _Mark(max(depth, *weights, -1), None)
            results = [mark] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    outputs.extend(mark_of(atom) for atom in jaxpr.outvars)


def _called(eqn: Any) -> Any:
    """The jaxpr that an equation runs on its own inputs, for its own outputs; None where there is
    none such (a branch, a loop with a condition): the equation then counts as one operation."""
    found = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    found = [each for each in found if hasattr(each, "eqns")]
    sizes = [(len(each.invars), len(each.outvars)) for each in found]
    return found[0] if sizes == [(len(eqn.invars), len(eqn.outvars))] else None
