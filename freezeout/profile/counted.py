"""Counted FLOPs and saved activations of one training step, at every depth, from one step.

Torch's own counter says what each operation costs. Which of them are left with k layers frozen
follows from the autograd graph of a step with none frozen. A node made in layer L lives on while
k <= L and a parameter of a layer >= k can be reached from it; it computes the gradient of an
input only if that input's own node lives on. So each layer is counted once, whatever their
number, and the counts are those of a step that is really frozen at that depth.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..errors import FreezeOutError, InvalidValue
from ..layers import Layer
from ..layers.scratch import random_state_kept

# Nodes whose FLOPs are shared equally by the gradients of these inputs: the two factors of a
# product. Other nodes compute all or nothing.
_FACTORS = {
    "AddmmBackward0": (1, 2),
    "BaddbmmBackward0": (1, 2),
    "BmmBackward0": (0, 1),
    "ConvolutionBackward0": (0, 1),
    "MkldnnConvolutionBackward0": (0, 1),
    "MmBackward0": (0, 1),
}
_NEVER = -1


@dataclass(frozen=True)
class StepCount:
    """One training step of n layers, counted.

    Attributes:
        forward: FLOPs of the forward pass in each layer.
        backward: FLOPs of the whole backward pass with the first k layers frozen,
            k = 0 ... n - 1. With none frozen it is about twice the forward pass's.
        saved_bytes: bytes of the activations kept for backward at each of these depths;
            parameters, buffers and the batch itself are not among them.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    saved_bytes: tuple[int, ...]

    def step_costs(self) -> list[float]:
        """FLOPs of a step at each depth; frozen layers still run forward."""
        return [float(sum(self.forward) + backward) for backward in self.backward]

    def prefix_costs(self) -> list[float]:
        """FLOPs of the first k layers' forward pass, which a cache would spare."""
        return [float(sum(self.forward[:depth])) for depth in range(len(self.forward))]


