"""Making a plan: which modules the rest of the model calls of the frozen ones, in which order,
and what they return, found in real forward passes. A plan that does not reproduce the real pass
bit for bit, or might not, is refused with the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..layers import Layer
from ..layers.held import asks_for_mode
from ..layers.scratch import close, equal, generators, scratch
from .inputs import Batch
from .placeholders import Placeholders, Unservable, reason_of, tensors_within
from .plan import ROWS, Call, Plan, Size, TensorSpec
from .recorder import RealCall, Recorder, Seen, check_draws, probe


def make_plan(
    model: nn.Module,
    layers: Sequence[Layer],
    depth: int,
    batch: Batch,
    placeholders: Placeholders,
    sibling: Plan | None = None,
) -> Plan:
    """The plan that skips `layers[:depth]`, all frozen, for batches of this kind. A few of the
    samples are enough: before it is used, a whole batch is compared.

    Nothing of the passes made here stays: buffers and generators are put back. `sibling`: a plan
    of the same depth for batches that differ in sizes only, which has been checked; one pass
    through the frozen layers is enough then.

    Raises:
        Unservable: with the reason.
    """
    frozen = {module for layer in layers[:depth] for module in layer.modules}
    real = Recorder(model, frozen)
    if sibling is not None:
        with scratch(model):
            real.record(batch.pair, stop_after=len(sibling.calls))
        calls = _scaled(real.calls, sibling, batch.pair.size)
        if calls is not None:
            plan = _plan(model, layers, depth, calls, None, sibling.draws, placeholders)
            plan.labels_checked = sibling.labels_checked
            return plan
        real = Recorder(model, frozen)
    _check_modules(model, frozen)
    whole, batch = batch, batch.few
    with scratch(model):
        real.record(batch)
    if not real.calls:
        raise Unservable("no frozen module is called by the rest of the model")
    with scratch(model):
        few = probe(model, frozen, batch, real.calls)
    if real.draws:
        check_draws(model, frozen, batch, real)
    _check_frontier(real, few, batch.size)
    only_size = 1 if batch.size == 1 else None
    calls = _specs(real.calls, few.calls, batch.size, only_size)
    plan = _plan(model, layers, depth, calls, only_size, real.draws, placeholders)
    check_plan(plan, model, batch, real.frontier, (real.output, real.drawn))
    check_labels(plan, model, whole)
    return plan


def real_pass(
    plan: Plan, model: nn.Module, batch: Batch, then: Callable[[], None]
) -> tuple[list[Tensor], Any, list[bytes]]:
    """The frontier, the output and the state of the generators of a real pass; `then` is called
    when it has come to the frontier."""
    reached: list[Tensor] = []

    def take(tensors: list[Tensor]) -> list[Tensor]:
        then()
        reached.extend(tensor.detach().clone() for tensor in tensors)
        return tensors

    batch = batch.copied()
    with scratch(model):
        with plan.capture(take):
            output = model(*batch.args, **batch.kwargs)
        if not reached:
            raise Unservable("the forward pass does not reach the last frozen module")
        return reached, output, generators(model)


def check_labels(plan: Plan, model: nn.Module, batch: Batch) -> None:
    """Unservable if frozen layers use the labels, which are in no checksum. Where all of the
    batch's labels are alike that cannot be told, and the plan stays to be checked."""
    plan.labels_checked |= not batch.has_labels
    if plan.labels_checked or (turned := batch.with_labels_turned()) is None:
        return
    with scratch(model):
        reached = [plan.prefix(each) for each in turned]
    if not all(map(equal, *reached)):
        raise Unservable("the frozen layers use the labels")
    plan.labels_checked = True


def check_unused(plan: Plan, model: nn.Module, batch: Batch, place: int) -> None:
    """Unservable if frozen layers use the value of the argument at this place, which all samples
    share: the layers are run on a stand-in that cannot be read."""
    batch = batch.pair
    with scratch(model):
        real = plan.prefix(batch)
        try:
            same = all(map(equal, real, plan.prefix(batch.hidden(place, plan.placeholders))))
        except Exception:
            same = False
    if not same:
        raise Unservable(
            f"an argument that is the same for all samples ({batch.name(place)}) has another value "
            "than when activations were stored, and the frozen layers use it"
        )


