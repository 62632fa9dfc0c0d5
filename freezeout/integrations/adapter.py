"""What callbacks of training frameworks have in common."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Never

from torch import nn
from torch.optim import Optimizer

from ..cache import PrefixCache
from ..errors import InvalidValue
from ..freezer import FreezeOut
from ..layers import ExampleInputs, Layer, find_layers, given_layers
from ..layers.names import module_named, plain_names
from ..plan import Plan, check_plan
from ..planned import plan_layers
from ..schedule import Schedule, read_plan, refuse_options
from ..values import plain, whole_number
from .caching import RunCache, cache_options

Part = str | nn.Module


class Adapter:
    """FreezeOut's options, kept until a run has a model and optimizers.

    Args:
        schedule: the plan of what trains when; a `Schedule`, `Frozen` or other `Plan`, or the
            arguments of a Schedule in a mapping.
        total_steps: optimizer steps in the whole run; None: as many as the trainer says.
        layers: the layers in execution order, each a module or several, or their names as in
            `model.named_modules()`; None: they are found.
        freeze_every, anneal, keep_awake: as in `FreezeOut`.
        allow_schedule_change: a checkpoint may be of another schedule or length: go on from its
            step with this one (to lengthen a run, say).
        cache: keep what frozen layers compute of each sample, and serve it in their place: True,
            or options of `PrefixCache` in a mapping. Training and evaluation are served (not with
            `{"evaluation": False}`), prediction is not. Where the cache can have no part, a
            warning says why, and the run goes on without.

    Attributes:
        cache: the `PrefixCache` that training is served from, or was; None: there is none.
        freezer: the `FreezeOut` of the run that goes on, or went last; None before the first.
    """

    _of_run: tuple[str, ...] = ()  # attributes beside `freezer` that only a run has
    _caching: RunCache | None = None

    def __init__(
        self,
        schedule: Plan | Mapping[str, Any] | None = None,
        *,
        total_steps: int | None = None,
        layers: Sequence[Part | Sequence[Part]] | None = None,
        freeze_every: int = 1,
        anneal: bool = True,
        keep_awake: bool = False,
        allow_schedule_change: bool = False,
        cache: bool | Mapping[str, Any] = False,
        **unknown: Never,
    ) -> None:
        refuse_options(type(self).__name__, unknown, signature(type(self)).parameters)
        if isinstance(schedule, Mapping):
            schedule = read_plan(schedule)
        check_plan("schedule", schedule)
        if total_steps is not None:
            total_steps = whole_number("total_steps", total_steps)
        self.schedule = schedule
        self.total_steps = total_steps
        self.layers = layers
        self.freeze_every = whole_number("freeze_every", freeze_every)
        self.anneal = anneal
        self.keep_awake = keep_awake
        self.allow_schedule_change = allow_schedule_change
        self.freezer: FreezeOut | None = None
        self._cache_options = cache_options(cache)

    @property
    def cache(self) -> PrefixCache | None:
        """The cache of the run that goes on, or went last."""
        return None if self._caching is None else self._caching.training

    def _start(
        self,
        model: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        total_steps: int | None,
        *,
        found: Sequence[Any] | None = None,
        example_inputs: ExampleInputs = None,
        state: Mapping[str, Any] | None = None,
    ) -> FreezeOut:
        """The FreezeOut of a run, with the layers `found` unless the user gave others, brought
        to where `state` says."""
        given = self._given_layers(model)
        freezer = FreezeOut(
            model,
            optimizers,
            total_steps,
            schedule=self.schedule,
            layers=found if given is None else given,
            example_inputs=example_inputs,
            freeze_every=self.freeze_every,
            anneal=self.anneal,
            keep_awake=self.keep_awake,
        )
        if state is not None:
            try:
                freezer.load_state_dict(
                    dict(state), allow_schedule_change=self.allow_schedule_change
                )
            except BaseException:
                freezer.release()
                raise
        self.freezer = freezer
        return freezer

    def _frozen_from_start(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        total_steps: int | None,
        example_inputs: ExampleInputs = None,
    ) -> list[Layer]:
        """The layers that the run's FreezeOut will freeze at step 0, before it is built."""
        with warnings.catch_warnings():  # which FreezeOut will give
            warnings.simplefilter("ignore")
            if (layers := self._given_layers(model)) is None:
                found = find_layers(model, example_inputs)
            else:
                found = given_layers(model, layers, example_inputs)
        return plan_layers(
            model,
            found,
            optimizers,
            self.schedule or Schedule(),
            total_steps,
            freeze_every=self.freeze_every,
            keep_awake=self.keep_awake,
        ).frozen_from_start

    def _given_layers(self, model: nn.Module) -> list[Any] | None:
        return None if self.layers is None else [_resolved(model, each) for each in self.layers]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, such as Lightning makes for processes that it starts, have the
        options, and no part in the run that goes on."""
        of_run = {*self._of_run, "_caching"}
        state = {name: value for name, value in vars(self).items() if name not in of_run}
        return {**state, "freezer": None}

    def _end(self) -> None:
        """Leave an ordinary model and optimizers behind. `freezer` can still be asked what was."""
        if self.freezer is not None:
            self.freezer.release()

    def _options(self) -> dict[str, Any]:
        """The arguments that make another like this one, as plain values."""
        model = None if self.freezer is None else self.freezer.model
        names = {} if model is None else plain_names(model)
        layers = None if self.layers is None else [_named(names, each) for each in self.layers]
        return {
            "schedule": None if self.schedule is None else plain(self.schedule.describe()),
            "total_steps": self.total_steps,
            "layers": layers,
            "freeze_every": self.freeze_every,
            "anneal": self.anneal,
            "keep_awake": self.keep_awake,
            "allow_schedule_change": self.allow_schedule_change,
            "cache": False if self._cache_options is None else _plain_options(self._cache_options),
        }

    def _figures(self) -> dict[str, float]:
        """For logs: how many layers are frozen, and the shares of the FLOPs and of the time of the
        steps so far that this has saved, once they can be told."""
        if self.freezer is None:
            return {}
        figures = {"freezeout/num_frozen": float(self.freezer.num_frozen)}
        if (flops := self.freezer.flops_saved()) is not None:
            figures["freezeout/flops_saved"] = flops
        if (saved := self.freezer.seconds_saved()) is not None:
            figures["freezeout/saved_share"] = saved.share
        return figures


def _plain_options(options: Mapping[str, Any]) -> Any:
    """As a checkpoint in JSON takes them, and an adapter takes them back."""
    plainly: dict[str, Any] = {
        name: value if isinstance(value, str | int | None) else str(value)
        for name, value in options.items()
        if name != "depths"
    }
    if "depths" in options:
        depths = options["depths"]
        plainly["depths"] = depths if isinstance(depths, str) else list(depths)
    return plainly or True


def _named(names: Mapping[nn.Module, str], entry: Any) -> Any:
    """An entry of `layers`, with names in the place of modules."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, nn.Module):
        return names.get(entry)  # None before there is a run
    return [_named(names, part) for part in entry]


def _resolved(model: nn.Module, entry: Any) -> Any:
    """An entry of `layers`, with modules in the place of names."""
    if isinstance(entry, str):
        module = module_named(model, entry)
        if module is None:
            raise InvalidValue(f"layers names {entry!r}, which is no module of the model")
        return module
    if isinstance(entry, nn.Module) or not isinstance(entry, Iterable):
        return entry
    return [_resolved(model, part) for part in entry]
