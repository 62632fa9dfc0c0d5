"""One short FreezeOut run of any model, with every promise of the library checked on the way."""

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_leaves

from freezeout import FreezeOut, Layer, Schedule, find_layers
from freezeout.layers import Trace
from freezeout.layers.flow import Flow
from freezeout.layers.trace import ExampleInputs, call_arguments
from tests.models import graph_of, layer_tensors

STEPS = 5  # the first layer freezes after the first step, a third of the others after the next ones


@dataclass(frozen=True)
class Report:
    """What was found on the way, all promises kept."""

    layers: list[str]
    parameters: int
    seconds_to_find: float  # beyond the forward pass itself
    cut: list[str]  # parameters that a frozen layer uses too: that use has no gradient
    unused: int  # parameters that one forward pass in evaluation mode does not use


class Promise(AssertionError):
    """A promise that was not kept."""


def promise(kept: object, what: str) -> None:
    if not kept:
        raise Promise(what)


class Uses(Trace):
    """Also the first use of each parameter."""

    def __init__(self, flow: Flow | None = None) -> None:
        super().__init__(flow)
        self.first: dict[nn.Parameter, int] = {}

    def _use(self, parameter: nn.Parameter) -> None:
        super()._use(parameter)
        self.first.setdefault(parameter, self._time)


