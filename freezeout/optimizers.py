"""An optimizer whose groups are split by layer for the duration of each step.

The user's optimizer keeps its own `param_groups` and `state_dict`: learning-rate schedulers,
checkpoints and training frameworks see nothing else. Only inside `optimizer.step()` do the lists of
groups hold others: one layer's parameters each, with the group's own options and `lr * factor`, and
no frozen parameters. Optimizers within the optimizer (SAM's, Lookahead's) are split with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import FreezeOutError, InvalidType, InvalidValue
from .parts import Family, Group, Part, Saved, unshared
from .versions import make_state

_ATTACHED: WeakSet[Optimizer] = WeakSet()
# Whose wrappers do nothing to parameters themselves: what they hold is driven, they are not.
_STAND_INS = {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}


def check_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple, or an error that names the one that cannot be split."""
    if _is_optimizer(optimizers):
        optimizers = (optimizers,)  # type: ignore[assignment]
    elif not isinstance(optimizers, Iterable):
        raise InvalidType(
            f"optimizer must be a torch optimizer or a list of them, got {optimizers!r}"
        )
    checked = tuple(map(_unwrapped, optimizers))  # type: ignore[arg-type]
    if not checked:
        raise InvalidValue("the list of optimizers is empty")
    if len(set(map(id, checked))) != len(checked):
        raise InvalidValue("the same optimizer is listed twice")
    seen: dict[int, Optimizer] = {}
    for optimizer in checked:
        if not _is_optimizer(optimizer):
            raise InvalidType(
                f"optimizer must be a torch optimizer, got {type(optimizer).__name__}"
            )
        held = optimizers_in(optimizer)
        for node in held:
            _check_one(node)
            outer = seen.setdefault(id(node), optimizer)
            if outer is not optimizer:
                raise InvalidValue(
                    f"the same {type(node).__name__} is listed twice: {type(outer).__name__} and "
                    f"{type(optimizer).__name__} both use it; list the outer one alone"
                )
        _check_copies(optimizer, held)
    return checked


