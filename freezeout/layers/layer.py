"""`Layer`: modules and parameters that freeze together, and what freezing does to them."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from .marks import Mark, mark_of, stopped, trained_again


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
    """

    def __init__(
        self,
        name: str,
        modules: Iterable[nn.Module],
        parameters: Iterable[nn.Parameter],
        boundary: Iterable[nn.Module] | None = None,
        cost: LayerCost | None = None,
    ) -> None:
        self.name = name
        self.modules = tuple(modules)
        self.parameters = tuple(parameters)
        self.boundary = self.modules if boundary is None else tuple(boundary)
        self.cost = cost
        self._handles: list[RemovableHandle] = []  # while frozen
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
        evaluation mode *for good*: `train()` on them or on a parent does not wake them. What comes
        in and goes out of them is detached, so that no gradient passes and no autograd node is
        made, even where an input requires a gradient or a weight shared with a later layer is
        still trained. Deep copies and pickles of the model are ordinary, nothing of them frozen.
        """
        if self.is_frozen:
            return
        for parameter in self.parameters:
            stopped(parameter)
        for module in self.modules:
            Mark(module, self, within).put_on()
        for module in self.boundary:
            self._handles += [
                module.register_forward_pre_hook(_detach_inputs, with_kwargs=True),
                module.register_forward_hook(_detach_output),
            ]
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

    def hold(self) -> list[nn.Parameter]:
        """The parameters that were made to require a gradient again behind the freeze's back; they
        require none now, and have none."""
        undone = [p for p in self.parameters if p.requires_grad] if self.is_frozen else []
        for parameter in undone:
            parameter.requires_grad_(False)
            parameter.grad = None
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


def _detach_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        _seen_by_compiler()
    return tuple(detached(arg) for arg in args), {k: detached(v) for k, v in kwargs.items()}


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


# What torch.compiler.assume_constant_result() sets, which would import the compiler.
_seen_by_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _detach_output(module: nn.Module, args: Any, output: Any) -> Any:
    return detached(output)
