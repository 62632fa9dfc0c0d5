"""`torch.compile` beside freezing.

A graph is made for one state of the parameters: which of them require gradients, which modules
train. So a model compiled as a whole needs a new graph at each freeze, and torch gives up after
eight. Compiled block by block, equal blocks share their graphs, frozen or not:

    compile_layers(freezer)                         # three graphs a kind of block, at most
    compile_layers(freezer, ahead=example_inputs)   # all of them now, none at a freeze

A model that has to be compiled as a whole gets room for a graph a freeze:

    allow_stages(freezer)
    model.compile()
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InvalidType, InvalidValue
from ..freezer import FreezeOut
from ..layers import ExampleInputs, Layer
from ..layers.layer import detached
from ..layers.names import from_names, to_names
from ..layers.scratch import random_state_kept
from ..layers.trace import call_arguments

_NUMBERS = count()


def compile_layers(freezer: FreezeOut, *, ahead: ExampleInputs = None, **options: Any) -> None:
    """Compile the model's blocks one by one, so that equal blocks share graphs.

    A kind of block needs at most three graphs in training (trained, trained behind frozen ones,
    frozen), however many blocks are of it and however many freeze. What stands between blocks,
    and single operations such as a lone convolution, runs uncompiled. Copies and pickles of the
    model are uncompiled, as after `module.compile()`.

    A block that torch would give up on raises `torch._dynamo.exc.FailOnRecompileLimitHit`: this
    sets `torch._dynamo.config.fail_on_recompile_limit_hit`.

    Args:
        freezer: over the model, which is not compiled itself.
        ahead: example inputs as `FreezeOut` takes them, of the shape, type and device that
            training uses. A copy of the model makes a forward and a backward pass on them at
            each depth of the schedule, so that no later freeze compiles anything. Call it under
            the `torch.autocast` of the training loop, if there is one.
        options: for `torch.compile`, such as `mode="max-autotune-no-cudagraphs"` or
            `fullgraph=True`.

    Raises:
        InvalidValue: the model is compiled already, `ahead` gives nothing to differentiate, or
            the options ask for CUDA graphs.
    """
    _check(freezer)
    refuse_cuda_graphs(options, {p.device.type for p in freezer.model.parameters()})
    if freezer.model._compiled_call_impl is not None or isinstance(
        freezer.model, torch._dynamo.OptimizedModule
    ):
        raise InvalidValue(
            "compile_layers() takes a model that is not compiled: drop torch.compile(model) and "
            "model.compile(), or keep them and call allow_stages(freezer) instead"
        )
    kinds = _Kinds(options)
    kinds.compile(freezer.model, freezer.layers)
    if ahead is not None:
        _visit(freezer, kinds, ahead)


def allow_stages(freezer: FreezeOut) -> int:
    """Make room for the graphs of a model compiled as a whole: one for each set of frozen layers.

    Call it before the model first runs compiled. It sets, in `torch._dynamo.config`,
    `recompile_limit` and `accumulated_recompile_limit` (never lower than they are),
    `fail_on_recompile_limit_hit`, so that giving up is an error, and
    `skip_nnmodule_hook_guards = False`, so that no graph from before a freeze serves after it.

    `FreezeOut(freeze_every=n)` makes the stages, and so the graphs, few.

    Returns:
        The number of graphs that training needs, of a model that is one graph: S stages, S + 1.

    Raises:
        InvalidValue: the order of the layers is still to be checked in a forward pass, which a
            compiled one does not allow: build the FreezeOut with example_inputs.
    """
    _check(freezer)
    if freezer.order_pending:
        raise InvalidValue(
            "a compiled forward pass cannot check the order of the layers: build the FreezeOut "
            "with example_inputs="
        )
    graphs = len(freezer.timeline.depths)
    _raise_limits(graphs)
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return graphs


def blocks(model: nn.Module, layers: Sequence[Layer]) -> Iterator[tuple[Layer, nn.Module]]:
    """The modules to compile, each with its layer: whatever may be called from outside and has
    parameters, in modules of one layer. Containers come with their blocks, since either may be
    called; a call within a compiled one becomes part of its graph. Where there is nothing but
    single operations, they are taken."""
    own = {layer: set(layer.modules) for layer in layers}
    candidates = [
        (layer, module)
        for layer in layers
        for module in layer.boundary
        if module is not model
        and type(module).forward is not nn.Module.forward
        and next(module.parameters(), None) is not None
        and all(inner in own[layer] for inner in module.modules() if inner._parameters)
    ]
    composite = [each for each in candidates if not _is_operation(each[1])]
    yield from composite or candidates


def _is_operation(module: nn.Module) -> bool:
    """One of torch's own leaves: one kernel, compiled or not."""
    is_leaf = next(module.children(), None) is None
    return is_leaf and type(module).__module__.startswith("torch.nn.")


