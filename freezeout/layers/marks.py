"""What FreezeOut puts on a model's modules and parameters, and how it comes off again.

While a layer is frozen, its modules carry a `Mark` and hooks, and its parameters remember that they
were trained. Copies and pickles of the model come without all that: they are what `release()`
would give, and a pickle loads where this package is not installed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import FreezeOutError
from .scratch import has_no_values, state_of

if TYPE_CHECKING:
    from .layer import Layer

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Beside each dictionary of hooks: what is remembered of some of them, by the same numbers.
_BESIDE = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
_COPYING = "__reduce_ex__"  # what both copy.deepcopy and pickle ask an object itself for
_SCRIPTING = "__prepare_scriptable__"  # what torch.jit.script calls, if a module has it


class Mark:
    """On a frozen module: it stays in evaluation mode, whatever `train()` is called for, and
    remembers the mode that it was meant to have.

    That is the mode of the model that it is part of (`within`), however this comes to have it:
    `train()`, or a framework that saves modes and sets them again. But a module that was itself put
    in another mode than the model stays in that.
    """

    def __init__(self, module: nn.Module, layer: "Layer", within: nn.Module | None) -> None:
        self.module, self.layer, self._within = module, layer, within
        self._note(module.training)
        # The user's own attributes of the instance that the mark's stand in the place of.
        self._own: dict[str, Any] = {}

    @property
    def meant(self) -> bool:
        """The mode that the module would have."""
        if self._within is None or self._is_apart:
            return self._asked
        return self._within.training

    def _note(self, mode: bool) -> None:
        self._asked = mode
        # train() sets a parent's mode before its parts'.
        self._is_apart = self._within is not None and self._within.training != mode

    def put_on(self) -> None:
        """Put the module into evaluation mode for good."""
        self._replace("train", self.train)
        if hasattr(self.module, "reset_running_stats"):
            self._replace("reset_running_stats", self.reset_running_stats)
        copied_plainly(self.module)
        self.module.training = False
        self._counted = self._count()

    def take_off(self) -> None:
        """Give the module back, in the mode that it was last asked to have."""
        without = self.removed(vars(self.module))
        for name in ("train", "reset_running_stats"):
            self.module.__dict__.pop(name, None)
            if name in without:
                self.module.__dict__[name] = without[name]
        self.module.training = self.meant
        unhooked(self.module)

    def removed(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's attributes as they would be without the mark."""
        without = {name: value for name, value in state.items() if not _is_of_mark(value)}
        return {**without, **self._own, "training": self.meant}

    def train(self, mode: bool = True) -> nn.Module:
        """Stands in for the module's: children that are not frozen still follow."""
        self._note(bool(mode))
        self.module.training = False
        if mode:
            counted = self._count()
            if self._counted[1] and not counted[1]:
                self.reset_running_stats()
            self._counted = counted
        for child in self.module.children():
            child.train(mode)
        return self.module

    def _count(self) -> tuple[Any, bool]:
        """Of a norm, what changes with the batches that it has counted, and whether there are any;
        looked at where that has changed, as an accelerator is waited for."""
        counter = vars(self.module)["_buffers"].get("num_batches_tracked")
        if counter is None or has_no_values(counter):
            return None, True
        state = id(counter), state_of(counter)
        known = getattr(self, "_counted", None)
        return known if known and known[0] == state else (state, bool(counter > 0))

    def reset_running_stats(self) -> None:
        """Stands in for a norm's, which `update_bn` calls."""
        raise FreezeOutError(
            f"the statistics of a frozen {type(self.module).__name__} were reset, or set back to "
            "before the first batch: update_bn(), or what else computes them anew, on a model with "
            "frozen layers would leave them so; call it on an averaged copy, or call "
            "FreezeOut.release() first"
        )

    def _replace(self, name: str, value: Any) -> None:
        own = vars(self.module)
        if name in own:
            self._own[name] = own[name]
        own[name] = value  # past __setattr__


def is_norm(module: nn.Module) -> bool:
    """Whether it keeps statistics in training, and uses them in evaluation mode, as torch's do."""
    return hasattr(module, "running_mean") and hasattr(module, "num_batches_tracked")


def is_plain_norm(module: nn.Module) -> bool:
    """Whether it is a norm that computes as torch's do: it writes nothing in evaluation mode."""
    return is_norm(module) and type(module).forward.__module__.startswith("torch.nn.modules.")


def mark_of(module: nn.Module) -> Mark | None:
    """The mark that a frozen module carries."""
    mark = getattr(vars(module).get("train"), "__self__", None)
    return mark if isinstance(mark, Mark) else None


def copied_plainly(module: nn.Module) -> None:
    """From now on, copies and pickles of the module come without marks and hooks; and
    `torch.jit.script`, which would compile the hooks, says what to do."""
    vars(module)[_COPYING] = partial(_reduced, module)
    vars(module)[_SCRIPTING] = _refuse_scripting
    if hasattr(type(module), "__deepcopy__"):  # it is asked first, as of parametrized modules
        vars(module)["__deepcopy__"] = partial(_deep_copied, module)


