"""FSDP2 on two processes: freezing, freed shards, and a distributed checkpoint, beside one process.

The processes are started once, for all tests; each test looks at what they found.
"""

import json
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from freezeout import FreezeOut, Frozen, Plan, Schedule

RANKS, STEPS, SAVED_AT = 2, 12, 7
# Half of the first FSDP unit, the other half, a whole unit, embeddings and head: never.
SCHEDULE = Schedule(times=(2 / 12, 4 / 12, 6 / 12, 1.0, 1.0), scale_lr=False)

# The first half of a unit from the start, the other half later.
START = Frozen(1, then=Schedule(times=(0.5, 1.0, 1.0, 1.0), scale_lr=False))

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Block(nn.Module):
    """A residual block, wide enough for both ranks to hold a share of it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(self.norm(x))))  # type: ignore[no-any-return]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(Block(), Block()), Block(), Block(), nn.Linear(8, 4))


def sharded() -> nn.Sequential:
    """A unit of two blocks, two of one, and the root's, which holds the classifier."""
    model = network()
    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in (*list(model)[:3], model):
        fully_shard(unit, mesh=mesh)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 8, generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def driven(
    model: nn.Module, optimizer: Optimizer, example: bool = True, plan: Plan = SCHEDULE
) -> FreezeOut:
    inputs = batch(0)[0] if example else None
    return FreezeOut(model, optimizer, STEPS, schedule=plan, example_inputs=inputs)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def local_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    tensors = (t for state in optimizer.state.values() for t in state.values())
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local if isinstance(t, Tensor))


