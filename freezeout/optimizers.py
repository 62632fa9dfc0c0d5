"""An optimizer whose groups are split by layer for the duration of each step.

The user's optimizer keeps its own `param_groups` and `state_dict`: learning-rate schedulers,
checkpoints and training frameworks see nothing else. Only inside `optimizer.step()` do groups
stand in their place that hold one layer's parameters each, with the group's own options and
`lr * factor`, and no frozen parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import FreezeOutError, InvalidType, InvalidValue
from .versions import make_state

Group = dict[str, Any]

_ATTACHED: WeakSet[Optimizer] = WeakSet()


def check_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple, or an error that names the one that cannot be split."""
    if isinstance(optimizers, Optimizer):
        optimizers = (optimizers,)
    elif not isinstance(optimizers, Iterable):
        raise InvalidType(
            f"optimizer must be a torch optimizer or a list of them, got {optimizers!r}"
        )
    checked = tuple(map(_unwrapped, optimizers))
    if not checked:
        raise InvalidValue("the list of optimizers is empty")
    for optimizer in checked:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise InvalidType(f"optimizer must be a torch optimizer, got {name}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InvalidType(
                "LBFGS cannot be used with FreezeOut: it keeps one flat history over all "
                "parameters and takes a missing gradient for zero"
            )
        if name == "ZeroRedundancyOptimizer":
            raise InvalidType(
                "ZeroRedundancyOptimizer cannot be used with FreezeOut: it keeps its own copy of "
                "the groups; FSDP2 (torch.distributed.fsdp.fully_shard) shards optimizer state too"
            )
        if optimizer in _ATTACHED:
            raise InvalidValue(
                f"another FreezeOut already drives this {name}; call its release() first"
            )
    if len(set(checked)) != len(checked):
        raise InvalidValue("the same optimizer is listed twice")
    return checked


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer in a framework's wrapper (Accelerate's, Lightning's): a stand-in that was never
    set up as an optimizer itself, and passes everything on."""
    inner = getattr(optimizer, "optimizer", None)
    stands_in = "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {})
    return _unwrapped(inner) if stands_in and isinstance(inner, Optimizer) else optimizer


class SplitOptimizer:
    """Splits one optimizer's groups by layer in every step.

    Args:
        optimizer: the user's.
        layer_of: number of each model parameter's layer. Parameters that the optimizer holds
            beside them (a loss's, say) are trained as the last layer's are.
        factors: gives each layer's learning-rate multiplier, now.
        num_frozen: gives how many layers, from the first, are frozen now.
        is_over: gives whether the run has ended: then a step changes nothing.
        names: of each model parameter and of its layer, for errors.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layer_of: Mapping[nn.Parameter, int],
        factors: Callable[[], Sequence[float]],
        num_frozen: Callable[[], int],
        is_over: Callable[[], bool],
        names: Mapping[nn.Parameter, tuple[str, str]],
    ) -> None:
        self.optimizer = optimizer
        self._layer_of, self._factors, self._num_frozen = layer_of, factors, num_frozen
        self._is_over, self._names = is_over, names
        self._groups_known = len(optimizer.param_groups)
        self._last = max(layer_of.values())
        # The user's groups while split ones stand in their place, else None.
        self._visible: list[Group] | None = None
        self._split: list[_Part] = []
        self._key: object = None  # what the split groups were made from
        self._calls = 0  # of `step` that are running, through our wrapper
        self._nested = 0  # hooks of a parent class's step, called by the optimizer's own
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        self.updates = 0  # calls of the optimizer's step
        self._idle = False  # all of its layers are frozen
        self._unscales: bool | None = None  # what it said of itself before
        self._own_step = optimizer.__dict__.get("step")
        optimizer.step = MethodType(self._restoring(optimizer.step), optimizer)  # type: ignore[method-assign]
        _ATTACHED.add(optimizer)

    def base_rates(self) -> Iterator[tuple[int, float]]:
        """(layer, learning rate of its group before the layer's factor), for each pair of
        layer and group."""
        for group in self.optimizer.param_groups:
            for layer in {self._layer(parameter) for parameter in group["params"]}:
                yield layer, float(group["lr"])

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of the state that is held, momenta and the like, and of the parameters that it is
        held for."""
        states = self.optimizer.state.items()
        held = [(parameter, list(map(_bytes, state.values()))) for parameter, state in states]
        return sum(sum(sizes) for _, sizes in held), sum(_bytes(p) for p, sizes in held if sizes)

    def drop_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget momenta and the like of parameters that are no longer trained."""
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def settle(self) -> None:
        """After layers have frozen or come back: tell gradient scalers, which insist on finding a
        gradient in each optimizer, whether there will be any."""
        num_frozen = self._num_frozen()
        groups = self.optimizer.param_groups
        self._set_idle(
            all(self._layer(p) < num_frozen for group in groups for p in group["params"])
        )

    def _set_idle(self, idle: bool) -> None:
        if idle == self._idle:
            return
        self._idle = idle
        own = self.optimizer.__dict__
        if idle:
            # Of an optimizer that unscales by itself they ask for none.
            self._unscales = own.get("_step_supports_amp_scaling")
            own["_step_supports_amp_scaling"] = True
        elif self._unscales is None:
            own.pop("_step_supports_amp_scaling", None)
        else:
            own["_step_supports_amp_scaling"] = self._unscales

    def detach(self) -> None:
        """Give the optimizer back as it was."""
        self._restore()
        self._set_idle(False)
        for handle in self._handles:
            handle.remove()
        # A scheduler built since may have wrapped our step; then it stays, and does nothing.
        step = self.optimizer.__dict__.get("step")
        if isinstance(step, MethodType) and getattr(step.__func__, "splits", None) is self:
            del self.optimizer.__dict__["step"]
            if self._own_step is not None:
                self.optimizer.__dict__["step"] = self._own_step
        make_state(self.optimizer, (p for g in self.optimizer.param_groups for p in g["params"]))
        _ATTACHED.discard(self.optimizer)

    def _layer(self, parameter: nn.Parameter) -> int:
        return self._layer_of.get(parameter, self._last)

    def _restoring(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step`, which on an exception, when post-hooks do not run, puts the groups back."""

        # Keeps the marks that learning-rate schedulers leave on the function.
        @wraps(step)
        def restoring(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            try:
                return step(*args, **kwargs)
            except BaseException:
                self._restore()
                raise
            finally:
                self._calls -= 1

        restoring.splits = self  # type: ignore[attr-defined]
        return restoring

    def _restore(self) -> None:
        if self._visible is not None:
            self.optimizer.param_groups, self._visible = self._visible, None
        self._nested = 0

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _refuse_capture(optimizer)
        if self._visible is not None:
            if self._calls:  # the step calls its parent class's step, which has hooks too
                self._nested += 1
                return args, kwargs
            self._restore()  # a step that failed where our wrapper had been replaced
        self.updates += 1
        factors = self._factors()
        groups = optimizer.param_groups
        self._refresh(groups, factors)
        if self._idle:
            self._ignore_scaler(optimizer)
        for part in self._split:
            part.fill(factors[part.layer])
        self._visible = groups
        optimizer.param_groups = [part.group for part in self._split]
        # args[0] is the optimizer: the hook sees the arguments of the unbound method.
        return tuple(map(self._outside, args)), {k: self._outside(v) for k, v in kwargs.items()}

    def _ignore_scaler(self, optimizer: Optimizer) -> None:
        """Hide the scale from an optimizer that only passes for one that unscales by itself."""
        scaled = optimizer.__dict__.get("found_inf") is not None  # a scaler calls
        if any(part.size for part in self._split):  # a group was added since
            self._set_idle(False)
            if scaled:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
                raise FreezeOutError(
                    f"a group was added to this {type(optimizer).__name__} when all its layers "
                    "were frozen, and its gradients may still be scaled: skip this step"
                )
        elif scaled:
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]

    def _outside(self, argument: Any) -> Any:
        """A closure sees the user's groups, as it would without FreezeOut."""
        if not callable(argument) or isinstance(argument, Optimizer):
            return argument

        @wraps(argument)
        def closure(*args: Any, **kwargs: Any) -> Any:
            inside = self.optimizer.param_groups, self._visible, self._nested
            self._restore()
            result = argument(*args, **kwargs)
            self.optimizer.param_groups, self._visible, self._nested = inside
            return result

        return closure

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._nested:
            self._nested -= 1
            return
        factors = self._factors()
        for part in self._split:
            part.carry_back(factors[part.layer])
        self._restore()

    def _refresh(self, groups: list[Group], factors: Sequence[float]) -> None:
        """Make the split groups again if the user's groups or the frozen layers have changed.

        While all layers have the same factor, as under a plan that anneals nothing, each group
        stays whole: a GPU is sent as few kernels as without FreezeOut."""
        num_frozen, is_over = self._num_frozen(), self._is_over()
        is_whole = len(set(factors[num_frozen:])) == 1
        those = [(id(group), *map(id, group["params"])) for group in groups]
        key = num_frozen, is_over, is_whole, those
        if key == self._key:
            return
        self._check_added(groups, num_frozen)
        # A checkpoint from before a freeze may have brought back what the freeze dropped.
        self.drop_state(p for p, layer in self._layer_of.items() if layer < num_frozen)
        self._split = []
        for group in groups:
            layers: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                layer = self._layer(parameter)
                if layer >= num_frozen:
                    layers.setdefault(self._last if is_whole else layer, []).append(parameter)
            if not is_over:
                make_state(self.optimizer, (p for params in layers.values() for p in params))
                self._split += [_Part(layer, group, layers[layer]) for layer in sorted(layers)]
        if not self._split:  # some optimizers look at their first group, whatever it holds
            self._split = [_Part(self._last, groups[0], [])]
        self._key = key

    def _check_added(self, groups: list[Group], num_frozen: int) -> None:
        """InvalidValue if a group has been added to train what is frozen."""
        for group in groups[self._groups_known :]:
            for parameter in group["params"]:
                if self._layer(parameter) < num_frozen:
                    name, layer = self._names[parameter]
                    raise InvalidValue(
                        f"a group was added to this {type(self.optimizer).__name__} for parameter "
                        f"{name!r}, but its layer {layer!r} is frozen and would not be trained; "
                        "leave the group out, or build FreezeOut anew with a plan that trains it"
                    )
        self._groups_known = len(groups)

    def _loaded(self, optimizer: Optimizer) -> None:
        self._key = None


def _refuse_capture(optimizer: Optimizer) -> None:
    """FreezeOutError if the step is being recorded into a CUDA graph."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if begun and torch.cuda.is_current_stream_capturing():
        raise FreezeOutError(
            f"{type(optimizer).__name__}.step() runs in a CUDA graph capture: each replay would "
            "train the layers that train now, frozen ones too, at the learning rates of now. "
            "Capture the forward and backward passes alone, anew whenever FreezeOut.step() returns "
            "layers, and call optimizer.step() outside; or use "
            "freezeout.parallel.compile_layers(freezer)"
        )


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


class _Part:
    """The share of one of the user's groups in one layer, or in all that are trained alike."""

    def __init__(self, layer: int, origin: Group, parameters: list[nn.Parameter]) -> None:
        self.layer, self._origin, self._parameters = layer, origin, parameters
        self.size = len(parameters)
        self.group: Group = {}
        self._given: Group = {}

    def fill(self, factor: float) -> None:
        """Take the user's group's options as they are now, with its learning rate scaled."""
        self._given = {**self._origin, "lr": self._origin["lr"] * factor}
        self._given["params"] = self._parameters
        self.group.clear()
        self.group.update(self._given)

    def carry_back(self, factor: float) -> None:
        """Give the user's group every value that the optimizer has changed in this part."""
        for key, value in self.group.items():
            if value is not self._given.get(key) and key != "params":
                if key != "lr":
                    self._origin[key] = value
                elif factor:
                    self._origin[key] = value / factor