def copied_as_ever(module: nn.Module) -> None:
    """Undo `copied_plainly`."""
    vars(module).pop(_SCRIPTING, None)
    if vars(module).pop(_COPYING, None) is not None and _copies_deeply(module):
        vars(module).pop("__deepcopy__")


def unhooked(module: nn.Module) -> None:
    """Undo `copied_plainly` unless there is still something that copies come without."""
    if mark_of(module) is None and not any(map(_is_ours, _hooks(module))):
        copied_as_ever(module)


def take_off(model: nn.Module) -> bool:
    """Take everything of ours off the model's modules and parameters; whether anything was
    frozen. Layers that they were frozen with are thawed as a whole."""
    modules = list(model.modules())
    layers = {mark.layer for module in modules if (mark := mark_of(module))}
    for layer in layers:
        layer.unfreeze()
    found = bool(layers)
    for module in modules:
        for name, value in _without_hooks(vars(module)).items():
            getattr(module, name).clear()
            getattr(module, name).update(value)
        copied_as_ever(module)
        for parameter in module._parameters.values():
            if parameter is not None and _COPYING in vars(parameter):
                found = True
                trained_again(parameter)
    return found


# --- parameters -----------------------------------------------------------------------------


def is_stopped(parameter: nn.Parameter) -> bool:
    """Whether a freeze has ended its training."""
    return _COPYING in vars(parameter)


def stopped(parameter: nn.Parameter) -> None:
    """End the parameter's training; copies and pickles of it are trained."""
    if parameter.requires_grad:
        parameter.requires_grad_(False)
        vars(parameter)[_COPYING] = partial(_of_trained, parameter, _COPYING)
        vars(parameter)["__deepcopy__"] = partial(_of_trained, parameter, "__deepcopy__")
    parameter.grad = None


def trained_again(parameter: nn.Parameter) -> None:
    """Undo `stopped`: it requires a gradient if it did before."""
    if vars(parameter).pop(_COPYING, None) is not None:
        vars(parameter).pop("__deepcopy__", None)
        parameter.requires_grad_(True)


def _of_trained(parameter: nn.Parameter, name: str, argument: Any) -> Any:
    """Stands in for the parameter's method of that name, called as if it were trained."""
    ours = {each: vars(parameter).pop(each) for each in (_COPYING, "__deepcopy__")}
    parameter.requires_grad_(True)
    try:
        return getattr(parameter, name)(argument)
    finally:
        parameter.requires_grad_(False)
        vars(parameter).update(ours)


# --- copies of modules ----------------------------------------------------------------------


def _reduced(module: nn.Module, protocol: Any) -> Any:
    """Stands in for the module's `__reduce_ex__`."""
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    return (*reduced[:2], _plain(module, reduced[2]), *reduced[3:])


def _deep_copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Stands in for the module's `__deepcopy__`, if its class has one: our things are away while
    it runs."""
    own = vars(module)
    before = dict(own)
    plain = _plain(module, own)
    own.clear()
    own.update(plain)
    try:
        kind: Any = type(module)
        return kind.__deepcopy__(module, memo)
    finally:
        own.clear()
        own.update(before)


def _plain(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The module's attributes without what we have put there."""
    ours = {_COPYING, _SCRIPTING, *(["__deepcopy__"] if _copies_deeply(module) else [])}
    state = {name: value for name, value in state.items() if name not in ours}
    mark = mark_of(module)
    if mark is not None:
        state = mark.removed(state)
    return {**state, **_without_hooks(state)}


def _refuse_scripting() -> Any:
    """Stands in for the module's `__prepare_scriptable__`."""
    raise FreezeOutError(
        "torch.jit.script() on a model that FreezeOut trains would compile its hooks: script a "
        "copy, torch.jit.script(copy.deepcopy(model)), or call FreezeOut.release() first"
    )


def _copies_deeply(module: nn.Module) -> bool:
    return getattr(vars(module).get("__deepcopy__"), "func", None) is _deep_copied


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """Those of a module's dictionaries of hooks that hold ours, without them."""
    changed: dict[str, Any] = {}
    for name in _HOOKS:
        numbers = {number for number, hook in state.get(name, {}).items() if _is_ours(hook)}
        if numbers:
            for each in (name, *_BESIDE[name]):
                kept = {n: value for n, value in state[each].items() if n not in numbers}
                changed[each] = type(state[each])(kept)
    return changed


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in _HOOKS:
        yield from vars(module)[name].values()


def foreign_hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The module's forward hooks that are not of this package."""
    yield from (h for h in vars(module)["_forward_hooks"].values() if not _is_ours(h))


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _is_of_mark(value: Any) -> bool:
    return isinstance(getattr(value, "__self__", None), Mark)
