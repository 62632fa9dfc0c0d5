"""Whether an optimizer that torch does not come with does what freezing and annealing need.

What layers are promised holds only if the optimizer takes the learning rate of each group, takes
different ones, and can do without parameters that have left. There is no list of those that do. So
a few steps are made with a copy of the optimizer, on corners of its parameters, groups by hand.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import InvalidType
from .optimizers import is_innermost, is_torchs, optimizers_in
from .parts import Group, share_of, unshared

_CORNER = 4  # of each dimension of a tensor, so many
_BEFORE, _STEPS = 6, 18  # what is tried begins after so many steps, of so many
_TAKE_NO_RATE = {torch.optim.Rprop}  # of torch's own

_INSTEAD = (
    "pass anneal=False, so that layers freeze on time and train at the optimizer's own rates until "
    "then, or use another optimizer"
)


def check_rates(optimizers: Sequence[Optimizer], anneals: bool, differ: bool) -> None:
    """InvalidType, naming it, if an optimizer cannot do what the plan asks of it.

    Args:
        optimizers: the user's.
        anneals: whether layers that train get other rates than their groups'.
        differ: whether they get different ones.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        inner = [each for each in optimizers_in(optimizer) if is_innermost(each)]
        if anneals:
            for group in (group for each in inner for group in each.param_groups):
                if group.get("lr") is None:
                    raise InvalidType(
                        f"{name} keeps no learning rate in its groups (their 'lr' is missing or "
                        "None), so FreezeOut has nothing to anneal; give it a learning rate, or "
                        f"{_INSTEAD}"
                    )
        failure = _try(optimizer, anneals, differ)
        if failure is not None:
            if not is_innermost(optimizer):  # which may need a whole framework around it
                for each in inner:
                    _try(each, anneals, differ)
            _tell_untried(name, failure)


def _try(optimizer: Optimizer, anneals: bool, differ: bool) -> str | None:
    """InvalidType if the optimizer, tried out, does not do what is needed. Returns why it could not
    be tried out, if so."""
    if is_torchs(optimizer) and type(optimizer) not in _TAKE_NO_RATE:
        return None
    if not is_torchs(optimizer) and _may_communicate(optimizer):
        return "it uses torch.distributed, and several processes train together"
    try:
        with _aside(optimizer):
            refusal = _refusal(optimizer, anneals, differ)
    except Exception as error:  # whatever an unknown optimizer may raise
        return _said(error)
    if refusal is not None:
        name = type(optimizer).__name__
        raise InvalidType(f"{name} cannot be used with FreezeOut like this: {refusal}")
    return None


