"""Freezing under DistributedDataParallel, in real processes that talk over gloo."""

import gc
import multiprocessing as mp
import resource
import socket
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from multiprocessing.connection import Connection
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

from freezeout import FreezeOut, Frozen, Plan, Schedule, Timeline
from freezeout.errors import FreezeOutError, InvalidType, InvalidValue
from freezeout.parallel import check_ranks_agree, rewrap
from freezeout.versions import SYNC_BUFFERS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

BATCH, STEPS = 8, 20
Work = Callable[..., Any]


# --- processes ---------------------------------------------------------------------------


class Processes:
    """A few processes that do the same work together, each call in a process group of its own."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "freezeout.freezer", "freezeout.parallel"])
        self.pipes: list[Connection] = []
        self.workers = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, size, theirs), daemon=True)
            worker.start()
            self.pipes.append(mine)
            self.workers.append(worker)

    def run(self, work: Work, *args: Any) -> list[Any]:
        """What `work(rank, *args)` returns on each rank."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send((work, args, port))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(60), f"{work.__name__}: rank {rank} has not answered"
            answers.append(pipe.recv())
        for error, _ in answers:
            assert error is None, f"{work.__name__}: {error}"
        return [result for _, result in answers]

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()


def _serve(rank: int, size: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        work, args, port = pipe.recv()
        dist.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=size
        )
        try:
            pipe.send((None, work(rank, *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        gc.collect()  # wrappers that an exception has kept are gone before their group is
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.end()


# --- what they train ---------------------------------------------------------------------


def plain() -> nn.Sequential:
    """Without BatchNorm, whose batch is a rank's."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU()),
        nn.Linear(16, 4),
    )


def with_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
    )


def freezing(model: nn.Sequential, **options: Any) -> tuple[torch.optim.SGD, FreezeOut]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"schedule": Schedule(0.5, "squared"), "layers": list(model), **options}
    return optimizer, FreezeOut(model, optimizer, options.pop("total_steps", STEPS), **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (BATCH,), generator=generator)


def loss_of(net: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """Of a rank's share of the step's batch."""
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    x, y = batch(step)
    return nn.functional.cross_entropy(net(x[share]), y[share])


def gradients(
    rank: int, size: int, options: dict[str, Any], **plan: Any
) -> dict[int, dict[str, Tensor]]:
    """All gradients, at a step of every depth; size 1: of one process."""
    model = plain()
    optimizer, freezer = freezing(model, **plan)
    net: Any = DDP(model, **options) if size > 1 else model
    found = {}
    for step in range(STEPS):
        loss_of(net, step, rank, size).backward()  # type: ignore[no-untyped-call]
        found[freezer.num_frozen] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step() and size > 1:
            net = rewrap(net)
    return found


def known(**options: Any) -> dict[str, Any]:
    """Those of the options that this version of DistributedDataParallel has."""
    return {name: o for name, o in options.items() if name in signature(DDP.__init__).parameters}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    known(bucket_cap_mb_list=[0.001, 0.002], batched_grad_copy=True),
    {"find_unused_parameters": True, SYNC_BUFFERS: False},
]


def check_gradients(processes: Processes, size: int, options: dict[str, Any]) -> None:
    alone = gradients(0, 1, {})
    assert sorted(alone) == [0, 1, 2, 3, 4]
    for rank, found in enumerate(processes.run(gradients, size, options)):
        assert found.keys() == alone.keys(), rank
        for depth, expected in alone.items():
            assert found[depth].keys() == expected.keys(), (rank, depth)
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    found[depth][name], gradient, rtol=0, atol=1e-6, msg=f"{rank} {depth} {name}"
                )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_two_ranks_are_those_of_one_process(
    two: Processes, options: dict[str, Any]
) -> None:
    check_gradients(two, 2, options)


START = {"schedule": Frozen(2, then=Schedule(0.5, "squared"))}


def gradients_from_the_start(rank: int, size: int) -> Any:
    return gradients(rank, size, {}, **START)


def test_layers_frozen_from_the_start_are_not_waited_for(two: Processes) -> None:
    alone = gradients(0, 1, {}, **START)
    assert sorted(alone) == [2, 3, 4]
    for found in two.run(gradients_from_the_start, 2):
        assert found.keys() == alone.keys()
        for depth, expected in alone.items():
            assert found[depth].keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[depth][name], gradient, rtol=0, atol=1e-6)


def wrapped_too_early(rank: int) -> tuple[str, list[bool], bool]:
    """DDP, then a plan that freezes at once: the first step says so, and rewrap() mends it."""
    model = plain()
    net: Any = DDP(model)
    _, freezer = freezing(model, schedule=Frozen(2))
    said = ""
    try:
        loss_of(net, 0, rank, 2)
    except FreezeOutError as error:
        said = str(error)
    net = rewrap(net)
    for step in range(2):
        loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        found = [p.grad is not None for p in model.parameters()]
        model.zero_grad()
        freezer.step()
    late = DDP(model)
    loss_of(late, 0, rank, 2).backward()  # type: ignore[no-untyped-call]
    return said, found, all(p.grad is None for p in model[:2].parameters())


def test_ddp_that_was_built_before_layers_were_frozen_is_told_of_at_once(two: Processes) -> None:
    for said, found, rest in two.run(wrapped_too_early):
        assert "waits for gradients of 16 parameters, and only 8 are trained now" in said
        assert "freezeout.parallel.rewrap(ddp)" in said
        assert found == [False] * 8 + [True] * 8
        assert rest


@dataclass(frozen=True)
class Thawing(Plan):
    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline.of(num_layers, total_steps, [(0, 2), (3, 0)], freeze_every)


def thawed(rank: int, rewrapped: bool, options: dict[str, Any]) -> Any:
    model = plain()
    optimizer, freezer = freezing(model, schedule=Thawing())
    net: Any = DDP(model, **options)
    for step in range(6):
        try:
            loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        except FreezeOutError as error:
            return f"{step}: {error}"
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step() and rewrapped:
            net = rewrap(net)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
def test_layers_that_thaw_are_averaged_or_it_is_said(
    two: Processes, options: dict[str, Any]
) -> None:
    one, other = two.run(thawed, True, options)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for said in two.run(thawed, False, options):
        assert said.startswith("3: DistributedDataParallel averages the gradients of 8 parameters")


def test_gradients_of_four_ranks_are_those_of_one_process(four: Processes) -> None:
    check_gradients(four, 4, {})


# --- pain 3: DDP fixes its buckets when it is built ----------------------------------------


def train_without_rewrap(rank: int, options: dict[str, Any], told: bool) -> str:
    model = plain()
    optimizer, freezer = freezing(model)
    if not told:
        freezer._engaged.arm = lambda loaded=False: None  # type: ignore[method-assign]
    net = DDP(model, **options)
    for step in range(STEPS):
        try:
            loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, FreezeOutError) as error:
            return f"{freezer.num_frozen}: {error}"
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    return "trained"


@pytest.mark.parametrize("static", [False, True])
def test_the_naive_way_raises_where_rewrap_trains(two: Processes, static: bool) -> None:
    """The tests above train with both. FreezeOut says what to do before torch says that it is
    lost."""
    naive = two.run(train_without_rewrap, {"static_graph": static}, False)
    assert all(said.startswith("1: ") for said in naive), naive
    assert static or all("finished reduction" in said for said in naive), naive
    told = two.run(train_without_rewrap, {"static_graph": static}, True)
    assert all(said.startswith("1: ") and "rewrap(ddp)" in said for said in told), told


# --- bytes, buckets, hooks, memory ---------------------------------------------------------


def counting(
    state: list[int],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """A communication hook that counts the bytes it is given."""
    buffer = bucket.buffer()
    state[0] += buffer.numel() * buffer.element_size()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def count_bytes(rank: int) -> list[tuple[int, int, int]]:
    """(frozen layers, bytes reduced, bytes of trained parameters) of every step."""
    model = plain()
    optimizer, freezer = freezing(model)
    reduced, rows, old = [0], [], []
    net = DDP(model)
    net.register_comm_hook(reduced, counting)
    for step in range(STEPS):
        reduced[0] = 0
        loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        rows.append((freezer.num_frozen, reduced[0], trained))
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step():
            old.append(net)  # kept alive: its hooks must be gone all the same
            net = rewrap(net)
    return rows


def test_bytes_reduced_fall_with_the_trained_parameters(two: Processes) -> None:
    mine, theirs = two.run(count_bytes)
    assert mine == theirs
    assert {frozen for frozen, _, _ in mine} == {0, 1, 2, 3, 4}
    for frozen, reduced, trained in mine:
        assert reduced == pytest.approx(trained, rel=0.02), frozen
    assert len({reduced for _, reduced, _ in mine}) == 5


def carried(rank: int) -> dict[str, Any]:
    """The options of a wrapper made again, twice."""
    options: dict[str, Any] = {SYNC_BUFFERS: False, **known(skip_all_reduce_unused_params=True)}
    net = DDP(
        plain(),
        bucket_cap_mb=3,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
        process_group=dist.new_group(),
        **options,
    )
    default = rewrap(DDP(plain()))
    group, net = net.process_group, rewrap(rewrap(net.eval()))
    names = ("bucket_bytes_cap", "gradient_as_bucket_view", "find_unused_parameters")
    more = (*known(skip_all_reduce_unused_params=True), SYNC_BUFFERS, "training")
    return {name: getattr(net, name) for name in (*names, *more)} | {
        "group": net.process_group is group,
        "small first bucket": default.bucket_bytes_cap_default,
    }


def test_options_go_along(two: Processes) -> None:
    expected = {
        "bucket_bytes_cap": 3 * 2**20,
        "gradient_as_bucket_view": True,
        "find_unused_parameters": True,
        **known(skip_all_reduce_unused_params=True),
        SYNC_BUFFERS: False,
        "training": False,
        "group": True,
        "small first bucket": True,
    }
    assert two.run(carried) == [expected] * 2


def misuse(rank: int) -> list[str]:
    said = []
    net, not_wrapped = DDP(plain()), cast(Any, plain())
    new = rewrap(net, keep_hook=False)
    for call in (lambda: net(batch(0)[0]), lambda: rewrap(net), lambda: rewrap(not_wrapped)):
        try:
            call()
        except (FreezeOutError, InvalidType) as error:
            said.append(str(error))
    new.module[0][0].weight._in_backward_optimizers = []
    try:
        rewrap(new)
    except InvalidValue as error:
        said.append(str(error))
    return said


def test_misuse_is_said(two: Processes) -> None:
    for said in two.run(misuse):
        used, again, other, prototype = said
        assert "use what rewrap() gave" in used
        assert "use what rewrap() gave" in again
        assert "got Sequential" in other
        assert "cannot carry over an optimizer that runs in the backward pass" in prototype


def rewrap_often(rank: int, times: int) -> tuple[int, int]:
    """Growth of the process in bytes, and wrappers alive, after many rewraps of 4 MB."""
    net = DDP(nn.Linear(1000, 1000))
    x = torch.ones(1, 1000)

    def step() -> None:
        net(x).sum().backward()
        net.zero_grad()

    alive: weakref.WeakSet[DDP] = weakref.WeakSet()
    for i in range(times):
        if i == times // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        alive.add(net)
        if i % 10 == 0:
            step()
        net = rewrap(net)
    gc.collect()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return growth * (1 if sys.platform == "darwin" else 1024), len(alive)


def test_a_hundred_rewraps_leave_nothing_behind(two: Processes) -> None:
    for growth, alive in two.run(rewrap_often, 100):
        assert growth < 40e6  # one in ten leaking would be 36 MB or more
        assert alive <= 1


# --- ranks that agree --------------------------------------------------------------------


def depths(rank: int) -> list[int]:
    """num_frozen at every step, with a rank that is restored on the way."""
    model = plain()
    optimizer, freezer = freezing(model)
    check_ranks_agree(freezer)
    net, found = DDP(model), []
    for step in range(STEPS):
        loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step():
            net = rewrap(net)
        if step == STEPS // 2 and rank == 1:
            freezer.load_state_dict(freezer.state_dict())
        found.append(freezer.num_frozen)
    check_ranks_agree(freezer)
    return found


def test_ranks_never_disagree_on_the_depth(two: Processes) -> None:
    mine, theirs = two.run(depths)
    assert mine == theirs
    assert mine[-1] == 4


def disagreement(rank: int, options: list[dict[str, Any]]) -> str:
    model = plain()
    _, freezer = freezing(model, **options[rank])
    try:
        check_ranks_agree(freezer)
    except InvalidValue as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ({"schedule": Schedule(0.6, "squared")}, "t_0 is 0.5 on rank 0 and 0.6 on rank 1"),
        ({"schedule": Schedule(0.5)}, "how_scale is 'squared' on rank 0 and 'cubic' on rank 1"),
        ({"total_steps": 30}, "total_steps is 20 on rank 0 and 30 on rank 1"),
        ({"freeze_every": 5}, "freeze_every is 1 on rank 0 and 5 on rank 1"),
        ({"anneal": False}, "anneal is True on rank 0 and False on rank 1"),
        ({}, "nothing"),
    ],
)
def test_ranks_with_different_schedules_are_told_on_every_rank(
    two: Processes, theirs: dict[str, Any], line: str
) -> None:
    for said in two.run(disagreement, [{}, theirs]):
        assert said.removeprefix("the ranks differ: ") == line


def rewrap_at_another_depth(rank: int) -> str:
    model = plain()
    net = DDP(model)
    for p in model[: 1 + rank].parameters():
        p.requires_grad_(False)
    try:
        rewrap(net)
    except InvalidValue as error:
        return str(error)
    return "nothing"


def test_ranks_that_rewrap_at_different_depths_are_told(two: Processes) -> None:
    for said in two.run(rewrap_at_another_depth):
        assert said == (
            "the ranks differ: number of trained parameters is 12 on rank 0 and 8 on rank 1"
        )


# --- BatchNorm ---------------------------------------------------------------------------


def statistics(rank: int, sync: bool) -> list[tuple[int, list[Tensor], list[Tensor]]]:
    """(frozen layers, buffers of frozen layers, of trained ones) before each step but the first,
    under model.train(), then those of frozen layers a whole run later."""
    model = with_norms()
    optimizer, freezer = freezing(model)
    options: dict[str, Any] = {SYNC_BUFFERS: sync}
    net, rows = DDP(model, **options), []
    for step in range(STEPS):
        model.train()
        loss_of(net, step, rank, 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step():
            net = rewrap(net)
        frozen = freezer.num_frozen
        rows.append(
            (
                frozen,
                [buffer.clone() for buffer in model[:frozen].buffers()],
                [buffer.clone() for buffer in model[frozen:].buffers()],
            )
        )
    return rows


@pytest.mark.parametrize("sync", [False, True])
def test_statistics_are_equal_from_the_moment_a_layer_freezes(two: Processes, sync: bool) -> None:
    mine, theirs = two.run(statistics, sync)
    assert [frozen for frozen, _, _ in mine][-1] == 2
    differed = 0
    for (frozen, still, moving), (_, others, moving_others) in zip(mine, theirs, strict=True):
        assert len(still) == 3 * frozen
        assert all(torch.equal(a, b) for a, b in zip(still, others, strict=True))
        differed += sum(not torch.equal(a, b) for a, b in zip(moving, moving_others, strict=True))
    assert differed > 0  # they are each rank's own until then
    at = next(i for i, (frozen, _, _) in enumerate(mine) if frozen == 1)
    for a, b in zip(mine[at][1], mine[-1][1], strict=False):
        assert torch.equal(a, b)  # and no longer move