def count_step(
    model: nn.Module,
    layers: Sequence[Layer],
    loss: Callable[[], Tensor],
) -> StepCount:
    """Count one step's FLOPs and activations at every depth, from one forward and backward pass.

    On the meta device this takes no memory and no weights, whatever the model's size.

    Args:
        model: with gradients as in training; its mode is left alone.
        layers: the model's layers, none of them frozen.
        loss: one forward pass of `model`, and the loss to go backward from.

    Raises:
        InvalidValue: the loss does not depend on the model's parameters.
    """
    if any(layer.is_frozen for layer in layers):
        raise FreezeOutError("count_step() on frozen layers: it needs them as they start")
    gradients = {p: p.grad for p in model.parameters()}
    for parameter in gradients:
        parameter.grad = None  # not added to
    counter = flop_counter()
    try:
        with ExitStack() as stack:
            stack.enter_context(random_state_kept(model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(counter)
            forward = _Forward(model, layers, counter)
            with forward.watched():
                value = loss()
            if not value.requires_grad:
                raise InvalidValue("the loss depends on none of the model's trained parameters")
            graph = _Graph(value, layers, forward)
            backward = graph.backward(value, counter)
            saved = graph.saved_bytes()
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return StepCount(tuple(forward.flops), tuple(backward), tuple(saved))


def flop_counter() -> FlopCounterMode:
    """Torch's counter, but for the weight's gradient in a grouped convolution: torch 2.13 counts
    it as if there were no groups, which for a depthwise one is too much by the channels' number."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _convolution_backward_flops(
    grad_shape: Sequence[int],  # (batch, channels out, *space out)
    input_shape: Sequence[int],  # (batch, channels in, *space in)
    weight_shape: Sequence[int],  # (channels, channels / groups, *kernel)
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    *,
    out_shape: Any,
) -> int:
    """Each of the two gradients takes as many multiplications as the forward pass."""
    places = prod((input_shape if transposed else grad_shape)[2:])
    forward = 2 * grad_shape[0] * places * prod(weight_shape)
    return forward * sum(output_mask[:2])


class _Forward:
    """What one forward pass tells: FLOPs a layer, where in the order of autograd's nodes each
    layer runs, and what each node keeps."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], counter: FlopCounterMode) -> None:
        self._counter = counter
        # Modules whose results are detached when their layer is frozen.
        self._layer_of = {module: i for i, layer in enumerate(layers) for module in layer.boundary}
        self._model = model
        self._stack: list[int] = []
        self._last = 0  # the layer that ran last: what no layer's module does goes with it
        self._counted = 0
        self.flops = [0] * len(layers)
        # Sequence numbers from which on nodes are made in a layer, and that layer.
        self.starts: list[int] = []
        self.owners: list[int] = []
        # Of each kept tensor: the sequence number of its node, its storage and its bytes.
        self.kept: list[tuple[int, int, int]] = []
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # storages are known by address: none may be reused

    @contextmanager
    def watched(self) -> Iterator[None]:
        handles = []
        try:
            for module in self._model.modules():
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                self._mark()
                yield
                self._settle()
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._settle()
        if module is self._model:  # the batch is there in any case
            batch = (v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor))
            self._own |= {tensor.untyped_storage()._cdata for tensor in batch}
        # A module that blocks share belongs to the last one's layer, but in each it goes with it.
        outside = self._stack[-1] if self._stack else len(self.flops) - 1
        layer = min(outside, self._layer_of.get(module, outside))
        innermost = next(module.children(), None) is None
        self._stack.append(layer)
        if innermost:
            self._last = layer
        self._mark()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._settle()
        self._stack.pop()
        self._mark()

    def _settle(self) -> None:
        """FLOPs since the last time go to the layer that ran."""
        total = self._counter.get_total_flops()
        layer = self._stack[-1] if self._stack else self._last
        self.flops[layer] += total - self._counted
        self._counted = total

    def _mark(self) -> None:
        self.starts.append(_next_number())
        self.owners.append(self._stack[-1] if self._stack else len(self.flops) - 1)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            # The node that keeps it is the one made last.
            number = _next_number() - 1
            self.kept.append((number, storage._cdata, storage.nbytes()))
            self._alive.append(tensor)
        return tensor

    def owner(self, number: int) -> int:
        """The layer in which the node of this sequence number was made."""
        return self.owners[max(0, bisect_right(self.starts, number) - 1)]


class _Graph:
    """The autograd graph of one step, and until which depth each of its nodes lives."""

    def __init__(self, loss: Tensor, layers: Sequence[Layer], forward: _Forward) -> None:
        self._forward = forward
        self._depths = len(layers)
        layer_of = {p: i for i, layer in enumerate(layers) for p in layer.parameters}
        # The deepest freezing at which a node still runs. Layers before it detach what comes in
        # and goes out, so a path ends with the first frozen layer on it.
        self._until: dict[Any, int] = {None: _NEVER}
        self._nodes = _children_first(loss.grad_fn)
        for node in self._nodes:
            variable = getattr(node, "variable", None)
            if variable is not None:
                self._until[node] = layer_of.get(variable, self._depths - 1)
            else:
                reached = (self._until[following] for following, _ in node.next_functions)
                made_in = forward.owner(node._sequence_nr())
                self._until[node] = min(made_in, max(reached, default=_NEVER))

    def backward(self, loss: Tensor, counter: FlopCounterMode) -> list[int]:
        """Run backward, and return its FLOPs at each depth."""
        flops: dict[Any, int] = {}
        counted = counter.get_total_flops()
        running: Any = None

        def settle(node: Any) -> None:
            nonlocal counted, running
            total = counter.get_total_flops()
            flops[running] = flops.get(running, 0) + total - counted
            counted, running = total, node

        handles = [
            node.register_prehook(lambda _, node=node: settle(node))
            for node in self._nodes
            if not hasattr(node, "variable")
        ]
        try:
            torch.autograd.backward(loss)
            settle(None)
        finally:
            for handle in handles:
                handle.remove()
        return self._at_depths(
            part for node, count in flops.items() if count for part in self._parts(node, count)
        )

    def saved_bytes(self) -> list[int]:
        """Bytes kept for backward at each depth, each storage once."""
        nodes = [node for node in self._nodes if not hasattr(node, "variable")]
        nodes.sort(key=lambda node: node._sequence_nr())
        numbers = [node._sequence_nr() for node in nodes]
        storages: dict[int, tuple[int, int]] = {}
        for number, storage, size in self._forward.kept:
            # An in-place operation keeps a clone: a node too, but none that backward visits.
            keeper = bisect_right(numbers, number) - 1
            until = self._until[nodes[keeper]] if keeper >= 0 else _NEVER
            storages[storage] = (max(until, storages.get(storage, (_NEVER, 0))[0]), size)
        return self._at_depths(iter(storages.values()))

    def _parts(self, node: Any, flops: int) -> Iterator[tuple[int, int]]:
        """A node's FLOPs, divided by the depth until which they are spent."""
        until = self._until[node]
        following = [following for following, _ in node.next_functions]
        factors = [following[i] for i in _FACTORS.get(node.name(), ())]
        computed = [factor for factor in factors if factor is not None]
        if not computed:
            yield until, flops
        for factor in computed:
            yield min(until, self._until[factor]), flops // len(computed)

    def _at_depths(self, parts: Iterator[tuple[int, int]]) -> list[int]:
        """Sums at each depth of (depth until which it counts, amount)."""
        ending = [0] * self._depths
        for until, amount in parts:
            if until >= 0:
                ending[until] += amount
        return [sum(ending[depth:]) for depth in range(self._depths)]


def _children_first(root: Any) -> list[Any]:
    """Every node that can be reached from `root`, each after those it leads to."""
    order: list[Any] = []
    seen = {root}
    waiting = [(root, iter(root.next_functions))]
    while waiting:
        node, following = waiting[-1]
        child = next((c for c, _ in following if c is not None and c not in seen), None)
        if child is None:
            order.append(node)
            waiting.pop()
        else:
            seen.add(child)
            waiting.append((child, iter(child.next_functions)))
    return order


def _next_number() -> int:
    """The sequence number that autograd's next node will have."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