def summed() -> float:
    """What torch's own FSDP2 multiplies the mean of the ranks' gradients by: 1, but over gloo the
    number of ranks in torch 2.7 and others, which take their sum."""
    model = nn.Linear(1, 2, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    torch.autograd.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad is not None
    return float(whole(model.weight.grad)[0, 0])


def train(
    model: nn.Module,
    optimizer: Optimizer,
    freezer: FreezeOut,
    steps: range,
    share: slice,
    divisor: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Train on this rank's share of each batch; after each step, what there is to compare."""
    for step in steps:
        x, y = batch(step)
        torch.autograd.backward(cross_entropy(model(x[share]), y[share]) / divisor)
        gradients = [None if p.grad is None else whole(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        yield {
            "gradients": gradients,
            "parameters": [whole(p) for p in model.parameters()],
            "num_frozen": freezer.num_frozen,
            "bytes": local_bytes(optimizer),
            "with_state": len(optimizer.state),
        }


def save(folder: Path, model: nn.Module, optimizer: Optimizer, freezer: FreezeOut) -> None:
    states = get_state_dict(model, optimizer)
    # As text, which the checkpoint keeps whole whatever it holds.
    state = json.dumps(freezer.state_dict())
    state_dict_saver.save(
        {"model": states[0], "optimizer": states[1], "freezer": state}, checkpoint_id=folder
    )


def load(folder: Path, model: nn.Module, optimizer: Optimizer, freezer: FreezeOut) -> None:
    state = {"freezer": ""}
    state_dict_loader.load(state, checkpoint_id=folder)
    # First: frozen parameters have no optimizer state to load.
    freezer.load_state_dict(json.loads(state["freezer"]))
    states = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])


def on_each_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    share = slice(4 * rank, 4 * rank + 4)
    divisor = summed()
    found: dict[str, Any] = {}
    for build in (adamw, momentum):
        model = sharded()
        optimizer = build(model)
        names = [name for name, _ in model.named_parameters()]
        freezer = driven(model, optimizer)
        found["layers"] = [
            (layer.name, [names[i] for i, p in enumerate(model.parameters()) if p in own])
            for layer in freezer.layers
            for own in [set(layer.parameters)]
        ]
        records = train(model, optimizer, freezer, range(SAVED_AT), share, divisor)
        before = list(records)
        checkpoint = folder / build.__name__
        save(checkpoint, model, optimizer, freezer)
        after = list(train(model, optimizer, freezer, range(SAVED_AT, STEPS), share, divisor))
        found[build.__name__] = before + after

        model = sharded()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0)  # whatever is right afterwards has been loaded
        optimizer = build(model)
        freezer = driven(model, optimizer)
        load(checkpoint, model, optimizer, freezer)
        resumed = list(train(model, optimizer, freezer, range(SAVED_AT, STEPS), share, divisor))
        found[f"{build.__name__} resumed"] = resumed
    model = sharded()
    optimizer = adamw(model)
    freezer = driven(model, optimizer, plan=START)
    found["start"] = list(train(model, optimizer, freezer, range(STEPS), share, divisor))
    # Without example inputs: the order is checked in the first forward pass.
    model = sharded()
    optimizer = adamw(model)
    freezer = driven(model, optimizer, example=False)
    found["checked"] = list(train(model, optimizer, freezer, range(3), share, divisor))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(on_each_rank, (port, folder), nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def alone(
    build: Callable[[nn.Module], Optimizer], plan: Plan = SCHEDULE
) -> tuple[FreezeOut, list[dict[str, Any]]]:
    """The same run in one process, on whole batches."""
    model = network()
    optimizer = build(model)
    freezer = driven(model, optimizer, plan=plan)
    return freezer, list(train(model, optimizer, freezer, range(STEPS), slice(None)))


def test_finds_the_layers_of_the_unsharded_model(ranks: list[dict[str, Any]]) -> None:
    model = network()
    freezer = driven(model, adamw(model))
    name_of = {p: name for name, p in model.named_parameters()}
    expected = [(layer.name, [name_of[p] for p in layer.parameters]) for layer in freezer.layers]
    assert len(expected) == 5
    for found in ranks:
        assert found["layers"] == expected


@pytest.mark.parametrize("build", [adamw, momentum])
def test_trains_as_one_process_does(
    ranks: list[dict[str, Any]], build: Callable[[nn.Module], Optimizer]
) -> None:
    _, expected = alone(build)
    assert [record["num_frozen"] for record in expected] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    for found in ranks:
        for record, reference in zip(found[build.__name__], expected, strict=True):
            assert record["num_frozen"] == reference["num_frozen"]
            for key in ("gradients", "parameters"):
                torch.testing.assert_close(record[key], reference[key], rtol=1e-5, atol=1e-5)


def test_frozen_from_the_start(ranks: list[dict[str, Any]]) -> None:
    freezer, expected = alone(adamw, START)
    first = [whole(p) for p in network().parameters()]
    held = [p in set(freezer.layers[0].parameters) for p in freezer.model.parameters()]
    assert [record["num_frozen"] for record in expected] == [1] * 5 + [2] * 7
    for found in ranks:
        for record, reference in zip(found["start"], expected, strict=True):
            assert record["num_frozen"] == reference["num_frozen"]
            assert record["with_state"] == reference["with_state"]
            for key in ("gradients", "parameters"):
                torch.testing.assert_close(record[key], reference[key], rtol=1e-5, atol=1e-5)
            for was, now, gradient, is_held in zip(
                first, record["parameters"], record["gradients"], held, strict=True
            ):
                assert torch.equal(was, now) == is_held
                assert not is_held or gradient is None


def test_frozen_shards_stay_and_their_state_is_freed(ranks: list[dict[str, Any]]) -> None:
    freezer, expected = alone(adamw)
    parameters = list(freezer.model.parameters())
    for found in ranks:
        records = found["adamw"]
        for record, following in pairwise(records):
            frozen = set().union(*(x.parameters for x in freezer.layers[: record["num_frozen"]]))
            for i, parameter in enumerate(parameters):
                same = torch.equal(record["parameters"][i], following["parameters"][i])
                assert same == (parameter in frozen)
                assert (following["gradients"][i] is None) == (parameter in frozen)
        for record, reference in zip(records, expected, strict=True):
            assert record["with_state"] == reference["with_state"]
    # Two ranks hold the state between them; the step counts (four bytes) are on both.
    for i, reference in enumerate(expected):
        together = sum(found["adamw"][i]["bytes"] for found in ranks)
        assert together == reference["bytes"] + 4 * reference["with_state"]
    assert expected[-1]["bytes"] < 0.4 * expected[0]["bytes"]


@pytest.mark.parametrize("build", [adamw, momentum])
def test_resumes_from_a_distributed_checkpoint(
    ranks: list[dict[str, Any]], build: Callable[[nn.Module], Optimizer]
) -> None:
    for found in ranks:
        whole_run, resumed = found[build.__name__], found[f"{build.__name__} resumed"]
        torch.testing.assert_close(resumed, whole_run[SAVED_AT:], rtol=0, atol=0)


def test_the_order_is_checked_in_the_first_forward_pass(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["checked"], found["adamw"][:3], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of FSDP1
def test_fsdp1_refuses_a_unit_that_is_half_frozen_and_fsdp2_takes_it() -> None:
    """FSDP1 makes one tensor of a unit's parameters, which requires a gradient or does not."""
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        model = network()
        model[0].requires_grad_(False)
        with pytest.raises(ValueError, match="uniform `requires_grad`"):
            FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        model = network()
        fully_shard(model)
        freezer = FreezeOut(model, SGD(model.parameters(), 0.1), STEPS, layers=list(model))
        while freezer.num_frozen < 1:
            freezer._optimizers[0].optimizer.step()
            freezer.step()
        torch.autograd.backward(model(torch.randn(3, 8)).sum())
        has_gradient = [p.grad is not None for p in model.parameters()]
        frozen = len(list(model[0].parameters()))
        assert has_gradient == [False] * frozen + [True] * (len(has_gradient) - frozen)
    finally:
        dist.destroy_process_group()