def check_padding(plan: Plan, model: nn.Module, batch: Batch) -> None:
    """Unservable if what frozen layers give for a sequence depends on what it is padded with: then
    it would depend on the batch."""
    batch = batch.pair
    with scratch(model):
        reached = [plan.prefix(each) for each in (batch, batch.with_other_padding())]
    for one, two in zip(*reached, strict=True):
        if not close(_without_padding(one, batch), _without_padding(two, batch)):
            raise Unservable("what the frozen layers compute depends on padding")


def check_plan(
    plan: Plan,
    model: nn.Module,
    batch: Batch,
    frontier: Sequence[Tensor],
    real: tuple[Any, list[bytes]],
) -> None:
    """Unservable unless the served pass, given the real `frontier`, equals the real pass bit for
    bit: every tensor in the output, and what was drawn from the generators. `real`: both."""
    given = [tensor.clone() for tensor in frontier]
    with scratch(model):
        try:
            served = plan.run(batch.copied(), given)
        except Exception as error:
            reason = reason_of(error)
            if reason is None:
                reason = f"the forward pass fails on placeholders: {type(error).__name__}: {error}"
            raise Unservable(" ".join(reason.split())) from error
        if generators(model) != real[1]:
            raise Unservable("the frozen layers, or what runs between them, draw random numbers")
    difference = _difference(real[0], served, batch)
    if difference is not None:
        raise Unservable(f"the served output is not the model's: {difference}")


def _difference(real: Any, served: Any, batch: Batch) -> str | None:
    """What tells the two outputs apart; padding aside."""
    if type(real) is not type(served):
        return f"a {type(served).__name__} in place of a {type(real).__name__}"
    ours, theirs = list(tensors_within(served)), list(tensors_within(real))
    if len(ours) != len(theirs) or tree_flatten(real)[1] != tree_flatten(served)[1]:
        return f"it has {len(ours)} tensors in place of {len(theirs)}"
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.requires_grad != b.requires_grad:
            return f"tensor {number} does not require a gradient as the model's does"
        if a.shape == b.shape and batch.lengths is not None:
            a, b = _without_padding(a, batch), _without_padding(b, batch)
        if not equal(a, b):
            return f"tensor {number} has other values"
    return None


def _without_padding(tensor: Tensor, batch: Batch) -> Tensor:
    if batch.lengths is None or tuple(tensor.shape[:2]) != (batch.size, batch.time):
        return tensor
    inside = torch.arange(batch.time)[None] < batch.lengths[:, None]
    return tensor[inside.to(tensor.device)]


def _check_modules(model: nn.Module, frozen: set[nn.Module]) -> None:
    """What can be seen without running anything: compiled containers, foreign hooks."""
    for path, module in model.named_modules():
        parts = list(module.modules())
        compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        mixed = any(part in frozen for part in parts) and not all(part in frozen for part in parts)
        if compiled and (mixed or module is model):
            what = "the model" if module is model else f"module {path!r}"
            raise Unservable(
                f"{what} is compiled as a whole, frozen layers and others together; call "
                "freezeout.parallel.compile_layers(freezer) in place of torch.compile"
            )
        if module in frozen:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if not _is_harmless(hook):
                    raise Unservable(
                        f"frozen module {path!r} has a forward hook, which would not run"
                    )


