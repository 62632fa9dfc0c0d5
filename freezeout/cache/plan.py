"""A plan: how to run a model with its first layers skipped and their output given.

`make_plan` looks at real forward passes and finds which modules of the frozen layers the rest of
the model calls, in which order, and what they return. `Plan.serving` then runs the model with
placeholders in their place, and the given tensors in place of the last one's result;
`Plan.capture` takes that result out of a pass that computes it. A plan that does not reproduce
the real forward pass bit for bit, or might not, is refused with the reason.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..layers import Layer, Trace
from ..layers.trace import _uncompiled, random_state_kept
from .inputs import Batch
from .placeholders import Placeholders, Unservable, holds_placeholder, reason_of, tensors_within


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
        self._model, self._placeholders, self._stand_ins = model, placeholders, stand_ins
        self.modules = list(dict.fromkeys(call.module for call in self.calls))
        # The last call is this one of its module's.
        self._nth = sum(call.module is self.frontier.module for call in self.calls)
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
        self._own = {module: _forward(module) for module in self.modules}
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
        inner = _forward(module)

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
            raise _Reached

        with ExitStack() as stack:
            if self.draws:
                stack.enter_context(random_state_kept(self._model))
            if start is not None:
                stack.enter_context(start.serving(batch.size, given))
            try:
                with self.capture(stop):
                    self._model(*batch.args, **batch.kwargs)
            except _Reached:
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
                self._placeholders.make(
                    s.shape(self._size), s.strides(self._size), s.dtype, s.device
                )
                for s in specs
            ]
            self._made[self._size][number] = made
        return made


class _Reached(Exception):
    """The frontier has been reached, and the rest is not wanted."""


def make_plan(
    model: nn.Module,
    layers: Sequence[Layer],
    depth: int,
    batch: Batch,
    placeholders: Placeholders,
    sibling: Plan | None = None,
) -> Plan:
    """The plan that skips `layers[:depth]`, all frozen, for batches of this kind.

    Nothing of the passes made here stays: buffers and generators are put back. `sibling`: a plan
    of the same depth for batches that differ in sizes only, which has been checked; one pass
    through the frozen layers is enough then.

    Raises:
        Unservable: with the reason.
    """
    frozen = {module for layer in layers[:depth] for module in layer.modules}
    real = _Recorder(model, frozen)
    if sibling is not None:
        with scratch(model):
            real.record(batch, stop_after=len(sibling.calls))
        calls = _scaled(real.calls, sibling, batch.size)
        if calls is not None:
            return _plan(model, layers, depth, calls, None, sibling.draws, placeholders)
        real = _Recorder(model, frozen)
    _check_modules(model, frozen)
    with scratch(model):
        real.record(batch)
    if not real.calls:
        raise Unservable("no frozen module is called by the rest of the model")
    with scratch(model):
        few = _probe(model, frozen, batch, real.calls)
    _check_frontier(real, few, batch.size)
    only_size = 1 if batch.size == 1 else None
    calls = _specs(real.calls, few.calls, batch.size, only_size)
    plan = _plan(model, layers, depth, calls, only_size, real.draws, placeholders)
    check_plan(plan, model, batch, real.frontier, (real.output, real.drawn))
    return plan


def check_plan(
    plan: Plan,
    model: nn.Module,
    batch: Batch,
    frontier: Sequence[Tensor],
    real: tuple[Any, list[bytes]] | None = None,
) -> None:
    """Unservable unless the served pass, given the real `frontier`, equals the real pass bit for
    bit: every tensor in the output, and what was drawn from the generators. `real`: both, of
    the real pass, where it has been made."""
    if real is None:
        with scratch(model):
            output = model(*batch.args, **batch.kwargs)
            real = output, _generators(model)
    given = [tensor.clone() for tensor in frontier]
    with scratch(model):
        try:
            served = plan.run(batch, given)
        except Exception as error:
            reason = reason_of(error)
            if reason is None:
                reason = f"the forward pass fails on placeholders: {type(error).__name__}: {error}"
            raise Unservable(" ".join(reason.split())) from error
        if _generators(model) != real[1]:
            raise Unservable("the frozen layers, or what runs between them, draw random numbers")
    difference = _difference(real[0], served, batch)
    if difference is not None:
        raise Unservable(f"the served output is not the model's: {difference}")


@contextmanager
def scratch(model: nn.Module) -> Iterator[None]:
    """Forward passes that leave no trace: buffers and generators are put back."""
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    python = random.getstate()
    with random_state_kept(model):
        try:
            yield
        finally:
            random.setstate(python)
            with torch.no_grad():
                for module, name, buffer, kept in buffers:
                    module._buffers[name] = buffer
                    # Norms change theirs without a new version; frozen ones keep the old.
                    if buffer is not None and kept is not None and not _equal(buffer, kept):
                        buffer.copy_(kept)


class _Seen(NamedTuple):
    """What is to be known of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _RealCall(NamedTuple):
    module: nn.Module
    tree: TreeSpec
    leaves: list[Any]
    runs: bool

    @property
    def tensors(self) -> list[_Seen]:
        return [leaf for leaf in self.leaves if isinstance(leaf, _Seen)]


