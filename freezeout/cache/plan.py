"""A plan: how to run a model with its first layers skipped and their output given.

`Plan.serving` runs the model with placeholders in place of the frozen layers' results, and the
given tensors in place of the last one's; `Plan.capture` takes that result out of a pass that
computes it. Plans are made, and checked against the real forward pass, in `planning`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..layers.scratch import random_state_kept
from .inputs import Batch
from .placeholders import Placeholders, Unservable, holds_placeholder


class Size(NamedTuple):
    """One size of a tensor: `fixed + per_sample * samples`."""

    fixed: int
    per_sample: int

    def at(self, samples: int) -> int:
        return self.fixed + self.per_sample * samples


ROWS = Size(0, 1)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a frozen module returned. `order`: its dimensions from the outermost in
    memory to the innermost."""

    sizes: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def shape(self, samples: int) -> tuple[int, ...]:
        return tuple(size.at(samples) for size in self.sizes)

    def strides(self, samples: int) -> tuple[int, ...]:
        shape, strides, step = self.shape(samples), [1] * len(self.sizes), 1
        for dimension in reversed(self.order):
            strides[dimension] = step
            step *= max(shape[dimension], 1)
        return tuple(strides)


@dataclass(frozen=True)
class Call:
    """One call of a frozen module from outside the frozen ones, and the structure it returned;
    leaves that are no tensors are kept as they are. `runs`: it is left to compute."""

    module: nn.Module
    tree: TreeSpec
    leaves: tuple[Any, ...]
    runs: bool = False

    @property
    def tensors(self) -> list[TensorSpec]:
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    def rebuilt(self, tensors: Iterable[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.tree)


class Plan:
    """How to skip the first `depth` layers. See the module.

    Attributes:
        calls: what the rest of the model calls, in order; the last one's result is the frontier.
        modules: those that are called, each once.
        only_size: the number of samples it holds for; None: any.
        labels_checked: whether it is known that frozen layers do not use the labels.
        draws: whether the model draws random numbers in front of the frontier (a drop rate of
            zero, say), so that a pass that stops there has to put the generators back.
    """

    def __init__(
        self,
        model: nn.Module,
        depth: int,
        calls: Sequence[Call],
        only_size: int | None,
        draws: bool,
        placeholders: Placeholders,
        stand_ins: Sequence[tuple[nn.Module, str, Tensor]],
    ) -> None:
        self.depth, self.calls, self.only_size, self.draws = depth, tuple(calls), only_size, draws
        self.frontier = self.calls[-1]
        self._model, self.placeholders, self._stand_ins = model, placeholders, stand_ins
        self.modules = list(dict.fromkeys(call.module for call in self.calls))
        # The last call is this one of its module's.
        self._nth = sum(call.module is self.frontier.module for call in self.calls)
        self.labels_checked = False
        self._made: dict[int, list[list[Tensor]]] = {}  # by number of samples
        self._next = 0
        self._given: Sequence[Tensor] = ()
        self._size = 0
        self._own: dict[nn.Module, Callable[..., Any]] = {}
        self._stubs = {module: self._stub(module) for module in self.modules}

    def run(self, batch: Batch, tensors: Sequence[Tensor]) -> Any:
        """The model's output, its frozen layers' last output given."""
        with self.serving(batch.size, tensors):
            output = self._model(*batch.args, **batch.kwargs)
        self.check(output)
        return output

    @contextmanager
    def serving(self, samples: int, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, frozen modules return placeholders, the last one `tensors`."""
        self._next, self._given, self._size = 0, tensors, samples
        self._own = {module: forward_of(module) for module in self.modules}
        kept = [(module, overridden(module, self._stubs[module])) for module in self.modules]
        parameters = [(m, name, m._parameters[name]) for m, name, _ in self._stand_ins]
        try:
            for module, name, stand_in in self._stand_ins:
                module._parameters[name] = stand_in  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in parameters:
                module._parameters[name] = parameter
            for module, before in kept:
                restore(module, before)
            self._given, self._own = (), {}

    def check(self, output: Any) -> None:
        """Unservable if the output of the pass just served holds a placeholder, or came about
        in another way."""
        if self._next != len(self.calls):
            raise Unservable("the forward pass calls fewer frozen modules than it did")
        if holds_placeholder(output):
            raise Unservable(
                "the model returns something from inside the frozen layers "
                "(hidden states or attention maps, say)"
            )

    @contextmanager
    def capture(self, take: Callable[[list[Tensor]], list[Tensor]]) -> Iterator[None]:
        """Inside, what reaches the frontier is passed to `take`, and its result goes on. A pass
        that takes another way is left alone."""
        module, nth, count = self.frontier.module, self._nth, 0
        inner = forward_of(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            output = inner(*args, **kwargs)
            count += 1
            if count != nth:
                return output
            leaves, tree = tree_flatten(output)
            taken = iter(take([leaf for leaf in leaves if isinstance(leaf, Tensor)]))
            leaves = [next(taken) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return tree_unflatten(leaves, tree)

        before = overridden(module, forward)
        try:
            yield
        finally:
            restore(module, before)

    def prefix(
        self, batch: Batch, start: "Plan | None" = None, given: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """The frontier's tensors, nothing behind it computed; from the start, or from those of
        an earlier plan."""
        reached: list[Tensor] = []

        def stop(tensors: list[Tensor]) -> list[Tensor]:
            reached.extend(tensor.detach() for tensor in tensors)
            raise Reached

        batch = batch.copied()
        with ExitStack() as stack:
            if self.draws:
                stack.enter_context(random_state_kept(self._model))
            if start is not None:
                stack.enter_context(start.serving(batch.size, given))
            try:
                with self.capture(stop):
                    self._model(*batch.args, **batch.kwargs)
            except Reached:
                return reached
        raise Unservable("the forward pass does not reach the last frozen module")

    def _stub(self, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            number = self._next
            if number >= len(self.calls) and next(module.parameters(), None) is None:
                return self._own[module](*args, **kwargs)  # behind the frontier
            if number >= len(self.calls) or self.calls[number].module is not module:
                raise Unservable("the forward pass calls frozen modules in another order")
            self._next += 1
            if self.calls[number].runs:
                return self._own[module](*args, **kwargs)
            if number == len(self.calls) - 1:
                return self.frontier.rebuilt(self._given)
            return self.calls[number].rebuilt(self._placeholders_of(number))

        return forward

    def _placeholders_of(self, number: int) -> list[Tensor]:
        """Of one call's tensors; made once, and again where the model has changed one."""
        if self._size not in self._made:
            self._made = {self._size: [[] for _ in self.calls]}
        made = self._made[self._size][number]
        specs = self.calls[number].tensors
        if len(made) != len(specs) or any(t._version or t.requires_grad for t in made):
            made = [
                self.placeholders.make(
                    s.shape(self._size), s.strides(self._size), s.dtype, s.device
                )
                for s in specs
            ]
            self._made[self._size][number] = made
        return made


class CallsOf:
    """Calls of one of a module's methods go to another function, until `end()`. Copies of the
    module, and pickles, are without. A model that is compiled as a whole calls its own.

    Args:
        instead: is given the module's own method, and the arguments.
        name: of the method; by default all of a call, hooks included.
    """

    def __init__(
        self, module: nn.Module, instead: Callable[..., Any], name: str = "_call_impl"
    ) -> None:
        self._module, self._instead, self._name = module, instead, name
        self._before = vars(module).get(name)
        update_wrapper(self, getattr(module, name), updated=())
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._before
        while isinstance(own, CallsOf):  # of two, the inner one serves
            own = own._before
        own = own or _own_method(self._module, self._name)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        return self._instead(own, args, kwargs)

    def __reduce__(self) -> Any:
        return _own_method, (self._module, self._name)

    def end(self) -> None:
        if self._before is None:
            vars(self._module).pop(self._name, None)
        else:
            vars(self._module)[self._name] = self._before


def _own_method(module: nn.Module, name: str) -> Callable[..., Any]:
    return MethodType(getattr(type(module), name), module)


class Reached(Exception):
    """The frontier has been reached, and the rest is not wanted."""


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module comes to: its compiled graph, or its forward."""
    compiled: Callable[..., Any] | None = module._compiled_call_impl
    return module.forward if compiled is None else compiled


def overridden(module: nn.Module, forward: Callable[..., Any]) -> tuple[str, Any]:
    """Put another function in that place, in the instance; what to give `restore`."""
    name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    return name, before


def restore(module: nn.Module, before: tuple[str, Any]) -> None:
    name, value = before
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
