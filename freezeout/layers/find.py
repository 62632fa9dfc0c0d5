"""`find_layers`: a model's layers in execution order, grouped as a person would group them."""

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from ..errors import InvalidType, InvalidValue
from .flow import Flow
from .layer import Layer, LayerCost
from .names import innermost, plain_names
from .trace import ExampleInputs, Stack, Trace, check_order, last_uses


def find_layers(model: nn.Module, example_inputs: ExampleInputs = None) -> list[Layer]:
    """The layers of `model`, in the order in which one forward pass uses them last.

    Args:
        model: any module. It is run once in evaluation mode and left as it was.
        example_inputs: what its forward takes: a tensor, a tuple of positional arguments, a
            mapping of keyword arguments, or the pair (tuple, mapping). A small batch will do.
            None: the modules' order of definition is taken instead of a forward pass. A `Trace`:
            that of a forward pass which has been recorded.

    A residual block, dense unit or transformer block is one layer, and so is a convolution with
    its norm; a norm without a bare neighbour in front goes with what follows, as a final norm
    with the classifier. A parameter used in several places belongs to the last of them; one
    owned by no layer's module (class token, position embedding) to the layer that runs next. A
    module without parameters belongs to the layer executed before it. First layers that do not
    feed each other are one, and so are last ones (parallel heads). Parameters that the forward
    pass did not use belong to the block that they stand in if it ran (experts that no input
    took) and otherwise to the last layer, with a warning. Every parameter and every module of the
    model is in exactly one layer.

    Raises:
        InvalidValue: the model has no parameters, or the forward pass fails.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise InvalidValue("the model has no parameters: there is nothing to train or freeze")
    trace = Trace.of(model, example_inputs)
    names = plain_names(model)
    units = _Units(model, trace)
    groups = _grouped(units.in_order(), units)
    if trace.flow is not None:
        groups = _ends_joined(groups, units, trace.flow)
    return _layers(model, trace, units, groups, [_name(group, units, names) for group in groups])


def given_layers(
    model: nn.Module,
    layers: Sequence[Any],
    example_inputs: ExampleInputs = None,
) -> list[Layer]:
    """Layers from a user's list: each entry a module, or several that freeze together.

    What no entry covers is placed as in `find_layers`, but parameters that nothing places go
    with the last layer, with a warning.

    Raises:
        InvalidType: an entry is not a module. InvalidValue: an entry is no part of the model, or
        stands in two places. LayerOrderError: the order is not that of execution.
    """
    if not isinstance(layers, Iterable):
        raise InvalidType(f"layers must be a list of modules, got {layers!r}")
    groups: list[list[Any]] = [
        [entry] if isinstance(entry, nn.Module) or not isinstance(entry, Iterable) else list(entry)
        for entry in layers
    ]
    names = plain_names(model)
    taken: dict[nn.Module, int] = {}
    for number, group in enumerate(groups):
        if not group:
            raise InvalidValue(f"layers[{number}] is empty")
        for entry in group:
            if not isinstance(entry, nn.Module):
                hint = ", which model.get_submodule(name) gives" if isinstance(entry, str) else ""
                raise InvalidType(
                    f"layers[{number}] holds a {type(entry).__name__}, not a module{hint}"
                )
            if entry not in names:
                raise InvalidValue(
                    f"layers[{number}] holds a {type(entry).__name__} that is no part of the model"
                )
            for module in entry.modules():
                if taken.setdefault(module, number) != number:
                    raise InvalidValue(
                        f"module {names[module]!r} is in layers[{taken[module]}] and in "
                        f"layers[{number}]"
                    )
    if not groups:
        raise InvalidValue("layers is empty; pass at least one module")
    trace = Trace.of(model, example_inputs)
    units = _Units(model, trace, [module for group in groups for module in group])
    result = _layers(model, trace, units, groups, [names[group[0]] or "model" for group in groups])
    if example_inputs is not None:
        check_order(result, last_uses(result, trace))
    return result


def _is_list(module: nn.Module) -> bool:
    """A plain container: its elements count, it computes nothing of its own."""
    module = innermost(module)
    own_forward = type(module).forward not in (nn.Sequential.forward, nn.Module.forward)
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not own_forward


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """Children with parameters, those of plain lists in place of the lists."""
    for child in module.children():
        if _is_list(child):
            yield from _elements(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Of one class, and at least half of the parts that both have are of one class too: not so
    two instances of a wrapper, residual say, around different things."""
    one, other = innermost(one), innermost(other)
    if type(one) is not type(other):
        return False
    parts = dict(one.named_children())
    both = [(parts[name], part) for name, part in other.named_children() if name in parts]
    return 2 * sum(type(a) is type(b) for a, b in both) >= len(both)


