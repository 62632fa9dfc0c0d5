"""`find_layers`: a model's layers in execution order, grouped as a person would group them."""

import warnings
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from ..errors import InvalidType, InvalidValue
from .flow import Node
from .layer import Layer, LayerCost
from .names import innermost, plain_names
from .order import check_order
from .trace import ExampleInputs, Stack, Trace


def find_layers(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    trained: Container[nn.Parameter] | None = None,
) -> list[Layer]:
    """The layers of `model`, in the order in which one forward pass uses them last.

    Args:
        model: any module. It is run once in evaluation mode and left as it was.
        example_inputs: what its forward takes: a tensor, a tuple of positional arguments, a
            mapping of keyword arguments, or the pair (tuple, mapping). A small batch will do.
            None: the modules' order of definition is taken instead of a forward pass. A `Trace`:
            that of a forward pass which has been recorded.
        trained: parameters that are trained if they require a gradient; None: all of them.

    A residual block, dense unit or transformer block is one layer, and so is a convolution with
    its norm; a norm without a bare neighbour in front goes with what follows, as a final norm
    with the classifier. A parameter used in several places belongs to the last of them; one
    owned by no layer's module (class token, position embedding) to the layer that runs next. A
    module without parameters belongs to the layer executed before it. Branches that do not feed
    each other (towers, heads) are side by side, one layer at each depth, counted from the end;
    first layers that do not feed each other are one. What neither trains nor feeds anything that
    does (a teacher) stays out: it goes with the last layer. Parameters that the forward
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
    units = _Units(model, trace, trained)
    towers: set[nn.Module] = set()
    while alone := units.alone():
        towers |= alone
        units = _Units(model, trace, trained, towers=towers)
    groups = _side_by_side(_grouped(units.in_order(), units), units)
    return _layers(model, trace, units, groups, [_name(group, units, names) for group in groups])


def given_layers(
    model: nn.Module,
    layers: Sequence[Any],
    example_inputs: ExampleInputs = None,
    *,
    trained: Container[nn.Parameter] | None = None,
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
    units = _Units(model, trace, trained, [module for group in groups for module in group])
    result = _layers(model, trace, units, groups, [names[group[0]] or "model" for group in groups])
    if example_inputs is not None:
        check_order(result, trace)
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

    def __init__(self, model: nn.Module, trace: Trace, towers: Container[nn.Module] = ()) -> None:
        self._model, self._trace, self._flow = innermost(model), trace, trace.flow
        self._towers = towers  # which are split, whatever they are
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
            or module in self._towers
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
        self,
        model: nn.Module,
        trace: Trace,
        trained: Container[nn.Parameter] | None,
        modules: Sequence[nn.Module] | None = None,
        towers: Container[nn.Module] = (),
    ) -> None:
        self.modules = _Blocks(model, trace, towers).find() if modules is None else list(modules)
        # All parameters are the root's own, or those of modules that never ran.
        self.modules = self.modules or [model]
        self._trace, self._flow = trace, trace.flow
        self._set = set(self.modules)
        self._home = {p: unit for unit in reversed(self.modules) for p in unit.parameters()}
        self._last = max(self.modules, key=lambda m: trace.runs.get(m, (-1,))[0])
        users = {p: self._user(p) for p in trace.uses}
        self._starts = sorted(
            [(time, m) for time, m in trace.starts if m in self._set]
            + [
                (self.time(p), m) for p, m in users.items() if m is not None and m not in trace.runs
            ],
            key=lambda start: start[0],
        )
        self.parameters: dict[nn.Module, list[nn.Parameter]] = {m: [] for m in self.modules}
        self.aside: set[nn.Parameter] = set()  # neither trained nor taken by what is
        free: list[nn.Parameter] = []  # used between units
        for parameter, user in users.items():
            # A module may well be false: an empty list, or one of torch.compile's.
            self.parameters[self._next(parameter) if user is None else user].append(parameter)
            if user is None:
                free.append(parameter)
        self._set_aside(trained, free, modules is None)
        self.unused: list[str] = []
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
            if (times := [self.time(p) for p in used if p in trace.uses])
        }
        if not self.times:
            raise InvalidValue("the forward pass on example_inputs used none of the parameters")

    def inside(self, stack: Stack) -> nn.Module | None:
        """The unit that is running, given the modules that are, or None between units."""
        return next((module for module in reversed(stack) if module in self._set), None)

    def time(self, parameter: nn.Parameter) -> int:
        """Of its last use: if its unit does not run then, of that on data."""
        time, stack = self._trace.uses[parameter]
        if parameter in self._trace.applied and self._user(parameter) is not self.inside(stack):
            return self._trace.applied[parameter][0]
        return time

    def _user(self, parameter: nn.Parameter) -> nn.Module | None:
        """The unit that uses it last; None: it is used between units."""
        unit = self.inside(self._trace.uses[parameter][1])
        home, applied = self._home.get(parameter), self._trace.applied.get(parameter)
        if unit is None and home is not None and applied is not None:
            # Its unit's forward is written out by what contains it, F.linear(x, unit.weight) say;
            # or what is made of its weights is handed to it, by functional_call() say.
            runs = home in self._trace.runs
            unit = home if self.inside(applied[1]) is (home if runs else None) else None
        return unit

    def _next(self, parameter: nn.Parameter) -> nn.Module:
        """The unit that a parameter goes with which is used between units: the next one to run
        that needs it. Behind the last unit of its branch, that one."""

        def following(time: int) -> int:
            return bisect_right(self._starts, time, key=lambda start: start[0])

        after = self._starts[following(self._trace.uses[parameter][0]) :]
        if self._flow is not None and parameter in self._trace.applied:
            made, taken = self._flow.made([parameter]), self._flow.taken([parameter])
            for _, unit in after:
                if made & self._flow.taken(self.nodes(unit)):
                    return unit
            for _, unit in reversed(self._starts[: following(self._trace.applied[parameter][0])]):
                if taken & self._flow.made(self.nodes(unit)):
                    return unit
        return after[0][1] if after else self._last

    def _set_aside(
        self, trained: Container[nn.Parameter] | None, free: list[nn.Parameter], whole: bool
    ) -> None:
        """Take out what is not trained and feeds nothing that is; `whole`: units as well."""
        graded = self._trace.graded

        def trains(parameter: nn.Parameter) -> bool:
            return (
                parameter.requires_grad
                and (trained is None or parameter in trained)
                and (graded is None or parameter in graded)
            )

        training = {unit for unit, used in self.parameters.items() if any(map(trains, used))}
        self._made = 0  # by what trains
        if self._flow is None or not training:
            return
        nodes = [n for m in training for n in (*self.nodes(m), *filter(trains, self.parameters[m]))]
        self._made, taken = self._flow.made(nodes), self._flow.taken(nodes)

        def idle(nodes: Sequence[Node]) -> bool:
            mine = self._flow.made(nodes) if self._flow is not None else 0
            return bool(mine) and not mine & taken

        self.aside = {p for p in free if not trains(p) and idle([p])}
        for unit, used in self.parameters.items():
            if whole and used and unit not in training and idle(self.nodes(unit)):
                self.aside.update(used)
            self.parameters[unit] = [p for p in used if p not in self.aside]

    def is_aside(self, module: nn.Module) -> bool:
        """Whether a module without parameters is part of what was set aside, or behind it."""
        if not self.aside or self._flow is None or module not in self._trace.runs:
            return False
        for outer in reversed(self._trace.runs[module][1]):
            if inside := set(outer.parameters()):
                if inside <= self.aside:
                    return True
                break
        taken = self._flow.taken([module])
        return bool(taken & self._flow.made(self.aside)) and not taken & self._made

    def alone(self) -> set[nn.Module]:
        """Units with parts that neither feed another nor are fed by one: towers beside others, from
        the input to the end."""
        if self._flow is None or len(self.times) < 2:
            return set()
        nodes = {m: (*self.nodes(m), *self.parameters[m]) for m in self.times}
        made = {m: self._flow.made(each) for m, each in nodes.items()}
        taken = {m: self._flow.taken(each) for m, each in nodes.items()}
        alone = set()
        for unit in self.times:
            others = [m for m in self.times if m is not unit]
            if not _is_leaf(innermost(unit)) and all(
                made[m] and not made[m] & taken[unit] and not made[unit] & taken[m] for m in others
            ):
                alone.add(unit)
        return alone if all(map(made.get, alone)) else set()

    def is_fed(self, module: nn.Module, parameter: nn.Parameter) -> bool:
        """Whether the module took what was computed with the parameter, as far as is known."""
        return self._flow is not None and bool(
            self._flow.made([parameter]) & self._flow.taken([module])
        )

    def nodes(self, unit: nn.Module) -> Sequence[Node]:
        """What stands for the unit in the flow: itself, or its parameters if it never runs."""
        return (unit,) if unit in self._trace.runs else tuple(unit.parameters())

    def feeds(self, one: nn.Module, other: nn.Module, unknown: bool = True) -> bool:
        """Whether the other unit took anything computed from a result of this."""
        if self._flow is None:
            return unknown
        mine, others = self._flow.made(self.nodes(one)), self._flow.made(self.nodes(other))
        if not mine or not others:
            return unknown
        return bool(mine & self._flow.taken(self.nodes(other)))

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
        """Units that have parameters, by the last use of any of them; but what feeds others, and is
        not fed by them, comes before these, even if it runs again later: an encoder that several
        heads have in common, each of which runs right after it."""
        waiting = sorted(self.times, key=self.times.__getitem__)
        if self._flow is None:
            return waiting
        made = {m: self._flow.made(self.nodes(m)) for m in waiting}
        taken = {m: self._flow.taken(self.nodes(m)) for m in waiting}
        before = {
            unit: {m for m in waiting if made[m] & taken[unit] and not made[unit] & taken[m]}
            for unit in waiting
            if made[unit]
        }
        ordered: list[nn.Module] = []
        while waiting:
            ready = (m for m in waiting if before.get(m, set()).isdisjoint(waiting))
            ordered.append(next(ready, waiting[0]))
            waiting.remove(ordered[-1])
        return ordered


def _grouped(ordered: list[nn.Module], units: _Units) -> list[list[nn.Module]]:
    """Units joined into layers: norms with a neighbour, successive embeddings together."""
    groups: list[list[nn.Module]] = []
    waiting: list[nn.Module] = []  # norms and depthwise kernels in front of what they belong to

    def bare(group: list[nn.Module]) -> bool:
        return all(_is_leaf(innermost(unit)) and not units.is_norm(unit) for unit in group)

    def in_front(unit: nn.Module) -> list[nn.Module] | None:
        """The last group that feeds it: others may be of a branch beside it."""
        feeding = (g for g in reversed(groups) if any(units.feeds(one, unit) for one in g))
        return next(feeding, None)

    for unit in ordered:
        mine = [one for one in waiting if units.feeds(one, unit)]
        front = in_front(unit)
        if units.is_norm(unit):
            trained = any(p.requires_grad for p in units.parameters[unit])
            behind = isinstance(innermost(unit), nn.PReLU) or not trained
            if front is not None and not mine and (behind or bare(front)):
                front.append(unit)
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
            groups.append([*mine, unit])
            waiting = [one for one in waiting if one not in mine]
    for unit in waiting:  # at the end of its branch
        front = in_front(unit)
        if front is None:
            groups[-1:] = [[*(groups[-1] if groups else []), unit]]
        else:
            front.append(unit)
    return groups


def _side_by_side(groups: list[list[nn.Module]], units: _Units) -> list[list[nn.Module]]:
    """The groups with those joined that stand side by side: branches that do not feed each other.

    First ones are one: embeddings or stems of several inputs. All others are as far from the end
    as the longest way there is, so that heads end together, and towers as well.
    """
    weights = [[u for u in group if not units.is_norm(u)] for group in groups]

    def related(i: int, j: int) -> bool:
        pairs = ((a, b) for a in weights[i] or groups[i] for b in weights[j] or groups[j])
        return any(units.feeds(a, b) or units.feeds(b, a) for a, b in pairs)

    count = len(groups)
    first = 1
    while first < count and not any(related(i, first) for i in range(first)):
        first += 1
    if first == count:  # all of them side by side
        return groups
    behind = [[j for j in range(max(i + 1, first), count) if related(i, j)] for i in range(count)]
    for j in range(first, count):
        # An embedding where branches meet, a decoder's, is a layer of its own, behind what runs
        # before it.
        is_embedding = all(isinstance(innermost(unit), nn.Embedding) for unit in weights[j])
        if is_embedding and behind[j] and not any(j in behind[i] for i in range(j)):
            meeting = behind[j][0]
            others = [i for i in range(meeting) if i != j and meeting in behind[i]]
            if any(i not in behind[j] for i in others):
                for i in others:
                    if i < j:
                        behind[i].append(j)
    depth = [0] * count
    for i in reversed(range(count)):
        depth[i] = 1 + max((depth[j] for j in behind[i]), default=-1)
    depth[:first] = [max(depth[:first])] * first
    joined = [
        [unit for group, own in zip(groups, depth, strict=True) if own == level for unit in group]
        for level in sorted(set(depth), reverse=True)
    ]
    # A norm that several branches take goes with the first of them.
    number = {unit: i for i, group in enumerate(joined) for unit in group}
    for unit, i in number.items():
        if units.is_norm(unit):
            taking = [
                number[u]
                for part in weights
                for u in part
                if units.times[u] > units.times[unit] and units.feeds(unit, u, unknown=False)
            ]
            if (early := min(taking, default=i)) < i:
                joined[i].remove(unit)
                joined[early].append(unit)
    return joined


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
    ends = sorted(
        ((trace.uses[p][0], i, p) for p, i in of_parameter.items() if p in trace.uses),
        key=lambda end: end[:2],
    )
    of_parameter.update(dict.fromkeys(units.aside, last))

    def behind(module: nn.Module) -> int:
        """The last layer that runs before the module: of those that feed it, if any does."""
        before = bisect_right(ends, trace.runs[module][0], key=lambda end: end[0])
        feeding = [i for _, i, p in ends[:before] if units.is_fed(module, p)]
        return max(feeding or (i for _, i, _ in ends[:before]), default=0)

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
            if module in trace.runs and not units.is_aside(module):
                of_module[module] = behind(module)
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