class _Kinds:
    """One compiled function for each kind of block: torch keeps graphs, and counts them, by
    code object, and all modules share that of `Module.__call__`. There unequal blocks would use
    up each other's limit, and sizes that differ among them would be taken for dynamic."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._runs: dict[object, Callable[..., Any]] = {}

    def compile(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Have every block of `model` run compiled."""
        found = list(blocks(model, layers))
        # Blocks that look equal may differ in what no guard can share: room for each.
        _raise_limits(len(found))
        for layer, block in found:
            kind = _kind(block)
            if kind not in self._runs:
                self._runs[kind] = torch.compile(_runner(type(block).__name__), **self._options)
            # What Module.compile() sets, too.
            block._compiled_call_impl = partial(_call, self._runs[kind], layer, block)


def _kind(block: nn.Module) -> object:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return type(block), repr(block), tuple((name, t.shape, t.dtype) for name, t in tensors)


def _runner(name: str) -> Callable[..., Any]:
    """A function with a code object, and a name, of its own."""

    def run(frozen: bool, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        # Torch does not notice that freezing added hooks; it does notice this.
        return detached(output) if frozen else output

    run.__code__ = run.__code__.replace(co_name=f"{name}_{next(_NUMBERS)}")
    return run


def _call(
    run: Callable[..., Any], layer: Layer, block: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    if layer.is_frozen and layer.passes(args, kwargs):  # which a graph could not tell
        return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
    return run(layer.is_frozen, block, *args, **kwargs)


def _visit(freezer: FreezeOut, kinds: _Kinds, ahead: ExampleInputs) -> None:
    """Train a copy of the model for a step at every depth that is still to come."""
    model = copy.deepcopy(freezer.model)  # an ordinary one, nothing frozen
    layers = from_names(model, to_names(freezer.model, freezer.layers))
    kinds.compile(model, layers)
    if not model.training:
        model.train()
    args, kwargs = call_arguments(ahead)
    to_come = {k for step, k in freezer.timeline.changes if step > freezer.step_count}
    with random_state_kept(model), torch.enable_grad():
        for depth in sorted({freezer.num_frozen, *to_come}):
            for layer in layers[:depth]:
                layer.freeze(model)
            outputs = [
                output.float().sum()
                for output in tree_leaves(model(*args, **kwargs))
                if isinstance(output, Tensor) and output.requires_grad
            ]
            if not outputs:
                raise InvalidValue("ahead: the model returns no tensor that requires a gradient")
            torch.autograd.backward(torch.stack(outputs).sum())
            model.zero_grad()


def refuse_cuda_graphs(options: Mapping[str, Any], devices: Collection[str]) -> None:
    """InvalidValue if these options of `torch.compile` make CUDA graphs on one of the devices.

    A CUDA graph keeps its results where it wrote them. Frozen blocks have no backward pass, so that
    torch takes each of their calls for the beginning of another step, and may write over what an
    earlier block has returned."""
    mode = options.get("mode")
    flag = (options.get("options") or {}).get("triton.cudagraphs", False)
    if "cuda" in devices and (flag or mode in ("reduce-overhead", "max-autotune")):
        asked = f"mode={mode!r}" if not flag else "options={'triton.cudagraphs': True}"
        raise InvalidValue(
            f"compile_layers() does not take {asked}: it makes CUDA graphs, which do not go with "
            "blocks that freeze; mode='max-autotune-no-cudagraphs' is the nearest that does"
        )


def _check(freezer: FreezeOut) -> None:
    if not isinstance(freezer, FreezeOut):
        raise InvalidType(f"freezer must be a FreezeOut, got {type(freezer).__name__}")


def _graphs(states: int) -> int:
    """Torch's usual eight graphs (training, evaluation, sizes that vary) for each state."""
    return 8 * max(states, 1)


def _raise_limits(states: int) -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _graphs(states))
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, 2 * _graphs(states)
    )
    config.fail_on_recompile_limit_hit = True