class _Blocks:
    """Tells the modules that are never split, leaves with parameters and blocks, from those that
    are made of them."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace, self._flow = innermost(model), trace, trace.flow
        self._weights: dict[nn.Module, int] = {}
        self._stacks: dict[nn.Module, bool] = {}
        self._most = self._count(model) / 2

    def find(self) -> list[nn.Module]:
        """In the order of definition. A block is a composite module that holds no stack of
        blocks and not most of the network's weights. A module that several have in common is of
        the one that it runs in last."""
        found = list(self._visit(self._model, False, set(), set()))
        units = set(found)
        return [
            unit
            for unit in found
            if unit not in self._trace.runs or units.isdisjoint(self._trace.runs[unit][1][:-1])
        ]

    def _visit(
        self, module: nn.Module, listed: bool, split: set[type], seen: set[nn.Module]
    ) -> Iterator[nn.Module]:
        """`split`: classes of which another module of the same parent is split. A wrapper (of
        `torch.compile`, say) is what it wraps: split with it, and a unit in its place."""
        if module in seen or next(module.parameters(), None) is None:
            return
        inner = innermost(module)
        seen |= {module, inner}
        is_list = _is_list(inner)
        if not _is_leaf(inner) and (
            inner is self._model
            or is_list
            or type(inner) in split
            or self._holds_stack(inner)
            or (not listed and self._count(inner) > self._most)
        ):
            elements = map(innermost, _elements(inner))
            stacks = {type(part) for part in elements if self._holds_stack(part)}
            for child in inner.children():
                yield from self._visit(child, is_list, split | stacks if is_list else stacks, seen)
        else:
            yield module

    def _count(self, module: nn.Module) -> int:
        """How many modules inside (itself included) own a weight that mixes channels: a matrix
        or a kernel, but neither a norm's scale nor a depthwise kernel."""
        if module not in self._weights:
            self._weights[module] = sum(
                any(p.ndim >= 2 and p.shape[1] > 1 for p in inner.parameters(recurse=False))
                for inner in module.modules()
            )
        return self._weights[module]

    def _holds_stack(self, module: nn.Module) -> bool:
        """Whether blocks that are alike stand inside, two in a list or three as the only parts
        of a module, and one feeds another: a stage or an encoder, then, and no block. Branches
        or experts, of which none feeds another, are part of a block, whatever they hold."""
        module = innermost(module)
        if module not in self._stacks:
            self._stacks[module] = self._is_stack(module) or (
                not (self._is_apart(module) and _is_list(module))
                and any(self._holds_stack(child) for child in module.children())
            )
        return self._stacks[module]

    def _is_stack(self, module: nn.Module) -> bool:
        parts = list(_elements(module))
        blocks = [part for part in parts if self._count(part) >= 2]
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            stacked = any(_alike(a, b) for a, b in combinations(blocks, 2))
        else:
            tree = sum(type(innermost(block)) is type(module) for block in blocks) >= 2
            same = (
                len(blocks) == len(parts) >= 3
                and all(_alike(blocks[0], block) for block in blocks)
                and not any(_is_list(child) for child in module.children())
            )
            stacked = tree or same
        return stacked and not self._is_apart(module)

    def _is_apart(self, module: nn.Module) -> bool:
        parts = [c for c in module.children() if next(c.parameters(), None) is not None]
        return self._flow is not None and len(parts) >= 2 and self._flow.apart(parts)


