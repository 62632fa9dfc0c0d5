"""Loops that read the gradients of all parameters are named when FreezeOut is built, and hooks on
parameters before they fall silent."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from freezeout import FreezeOut, Frozen, Schedule
from tests.models import linear_net, run, vectors

STEPS = 20
MESSAGE = r"this loop reads \.grad of parameters that freeze: from step 8 on it is None"


def built(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> FreezeOut:
    optimizer = optimizer or SGD(model.parameters(), 0.1)
    return FreezeOut(model, optimizer, STEPS, **{"schedule": Schedule(0.4, "linear"), **options})


def norm_of(parameters: Iterable[nn.Parameter]) -> Any:
    return sum(p.grad.norm() for p in parameters)  # type: ignore[union-attr]


def shown(net: nn.Module) -> None:
    for name, p in net.named_parameters():
        print(name, p.grad)


def in_a_comprehension(model: nn.Module) -> None:
    built(model)
    max(p.grad.abs().max() for p in model.parameters())  # type: ignore[union-attr]


def in_a_loop(model: nn.Module) -> None:
    built(model)
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)  # type: ignore[arg-type]


def in_groups(model: nn.Module) -> None:
    optimizer = SGD(model.parameters(), 0.1)
    built(model, optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.clamp_(-1, 1)


def in_a_list_made_before(model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    built(model)
    for parameter in trained:
        parameter.grad += 1  # type: ignore[operator, assignment]


def in_a_function_called_with_parameters(model: nn.Module) -> None:
    built(model)
    norm_of(model.parameters())


def in_a_function_called_with_the_model(model: nn.Module) -> None:
    built(model)
    shown(net=model)


class Training:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.freezer = built(self.model)

    def log(self) -> list[Any]:
        return [p.grad.norm() for p in self.model.parameters()]  # type: ignore[union-attr]


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear_net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y

    def log(self) -> list[Any]:
        return [p.grad.norm() for p in self.parameters()]  # type: ignore[union-attr]


def in_a_method_of_the_model(model: nn.Module) -> None:
    built(Logging())


@pytest.mark.parametrize(
    "script",
    [
        in_a_comprehension,
        in_a_loop,
        in_groups,
        in_a_list_made_before,
        in_a_function_called_with_parameters,
        in_a_function_called_with_the_model,
        Training,
        in_a_method_of_the_model,
    ],
)
def test_a_loop_that_will_find_none_is_named(script: Callable[[nn.Module], Any]) -> None:
    raised = suppress(AttributeError, TypeError)  # nothing has gone backward here
    with pytest.warns(UserWarning, match=MESSAGE) as seen, raised:
        script(linear_net())
    (warning,) = seen
    assert warning.filename == __file__
    assert ".grad" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def with_a_question(model: nn.Module) -> None:
    built(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.clamp_(-1, 1)
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    assert [p.grad.norm() for p in model.parameters() if p.grad] == []


def over_another_model(model: nn.Module) -> None:
    other, model = model, linear_net()
    other(vectors(0)[0]).sum().backward()
    built(model)
    assert norm_of(other.parameters()) >= 0


def written_only(model: nn.Module) -> None:
    built(model)
    for parameter in model.parameters():
        parameter.grad = None


def nothing_freezes(model: nn.Module) -> None:
    built(model, schedule=Frozen(0))
    model(vectors(0)[0]).sum().backward()
    assert norm_of(model.parameters()) >= 0


@pytest.mark.parametrize(
    "script", [with_a_question, over_another_model, written_only, nothing_freezes]
)
def test_nothing_is_said_of_others(script: Callable[[nn.Module], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script(linear_net())


@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_that_falls_silent_is_named_once(after_backward: bool, late: bool) -> None:
    model = linear_net()
    calls: list[Any] = []
    optimizer = SGD(model.parameters(), 0.1)
    freezer = built(model, optimizer, example_inputs=vectors(0)[0])
    if late:
        run(model, [optimizer], freezer, vectors, range(3))
    weight: Any = model[0].weight
    if after_backward:
        weight.register_post_accumulate_grad_hook(calls.append)
    else:
        weight.register_hook(calls.append)
    begin = 3 if late else 0
    message = r"parameter '0\.weight' has a gradient hook \(builtins\.list\.append\), which is not"
    with pytest.warns(UserWarning, match=message) as seen:
        run(model, [optimizer], freezer, vectors, range(begin, 8 if late else 1))
    run(model, [optimizer], freezer, vectors, range(8 if late else 1, STEPS))
    assert len(seen) == 1
    assert len(calls) == 8 - begin


def test_hooks_on_what_never_freezes_are_not_named() -> None:
    model = linear_net()
    optimizer = SGD(model.parameters(), 0.1)
    freezer = built(model, optimizer, example_inputs=vectors(0)[0])
    weight: Any = model[6].weight
    weight.register_hook(torch.clone)
    run(model, [optimizer], freezer, vectors, range(STEPS))
    assert freezer.num_frozen == 3
