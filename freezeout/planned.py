"""Which of a model's layers count, and the plan for them.

Layers in which something trains count. In front of them, what the user froze, and what the plan
freezes from the start, are layers of their own. All others are joined to the next that counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from .errors import InvalidValue
from .layers import Layer
from .layers.layer import merged
from .layers.names import plain_names
from .plan import Plan, Timeline, bound


class Planned(NamedTuple):
    """The layers that count, the first `given` of which the user froze, and the plan for them."""

    layers: list[Layer]
    given: int
    plan: Plan
    timeline: Timeline

    @property
    def frozen_from_start(self) -> list[Layer]:
        """The layers that are frozen at step 0."""
        return self.layers[: self.timeline.num_frozen(0)]


def plan_layers(
    model: nn.Module,
    found: Sequence[Layer],
    optimizers: Sequence[Optimizer],
    schedule: Plan,
    total_steps: int | None,
    *,
    freeze_every: int,
    keep_awake: bool,
) -> Planned:
    """The layers of those `found` that count, and the plan for them. Arguments as `FreezeOut`'s.

    Leading layers that require gradients, but which no optimizer holds, are layers of their own if
    the plan freezes all of them from the start: an optimizer of what trains may well leave them
    out. Otherwise something else may train them, and they are joined to the next layer.

    Raises:
        InvalidValue: nothing trains, or the plan does not go with the layers.
    """
    # A name that a plan has been given may be with wrappers' parts or without.
    paths = {module: name for name, module in model.named_modules()}, plain_names(model)

    def planned(layers: list[Layer], given: int) -> Planned:
        names = [
            list(dict.fromkeys(each.get(module, "") for module in layer.modules for each in paths))
            for layer in layers
        ]
        plan, timeline = bound(schedule, names, given, total_steps, freeze_every)
        return Planned(layers, given, plan, timeline)

    layers, given, idle = _counted(found, optimizers, keep_awake, apart=True)
    if idle == given:
        return planned(layers, given)
    refusal: InvalidValue | None = None
    try:
        apart = planned(layers, given)
        if len(apart.frozen_from_start) >= idle:
            return apart
    except InvalidValue as error:
        refusal = error
    layers, given, _ = _counted(found, optimizers, keep_awake, apart=False)
    try:
        return planned(layers, given)
    except InvalidValue as error:
        raise refusal or error from None


def held_by(optimizers: Sequence[Optimizer]) -> set[nn.Parameter]:
    """The parameters that the optimizers hold."""
    return {p for each in optimizers for group in each.param_groups for p in group["params"]}


def _counted(
    found: Sequence[Layer], optimizers: Sequence[Optimizer], keep_awake: bool, apart: bool
) -> tuple[list[Layer], int, int]:
    """The layers that count; how many of them, the first ones, the user froze; and in how many no
    optimizer trains anything. Others of that kind are joined to the next layer; after the last, to
    that. `apart`: leading ones are not joined, whether they require gradients or not."""
    held = held_by(optimizers)
    trains = [any(p.requires_grad and p in held for p in layer.parameters) for layer in found]
    if not any(trains):
        raise InvalidValue(
            "the optimizer holds none of the model's parameters that require gradients "
            "(build it from model.parameters())"
        )
    counted: list[Layer] = []
    waiting: list[Layer] = []  # what belongs to the next layer that counts
    given, idle, by_user = 0, 0, not keep_awake
    for layer, counts in zip(found, trains, strict=True):
        waiting.append(layer)
        if not layer.parameters:
            continue
        by_user = by_user and not any(p.requires_grad for p in layer.parameters)
        is_leading = len(counted) == idle and not counts
        if counts or by_user or (is_leading and apart):
            counted.append(merged(layer.name, waiting))
            waiting = []
            given += by_user
            idle += is_leading
    if waiting:
        counted[-1] = merged(counted[-1].name, [counted[-1], *waiting])
    return counted, given, idle