def _check_one(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if not hasattr(optimizer, "param_groups"):
        raise InvalidType(f"{name} cannot be used with FreezeOut: it has no param_groups")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidType(
            "LBFGS cannot be used with FreezeOut: it keeps one flat history over all "
            "parameters and takes a missing gradient for zero"
        )
    if name == "ZeroRedundancyOptimizer":
        raise InvalidType(
            "ZeroRedundancyOptimizer cannot be used with FreezeOut: it keeps its own copy of "
            "the groups; FSDP2 (torch.distributed.fsdp.fully_shard) shards optimizer state too"
        )
    if optimizer in _ATTACHED:
        raise InvalidValue(
            f"another FreezeOut already drives this {name}; call its release() first"
        )
    if is_innermost(optimizer) and not _is_set_up(optimizer):
        raise InvalidType(
            f"{name} cannot be used with FreezeOut: torch.optim.Optimizer.__init__ was never "
            "called on it, and it holds no other optimizer in an attribute; give FreezeOut the "
            "optimizer that makes the updates"
        )


def _check_copies(outer: Optimizer, held: Sequence[Optimizer]) -> None:
    """InvalidType if an optimizer in another trains other tensors than that one's groups hold."""
    listed = {p for group in outer.param_groups for p in group["params"]}
    for inner in held[1:]:
        its = {p for group in inner.param_groups for p in group["params"]}
        if its and listed and its.isdisjoint(listed) and not _all_hold(held, listed):
            raise InvalidType(
                f"{type(outer).__name__} cannot be used with FreezeOut: the "
                f"{type(inner).__name__} in it trains other tensors than the parameters that "
                f"{type(outer).__name__} lists (copies in another precision?), so it cannot be "
                "told which of them belong to which layer; use the inner optimizer on the model's "
                "own parameters, with torch.autocast"
            )


def _all_hold(held: Sequence[Optimizer], listed: set[Any]) -> bool:
    """Whether the optimizers within share the outer one's parameters out among them."""
    inside = {p for each in held[1:] for group in each.param_groups for p in group["params"]}
    return listed <= inside


def _is_optimizer(value: Any) -> bool:
    """One of torch's, or what holds one and can be used like one."""
    if isinstance(value, Optimizer):
        return True
    like = not isinstance(value, type) and hasattr(value, "step") and hasattr(value, "param_groups")
    return like and len(optimizers_in(value)) > 1


def _is_set_up(optimizer: Optimizer) -> bool:
    return "_optimizer_load_state_dict_post_hooks" in vars(optimizer)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer in a framework's wrapper (Accelerate's, Lightning's), which passes everything
    on."""
    inner = getattr(optimizer, "optimizer", None)
    modules = {cls.__module__.partition(".")[0] for cls in type(optimizer).__mro__}
    stands_in = not modules.isdisjoint(_STAND_INS) and isinstance(inner, Optimizer)
    return _unwrapped(inner) if stands_in else optimizer


def optimizers_in(optimizer: Any) -> list[Optimizer]:
    """The optimizer, and those that it holds in attributes of its own, at any depth."""
    found = [optimizer]
    for each in found:
        for value in getattr(each, "__dict__", {}).values():
            several = list(value.values()) if isinstance(value, dict) else value
            held = several if isinstance(several, list | tuple) else [value]
            found += [
                one
                for one in held
                if isinstance(one, Optimizer) and all(one is not other for other in found)
            ]
    return found


def is_innermost(optimizer: Optimizer) -> bool:
    """Whether it holds no other optimizer."""
    return len(optimizers_in(optimizer)) == 1


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether its class is one of `torch.optim`."""
    return type(optimizer).__module__.startswith("torch.optim.")


def rate_of(group: Group) -> float:
    """The group's learning rate; nan if it has none."""
    rate = group.get("lr")
    return float("nan") if rate is None else float(rate)


def _averages(optimizer: Optimizer) -> bool:
    return all(callable(getattr(type(optimizer), name, None)) for name in ("eval", "train"))


class SplitOptimizer:
    """Splits one optimizer's groups by layer in every step.

    Args:
        optimizer: the user's.
        layer_of: number of each model parameter's layer. Parameters that the optimizer holds
            beside them (a loss's, say) are trained as the last layer's are.
        factors: gives each layer's learning-rate multiplier, now.
        num_frozen: gives how many layers, from the first, are frozen now.
        is_over: gives whether the run has ended: then a step changes nothing.
        names: of each model parameter and of its layer, for errors.
        differ: whether the plan ever gives layers different factors. If not, each of the user's
            groups stays whole: a GPU is sent as few kernels as without FreezeOut.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layer_of: Mapping[nn.Parameter, int],
        factors: Callable[[], Sequence[float]],
        num_frozen: Callable[[], int],
        is_over: Callable[[], bool],
        names: Mapping[nn.Parameter, tuple[str, str]],
        differ: bool,
    ) -> None:
        self.optimizer = optimizer
        self._all = optimizers_in(optimizer)
        # Those that make the updates; the others do something around that.
        self._inner = [each for each in self._all if is_innermost(each)]
        self._layer_of, self._factors, self._num_frozen = layer_of, factors, num_frozen
        self._is_over, self._names, self._differ = is_over, names, differ
        self._groups_known = [len(each.param_groups) for each in self._all]
        self._last = max(layer_of.values())
        self._is_torchs = all(map(is_torchs, self._all))
        # Lists of groups and the user's groups in them, while split ones stand there; else None.
        self._visible: list[tuple[list[Group], list[Group]]] | None = None
        self._split: list[list[Group]] = []  # for each list of groups, what to put there
        self._parts: list[Part] = []
        self._families: dict[int, Family] = {}
        self._saved: Saved | None = None  # numbers that have been loaded and not used yet
        self._key: object = None  # what the split groups were made from
        self._calls = 0  # of `step` that are running, through our wrapper
        self._nested = 0  # steps within the one for which groups were split
        self._handles = [
            handle
            for each in self._inner
            for handle in (
                each.register_step_pre_hook(self._before),
                each.register_step_post_hook(self._after),
                each.register_load_state_dict_post_hook(self._loaded),
            )
        ]
        # What numbers that an optimizer keeps in its groups begin with.
        self._begin = {k: v for each in self._all for k, v in getattr(each, "defaults", {}).items()}
        if not any(each.state for each in self._inner):
            groups = [group for each in self._all for group in each.param_groups]
            self._begin = {k: v for group in groups for k, v in group.items()} | self._begin
        self._begin = {k: unshared(v) for k, v in self._begin.items() if k != "params"}
        self._is_detached = False
        self.updates = 0  # calls of the optimizer's step
        self._idle = False  # all of its layers are frozen
        self._unscales: list[bool | None] = []  # what each said of itself before
        self._own_steps = [vars(each).get("step") for each in self._all]
        for each in self._all:
            step = self._restoring(each.step, around=each not in self._inner)
            each.step = MethodType(step, each)  # type: ignore[method-assign]
            _ATTACHED.add(each)

    def base_rates(self) -> Iterator[tuple[int, float]]:
        """(layer, learning rate of its group before the layer's factor), for each pair of
        layer and group; nan where a group has none."""
        for group in self._inner_groups():
            for layer in {self._layer(parameter) for parameter in group["params"]}:
                yield layer, rate_of(group)

    def _inner_groups(self) -> Iterator[Group]:
        return (group for each in self._inner for group in each.param_groups)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of the state that is held, momenta and the like, and of the parameters that it is
        held for."""
        states = [state for each in self._inner for state in each.state.items()]
        held = [(parameter, list(map(_bytes, state.values()))) for parameter, state in states]
        return sum(sum(sizes) for _, sizes in held), sum(_bytes(p) for p, sizes in held if sizes)

    def drop_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget momenta and the like of parameters that are no longer trained."""
        for parameter in parameters:
            for each in self._inner:
                each.state.pop(parameter, None)

    def rest(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before parameters are frozen: give them the values that an optimizer which averages
        weights evaluates with (schedule-free ones have `eval()` and `train()` for it)."""
        averaging = [each for each in self._all if _averages(each)]
        if not averaging:
            return
        outer, resting = averaging[0], set(parameters)
        before, users = dict(vars(outer)), list(outer.param_groups)
        try:
            outer.param_groups[:] = [
                {**group, "params": [p for p in group["params"] if p in resting]} for group in users
            ]
            outer.eval()  # type: ignore[attr-defined]
        finally:
            outer.param_groups[:] = users
            vars(outer).update(before)  # a mode that it keeps beside its groups

    def numbers(self) -> Saved:
        """What the optimizer keeps in the groups of layers and is not the user's groups' own, for
        `load_numbers`; empty for most optimizers."""
        if self._saved is not None:
            return self._saved
        families = [self._families.get(id(group)) for group in self._unique_groups()]
        rows = [family.saved() if family else [] for family in families]
        return rows if any(rows) else []

    def load_numbers(self, saved: Saved) -> None:
        """Go on with the numbers that `numbers` gave."""
        self._families.clear()
        self._saved, self._key = saved or None, None

    def settle(self) -> None:
        """After layers have frozen or come back: tell gradient scalers, which insist on finding a
        gradient in each optimizer, whether there will be any."""
        num_frozen = self._num_frozen()
        self._set_idle(
            all(
                self._layer(p) < num_frozen
                for group in self._inner_groups()
                for p in group["params"]
            )
        )

    def _set_idle(self, idle: bool) -> None:
        if idle == self._idle:
            return
        self._idle = idle
        name = "_step_supports_amp_scaling"
        if idle:
            # Of an optimizer that unscales by itself they ask for none.
            self._unscales = [vars(each).get(name) for each in self._all]
            for each in self._all:
                vars(each)[name] = True
            return
        for each, before in zip(self._all, self._unscales, strict=True):
            if before is None:
                vars(each).pop(name, None)
            else:
                vars(each)[name] = before

    def detach(self) -> None:
        """Give the optimizer back as it was."""
        self._restore()
        self._set_idle(False)
        for handle in self._handles:
            handle.remove()
        for each, own_step in zip(self._all, self._own_steps, strict=True):
            # A scheduler built since may have wrapped our step; then it stays, and does nothing.
            step = vars(each).get("step")
            if isinstance(step, MethodType) and getattr(step.__func__, "splits", None) is self:
                del vars(each)["step"]
                if own_step is not None:
                    vars(each)["step"] = own_step
            _ATTACHED.discard(each)
        for each in self._inner:
            make_state(each, (p for group in each.param_groups for p in group["params"]))
        self._is_detached = True

    def _layer(self, parameter: nn.Parameter) -> int:
        return self._layer_of.get(parameter, self._last)

    def _restoring(self, step: Callable[..., Any], around: bool) -> Callable[..., Any]:
        """`step`, which on an exception, when post-hooks do not run, puts the groups back.
        `around`: it also splits them, being of an optimizer around others, which may have no hooks
        that run."""

        # Keeps the marks that learning-rate schedulers leave on the function.
        @wraps(step)
        def restoring(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._is_detached:
                return step(*args, **kwargs)
            self._calls += 1
            try:
                if not around:
                    return step(*args, **kwargs)
                # Hooks see the arguments of the unbound method.
                (_, *rest), kwargs = self._before(optimizer, (optimizer, *args), kwargs)
                result = step(*rest, **kwargs)
                self._after(optimizer, args, kwargs)
                return result
            except BaseException:
                self._restore()
                raise
            finally:
                self._calls -= 1

        restoring.splits = self  # type: ignore[attr-defined]
        return restoring

    def _restore(self) -> None:
        for listed, groups in self._visible or []:
            listed[:] = groups
        self._visible = None
        self._nested = 0

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _refuse_capture(optimizer)
        if self._visible is not None:
            # The step calls its parent class's step, which has hooks too, or an inner optimizer's.
            if self._calls:
                self._nested += 1
                return args, kwargs
            self._restore()  # a step that failed where our wrapper had been replaced
        self.updates += 1
        factors = self._factors()
        lists = self._lists()
        self._refresh(lists, factors)
        if self._idle:
            self._ignore_scaler(optimizer)
        for family in self._families.values():
            family.look()
        for part in self._parts:
            part.fill(factors[part.layer])
        self._visible = [(listed, list(listed)) for listed in lists]
        for listed, split in zip(lists, self._split, strict=True):
            listed[:] = split
        return tuple(map(self._outside, args)), {k: self._outside(v) for k, v in kwargs.items()}

    def _lists(self) -> list[list[Group]]:
        """The lists of groups of all optimizers here, which may share them."""
        return list({id(each.param_groups): each.param_groups for each in self._all}.values())

    def _unique_groups(self) -> list[Group]:
        """Their groups, those first that the updates are made by: others may be the same until a
        state is loaded, and then not any more."""
        ordered = [*self._inner_groups(), *(g for groups in self._lists() for g in groups)]
        return list({id(group): group for group in ordered}.values())

    def _ignore_scaler(self, optimizer: Optimizer) -> None:
        """Hide the scale from an optimizer that only passes for one that unscales by itself."""
        scaled = optimizer.__dict__.get("found_inf") is not None  # a scaler calls
        if any(part.size for part in self._parts):  # a group was added since
            self._set_idle(False)
            if scaled:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
                raise FreezeOutError(
                    f"a group was added to this {type(optimizer).__name__} when all its layers "
                    "were frozen, and its gradients may still be scaled: skip this step"
                )
        elif scaled:
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]

    def _outside(self, argument: Any) -> Any:
        """A closure sees the user's groups, as it would without FreezeOut."""
        if not callable(argument) or isinstance(argument, Optimizer):
            return argument

        @wraps(argument)
        def closure(*args: Any, **kwargs: Any) -> Any:
            visible, nested = self._visible, self._nested
            inside = [(listed, list(listed)) for listed, _ in visible or []]
            self._restore()
            result = argument(*args, **kwargs)
            for listed, groups in inside:
                listed[:] = groups
            self._visible, self._nested = visible, nested
            return result

        return closure

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._nested:
            self._nested -= 1
            return
        if self._visible is None:  # a step within failed, and the one around it went on
            return
        factors = self._factors()
        for part in self._parts:
            part.carry_back(factors[part.layer])
        self._restore()

    def _refresh(self, lists: list[list[Group]], factors: Sequence[float]) -> None:
        """Make the split groups again if the user's groups or the frozen layers have changed."""
        num_frozen, is_over = self._num_frozen(), self._is_over()
        is_whole = not self._differ and len(set(factors[num_frozen:])) == 1
        those = [[(id(group), *map(id, group["params"])) for group in groups] for groups in lists]
        key = num_frozen, is_over, is_whole, those
        if key == self._key:
            return
        self._check_added(num_frozen)
        # A checkpoint from before a freeze may have brought back what the freeze dropped.
        self.drop_state(p for p, layer in self._layer_of.items() if layer < num_frozen)
        self._find_families()
        made = {
            id(family.origin): [] if is_over else self._parts_of(family, num_frozen, is_whole)
            for family in self._families.values()
        }
        self._split = []
        for groups in lists:
            if groups and not any(made[id(group)] for group in groups):
                # Some optimizers look at their first group, whatever it holds.
                made[id(groups[0])] = [self._empty_part(self._families[id(groups[0])])]
            self._split.append([part.group for group in groups for part in made[id(group)]])
        self._parts = [part for parts in made.values() for part in parts]
        self._key = key

    def _find_families(self) -> None:
        groups, known = self._unique_groups(), self._families
        self._families = {
            id(group): known[id(group)]
            if id(group) in known and known[id(group)].origin is group
            else Family(group, self._begin)
            for group in groups
        }
        if self._saved is not None:
            if len(self._saved) > len(groups):
                raise InvalidValue(
                    f"the FreezeOut state that was loaded is of {len(self._saved)} optimizer "
                    f"groups, this {type(self.optimizer).__name__} has {len(groups)}"
                )
            for family, rows in zip(self._families.values(), self._saved, strict=False):
                family.load(rows)
            self._saved = None

    def _parts_of(self, family: Family, num_frozen: int, is_whole: bool) -> list[Part]:
        origin = family.origin
        trained = {p: i for p in origin["params"] if (i := self._layer(p)) >= num_frozen}
        for each in self._inner:
            make_state(each, trained)
        parts = family.parts(trained, is_whole)
        # Others than torch's own may keep numbers for all groups in one of them.
        return parts or ([] if self._is_torchs else [self._empty_part(family)])

    def _empty_part(self, family: Family) -> Part:
        return Part(family, self._last, [], {})

    def _check_added(self, num_frozen: int) -> None:
        """InvalidValue if a group has been added to train what is frozen."""
        added = [
            parameter
            for each, known in zip(self._all, self._groups_known, strict=True)
            for group in each.param_groups[known:]
            for parameter in group["params"]
        ]
        for parameter in added:
            if self._layer(parameter) < num_frozen:
                name, layer = self._names[parameter]
                raise InvalidValue(
                    f"a group was added to this {type(self.optimizer).__name__} for parameter "
                    f"{name!r}, but its layer {layer!r} is frozen and would not be trained; "
                    "leave the group out, or build FreezeOut anew with a plan that trains it"
                )
        self._groups_known = [len(each.param_groups) for each in self._all]

    def _loaded(self, optimizer: Optimizer) -> None:
        self._key = None


def _refuse_capture(optimizer: Optimizer) -> None:
    """FreezeOutError if the step is being recorded into a CUDA graph."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if begun and torch.cuda.is_current_stream_capturing():
        raise FreezeOutError(
            f"{type(optimizer).__name__}.step() runs in a CUDA graph capture: each replay would "
            "train the layers that train now, frozen ones too, at the learning rates of now. "
            "Capture the forward and backward passes alone, anew whenever FreezeOut.step() returns "
            "layers, and call optimizer.step() outside; or use "
            "freezeout.parallel.compile_layers(freezer)"
        )


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