class _Units:
    """The unsplit modules, and which of them each parameter and module of the model is part of."""

    def __init__(
        self, model: nn.Module, trace: Trace, modules: Sequence[nn.Module] | None = None
    ) -> None:
        self.modules = _Blocks(model, trace).find() if modules is None else list(modules)
        # All parameters are the root's own, or those of modules that never ran.
        self.modules = self.modules or [model]
        self._set = set(self.modules)
        self._starts = [(time, m) for time, m in trace.starts if m in self._set]
        self._last = max(self.modules, key=lambda m: trace.runs.get(m, (-1,))[0])
        self.parameters: dict[nn.Module, list[nn.Parameter]] = {m: [] for m in self.modules}
        self.unused: list[str] = []
        for parameter, use in trace.uses.items():
            self.parameters[self._user(*use)].append(parameter)
        # Of blocks that were used otherwise, an expert that no row took say.
        spare = {
            parameter: unit
            for unit, used in self.parameters.items()
            if used
            for parameter in unit.parameters()
            if parameter not in trace.uses
        }
        for name, parameter in model.named_parameters():
            if parameter in spare:
                self.parameters[spare[parameter]].append(parameter)
            elif parameter not in trace.uses:
                self.unused.append(name)
        self.times = {
            m: max(times)
            for m, used in self.parameters.items()
            if (times := [trace.uses[p][0] for p in used if p in trace.uses])
        }
        if not self.times:
            raise InvalidValue("the forward pass on example_inputs used none of the parameters")

    def inside(self, stack: Stack) -> nn.Module | None:
        """The unit that is running, given the modules that are, or None between units."""
        return next((module for module in reversed(stack) if module in self._set), None)

    def _user(self, time: int, stack: Stack) -> nn.Module:
        unit = self.inside(stack)
        if unit is None:  # used between units: the unit that runs next needs it
            following = bisect_right(self._starts, time, key=lambda start: start[0])
            unit = self._starts[following][1] if following < len(self._starts) else self._last
        return unit

    def is_norm(self, unit: nn.Module) -> bool:
        """Whether all it has is a scale or shift a channel: any norm, PReLU, layer scale."""
        return all(p.ndim <= 1 for p in self.parameters[unit])

    def is_depthwise(self, unit: nn.Module) -> bool:
        """Whether all that it has beside norms are kernels of one channel each."""
        kernels = {
            p
            for owner in unit.modules()
            for p in owner.parameters(recurse=False)
            if p.ndim >= 2 and p.shape[1] == 1 < p.shape[0] == getattr(owner, "groups", 1)
        }
        return all(p.ndim <= 1 or p in kernels for p in self.parameters[unit])

    def in_order(self) -> list[nn.Module]:
        """Units that have parameters, by the last use of any of them."""
        return sorted(self.times, key=self.times.__getitem__)


def _grouped(ordered: list[nn.Module], units: _Units) -> list[list[nn.Module]]:
    """Units joined into layers: norms with a neighbour, successive embeddings together."""
    groups: list[list[nn.Module]] = []
    waiting: list[nn.Module] = []  # norms and depthwise kernels in front of what they belong to

    def bare(group: list[nn.Module]) -> bool:
        return all(_is_leaf(innermost(unit)) and not units.is_norm(unit) for unit in group)

    for unit in ordered:
        if units.is_norm(unit):
            trained = any(p.requires_grad for p in units.parameters[unit])
            behind = isinstance(innermost(unit), nn.PReLU) or not trained
            if groups and not waiting and (behind or bare(groups[-1])):
                groups[-1].append(unit)
            else:
                waiting.append(unit)
        elif units.is_depthwise(unit):
            waiting.append(unit)
        elif (
            isinstance(innermost(unit), nn.Embedding)
            and groups
            and not waiting
            and all(isinstance(innermost(other), nn.Embedding) for other in groups[-1])
        ):
            groups[-1].append(unit)
        else:
            groups.append([*waiting, unit])
            waiting = []
    if waiting:
        groups[-1:] = [[*(groups[-1] if groups else []), *waiting]]
    return groups


def _ends_joined(groups: list[list[nn.Module]], units: _Units, flow: Flow) -> list[list[nn.Module]]:
    """The groups with those joined that come first, or last, and do not feed one another:
    embeddings or stems of several inputs, parallel heads."""

    def apart(group: list[nn.Module], others: list[list[nn.Module]]) -> bool:
        weights = [unit for unit in group if not units.is_norm(unit)]
        return not any(
            flow.feeds(one, part) or flow.feeds(part, one)
            for one in weights
            for other in others
            for part in other
            if not units.is_norm(part)
        )

    first = 1
    while first < len(groups) and apart(groups[first], groups[:first]):
        first += 1
    last = len(groups) - 1
    while last > first and apart(groups[last - 1], groups[last:]):
        last -= 1
    if first == len(groups):  # all of them side by side
        return groups
    return [
        [unit for group in groups[:first] for unit in group],
        *groups[first:last],
        [unit for group in groups[last:] for unit in group],
    ]


