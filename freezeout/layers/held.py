"""What frozen modules would still do of their own accord: write tensors in a forward pass, whatever
the mode, and take torch's paths for inference. Neither happens."""

import warnings
from collections.abc import Collection, Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..versions import called_by_compiler, numbered_alike
from .marks import Mark, copied_plainly, is_norm, is_plain_norm, mark_of, unhooked
from .scratch import equal, has_no_values, places_of, state_of

_OBSERVES = "observer_enabled"  # the buffer of torch.ao's that switches an observer


class Writes:
    """Which modules' own tensors are written from now on: told by versions, places in memory and,
    of buffers, by which tensors they are, and their values: not all writing makes a new version."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._seen = [
            (module, own, name, tensor, state_of(tensor), self._values(module, own, tensor))
            for module, own, name, tensor in places_of(modules)
            if not is_plain_norm(module)
            and not (is_norm(module) and module.training)  # in which it counts batches
            and not hasattr(tensor, "_local_tensor")  # FSDP2 puts whole ones in its place
        ]

    def _values(self, module: nn.Module, own: dict[str, Any], tensor: Tensor) -> Tensor | None:
        if own is module._parameters or has_no_values(tensor):
            return None
        return tensor.detach().clone()

    def names(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules, and which of their tensors."""
        for module, own, name, tensor, state, values in self._seen:
            is_same = own.get(name) is tensor and state_of(tensor) == state
            if not is_same or (values is not None and not equal(tensor, values)):
                yield module, name


def writes_always(module: nn.Module) -> bool:
    """Whether it is known to write: embeddings with a largest norm, quantisation's observers."""
    return getattr(module, "max_norm", None) is not None or _OBSERVES in module._buffers


def _around(module: nn.Module, enter: Any, leave: Any) -> list[RemovableHandle]:
    """Hooks that are called before all others of the module, and after it, also where it fails."""
    return [
        module.register_forward_pre_hook(enter, prepend=True),
        numbered_alike(module.register_forward_hook(leave, always_call=True), always_called=True),
    ]


class Held:
    """Gives a frozen module, and what it contains, copies of the tensors that its forward pass
    writes, for as long as it runs: what it writes is thrown away with them, and the tensors
    themselves never move.

    Which these are is looked for in the first forward pass, in which all buffers, but for those of
    torch's norms, are copies. Where there are none, the hooks are gone after that, if they were
    ever there.

    Args:
        modules: those of the layer; what else the module contains is left alone.
        known: modules that are known to write, and which of their tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: Collection[nn.Module],
        known: Collection[tuple[nn.Module, str]],
    ) -> None:
        places = list(places_of(inner for inner in module.modules() if inner in modules))
        self._known = {
            (owner, name)
            for owner, _, name, _ in places
            if (owner, name) in known or writes_always(owner)
        }
        self._places = [
            (owner, own, name)
            for owner, own, name, _ in places
            if (owner, name) in self._known or (own is owner._buffers and not is_plain_norm(owner))
        ]
        self._is_looking = True
        self._swapped: list[tuple[nn.Module, dict[str, Any], str, Tensor, Tensor]] = []
        self._depth = 0
        self._handles = _around(module, self._enter, self._leave)
        if not self._places:
            self.remove()

    def remove(self) -> None:
        """Take the hooks away, and the copies."""
        self._put_back()
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            if self._known:
                _seen_by_compiler()
            return
        self._depth += 1
        if self._depth > 1:  # a module that calls itself
            return
        for owner, own, name in self._places:
            tensor = own.get(name)
            if tensor is None:
                continue
            copy = tensor.detach().clone()
            if name == _OBSERVES:
                copy.zero_()  # so that the scale stays what it is
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
            self._swapped.append((owner, own, name, tensor, copy))
            own[name] = copy

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        if self._is_looking and output is not None:  # None: after an exception
            self._is_looking = False
            self._places = [
                (owner, own, name)
                for owner, own, name, tensor, copy in self._swapped
                if (owner, name) in self._known
                or own.get(name) is not copy
                or not (has_no_values(copy) or equal(copy, tensor))
            ]
        self._put_back()
        if not self._places:
            self.remove()

    def _put_back(self) -> None:
        for _, own, name, tensor, _ in self._swapped:
            own[name] = tensor
        self._swapped = []


@called_by_compiler
def _seen_by_compiler() -> None:
    warnings.warn(
        "torch.compile compiles a frozen module that writes its own tensors in each forward pass "
        "(an embedding with max_norm, an observer): compiled ones go on writing",
        stacklevel=2,
    )


class TrainingPath:
    """Keeps a module off torch's paths for inference where it would not take them if its layers
    trained: in training, and where gradients are recorded. `nn.TransformerEncoder` looks at its
    first layer's mode, and would, once that is frozen, hand nested tensors to layers that train
    and do not take them; and a frozen `nn.MultiheadAttention` would compute by another kernel.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[bool] = []
        self._handles = _around(module, self._enter, self._leave)
        copied_plainly(module)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        unhooked(self._module)

    def _enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        mark = mark_of(module)
        self._before.append(torch.backends.mha.get_fastpath_enabled())
        if torch.is_grad_enabled() or (module.training if mark is None else mark.meant):
            torch.backends.mha.set_fastpath_enabled(False)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._before and not torch.compiler.is_compiling():
            torch.backends.mha.set_fastpath_enabled(self._before.pop())


class UsersHooks:
    """Forward hooks on a frozen module that ask for its mode are told the one that it is meant to
    have: what they add to its result (NEFTune's noise on embeddings) is no part of the layer."""

    def __init__(self, module: nn.Module, mark: Mark) -> None:
        self._mark = mark
        self._handles = [
            module.register_forward_pre_hook(self._frozen, prepend=True),  # after an exception
            module.register_forward_hook(self._meant, prepend=True),
            module.register_forward_hook(self._frozen),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _meant(self, module: nn.Module, *_: object) -> None:
        module.training = self._mark.meant

    def _frozen(self, module: nn.Module, *_: object) -> None:
        module.training = False


def asks_for_mode(hook: Any) -> bool:
    """Whether the hook's code names `training`."""
    hook = getattr(hook, "func", hook)  # a functools.partial's
    hook = getattr(hook, "__func__", hook)
    if not hasattr(hook, "__code__"):  # an object that can be called
        hook = vars(type(hook)).get("__call__")
    return "training" in _names(getattr(hook, "__code__", None))


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _names(inner)