def _may_communicate(optimizer: Optimizer) -> bool:
    """Whether there are other processes, and its code knows torch.distributed: if not all of them
    tried it out at the same time, they would wait for ever."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    modules = [sys.modules.get(cls.__module__) for cls in type(optimizer).__mro__]
    known = [
        v for m in modules if m and not m.__name__.startswith("torch.") for v in vars(m).values()
    ]
    return distributed.get_world_size() > 1 and any(
        str(getattr(v, "__name__" if isinstance(v, ModuleType) else "__module__", "")).startswith(
            "torch.distributed"
        )
        for v in known
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _tell_untried(name: str, reason: str) -> None:
    warnings.warn(
        f"FreezeOut could not try {name} out on small tensors ({reason}); layers freeze, and are "
        "annealed, as they should only if its step() uses the learning rate of each group in "
        "param_groups and leaves alone what is not in them",
        stacklevel=4,
    )


@contextmanager
def _aside(optimizer: Optimizer) -> Iterator[None]:
    """Random numbers, warnings and compilation are left as they are outside."""
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    on_cuda = [device for device in devices if device.type == "cuda"]
    with (
        torch.random.fork_rng(on_cuda),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _refusal(optimizer: Optimizer, anneals: bool, differ: bool) -> str | None:
    """Why the optimizer cannot be used; None if it can."""
    try:
        usual = _usual(optimizer, differ)
    except Exception as error:  # see above
        if not differ:
            raise
        _usual(optimizer, apart=False)
        return (
            "its groups cannot be split by layer, as it keeps a table of them or of their "
            f"parameters beside them ({_said(error)}); pass anneal=False, so that they stay whole, "
            "or use another optimizer"
        )
    if anneals:
        slower = _run(optimizer, differ, rates=(0.001, 0.001))
        if all(map(torch.equal, usual.b, slower.b)):
            return (
                "it does not use the learning rate of its groups (in later steps), so layers "
                f"cannot be annealed; {_INSTEAD}"
            )
    if differ:
        refuses = "it takes one learning rate for all groups only"
        try:
            other = _run(optimizer, differ, rates=(0.5, 1.0))
        except Exception as error:  # see above
            return f"{refuses} ({_said(error)}); {_INSTEAD}"
        # One step on, and not later: the other parameter is another one from then on.
        if not torch.equal(usual.b[_BEFORE + 1], other.b[_BEFORE + 1]):
            return f"{refuses}: another group's changes how far this one moves; {_INSTEAD}"
    still = _run(optimizer, differ, has_gradient=False)
    advice = "use the optimizer that it is built around, or another one"
    try:
        gone = _run(optimizer, differ, has_gradient=False, is_left_out=True)
    except Exception as error:  # see above
        return (
            "it fails when parameters leave its groups, as frozen ones do "
            f"({_said(error)}); {advice}"
        )
    if not torch.equal(gone.a[_BEFORE], gone.a[-1]):
        return f"it moves parameters that have left its groups, as frozen ones do; {advice}"
    if not all(map(torch.equal, still.b, gone.b)):
        return (
            "when parameters leave its groups, as frozen ones do, it moves the others differently "
            "than when they only have no gradient (it may know parameters by their place, or take "
            f"a missing gradient for zero); {advice}"
        )
    return None


def _usual(optimizer: Optimizer, apart: bool) -> "_Track":
    """How it moves two parameters when nothing is done to it; ValueError if it does not."""
    usual = _run(optimizer, apart)
    for track in (usual.a, usual.b):
        if not all(bool(each.isfinite().all()) for each in track):
            raise ValueError("they came to hold numbers that are not finite")
        if torch.equal(track[_BEFORE], track[-1]):
            raise ValueError("it did not move them all")
    return usual


class _Track:
    """Where two parameters were before each step and after the last."""

    def __init__(self) -> None:
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []

    def note(self, a: Tensor, b: Tensor) -> None:
        self.a.append(a.detach().clone())
        self.b.append(b.detach().clone())


def _run(
    optimizer: Optimizer,
    apart: bool,
    rates: tuple[float, float] = (1.0, 1.0),
    has_gradient: bool = True,
    is_left_out: bool = False,
) -> _Track:
    """Steps of a copy of the optimizer on two parameters a and b.

    Args:
        optimizer: the user's.
        apart: whether a and b are in groups of their own.
        rates: what their learning rates are multiplied by, from the middle on.
        has_gradient: whether a has a gradient, from there on.
        is_left_out: whether a has left its group, from there on.
    """
    torch.manual_seed(0)
    trial = _small(optimizer, {})
    lists = list({id(g): g for each in optimizers_in(trial) for g in [each.param_groups]}.values())
    group = max((g for groups in lists for g in groups), key=lambda g: len(_of_use(g)))
    if not _of_use(group):
        raise ValueError("it holds no parameter that requires a gradient")
    if len(_of_use(group)) == 1:
        group["params"].append(_small(_of_use(group)[0], {}))
    a, *_, b = _of_use(group)
    made = {id(g): _by_hand(g, a) if apart else [g] for groups in lists for g in groups}
    for groups in lists:
        groups[:] = [each for g in groups for each in made[id(g)]]
    mine = [(g, p) for parts in made.values() for g in parts for p in (a, b) if _in(p, g)]
    base = {id(g): _rate(g, trial) for g, _ in mine}
    if callable(getattr(type(trial), "train", None)):
        trial.train()
    track = _Track()
    gradients: dict[Tensor, Tensor | None] = {}

    def give() -> Tensor:
        for p, gradient in gradients.items():
            p.grad = None if gradient is None else gradient.clone()
        return torch.zeros(())

    step = _plain_step(trial, give)
    for number in range(_STEPS):
        track.note(a, b)
        is_late = number >= _BEFORE
        for g, p in mine:
            if base[id(g)] is not None:
                g["lr"] = base[id(g)] * (rates[p is b] if is_late else 1.0)
            if is_late and is_left_out and p is a:
                g.update(share_of(g, [q for q in g["params"] if q is not a]))
        for groups in lists:  # what nothing is left of is not shown
            groups[:] = [g for g in groups if g["params"]]
        for p in (a, b):
            gradient = torch.randn(p.shape).to(p)
            gradients[p] = gradient if p is b or has_gradient or not is_late else None
        give()
        step()
    track.note(a, b)
    return track


def _of_use(group: Group) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad and p.numel()]


def _rate(group: Group, trial: Optimizer) -> Any:
    """The group's learning rate, or where that is 0, as schedulers begin, one that moves."""
    rate = group.get("lr")
    if rate is None or float(rate):
        return rate
    given = getattr(trial, "defaults", {}).get("lr")
    positive = float(group.get("initial_lr") or given or 0.01)
    return torch.full_like(rate, positive) if isinstance(rate, Tensor) else positive