def _is_leaf(unit: nn.Module) -> bool:
    return next(unit.children(), None) is None


def _name(group: list[nn.Module], units: _Units, names: dict[nn.Module, str]) -> str:
    weights = [unit for unit in group if not units.is_norm(unit)]
    mixing = [unit for unit in weights if not units.is_depthwise(unit)]
    return names[[*mixing, *weights, *group][0]] or "model"


def _layers(
    model: nn.Module,
    trace: Trace,
    units: _Units,
    groups: list[list[nn.Module]],
    names: list[str],
) -> list[Layer]:
    """Layers of the groups, with every module and parameter of the model in exactly one."""
    last = len(groups) - 1
    number = {unit: i for i, group in enumerate(groups) for unit in group}
    of_parameter = {
        parameter: number[unit]
        for unit, parameters in units.parameters.items()
        for parameter in parameters
    }
    if units.unused:
        shown = ", ".join(units.unused[:5]) + (", ..." if len(units.unused) > 5 else "")
        warnings.warn(
            f"{len(units.unused)} parameters were not used by the forward pass and go with the "
            f"last layer {names[last]!r}: {shown}",
            stacklevel=4,
        )
    # Modules outside every unit: after the layer that was executed before them.
    # A parameter of a later layer may be used before it too (a position embedding, then dropout).
    ends = sorted((use[0], of_parameter[p]) for p, use in trace.uses.items())
    of_module: dict[nn.Module, int] = {}
    for unit, i in number.items():
        for module in unit.modules():
            user = units.inside(trace.runs[module][1]) if module in trace.runs else unit
            # A module may well be false: an empty list, or one of torch.compile's.
            of_module[module] = number.get(unit if user is None else user, i)

    def place(module: nn.Module) -> int:
        if module in of_module:
            return of_module[module]
        if _is_leaf(module) and (used := _used_last_by(module, trace)):
            # In a block of which only a method is called, say.
            of_module[module] = max(of_parameter[p] for p in used)
        elif (
            _is_leaf(module)
            or module in units.parameters
            or (module in trace.runs and next(module.parameters(), None) is None)
        ):
            # Without parameters, or with none that are not used again later.
            if module in trace.runs:
                before = bisect_right(ends, trace.runs[module][0], key=lambda end: end[0])
                of_module[module] = max((i for _, i in ends[:before]), default=0)
                for part in module.modules():  # an observer whose method is called
                    if part not in trace.runs:
                        of_module.setdefault(part, of_module[module])
            else:
                of_module[module] = last
        else:  # a container ends where the last of its parts does
            parts = [place(child) for child in module.children()]
            parts += [of_parameter.get(p, last) for p in module.parameters(recurse=False)]
            of_module[module] = max(parts)
        return of_module[module]

    # What is on the data's side is never frozen.
    of_module.update((module, last) for module in trace.ahead(model))
    inner = set(_inner(units.modules)) - set(units.modules)
    return [
        Layer(
            name,
            modules := [module for module in model.modules() if place(module) == i],
            (p for p in model.parameters() if of_parameter.get(p, last) == i),
            (module for module in modules if module not in inner),
            _cost(modules, trace),
            [written for written in trace.writes if place(written[0]) == i],
            _readers(model, modules),
        )
        for i, name in enumerate(names)
    ]


def _readers(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Encoders of torch's that look at the mode of one of the modules, their first layer."""
    own = set(modules)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and own.intersection(module.layers[:1])
    ]


def _cost(modules: Iterable[nn.Module], trace: Trace) -> LayerCost | None:
    if trace.flops is None or not trace.rows:
        return None
    modules, saved = list(modules), None
    if trace.saved is not None:
        saved = sum(trace.saved.get(module, 0) for module in modules) / trace.rows
    return LayerCost(sum(trace.flops.get(m, 0) for m in modules) / trace.rows, saved)


def _used_last_by(module: nn.Module, trace: Trace) -> list[nn.Parameter]:
    """The module's own parameters whose last use was in a run of it."""
    own = module.parameters(recurse=False)
    return [p for p in own if p in trace.uses and module in trace.uses[p][1]]


def _inner(units: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules that only units call: what they contain, but for the elements of plain lists."""
    for unit in units:
        if _is_list(unit) and innermost(unit) is unit:
            yield from _inner(unit.children())
        else:
            yield from (module for module in unit.modules() if module is not unit)
