"""`Layer`: modules and parameters that freeze together, and what freezing does to them."""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..versions import called_by_compiler, is_exporting, numbered_alike
from .flow import leaves_of
from .held import Held, TrainingPath, UsersHooks, asks_for_mode
from .marks import Mark, foreign_hooks, mark_of, stopped, trained_again
from .trace import sharded_modules


class Removable(Protocol):
    """What a frozen layer has put on its modules."""

    def remove(self) -> None:
        """Take it away."""


class LayerCost(NamedTuple):
    """FLOPs of a layer's forward pass, and bytes that autograd keeps of it, for one item; None:
    these are not known."""

    flops: float
    saved_bytes: float | None


class Layer:
    """A group of modules and parameters that freeze together.

    Attributes:
        name: path of the layer's first module that has weights, as in `named_modules()`, without
            what wrappers add (`_orig_mod.`, `module.`).
        modules: every module that goes into evaluation mode with the layer, outermost first.
        parameters: every parameter that stops being trained with it. A parameter shared with
            a later layer is that layer's, so a module here may own parameters that are not.
        cost: of its forward pass on the example inputs, if one was recorded.
        freezes: how often it has been frozen: what was computed with it before counts no more.
        boundary: the modules that tensors may enter and leave the layer through: blocks, and
            what contains them (either may be called, or only walked through); all of `modules`
            if not given.
        writes: modules that a forward pass was seen to write, norms aside, and the name of which of
            their parameters or buffers.
        readers: modules outside, whose code asks for the mode of one inside.
    """

    def __init__(
        self,
        name: str,
        modules: Iterable[nn.Module],
        parameters: Iterable[nn.Parameter],
        boundary: Iterable[nn.Module] | None = None,
        cost: LayerCost | None = None,
        writes: Iterable[tuple[nn.Module, str]] = (),
        readers: Iterable[nn.Module] = (),
    ) -> None:
        self.name = name
        self.modules = tuple(modules)
        self.parameters = tuple(parameters)
        self.boundary = self.modules if boundary is None else tuple(boundary)
        self.cost = cost
        self.writes, self.readers = set(writes), tuple(readers)
        self._handles: list[Removable] = []  # while frozen
        self._leaving: dict[nn.Module, int] = {}  # the number of the hook at its end
        self._within: nn.Module | None = None
        # Of calls that a gradient passes through: trained parameters that get none of it.
        self._spared: list[tuple[nn.Module, list[nn.Parameter]]] = []
        self._guarded: set[nn.Module] = set()  # they get them back after an exception, too
        self.tell_passes: Callable[[], None] | None = None  # called when a gradient passes
        self.is_frozen = False
        self.freezes = 0

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters)
        return f"Layer({self.name!r}, {len(self.modules)} modules, {count:,} parameters)"

    def freeze(self, within: nn.Module | None = None) -> None:
        """Take the layer out of training; nothing happens if it is out already.

        `within`: the model, whose mode its modules follow when they thaw, but for those that were
        put in evaluation mode while it trained. Without it, the mode that each was last asked for.

        Its parameters require no gradient and lose the one they hold; its modules are in
        evaluation mode *for good*: `train()` on them or on a parent does not wake them. What goes
        out of them is detached, so that no autograd node is made, even where a weight shared with
        a later layer is still trained. But where what comes in depends on something outside the
        model that requires a gradient, or is that itself (a generator's image, an adversarial
        input, a soft prompt), the gradient passes, and still no parameter gets one here. Deep
        copies and pickles of the model are ordinary, nothing of them frozen.
        """
        if self.is_frozen:
            return
        self._within = within
        for parameter in self.parameters:
            stopped(parameter)
        for module in self.modules:
            mark = Mark(module, self, within)
            if any(map(asks_for_mode, foreign_hooks(module))):
                self._handles.append(UsersHooks(module, mark))
            mark.put_on()
        own = set(self.modules)
        # Hooks that make an embedding's result require a gradient hang on the embedding itself.
        embeddings = (module for module in self.modules if isinstance(module, nn.Embedding))
        for module in dict.fromkeys((*self.boundary, *embeddings)):
            leave = numbered_alike(module.register_forward_hook(_leave, with_kwargs=True))
            self._handles += [
                numbered_alike(module.register_forward_pre_hook(_enter, with_kwargs=True)),
                leave,
            ]
            self._leaving[module] = leave.id
        self._handles += (Held(module, own, self.writes) for module in self.boundary)
        attention = (m for m in self.modules if isinstance(m, nn.MultiheadAttention))
        self._handles += map(TrainingPath, (*self.readers, *attention))
        self.is_frozen = True
        self.freezes += 1

    def unfreeze(self) -> None:
        """Undo `freeze()`: parameters require gradients again where they did before it, and each
        module is in the mode that it was last asked to have: what `train()` and `eval()` were
        called for in the meantime has not been forgotten."""
        if not self.is_frozen:
            return
        for parameter in self.parameters:
            trained_again(parameter)
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            if (mark := mark_of(module)) is not None:
                mark.take_off()
        modes = {module: module.training for module in self.modules}
        for module in self.modules:
            if type(module).train is not nn.Module.train:  # it may keep some of its parts asleep
                type(module).train(module, module.training)
        for module, training in modes.items():
            if not training:
                module.training = False
        self._handles, self.is_frozen = [], False
        self._leaving.clear()
        self._guarded.clear()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a frozen module runs."""
        hooks = module._forward_hooks
        if next(reversed(hooks)) != self._leaving[module]:
            hooks[self._leaving[module]] = hooks.pop(self._leaving[module])  # others came since
        if not _need_gradients(args) and not _need_gradients(kwargs.values()):
            return None
        if self.passes(args, kwargs):
            if self.tell_passes is not None and (self._within is None or self._within.training):
                self.tell_passes()
            spared = [p for p in module.parameters() if p.requires_grad]
            self._spared.append((module, spared))
            for parameter in spared:
                parameter.requires_grad_(False)
            if spared and module not in self._guarded:
                self._guarded.add(module)
                # Only here: torch.compile makes a graph for each module that has such a hook.
                self._handles.append(module.register_forward_hook(_end, always_call=True))
            return None
        return tuple(map(detached, args)), {k: detached(v) for k, v in kwargs.items()}

    def leave(self, module: nn.Module, output: Any) -> Any:
        """After a frozen module, and its other hooks, have run."""
        if self._spared and self._spared[-1][0] is module:
            for parameter in self._spared.pop()[1]:
                parameter.requires_grad_(True)
            return None
        if not _need_gradients((output,)) or self._is_joined(output):
            return None
        return detached(output)

    def passes(self, args: Any, kwargs: Any) -> bool:
        """Whether something that comes in needs a gradient for what lies outside of the model."""
        return self._reaches_outside(tree_leaves((args, kwargs)))

    def _is_joined(self, output: Any) -> bool:
        """Whether a hook has joined to the output what needs a gradient outside of the model.

        A tensor without a history, that a hook has made require a gradient, is none: so activation
        checkpointing is told not to stop before a frozen embedding, and all savings would be lost.
        But while the model is in evaluation mode somebody wants to look at that gradient.
        """
        tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        if self._within is not None and sharded_modules(self._within):
            return False  # what the model's own parameters are cannot be told
        if self._within is None or self._within.training:
            tensors = [tensor for tensor in tensors if not tensor.is_leaf]
        return self._reaches_outside(tensors)

    def _reaches_outside(self, tensors: Iterable[Any]) -> bool:
        leaves = list(leaves_of(tensors))
        if not leaves:
            return False
        whole = self.modules if self._within is None else (self._within,)
        own = {*self.parameters, *(p for module in whole for p in module.parameters())}
        return any(leaf not in own for leaf in leaves)

    def hand_over(self, modules: Collection[nn.Module], other: "Layer") -> None:
        """Give those of the modules that are in this layer to another one, which is not frozen."""
        given = [module for module in self.modules if module in modules]
        for module in given:
            if (mark := mark_of(module)) is not None:
                mark.take_off()
        self.modules, self.boundary = (
            tuple(module for module in own if module not in modules)
            for own in (self.modules, self.boundary)
        )
        other.modules += tuple(given)
        other.boundary += tuple(given)

    def hold(self) -> list[nn.Parameter]:
        """The parameters that were made to require a gradient again behind the freeze's back; they
        require none now, and have none."""
        undone = [p for p in self.parameters if p.requires_grad] if self.is_frozen else []
        for parameter in undone:
            stopped(parameter)  # it trains when the layer thaws
        return undone


def merged(name: str, layers: Iterable[Layer]) -> Layer:
    """One layer of several, under the name given."""
    layers = list(layers)
    costs = [layer.cost for layer in layers]
    known = [cost for cost in costs if cost is not None]
    return Layer(
        name,
        (module for layer in layers for module in layer.modules),
        (parameter for layer in layers for parameter in layer.parameters),
        (module for layer in layers for module in layer.boundary),
        _sum(known) if len(known) == len(costs) else None,
        (written for layer in layers for written in layer.writes),
        (module for layer in layers for module in layer.readers),
    )


def _sum(costs: Sequence[LayerCost]) -> LayerCost:
    saved = [cost.saved_bytes for cost in costs if cost.saved_bytes is not None]
    return LayerCost(
        sum(cost.flops for cost in costs), sum(saved) if len(saved) == len(costs) else None
    )


def detached(value: Any) -> Any:
    """A value, or a structure of them, its tensors without their history."""
    if isinstance(value, Tensor):  # by far the most frequent case
        return value.detach() if value.requires_grad else value
    return tree_map_only(Tensor, Tensor.detach, value)


def _need_gradients(values: Iterable[Any]) -> bool:
    """Whether a tensor among the values, or in a structure among them, requires a gradient."""
    for value in values:
        if isinstance(value, Tensor):  # by far the most frequent case
            if value.requires_grad:
                return True
        elif value is not None and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)
        ):
            return True
    return False


# Hooks of frozen modules. Functions, not methods: torch.compile would make a graph for each layer.


def _enter(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if is_exporting():
        return None
    if torch.compiler.is_compiling():
        _seen_by_compiler()
        return None
    mark = mark_of(module)
    return None if mark is None else mark.layer.enter(module, args, kwargs)


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():  # which cannot be asked where a gradient goes
        passes = _need_gradients(args) or _need_gradients(kwargs.values())
        return None if passes else detached(output)
    mark = mark_of(module)
    return None if mark is None else mark.layer.leave(module, output)


def _end(module: nn.Module, args: Any, output: Any) -> None:
    """Of a call that an exception has ended, or that `_leave` has seen the end of."""
    mark = mark_of(module)
    if output is None and mark is not None and not torch.compiler.is_compiling():
        mark.layer.leave(module, None)


@called_by_compiler
def _seen_by_compiler() -> None:
    """`torch.compile` traces a frozen layer, and calls this as it does. It would otherwise say
    little when it stops compiling: a line in the log, many freezes later."""
    if not torch._dynamo.config.fail_on_recompile_limit_hit:
        warnings.warn(
            "torch.compile compiles frozen layers together with trained ones: each freeze needs a "
            f"new graph, and after {torch._dynamo.config.recompile_limit} torch stops compiling; "
            "call freezeout.parallel.compile_layers(freezer) in place of torch.compile, or "
            "freezeout.parallel.allow_stages(freezer) before it",
            stacklevel=2,
        )