def _is_harmless(hook: Any) -> bool:
    """Freezing's own hooks, torch's that compute a weight (weight_norm), and transformers' that
    gather what is asked for in the output, which is looked through; not those that add to it in
    training (NEFTune)."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    known = home.startswith(("freezeout.", "torch.nn.utils.", "transformers."))
    return known and (home.startswith("freezeout.") or not asks_for_mode(hook))


def _check_frontier(real: Recorder, few: Recorder, size: int) -> None:
    """Every tensor there has a row a sample, which does not depend on the other samples."""
    name = type(real.calls[-1].module).__name__
    if not real.frontier:
        raise Unservable(f"the last frozen module, a {name}, returns no tensor")
    inside = {m for call in real.calls for m in call.module.modules() if m is not call.module}
    if real.calls[-1].module in inside:
        raise Unservable(f"the last frozen module, a {name}, runs inside another one as well")
    count = min(size, 2 if size > 2 else 1)
    for whole, part in zip(real.frontier, few.frontier, strict=True):
        if whole.ndim == 0 or whole.shape[0] != size or part.shape[0] != count:
            raise Unservable(
                f"the last frozen module, a {name}, returns a tensor {tuple(whole.shape)} without "
                "a row for each sample"
            )
        rows = whole.flip(0)[:count]
        if rows.shape != part.shape or not close(rows, part):
            raise Unservable(
                "what the frozen layers compute of a sample depends on the other samples of the "
                "batch, or is random"
            )


def _specs(
    calls: list[RealCall], probe: list[RealCall], size: int, only_size: int | None
) -> list[Call]:
    count = min(size, 2 if size > 2 else 1)
    specs = []
    for call, other in zip(calls, probe, strict=True):
        if call.tree != other.tree:
            raise Unservable("what a frozen module returns depends on the number of samples")
        leaves = [
            _spec(leaf, match, size, count, only_size) if isinstance(leaf, Seen) else leaf
            for leaf, match in zip(call.leaves, other.leaves, strict=True)
        ]
        specs.append(Call(call.module, call.tree, tuple(leaves), call.runs))
    return specs


def _spec(seen: Seen, other: Seen, size: int, few: int, only_size: int | None) -> TensorSpec:
    if only_size is not None:
        sizes = tuple(
            ROWS if i == 0 and n == size else Size(n, 0) for i, n in enumerate(seen.shape)
        )
    elif len(seen.shape) != len(other.shape):
        raise Unservable("the shape of what a frozen module returns depends on the input")
    else:
        sizes = tuple(_size(n, m, size, few) for n, m in zip(seen.shape, other.shape, strict=True))
    return TensorSpec(sizes, _order(seen.strides), seen.dtype, seen.device)


def _order(strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda i: (-strides[i], i)))


def _size(many: int, few: int, size: int, number: int) -> Size:
    per_sample, rest = divmod(many - few, size - number)
    if rest or per_sample < 0:
        raise Unservable("the size of what a frozen module returns depends on the input")
    return Size(many - per_sample * size, per_sample)


def _scaled(calls: list[RealCall], sibling: Plan, size: int) -> list[Call] | None:
    """The calls with sizes that grow with the number of samples where the sibling's do; None if
    that is not clear."""
    if [call.module for call in calls] != [call.module for call in sibling.calls]:
        return None
    specs = []
    for call, other in zip(calls, sibling.calls, strict=True):
        if call.tree != other.tree or len(call.tensors) != len(other.tensors):
            return None
        leaves: list[Any] = []
        known = iter(other.tensors)
        for leaf in call.leaves:
            if not isinstance(leaf, Seen):
                leaves.append(leaf)
                continue
            spec = next(known)
            if len(leaf.shape) != len(spec.sizes):
                return None
            sizes = []
            for n, old in zip(leaf.shape, spec.sizes, strict=True):
                if old.per_sample and (old != ROWS or n != size):
                    return None
                sizes.append(ROWS if old.per_sample else Size(n, 0))
            leaves.append(TensorSpec(tuple(sizes), spec.order, leaf.dtype, leaf.device))
        specs.append(Call(call.module, call.tree, tuple(leaves), call.runs))
    return specs


def _plan(
    model: nn.Module,
    layers: Sequence[Layer],
    depth: int,
    calls: Sequence[Call],
    only_size: int | None,
    draws: bool,
    placeholders: Placeholders,
) -> Plan:
    """With stand-ins for the frozen parameters that are used outside the calls."""
    inside = {inner for call in calls if not call.runs for inner in call.module.modules()}
    mine = {parameter for layer in layers[:depth] for parameter in layer.parameters}
    stand_ins = [
        (module, name, placeholders.like(parameter))
        for module in model.modules()
        if module not in inside
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in mine and not parameter.requires_grad
    ]
    return Plan(model, depth, calls, only_size, draws, placeholders, stand_ins)
