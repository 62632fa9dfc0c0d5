"""`Layer`: modules and parameters that freeze together, and what freezing does to them."""

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ..errors import FreezeOutError

# Frozen modules, to tell them from their copies.
_FROZEN: WeakSet[nn.Module] = WeakSet()


class Layer:
    """A group of modules and parameters that freeze together.

    Attributes:
        name: path of the layer's first module that has weights, as in `named_modules()`.
        modules: every module that goes into evaluation mode with the layer, outermost first.
        parameters: every parameter that stops being trained with it. A parameter shared with
            a later layer is that layer's, so a module here may own parameters that are not.
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
    ) -> None:
        self.name = name
        self.modules = tuple(modules)
        self.parameters = tuple(parameters)
        self.boundary = self.modules if boundary is None else tuple(boundary)
        # While frozen: the parameters that were trained until then, the modules that the user
        # kept in evaluation mode, and the hooks' handles.
        self._stopped: tuple[nn.Parameter, ...] = ()
        self._kept: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []
        self.is_frozen = False

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters)
        return f"Layer({self.name!r}, {len(self.modules)} modules, {count:,} parameters)"

    def freeze(self) -> None:
        """Take the layer out of training; nothing happens if it is out already.

        Its parameters require no gradient and lose the one they hold; its modules are in
        evaluation mode *for good*: `train()` on them, on a parent or on a deep or pickled copy
        does not wake them. What comes in and goes out of them is detached, so that no gradient
        passes and no autograd node is made, even where an input requires a gradient or a
        weight shared with a later layer is still trained.
        """
        if self.is_frozen:
            return
        self._stopped = tuple(p for p in self.parameters if p.requires_grad)
        if any(module.training for module in self.modules):
            self._kept = {module for module in self.modules if not module.training}
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in self.modules:
            module.training = False
            # In the instance's dictionary, where copies and pickles of the model keep it.
            module.__dict__["train"] = partial(_stay_in_evaluation, module)
            if hasattr(module, "reset_running_stats"):
                module.__dict__["reset_running_stats"] = partial(_reset_if_copy, module)
            _FROZEN.add(module)
        for module in self.boundary:
            self._handles += [
                module.register_forward_pre_hook(_detach_inputs, with_kwargs=True),
                module.register_forward_hook(_detach_output),
            ]
        self.is_frozen = True

    def unfreeze(self, training: bool) -> None:
        """Undo `freeze()`: parameters require gradients again where they did before it, and the
        modules are put in training or evaluation mode, but for those that the user had kept in
        evaluation mode while others trained."""
        if not self.is_frozen:
            return
        for parameter in self._stopped:
            parameter.requires_grad_(True)
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            del module.__dict__["train"]
            module.__dict__.pop("reset_running_stats", None)
            _FROZEN.discard(module)
            module.training = training and module not in self._kept
        self._stopped, self._kept, self._handles, self.is_frozen = (), set(), [], False


def merged(name: str, layers: Iterable[Layer]) -> Layer:
    """One layer of several, under the name given."""
    layers = list(layers)
    return Layer(
        name,
        (module for layer in layers for module in layer.modules),
        (parameter for layer in layers for parameter in layer.parameters),
        (module for layer in layers for module in layer.boundary),
    )


# Module-level functions, not closures or methods: copies and pickles of the model must carry
# them without carrying a Layer.


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for a frozen module's `train`: children that are not frozen still follow."""
    module.training = False
    for child in module.children():
        child.train(mode)
    return module


def _reset_if_copy(module: nn.Module) -> None:
    """Stands in for a frozen norm's `reset_running_stats`, which `update_bn` calls.

    A copy (an averaged model's) has other weights than the frozen ones, and so needs statistics
    of its own: it wakes up. Those of the model in training are frozen."""
    if module in _FROZEN:
        raise FreezeOutError(
            f"the statistics of a frozen {type(module).__name__} were to be reset: update_bn() on "
            "a model with frozen layers would leave them at zero; call it on an averaged copy, or "
            "call FreezeOut.release() first"
        )
    for name in ("train", "reset_running_stats"):
        del module.__dict__[name]
    module.reset_running_stats()  # type: ignore[operator]


def detached(value: Any) -> Any:
    """A value, or a structure of them, its tensors without their history."""
    if isinstance(value, Tensor):  # by far the most frequent case
        return value.detach() if value.requires_grad else value
    return tree_map_only(Tensor, Tensor.detach, value)


def _detach_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.compiler.is_compiling():
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
