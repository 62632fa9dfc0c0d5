"""A model trained with a `PrefixCache` beside the same model without, every number compared."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_map_only

from freezeout import FreezeOut, PrefixCache, Schedule
from freezeout.cache.placeholders import tensors_within
from freezeout.layers.trace import ExampleInputs, call_arguments

NOTHING = "nothing there has a row for each sample"


class Wrong(AssertionError):
    """A served number that is not the model's own."""


@dataclass
class Report:
    """At which depths the model was served; why not at others; the largest relative difference
    of an activation from the one computed among other samples."""

    layers: int
    served: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    difference: float = 0.0


def check(model: nn.Module, inputs: ExampleInputs, depths: int = 4) -> Report:
    """Freeze the model in a few moves, and at each depth serve a batch that has been stored.

    Served and recomputed: outputs, gradients of every trained parameter, and activations, equal
    bit for bit. Raises `Wrong` otherwise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        freezer = FreezeOut(
            model, SGD(trained, 1e-3), 1000, example_inputs=inputs, schedule=Schedule(0.5)
        )
        last = len(freezer.layers) - 1
        report = Report(last + 1)
        wanted = sorted({max(1, round(last * i / depths)) for i in range(1, depths + 1)})
        batches = [_copied(inputs, 0), _copied(inputs, 1)]  # two samples each
        cache = PrefixCache(freezer, 4, depths="all", budget=2**30)
        for depth in wanted if last else []:
            freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
            model.train()
            refused = dict(cache._refused)
            for number, batch in enumerate(batches):
                _call(cache, batch, ids=[2 * number, 2 * number + 1])
            new = {d: why for (d, _), why in cache._refused.items() if (d, _) not in refused}
            if depth in new or depth not in cache._activations.ready:
                report.refused[depth] = new.get(depth, "; ".join(cache.refusals[-1:]) or NOTHING)
                continue
            before = cache.stats.hits
            _compare(model, cache, trained, batches[1])
            if cache.off is not None:
                report.refused[depth] = cache.off
                break
            if cache.stats.hits != before + 4:
                raise Wrong(f"depth {depth}: a stored batch was not served")
            report.served.append(depth)
            report.difference = max(report.difference, _mixed(cache, batches))
        freezer.release()
    return report


def _compare(model: nn.Module, cache: PrefixCache, trained: list[Any], batch: Any) -> None:
    def outcome(run: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(0)
        tensors = list(tensors_within(run()))
        loss = sum(t.float().square().mean() for t in tensors if t.requires_grad)
        if isinstance(loss, Tensor):
            torch.autograd.backward(loss)
        return [t.detach() for t in tensors], [p.grad for p in trained]

    outcome(lambda: _call(cache, batch, ids=[2, 3]))  # compared with the real forward inside
    with _buffers_kept(model):
        served, gradients = outcome(lambda: _call(cache, batch, ids=[2, 3]))
    args, kwargs = call_arguments(batch)
    real, expected = outcome(lambda: model(*args, **kwargs))
    if len(served) != len(real):
        raise Wrong(f"{len(served)} tensors served, {len(real)} expected")
    for one, other in zip(served, real, strict=True):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise Wrong("an output differs")
    for mine, theirs in zip(gradients, expected, strict=True):
        if (mine is None) != (theirs is None) or (
            mine is not None and theirs is not None and not torch.equal(mine, theirs)
        ):
            raise Wrong("a gradient differs")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])


def _mixed(cache: PrefixCache, batches: list[Any]) -> float:
    """The largest relative difference between stored activations and those recomputed in a batch
    of one sample from each stored batch."""
    from freezeout.cache.inputs import Batch

    one, other = (call_arguments(batch) for batch in batches)
    flat = [
        torch.stack((a[0], b[1])) if a.ndim and a.shape[0] == 2 else a
        for a, b in zip(tensors_within(one), tensors_within(other), strict=True)
    ]
    given = iter(flat)
    args, kwargs = tree_map_only(Tensor, lambda _: next(given), one)
    batch = Batch(args, kwargs, 2)
    plan = cache._plan_for(batch)
    assert plan is not None
    import numpy as np

    stored = cache._activations.read(plan.depth, batch, np.array([0, 3]))
    worst = 0.0
    for a, b in zip(stored, plan.prefix(batch), strict=True):
        worst = max(worst, float((a - b).double().norm() / b.double().norm().clamp_min(1e-30)))
    return worst


def _call(cache: PrefixCache, inputs: ExampleInputs, ids: list[int]) -> Any:
    args, kwargs = call_arguments(inputs)
    return cache(*args, **kwargs, ids=ids)


def _copied(inputs: ExampleInputs, number: int) -> ExampleInputs:
    """The same, or others that are as good."""
    generator = torch.Generator().manual_seed(number)

    def other(tensor: Tensor) -> Tensor:
        if number == 0:
            return tensor.clone()
        if tensor.is_floating_point():
            return tensor + torch.randn(tensor.shape, generator=generator)
        return tensor.flip(0) if tensor.ndim else tensor.clone()

    return tree_map_only(Tensor, other, inputs)
