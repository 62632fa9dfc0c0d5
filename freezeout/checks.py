"""What FreezeOut checks as it goes: that freezing engaged, that the model is still the one it was
built for, that a state is of the same run, and that updates are counted, not micro-batches."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from .errors import CheckpointError, FreezeOutError, InvalidValue
from .layers import Layer
from .layers.flow import leaves_of, nodes_of
from .layers.held import Writes
from .layers.marks import copied_plainly, unhooked
from .layers.names import without_wrappers
from .layers.scratch import has_no_values
from .layers.trace import rows_of, sharded_modules
from .plan import Timeline
from .versions import guard_hooks

_WATCHED = 20  # steps after which missing updates are told
_BEGINNING = 2  # steps in which every forward pass is asked where its input comes from


class EngagedCheck:
    """Looks, in one training forward pass after each freeze, whether freezing did its work.

    Armed, it has two hooks on the model; after that forward pass they are gone. Those of the
    beginning stay for two steps: a discriminator, say, sees a generator's images only in its
    second forward pass, and what that means is better said before anything freezes.
    What it finds it warns of, once a kind, naming the module and the culprit. Reentrant activation
    checkpointing is refused, in the first training forward pass of all.

    It sees what runs eagerly. Inside a graph of `torch.compile` its hooks do nothing (and so are
    no reason to compile again); there `verify()`, after the update, sees frozen norms that move.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        self._handles: list[RemovableHandle] = []  # on the model, while armed
        self._inside: list[RemovableHandle] = []  # on its parts, for one forward pass
        self._owners: dict[nn.Module, Layer] = {}  # of modules with hooks
        self._active = False  # a training forward pass is running
        self._writes: Writes | None = None  # of that pass
        self._found: dict[str, str] = {}  # what is wrong with it: kind, message
        self._told: set[str] = set()
        self._steps_left = _BEGINNING
        self._is_called = False  # the model itself, in training; not where a method gives the loss
        self._graphs = _graphs()
        # Of frozen norms: layer, batches counted, and how many they were; None: not yet known.
        self._counters: list[tuple[str, Tensor, Tensor]] | None = None
        self._versions: list[int] = []  # of frozen parameters: what writes to them raises these
        self.to_verify = False
        self.rows = 0  # items in the batch of the last forward pass that was looked at
        for layer in layers:
            layer.tell_passes = self._tell_passes

    def arm(self, loaded: bool = False) -> None:
        """Look at the next training forward pass, and at frozen norms over the next update; or,
        when a state was `loaded`, over the one after it: the model's own may yet be loaded."""
        self._counters = None if loaded else self._count()
        self.to_verify = True
        if not self._handles:
            copied_plainly(self._model)
            self._handles = [
                self._model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
                self._model.register_forward_hook(self._end, always_call=True),
            ]

    def _look_inside(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks for one forward pass, which has begun: what is compiled is known by now."""
        compiled = set(_compiled(model))
        for layer in self._layers:
            for module in layer.boundary if layer.is_frozen else layer.modules:
                if module is model or module in compiled:
                    continue
                self._owners[module] = layer
                if layer.is_frozen:
                    yield module.register_forward_pre_hook(
                        self._enter_frozen, prepend=True, with_kwargs=True
                    )
                else:
                    yield module.register_forward_pre_hook(self._enter_trained)

    def _tell_passes(self) -> None:
        for layer in self._layers:
            layer.tell_passes = None
        if "passes" not in self._told:
            self._told.add("passes")
            warnings.warn(
                "what comes into the model requires a gradient: it passes through frozen layers, "
                "whose parameters get none, so such passes save less than others",
                stacklevel=4,
            )

    def disarm(self) -> None:
        """Stop looking; take every hook away."""
        self._leave()
        self._take_away()
        self._counters, self.to_verify = None, False
        for layer in self._layers:
            layer.tell_passes = None

    def _leave(self) -> None:
        """Take the hooks of one forward pass away."""
        for handle in self._inside:
            handle.remove()
        self._inside.clear()
        for module in self._owners:
            unhooked(module)
        self._owners.clear()
        self._active = False

    def verify(self) -> None:
        """After the update that follows a freeze: no frozen norm has counted a batch."""
        if self._steps_left:
            self._steps_left -= 1
            self._leave()
            if not self._steps_left:
                self._take_away()
            elif not self._is_called and _graphs() == self._graphs:
                # Nor did torch.compile make a graph of it: look at its parts in the next step.
                self._active = True
                self._inside += self._look_inside(self._model)
                for module in self._owners:
                    copied_plainly(module)
        if self._counters is None:
            self._counters = self._count()
            return
        # Weights that were rolled back, or loaded, bring their own counts.
        loaded = self._versions != self._count_versions()
        for name, counter, before in self._counters:
            if not loaded and bool((counter > before).all()):
                self._find(
                    "stale",
                    f"a norm of frozen layer {name!r} counted another batch, so a forward pass "
                    "from before the freeze still runs: a stale compiled graph "
                    "(skip_guard_eval_unsafe, a CUDA graph), or `.training` set by hand",
                )
        self._counters, self.to_verify = None, self._steps_left > 0
        self._tell()

    def _count_versions(self) -> list[int]:
        return [p._version for layer in self._layers if layer.is_frozen for p in layer.parameters]

    def _count(self) -> list[tuple[str, Tensor, Tensor]]:
        self._versions = self._count_versions()
        return [
            (layer.name, counter, counter.clone())
            for layer in self._layers
            if layer.is_frozen
            for module in layer.modules
            if isinstance(counter := getattr(module, "num_batches_tracked", None), Tensor)
        ]

    def begin(self) -> None:
        """If armed, look at the forward pass that begins, though the model itself is not called."""
        if self._handles:
            self._begin(self._model, ())

    def end(self, output: Any) -> None:
        """The end of that forward pass, or of the part that leads to `output`."""
        if self._active:
            self._end(self._model, (), output)

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if torch.compiler.is_compiling():
            guard_hooks()
            return
        self._leave()
        self._active = model.training and torch.is_grad_enabled()
        if self._active:
            self._is_called = True
            self.rows = rows_of(args, kwargs or {}) or self.rows
            own = set(model.parameters())
            if any(leaf not in own for leaf in leaves_of(tree_leaves((args, kwargs)))):
                self._tell_passes()
            _check_reducer(model)
            self._writes = Writes(model.modules())
            self._inside += self._look_inside(model)

    def _enter_trained(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or not self._active or torch.is_grad_enabled():
            return
        if _in_reentrant_checkpoint(sys._getframe()):
            self._refuse_reentrant(f"layer {self._owners[module].name!r}")

    def _enter_frozen(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not self._active:
            return
        if self._owners[module].passes(args, kwargs):
            self._tell_passes()

    def _end(self, model: nn.Module, args: object, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._active:
            return
        self._leave()
        writes, self._writes = self._writes, None
        if output is None:  # an exception, which is to be seen
            return
        if writes is not None:
            self._note_writers(writes)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        frozen: dict[Tensor, str] = {
            p: layer.name for layer in self._layers if layer.is_frozen for p in layer.parameters
        }
        nodes = set(nodes_of(tree_leaves(output)))
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            self._refuse_reentrant("the model")
        for variable in leaves_of(tree_leaves(output)):
            if variable in frozen and not variable.requires_grad:
                self._find(
                    "graph",
                    f"parameter {names.get(variable)!r} of frozen layer {frozen[variable]!r} is "
                    "still in the graph: the model keeps a tensor from before the freeze; compute "
                    "it anew, or detach it",
                )
        if frozen and any(map(_is_stale, nodes)):
            self._find(
                "stale",
                "a compiled graph from before the freeze still runs, and computes gradients of "
                f"frozen layers ({len(set(frozen.values()))} of them): a stale compiled graph "
                "(skip_guard_eval_unsafe); compile again",
            )
        if not self._steps_left:
            self._take_away()
        self._tell()

    def _take_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note_writers(self, writes: Writes) -> None:
        """Modules that write their own tensors get copies to write to once they are frozen. What
        is written in one that is frozen was not known, or is written from outside of it."""
        layer_of = {module: layer for layer in self._layers for module in layer.modules}
        for module, name in writes.names():
            layer = layer_of.get(module)
            if layer is not None and layer.is_frozen and name in module._parameters:
                raise FreezeOutError(
                    f"a forward pass writes parameter {name!r} of a {type(module).__name__} in "
                    f"layer {layer.name!r}, which is frozen and would not stand still: write it "
                    "outside of forward(), after optimizer.step(); or, if the module's own "
                    "forward() does it, build FreezeOut with example_inputs"
                )
            if layer is not None and layer.is_frozen:
                self._find(
                    "writes",
                    f"the model's forward pass goes on writing buffer {name!r} of a "
                    f"{type(module).__name__} in frozen layer {layer.name!r}, from outside of "
                    "that module's forward(), or where torch.compile has compiled it",
                )
            elif layer is not None:
                layer.writes.add((module, name))

    def _find(self, kind: str, message: str) -> None:
        if not self._found:  # what follows may well be the same culprit's
            self._found[kind] = message

    def _tell(self) -> None:
        for kind, message in self._found.items():
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(f"freezing did not fully engage: {message}", stacklevel=3)
        self._found.clear()

    def _refuse_reentrant(self, what: str) -> None:
        self._leave()
        raise FreezeOutError(
            f"{what} runs under reentrant activation checkpointing, which gives no gradient to "
            "what it runs where no input requires one; behind frozen layers none does, and the "
            "layers after them would silently stop learning; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def _check_reducer(model: nn.Module) -> None:
    """FreezeOutError if the model runs within a DistributedDataParallel that was built before
    layers were frozen or thawed: it would wait for gradients that never come, or leave some out."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or getattr(ddp, "logger", None) is None:
        return
    awaited = int(ddp._get_ddp_logging_data()["num_parameter_tensors"])  # type: ignore[no-untyped-call]
    given = sum(
        p.requires_grad and name not in ddp.parameters_to_ignore
        for name, p in ddp.module.named_parameters()
    )
    if given == awaited or (given < awaited and ddp.find_unused_parameters):
        return
    said = (
        f"waits for gradients of {awaited} parameters, and only {given} are trained now: it was "
        "built before layers were frozen"
        if given < awaited
        else f"averages the gradients of {awaited} parameters, but {given} are trained now: it was "
        "built before layers were thawed"
    )
    raise FreezeOutError(
        f"DistributedDataParallel {said}. Call ddp = freezeout.parallel.rewrap(ddp) after "
        "FreezeOut(...), if it froze any, and whenever step() returns layers; or wrap the model "
        "after FreezeOut(...)"
    )


def _compiled(model: nn.Module) -> Iterator[nn.Module]:
    """Modules inside what torch.compile compiled: a hook more or less there is a graph more."""
    for module in model.children():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            yield from module.modules()
        else:
            yield from _compiled(module)
    if model._compiled_call_impl is not None:
        yield from model.modules()


def _graphs() -> int:
    """How many graphs torch.compile has made."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


def _in_reentrant_checkpoint(frame: FrameType | None) -> bool:
    code = CheckpointFunction.forward.__code__
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def _is_stale(node: Any) -> bool:
    """Whether a compiled graph was made for more inputs that require gradients than it got."""
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    wanted = sum(info.requires_grad for info in getattr(metadata, "input_info", ()))
    return bool(wanted > sum(following is not None for following, _ in node.next_functions))


def check_unchanged(
    model: nn.Module, layers: Sequence[Layer], names: Mapping[nn.Parameter, str]
) -> None:
    """InvalidValue if the model's parameters (`names`: as they were called) or modules are not
    those of the layers any more."""
    modules = dict(model.named_modules())
    if sharded_modules(model):
        return  # FSDP2 puts other parameters in their place while it computes
    advice = "; change the model first, then build the optimizer and FreezeOut (or release() this)"
    now = {p: name for name, p in model.named_parameters()}
    for parameter, name in now.items():
        if parameter not in names:
            raise InvalidValue(
                f"parameter {name!r} was added to the model, or put in another's place, after "
                f"FreezeOut was built{advice}"
            )
    for parameter, name in names.items():
        if parameter not in now:
            raise InvalidValue(
                f"parameter {name!r} has gone from the model since FreezeOut was built{advice}"
            )
    known = {module: layer for layer in layers for module in layer.modules}
    for path, module in modules.items():
        # A wrapper (a compiled module, say) is no news.
        if module not in known and not any(inner in known for inner in module.modules()):
            raise InvalidValue(
                f"module {path!r} ({type(module).__name__}) was added to the model, or put in "
                f"another's place, after FreezeOut was built{advice}"
            )
    present = set(modules.values())
    for module, layer in known.items():
        if module not in present:
            raise InvalidValue(
                f"a {type(module).__name__} of layer {layer.name!r} has gone from the model since "
                f"FreezeOut was built{advice}"
            )


def check_state(
    state: Mapping[str, Any], mine: Mapping[str, Any], allow_schedule_change: bool
) -> bool:
    """CheckpointError unless the state is of a run with this configuration; whether its schedule
    is another one, which is allowed."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"a FreezeOut state is a dictionary, got {type(state).__name__}")
    missing = [key for key in ("step", "changes", *mine) if key not in state]
    if missing:
        raise CheckpointError(f"this is no FreezeOut state: it has no {missing[0]!r}")
    theirs = state["layers"]
    if not isinstance(theirs, list) or not all(isinstance(name, str) for name in theirs):
        raise CheckpointError(f"this is no FreezeOut state: its layers are {theirs!r}")
    # Of a model that was compiled, say, and is not any more.
    if list(map(without_wrappers, theirs)) != list(map(without_wrappers, mine["layers"])):
        raise CheckpointError(
            f"the checkpoint is of other layers: it has {_first_difference(theirs, mine['layers'])}"
        )
    changed = {key for key in mine if key != "layers" and state[key] != mine[key]}
    if changed and not allow_schedule_change:
        differences = "; ".join(
            f"{key} was {state[key]!r} and is now {mine[key]!r}" for key in sorted(changed)
        )
        raise CheckpointError(
            f"the checkpoint is of another schedule: {differences} (to go on with the new "
            "one, pass allow_schedule_change=True)"
        )
    step, total = state["step"], mine["total_steps"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"this is no FreezeOut state: it is at step {step!r}")
    if total is not None and step > total:
        raise CheckpointError(
            f"the checkpoint is at step {step} of a run that now has total_steps = {total}"
        )
    return bool(changed)


def _first_difference(theirs: list[str], mine: list[str]) -> str:
    for i, (a, b) in enumerate(zip(theirs, mine, strict=False)):
        if a != b:
            return f"{a!r} as layer {i}, this model {b!r}"
    return f"{len(theirs)} layers, this model {len(mine)}"


class GradientWatch:
    """Sees which layers the loss gives a gradient.

    The last layer never freezes, so that something trains to the end. If the loss does not use it
    (a pooler, under a mean over tokens), all that the loss does use would freeze in time, and
    torch would find nothing to differentiate. Of the first update this is an error; of later ones,
    as a loss may be off in some batches, a warning, once.
    """

    def __init__(
        self, layers: Sequence[Layer], optimizers: Iterable[Optimizer], timeline: Timeline
    ) -> None:
        self._layers, self._timeline = layers, timeline
        self._now = self._first = -1  # the last layer with a gradient: since step(), and at first
        self._is_told = False
        # After the step, since a closure computes gradients in it.
        watched = [e for e in optimizers if hasattr(e, "_optimizer_step_post_hooks")]
        self._waiting = set(watched)  # their first update is to come
        self._handles = [each.register_step_post_hook(self._after) for each in watched]

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Each optimizer's updates: by another's, gradients may be gone."""
        is_first = optimizer in self._waiting
        used = _is_used if is_first else _has_gradient
        reached = len(self._layers) - 1
        while reached >= 0 and not any(map(used, self._layers[reached].parameters)):
            reached -= 1
        self._now = max(self._now, reached)
        if is_first and any(_has_gradient(p) for g in optimizer.param_groups for p in g["params"]):
            self._first = max(self._first, reached)
            self._waiting.discard(optimizer)
            if not self._waiting and self._first >= 0:
                self._check(self._first)

    def stepped(self) -> None:
        """A step was made: warn if its loss used nothing that trains to the end."""
        last, self._now = self._now, -1
        if self._is_told or not 0 <= last < len(self._layers) - 1:
            return
        if last < max(self._timeline.depths):
            self._is_told = True
            warnings.warn(
                f"in this update the loss used nothing behind layer {self._layers[last].name!r}, "
                f"which is frozen from step {self._timeline.freeze_steps[last]} on: from then on "
                "nothing is left to train for such a loss, and its backward() fails. Leave such "
                "batches out, or give layers= with that layer and the last one as one",
                stacklevel=3,
            )

    def _check(self, last: int) -> None:
        """FreezeOutError if the last layer that the loss uses is to be frozen."""
        if max(self._timeline.depths) <= last:
            return
        unused = [repr(layer.name) for layer in self._layers[last + 1 :]]
        raise FreezeOutError(
            f"the loss does not use {' and '.join(unused)}: no gradient, or one of zeros, came "
            f"there in the first update. Layer {self._layers[last].name!r}, the last one that the "
            f"loss does use, would be frozen from step {self._timeline.freeze_steps[last]} on, and "
            "nothing would be left to train. Call requires_grad_(False) on what the loss does not "
            "use before you build the optimizer and FreezeOut; or, if a loss on it comes later, "
            "give layers= with it and an earlier layer as one"
        )

    def remove(self) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None


def _is_used(parameter: Tensor) -> bool:
    """Whether it has a gradient, of more than zeros: of a loss with weight 0."""
    grad = parameter.grad
    if grad is None or has_no_values(grad) or hasattr(grad, "_local_tensor"):
        return grad is not None
    return bool((grad._values() if grad.is_sparse else grad).any())


def hooked(parameters: Mapping[nn.Parameter, str]) -> tuple[str, str] | None:
    """The name of the first of the parameters that has a gradient hook, and what that is called."""
    for parameter, name in parameters.items():
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(parameter, attribute, None) or {}).values():
                home = getattr(hook, "__module__", None) or type(hook).__module__
                called = getattr(hook, "__qualname__", None) or type(hook).__qualname__
                return name, f"{home}.{called}"
    return None


class UpdateWatch:
    """Warns if most of the first steps came without an update: micro-batches counted as steps."""

    def __init__(self) -> None:
        self._steps = self._without = self._updates = 0

    def count(self, updates: int) -> bool:
        """One step more, so many updates having been made in all; False once it is done."""
        if self._steps == _WATCHED:
            if 2 * self._without > _WATCHED:
                warnings.warn(
                    f"{self._without} of the first {_WATCHED} calls of FreezeOut.step() had no "
                    "optimizer.step() before them: it counts updates, and layers would freeze too "
                    "early. Call it after each optimizer.step(), not after each micro-batch",
                    stacklevel=4,
                )
            return False
        self._steps += 1
        self._without += updates == self._updates
        self._updates = updates
        return True