class _Recorder:
    """One real pass: what the rest of the model calls of the frozen modules.

    Attributes:
        calls: those calls, up to the last that matters.
        frontier: a copy of the tensors that the last one returned.
        output: the model's.
        draws: whether anything was drawn from a generator before the frontier.
        drawn: the generators after the pass.
    """

    def __init__(self, model: nn.Module, frozen: set[nn.Module]) -> None:
        self._model = model
        frozen_only = [m for m in model.modules() if all(i in frozen for i in m.modules())]
        in_graphs = {
            inner
            for module in frozen_only
            if module._compiled_call_impl is not None
            for inner in module.modules()
            if inner is not module
        }
        self._modules = [
            module
            for module in frozen_only
            if module not in in_graphs and type(module).forward is not nn.Module.forward
        ]
        self.calls: list[_RealCall] = []
        self.frontier: list[Tensor] = []
        self.output: Any = None
        self.draws = False
        self.drawn: list[bytes] = []
        self._before: list[bytes] = []
        self._made: list[Tensor] = []  # what frozen modules handed out
        self._inside = False
        self._stop_after: int | None = None

    def record(self, batch: Batch, stop_after: int | None = None) -> None:
        """Run the model, or its calls of frozen modules up to a number."""
        self._stop_after = stop_after
        kept = [(m, overridden(m, self._wrapped(m, _forward(m)))) for m in self._modules]
        self._before = _generators(self._model)
        try:
            self.output = self._model(*batch.args, **batch.kwargs)
        except _Reached:
            pass
        finally:
            for module, before in kept:
                restore(module, before)
        self.drawn = _generators(self._model)
        while self.calls and self.calls[-1].runs:
            self.calls.pop()

    def _wrapped(self, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        has_parameters = next(module.parameters(), None) is not None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return inner(*args, **kwargs)
            # What has no parameters, and takes other things than the frozen modules' results,
            # may be of use to the rest too (rotary embeddings): it runs on whatever it gets.
            runs = not has_parameters and not self._takes_results(args, kwargs)
            self._inside = True
            try:
                output = inner(*args, **kwargs)
            finally:
                self._inside = False
            leaves, tree = tree_flatten(output)
            if not runs:
                self._check(module, leaves)
                self._made += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                self.frontier = [t.detach().clone() for t in leaves if isinstance(t, Tensor)]
                self.draws = _generators(self._model) != self._before
            seen = [_seen(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.calls.append(_RealCall(module, tree, seen, runs))
            if len(self.calls) == self._stop_after:
                raise _Reached
            return output

        return forward

    def _takes_results(self, args: Any, kwargs: Any) -> bool:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Hooks of frozen modules detach what they are handed: the same memory, another object.
        made = {_place(tensor) for tensor in self._made}
        return bool(tensors) and all(_place(tensor) in made for tensor in tensors)

    def _check(self, module: nn.Module, leaves: list[Any]) -> None:
        name = type(module).__name__
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    raise Unservable(
                        f"{name}, of the frozen layers, uses a weight that still trains (a tied "
                        "one)"
                    )
                if leaf.layout is not torch.strided or type(leaf) is not Tensor:
                    raise Unservable(
                        f"a frozen {name} returns a {type(leaf).__name__} of {leaf.layout}"
                    )
            elif next(tensors_within([leaf]), None) is not None:
                raise Unservable(f"a frozen {name} returns tensors inside a {type(leaf).__name__}")


def _seen(tensor: Tensor) -> _Seen:
    return _Seen(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _probe(
    model: nn.Module, frozen: set[nn.Module], batch: Batch, calls: list[_RealCall]
) -> _Recorder:
    """The same calls for two of the samples, in reverse order. On the way: what the frozen layers
    use and keep."""
    count = min(batch.size, 2 if batch.size > 2 else 1)
    few = batch.rows(range(batch.size - 1, batch.size - 1 - count, -1))
    kept = _kept_tensors(frozen)
    trace = Trace()
    recorder = _Recorder(model, frozen)
    with _uncompiled(), trace.listening(model):
        try:
            recorder.record(few, stop_after=len(calls))
        except Unservable:
            raise
        except Exception as error:
            raise Unservable(
                "the model does not take a part of the batch: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if [(c.module, c.runs) for c in recorder.calls] != [(c.module, c.runs) for c in calls]:
        raise Unservable("which frozen modules run depends on the input")
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [names[p] for p in trace.uses if p.requires_grad]
    if trained:
        raise Unservable(f"parameter {trained[0]!r} is used in front of the frontier and trains")
    after = _kept_tensors(frozen)
    for key, value in after.items():
        if key in kept and not _same_kept(kept[key], value):
            module, attribute = key
            raise Unservable(
                f"a frozen {type(module).__name__} keeps tensors from call to call, in its "
                f"attribute {attribute!r}"
            )
    return recorder


def _kept_tensors(modules: Iterable[nn.Module]) -> dict[tuple[nn.Module, str], Any]:
    """Tensors in attributes and buffers, with their versions; the tensors themselves, so that no
    other takes their place in memory."""
    found: dict[tuple[nn.Module, str], Any] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name in ("_parameters", "_modules"):
                continue
            if isinstance(value, Tensor | list | tuple | dict) and name[:1] != "_":
                tensors = list(tensors_within(value))
            elif name == "_buffers":
                tensors = [buffer for buffer in value.values() if buffer is not None]
            else:
                tensors = list(tensors_within(value)) if isinstance(value, Tensor) else []
            found[module, name] = [(tensor, tensor._version) for tensor in tensors]
    return found


def _same_kept(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(after) and all(
        one is other and one_version == other_version
        for (one, one_version), (other, other_version) in zip(before, after, strict=True)
    )


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
    gather what is asked for in the output, which is looked through."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith(("freezeout.", "torch.nn.utils.", "transformers."))


def _check_frontier(real: _Recorder, few: _Recorder, size: int) -> None:
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


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same samples agree, up to the order of summation: the norm
    of the difference is at most 1e-5 of the norm in fp32 on a CPU."""
    if one.dtype != other.dtype or not (one.is_floating_point() or one.is_complex()):
        return one.dtype == other.dtype and torch.equal(one, other)
    if _equal(one, other):
        return True
    bound = 1e-5 if one.device.type == "cpu" else 1e-2  # TF32
    if one.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(one.device.type):
        bound = 3e-2
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= bound * torch.maximum(one.norm(), other.norm()))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, where a NaN equals a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return (one.is_floating_point() or one.is_complex()) and bool(
        ((one == other) | (one.isnan() & other.isnan())).all()
    )


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
        if not _equal(a, b):
            return f"tensor {number} has other values"
    return None


def _without_padding(tensor: Tensor, batch: Batch) -> Tensor:
    if batch.lengths is None or tuple(tensor.shape[:2]) != (batch.size, batch.time):
        return tensor
    inside = torch.arange(batch.time)[None] < batch.lengths[:, None]
    return tensor[inside.to(tensor.device)]


def _specs(
    calls: list[_RealCall], probe: list[_RealCall], size: int, only_size: int | None
) -> list[Call]:
    count = min(size, 2 if size > 2 else 1)
    specs = []
    for call, other in zip(calls, probe, strict=True):
        if call.tree != other.tree:
            raise Unservable("what a frozen module returns depends on the number of samples")
        leaves = [
            _spec(leaf, match, size, count, only_size) if isinstance(leaf, _Seen) else leaf
            for leaf, match in zip(call.leaves, other.leaves, strict=True)
        ]
        specs.append(Call(call.module, call.tree, tuple(leaves), call.runs))
    return specs


def _spec(seen: _Seen, other: _Seen, size: int, few: int, only_size: int | None) -> TensorSpec:
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


def _scaled(calls: list[_RealCall], sibling: Plan, size: int) -> list[Call] | None:
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
            if not isinstance(leaf, _Seen):
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


def _forward(module: nn.Module) -> Callable[..., Any]:
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


def _generators(model: nn.Module) -> list[bytes]:
    """The state of every generator that a forward pass may draw from."""
    states = [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode()]
    if any(parameter.is_cuda for parameter in model.parameters()):
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states