def _by_hand(group: Group, a: Tensor) -> list[Group]:
    """The group as two, of `a` and of all others; for one without `a`, that group alone."""
    others = [p for p in group["params"] if p is not a]
    if not _in(a, group) or not others:
        return [group]
    other = {key: unshared(value, group["params"]) for key, value in group.items()}
    return [{**group, **share_of(group, [a])}, {**other, **share_of(group, others)}]


def _in(parameter: Tensor, group: Group) -> bool:
    return any(p is parameter for p in group["params"])


def _plain_step(trial: Optimizer, closure: Callable[[], Tensor]) -> Callable[[], None]:
    """Its class's step without hooks; with a closure where there has to be one."""
    step: Any = type(trial).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    needs_closure = False

    def plain() -> None:
        nonlocal needs_closure
        if not needs_closure:
            try:
                step(trial)
                return
            except Exception:
                needs_closure = True
                closure()  # it may have dropped the gradients before it failed
        step(trial, closure)

    return plain


def _small(value: Any, memo: dict[int, Any]) -> Any:
    """A copy in which of every tensor there is a corner only."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        raise TypeError("it holds a module")
    new: Any
    if isinstance(value, Tensor):
        memo[id(value)] = new = _corner(value)
    elif isinstance(value, Optimizer) or (not isinstance(value, type) and _is_like(value)):
        memo[id(value)] = new = object.__new__(type(value))
        for name, held in vars(value).items():
            hooks = name.startswith("_optimizer_") and isinstance(held, dict)
            if name != "step":
                vars(new)[name] = type(held)() if hooks else _small(held, memo)
    elif isinstance(value, dict):
        memo[id(value)] = new = copy(value)
        new.clear()
        new.update({_small(k, memo): _small(v, memo) for k, v in value.items()})
    elif type(value) in (list, tuple, set):
        new = type(value)(_small(each, memo) for each in value)
        memo[id(value)] = new
    elif isinstance(value, MethodType):
        new = MethodType(value.__func__, _small(value.__self__, memo))
    else:
        new = deepcopy(value, memo)
    return new


def _is_like(value: Any) -> bool:
    return hasattr(value, "__dict__") and len(optimizers_in(value)) > 1


def _corner(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "_local_tensor", tensor).detach()
    if local.device.type == "meta":
        raise TypeError("its parameters have no data")
    new = local[tuple(slice(_CORNER) for _ in local.shape)].clone()
    if new.dtype in (torch.float16, torch.bfloat16):
        new = new.float()  # which small steps move too
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)
