"""When each module runs and each parameter is used: one forward pass, recorded."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidValue
from ..words import first_line
from .flow import Flow, Graph, memory_of
from .held import Writes, writes_always
from .marks import is_norm
from .scratch import places_of, scratch, uncompiled

# A tensor or any other single argument; a tuple of positional arguments; a mapping of keyword
# arguments; or the pair (tuple, mapping).
ExampleInputs = Any
Stack = tuple[nn.Module, ...]


class Trace:
    """The last run of each module and the last use of each parameter, on one clock.

    Attributes:
        runs: for each module that ran, the time at which its last run started and the modules
            running then, outermost first, itself included.
        uses: for each parameter used, the time of its last use and the modules running then. A
            use is an operation that takes the parameter, wherever it is called from.
        applied: for each parameter that was applied to data, itself or what was computed from it,
            the time at which it first was after its last use, and the modules running then.
        graded: the parameters that were used where autograd looks, which under `no_grad` it does
            not: a teacher's, say. None: not known. Other uses of them do not count.
        starts: every (time, module) at which a module started to run.
        flow: which modules fed which; None if no forward pass was seen.
        flops, saved: of each module that was the innermost one running, the FLOPs of its forward
            pass and the bytes that autograd kept of it; None if these were not counted.
        rows: items in the batch that was seen, 0 if it is not known.
        begin: the time at which the first parameter was used; None: no forward pass was seen.
        writes: modules that the forward pass wrote, norms aside, and the name of which tensor.
    """

    def __init__(self, flow: Flow | None = None) -> None:
        self.runs: dict[nn.Module, tuple[int, Stack]] = {}
        self.uses: dict[nn.Parameter, tuple[int, Stack]] = {}
        self.applied: dict[nn.Parameter, tuple[int, Stack]] = {}
        self.graded: set[nn.Parameter] | None = None
        self.starts: list[tuple[int, nn.Module]] = []
        self.flow = flow
        self.flops: dict[nn.Module, int] | None = None if flow is None else {}
        self.saved: dict[nn.Module, int] | None = None
        self.rows = 0
        self.begin: int | None = None
        self.writes: set[tuple[nn.Module, str]] = set()
        self._time = 0
        self._running: list[nn.Module] = []
        self._with_grad: list[bool] = []  # for each of them, whether autograd looked at its start

    @classmethod
    def of(cls, model: nn.Module, example_inputs: ExampleInputs) -> "Trace":
        """What there is to know: of a forward pass, one recorded before, or the definition."""
        refuse_scripted(model)
        _refuse_lazy(model)
        if isinstance(example_inputs, Trace):
            return example_inputs
        if example_inputs is None:
            return cls.of_definition(model)
        return cls.of_forward(model, example_inputs)

    @classmethod
    def recorder(cls) -> "Trace":
        """An empty one, for `listening()` to a forward pass."""
        return cls(Flow())

    @classmethod
    def of_forward(cls, model: nn.Module, example_inputs: ExampleInputs) -> "Trace":
        """Record `model` on `example_inputs`, in evaluation mode, leaving no mark on it: modes,
        buffers, random state and gradients are as before."""
        args, kwargs = call_arguments(example_inputs)
        if getattr(model.forward, "__func__", None) is nn.Module.forward:
            raise InvalidValue(
                f"a {type(model).__name__} has no forward() that example_inputs could be given to; "
                "leave example_inputs out and pass layers=, the modules in the order in which "
                "the loss runs them"
            )

        def recorded(weigh: bool) -> Trace:
            trace = cls.recorder()
            trace.rows = rows_of(args, kwargs)
            weighing = trace.weighing(model, example_inputs) if weigh else nullcontext()
            with _undisturbed(model), trace.listening(model), weighing:
                output = model(*args, **kwargs)
            trace.gave(output)
            return trace

        try:
            try:
                return recorded(weigh=True)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):  # which torch.func does not take
                    raise
                return recorded(weigh=False)
        except Exception as error:
            raise InvalidValue(
                "the forward pass on example_inputs failed with "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    @classmethod
    def of_definition(cls, model: nn.Module) -> "Trace":
        """What a forward pass that runs every module once, as defined, would record."""
        trace = cls()
        trace._define(model)
        trace.begin = None
        return trace

    def _define(self, module: nn.Module) -> None:
        self._start(module)
        for parameter in module.parameters(recurse=False):
            self._use(parameter)
        for child in module.children():
            self._define(child)
        self._end()

    def _start(self, module: nn.Module) -> None:
        self._time += 1
        self._running.append(module)
        self._with_grad.append(torch.is_grad_enabled())
        self.runs[module] = (self._time, tuple(self._running))
        self.starts.append((self._time, module))

    def _end(self) -> None:
        self._running.pop()
        self._with_grad.pop()

    def _use(self, parameter: nn.Parameter) -> None:
        self._time += 1
        self.begin = self.begin or self._time
        self.uses[parameter] = (self._time, tuple(self._running))

    def _take(self, parameter: nn.Parameter) -> None:
        """An operation that is seen takes the parameter. What happens to it under `no_grad` (a
        moving average is taken of it) is no use if it has another."""
        if self.graded is None:
            self.graded = set()
        if all(self._with_grad[-1:]) and (torch.is_grad_enabled() or _in_function()):
            self.graded.add(parameter)
        elif parameter in self.graded:
            return
        self._use(parameter)

    def gave(self, output: Any) -> None:
        """The forward pass returned this: parameters that no backward pass from it reaches, behind
        a `detach()` say, are not `graded`."""
        parameters = list(self.graded or ())
        reached = Graph({p: 1 << i for i, p in enumerate(parameters)}).behind(output)
        if reached:  # otherwise it is no tensor, or not made for training
            self.graded = {p for i, p in enumerate(parameters) if reached >> i & 1}

    def operation(self, func: Any, args: Any, kwargs: Any, taken: list[Any], given: Any) -> None:
        """One operation, which took and gave these values."""
        if self.flow is None:
            return
        for parameter in self.flow.record(self._running, taken, given, func._schema.is_mutable):
            before = self.applied.get(parameter)
            if before is None or before[0] < self.uses.get(parameter, before)[0]:
                self._time += 1
                self.applied[parameter] = (self._time, tuple(self._running))
        self.count(func, args, kwargs, given)

    def ahead(self, model: nn.Module) -> Iterator[nn.Module]:
        """Modules without parameters that ran on the raw input, before any parameter was used:
        augmentation, noise. They are on the data's side, and no part of what freezes. Not so what
        keeps statistics, which frozen layers depend on, and what a layer does before it uses its
        own weights (a convolution's padding)."""
        if self.begin is None:
            return
        keep = {module for module, _ in self.writes}
        for module in model.modules():
            if [part for part in module.modules() if part._parameters] == [module]:
                keep.update(module.modules())
        for module in model.modules():
            parts = set(module.modules())
            runs = [self.runs[part][0] for part in parts if part in self.runs]
            if (
                runs
                and next(module.parameters(), None) is None
                and max(runs) < self.begin
                and parts.isdisjoint(keep)
                and not any(is_norm(part) or writes_always(part) for part in parts)
            ):
                yield module

    def count(self, func: Any, args: Any, kwargs: Any, given: Any) -> None:
        """The FLOPs of an operation, by torch's own formulas, for the innermost module."""
        formula = flop_registry.get(func._overloadpacket)
        if formula is None or self.flops is None or not self._running:
            return
        module = self._running[-1]
        plain = getattr(formula, "__wrapped__", None)
        try:
            if plain is None or kwargs or not isinstance(given, torch.Tensor):
                flops = formula(*args, **kwargs, out_val=given)
            else:  # what torch's wrapper does, which takes structures apart, and its time
                shapes = (x.shape if isinstance(x, torch.Tensor) else x for x in args)
                flops = plain(*shapes, out_shape=given.shape)
        except Exception:  # a formula that does not know these arguments
            self.flops = None
        else:
            self.flops[module] = self.flops.get(module, 0) + int(flops)

    @contextmanager
    def weighing(self, model: nn.Module, inputs: Any) -> Iterator[None]:
        """Record what autograd keeps of each module inside the `with` block, beside parameters,
        buffers and what the model is given."""
        saved: dict[nn.Module, int] = {}
        self.saved = saved
        there = (*model.parameters(), *model.buffers(), *tree_leaves(inputs))
        fixed = {memory for each in there for memory in memory_of(each)}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            mine = memory_of(tensor)
            if self._running and mine and mine[0] not in fixed:
                fixed.add(mine[0])  # of tensors that share memory, the first
                module = self._running[-1]
                size = min(tensor.nbytes, tensor.untyped_storage().nbytes())
                saved[module] = saved.get(module, 0) + size
            # Its own node would keep a result that is handed back as it is, and never be freed.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @contextmanager
    def listening(self, model: nn.Module, running: bool = False) -> Iterator[None]:
        """Record what runs inside the `with` block; `running`: the model runs already."""
        refuse_scripted(model)

        def before(module: nn.Module, args: object, kwargs: object) -> None:
            self._start(module)
            if self.flow is not None:
                self.flow.enter(module, (args, kwargs))

        def after(module: nn.Module, args: object, output: object) -> None:
            self._end()

        handles: list[RemovableHandle] = []
        # A cast weight that autocast has kept would be used unseen.
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        writes = Writes(model.modules())
        try:
            if running:
                self._start(model)
            for module in model.modules():
                if running and module is model:
                    continue
                handles.append(
                    module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                )
                handles.append(module.register_forward_hook(after, always_call=True))
            with _UseListener(self, model):
                yield
        finally:
            torch.set_autocast_cache_enabled(cache)
            self.writes.update(writes.names())
            for handle in handles:
                handle.remove()


class _UseListener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a trace of every operation that takes one of the parameters."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace, self._parameters = trace, set(model.parameters())
        if trace.flow is not None:
            for parameter in self._parameters:
                trace.flow.know(parameter, parameter)
            for buffer in model.buffers():
                trace.flow.know_constant(buffer)
        # FSDP puts whole parameters in the place of shards while a module runs.
        modules = model.modules() if sharded_modules(model) else ()
        self._sharded = list(places_of(modules))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = tree_leaves((args, kwargs))
        for value in taken:
            if isinstance(value, nn.Parameter):
                if value in self._parameters:
                    self._take(value, value)
                elif self._sharded:
                    self._use_unsharded(value)
        given = func(*args, **(kwargs or {}))
        self._trace.operation(func, args, kwargs or {}, taken, given)
        return given

    def _take(self, parameter: nn.Parameter, value: nn.Parameter) -> None:
        """An operation takes the parameter, in the form of this value."""
        self._trace._take(parameter)
        if self._trace.flow is not None:  # its memory may be another by now
            self._trace.flow.know(parameter, value)

    def _use_unsharded(self, value: nn.Parameter) -> None:
        for _, own, name, parameter in self._sharded:
            if own.get(name) is value and isinstance(parameter, nn.Parameter):
                self._take(parameter, value)
                break


def _in_function() -> bool:
    """Whether the forward of an autograd function runs: inside of it autograd never looks."""
    codes = set(_forward_codes(torch.autograd.Function))
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _forward_codes(function: Any) -> Iterator[CodeType]:
    for kind in function.__subclasses__():
        code = getattr(getattr(kind, "forward", None), "__code__", None)
        if code is not None:
            yield code
        yield from _forward_codes(kind)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `torch.distributed.fsdp.fully_shard` has been applied to."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def refuse_scripted(model: nn.Module) -> None:
    """InvalidValue if a module is of TorchScript, which takes no hooks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"module {name!r}" if name else "the model"
            advice = (
                "build FreezeOut on it as it was before torch.jit.script or torch.jit.trace, and "
                "script the model after training"
                if any(p.requires_grad for p in module.parameters())
                else "as nothing in it trains, it may stand outside of the model's modules, in a "
                "list: self.part = [scripted]"
            )
            raise InvalidValue(
                f"{what} is scripted or traced (a {type(module).__name__}), so that nothing in it "
                f"can be watched or frozen; {advice}"
            )


def _refuse_lazy(model: nn.Module) -> None:
    """InvalidValue if a lazy module has no sizes yet, and so no parameters to speak of."""
    for name, module in model.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in own):
            raise InvalidValue(
                f"module {name!r} ({type(module).__name__}) has no sizes yet: make one forward "
                "pass, model(x), before the optimizer and FreezeOut are built"
            )


def call_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from the forms `example_inputs` may take."""
    match example_inputs:
        case (tuple() as args, Mapping() as kwargs):
            return args, dict(kwargs)
        case tuple():
            return example_inputs, {}
        case Mapping():
            return (), dict(example_inputs)
        case _:
            return (example_inputs,), {}


def rows_of(*values: Any) -> int:
    """Items in a batch: the first size of the first tensor that has one; 0: there is none."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return next((len(tensor) for tensor in tensors if tensor.ndim), 0)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers and random state as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(scratch(model, watched=True))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.enable_grad())
        # What the user froze might take attention's path for inference, and the rest not.
        mha = torch.backends.mha
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        for module in sharded_modules(model):
            stack.callback(module.reshard)  # the root keeps whole parameters after a forward pass
        yield
