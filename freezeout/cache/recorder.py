"""What the rest of a model calls of its frozen modules, seen in a real forward pass."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from ..layers import Trace
from ..layers.scratch import close, foreign_generators, generators, scratch, uncompiled
from ..versions import no_grad
from .inputs import Batch
from .placeholders import Unservable, tensors_within
from .plan import Reached, forward_of, overridden, restore

_BELOW_ONE = 1 - 2**-8  # in bfloat16 too


class Seen(NamedTuple):
    """What is to be known of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class RealCall(NamedTuple):
    module: nn.Module
    tree: TreeSpec
    leaves: list[Any]
    runs: bool

    @property
    def tensors(self) -> list[Seen]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Seen)]


class Recorder:
    """One real pass: what the rest of the model calls of the frozen modules.

    Attributes:
        calls: those calls, up to the last that matters.
        frontier: a copy of the tensors that the last one returned.
        output: the model's.
        draws: whether anything was drawn from a generator before the frontier.
        draws_outside_torch: whether from Python's or numpy's.
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
        self.calls: list[RealCall] = []
        self.frontier: list[Tensor] = []
        self.output: Any = None
        self.draws = self.draws_outside_torch = False
        self.drawn: list[bytes] = []
        self._before: list[bytes] = []
        self._foreign: list[bytes] = []
        self._made: list[Tensor] = []  # what frozen modules handed out
        self._inside = False
        self._stop_after: int | None = None

    def record(self, batch: Batch, stop_after: int | None = None) -> None:
        """Run the model, or its calls of frozen modules up to a number."""
        self._stop_after, batch = stop_after, batch.copied()
        kept = [(m, overridden(m, self._wrapped(m, forward_of(m)))) for m in self._modules]
        self._before, self._foreign = generators(self._model), foreign_generators()
        try:
            self.output = self._model(*batch.args, **batch.kwargs)
        except Reached:
            pass
        finally:
            for module, before in kept:
                restore(module, before)
        self.drawn = generators(self._model)
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
                self.draws = generators(self._model) != self._before
                self.draws_outside_torch = foreign_generators() != self._foreign
            seen = [_seen(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.calls.append(RealCall(module, tree, seen, runs))
            if len(self.calls) == self._stop_after:
                raise Reached
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


def _seen(tensor: Tensor) -> Seen:
    return Seen(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def probe(
    model: nn.Module, frozen: set[nn.Module], batch: Batch, calls: list[RealCall]
) -> Recorder:
    """The same calls for two of the samples, in reverse order. On the way: what the frozen layers
    use and keep."""
    count = min(batch.size, 2 if batch.size > 2 else 1)
    few = batch.rows(range(batch.size - 1, batch.size - 1 - count, -1))
    weightless = {m for m in model.modules() if next(m.parameters(), None) is None}
    kept = _kept_tensors(frozen | weightless)
    trace = Trace()
    recorder = Recorder(model, frozen)
    with uncompiled(), trace.listening(model):
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
    after = _kept_tensors(frozen | (weightless & set(trace.runs)))
    for key, value in after.items():
        if key in kept and not _same_kept(kept[key], value):
            module, attribute = key
            where = "frozen" if module in frozen else "preceding"
            raise Unservable(
                f"a {where} {type(module).__name__} keeps tensors from call to call, in its "
                f"attribute {attribute!r}"
            )
    return recorder


def check_draws(model: nn.Module, frozen: set[nn.Module], batch: Batch, real: Recorder) -> None:
    """Unservable if what is drawn in front of the frontier decides what reaches it. A drop rate of
    zero draws as well, and decides nothing: nor do the lowest and the highest numbers then."""
    reason = "random numbers that are drawn in front of the frontier decide what reaches it"
    if real.draws_outside_torch:
        raise Unservable(
            "Python's or numpy's random numbers are drawn in front of the frontier, and may decide "
            "what reaches it"
        )
    for value in (0, 1):
        again = Recorder(model, frozen)
        try:
            with scratch(model), no_grad(), uncompiled(), _Drawing(model, value):
                again.record(batch, stop_after=len(real.calls))
        except Exception as error:
            raise Unservable(reason) from error
        same = [(c.module, c.runs) for c in again.calls] == [(c.module, c.runs) for c in real.calls]
        if not same or not all(map(close, again.frontier, real.frontier)):
            raise Unservable(reason)


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever is drawn from torch's generators is the lowest number (0), or the highest (1)."""

    def __init__(self, model: nn.Module, value: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._value = model, value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = generators(self._model)
        out = func(*args, **(kwargs or {}))
        if generators(self._model) != before:  # attention without dropout draws nothing
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    # Uniform numbers are below 1.
                    below = self._value and "bernoulli" not in str(func)
                    tensor.fill_(
                        _BELOW_ONE if below and tensor.is_floating_point() else self._value
                    )
        return out


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
            found[module, name] = [(tensor, _version(tensor)) for tensor in tensors]
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_kept(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(after) and all(
        one is other and one_version == other_version
        for (one, one_version), (other, other_version) in zip(before, after, strict=True)
    )