def check(model: nn.Module, inputs: ExampleInputs) -> Report:
    """Find the layers of `model`, freeze them, all but the last, in four steps and check:

    - every parameter and module is in exactly one layer, in the order of their last uses;
    - parameters and buffers of a frozen layer stay bit for bit, and `model.train()` does not
      wake it;
    - no autograd node is made inside it, none that backward visits is its, and what it hands on
      requires no gradient;
    - every parameter still trained gets the gradient that it gets when nothing is detached and
      the frozen parameters merely require no gradient, but for those that a frozen layer uses
      as well;
    - `release()` leaves an ordinary model.

    Raises:
        Promise: one of them is not kept.
    """
    names = {p: name for name, p in model.named_parameters()}
    layers, unused, seconds = _found(model, inputs)
    twin = copy.deepcopy(model)
    uses = Uses.of_forward(model, inputs)
    assert isinstance(uses, Uses)
    _check_partition(model, layers, uses)

    counted = sum(any(p.requires_grad for p in layer.parameters) for layer in layers)
    others = max(counted - 2, 1)
    times = [(2 + i * (STEPS - 2) // others) / STEPS for i in range(-1, counted - 2)]
    schedule = Schedule(times=(*([1 / STEPS, *times[1:]] if times else []), 1.0), scale_lr=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = _hooks(model)
    optimizer = SGD(trained, 1e-3, momentum=0.9, weight_decay=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        freezer = FreezeOut(model, optimizer, STEPS, schedule=schedule, example_inputs=inputs)
    cut: set[str] = set()
    values: list[list[Tensor]] = []  # of the frozen layers, when they froze
    for step in range(STEPS):
        model.train()
        with _watched(freezer):
            loss = _loss(model, inputs, step)
        promise(torch.isfinite(loss), "the loss is finite")
        _check_still(freezer, values)
        _check_graph(freezer, loss, names)
        torch.autograd.backward(loss)
        if freezer.num_frozen:
            cut |= _check_gradients(freezer, twin, inputs, step, uses)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values += [layer_tensors(layer) for layer in freezer.step()]
        _check_still(freezer, values)
    promise(freezer.num_frozen == counted - 1, "all layers but the last are frozen")
    freezer.release()
    promise(all(p.requires_grad for p in trained), "released parameters are trained")
    promise(_hooks(model) == hooks, "no hook is left")
    promise(not any("train" in vars(module) for module in model.modules()), "train() is its own")
    return Report(
        [layer.name for layer in freezer.layers],
        sum(p.numel() for p in names),
        seconds,
        sorted(cut),
        unused,
    )


def _found(model: nn.Module, inputs: ExampleInputs) -> tuple[list[Layer], int, float]:
    """The layers, how many parameters the forward pass left unused, and the seconds it took
    beyond the forward pass."""
    args, kwargs = call_arguments(inputs)
    model.eval()
    model(*args, **kwargs)  # the first time is slower
    start = time.perf_counter()
    model(*args, **kwargs)
    between = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = find_layers(model, inputs)
    seconds = max(0.0, time.perf_counter() - between - (between - start))
    model.train()
    said = [str(w.message) for w in caught if "were not used by the forward pass" in str(w.message)]
    return layers, sum(int(text.split()[0]) for text in said), seconds


def _check_partition(model: nn.Module, layers: list[Layer], uses: Uses) -> None:
    parameters = [p for layer in layers for p in layer.parameters]
    modules = [m for layer in layers for m in layer.modules]
    promise(len(parameters) == len(set(parameters)), "no parameter is in two layers")
    promise(set(parameters) == set(model.parameters()), "every parameter is in a layer")
    promise(len(modules) == len(set(modules)), "no module is in two layers")
    promise(set(modules) == set(model.modules()), "every module is in a layer")
    promise(all(layer.parameters for layer in layers), "every layer has parameters")
    last = [
        max((uses.uses[p][0] for p in layer.parameters if p in uses.uses), default=-1)
        for layer in layers
    ]
    for i, (one, next_one) in enumerate(pairwise(last)):
        promise(0 <= one <= next_one, f"{layers[i].name} is used before {layers[i + 1].name}")


def _loss(model: nn.Module, inputs: ExampleInputs, step: int) -> Tensor:
    """The distance of all that the model returns from noise."""
    args, kwargs = call_arguments(inputs)
    torch.manual_seed(step)
    outputs = tree_leaves(model(*args, **kwargs))
    targets = torch.Generator().manual_seed(step)
    losses = [
        (value - torch.randn(value.shape, generator=targets)).square().mean()
        for value in outputs
        if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
    ]
    return torch.stack(losses).sum()


@contextmanager
def _watched(freezer: FreezeOut) -> Iterator[None]:
    """Checks what happens inside frozen layers while the model runs."""
    frozen = [module for layer in freezer.layers[: freezer.num_frozen] for module in layer.modules]
    # A weight that a later layer uses again is still trained: what it makes here is detached.
    tied = {m for m in frozen if any(p.requires_grad for p in m.parameters())}
    names = {module: name for name, module in freezer.model.named_modules()}
    running: list[nn.Module] = []

    def before(module: nn.Module, args: object) -> None:
        promise(not module.training, f"{names[module]} runs in evaluation mode")
        running.append(module)

    def inside(module: nn.Module, args: object, output: object) -> None:
        running.pop()
        if module not in tied and not tied.intersection(running):
            promise(not _requires_grad(output), f"{names[module]} makes no autograd node")

    def outside(module: nn.Module, args: object, output: object) -> None:
        # Of a tied weight's module it is seen below, in the graph: it is detached after this hook.
        if not running and module not in tied:
            promise(not _requires_grad(output), f"{names[module]} hands on no gradient")

    def saved(value: Tensor) -> Tensor:
        if running and not tied.intersection(running):
            raise Promise(f"{names[running[-1]]} keeps nothing for backward")
        return value

    handles = []
    for module in frozen:
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(inside, prepend=True))
        handles.append(module.register_forward_hook(outside))
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda value: value):
        yield
    for handle in handles:
        handle.remove()


def _check_still(freezer: FreezeOut, values: list[list[Tensor]]) -> None:
    for layer, value in zip(freezer.layers, values, strict=False):
        promise(all(map(torch.equal, layer_tensors(layer), value)), f"{layer.name} stands still")


def _requires_grad(output: object) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


def _check_graph(freezer: FreezeOut, loss: Tensor, names: dict[nn.Parameter, str]) -> None:
    reached = {node.variable for node in graph_of(loss) if hasattr(node, "variable")}
    for layer in freezer.layers[: freezer.num_frozen]:
        for p in layer.parameters:
            promise(not p.requires_grad and p.grad is None, f"{names[p]} is not trained")
            promise(p not in reached, f"backward does not reach {names[p]}")


def _check_gradients(
    freezer: FreezeOut, twin: nn.Module, inputs: ExampleInputs, step: int, uses: Uses
) -> set[str]:
    """Compare with the same model when nothing is detached; returns the parameters that differ
    because a frozen layer uses them too."""
    model = freezer.model
    frozen = [p for layer in freezer.layers[: freezer.num_frozen] for p in layer.parameters]
    end = max((uses.uses[p][0] for p in frozen if p in uses.uses), default=0)
    for module, like in zip(model.modules(), twin.modules(), strict=True):
        like.training = module.training
    with torch.no_grad():
        for value, copied in zip(_tensors(model), _tensors(twin), strict=True):
            copied.copy_(value)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.requires_grad_(mine.requires_grad)
        other.grad = None
    # Frozen attention takes the path that it takes in training.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.autograd.backward(_loss(twin, inputs, step))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    cut: set[str] = set()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        same = (
            mine.grad is other.grad is None
            or (mine.grad is None and other.grad is not None and not other.grad.any())
            or (
                mine.grad is not None
                and other.grad is not None
                and torch.equal(mine.grad, other.grad)
            )
        )
        if not same:
            promise(uses.first.get(mine, end) < end, f"{name} gets its whole gradient")
            cut.add(name)
    return cut


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _hooks(model: nn.Module) -> list[Any]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
