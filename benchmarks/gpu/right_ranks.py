"""Two processes on one device that talk over gloo, beside one process with the whole batch:
python -m benchmarks.gpu.right_ranks RANK FOLDER DEVICE is one of them."""

import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from freezeout import FreezeOut, Schedule
from freezeout.parallel import check_ranks_agree, rewrap

from .part import Row, Setup, Wrong
from .right_proofs import exactly, largest_difference, row

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 12, 16
SCHEDULE = Schedule(times=(0.25, 0.5, 0.75, 1.0), scale_lr=False)


def _network() -> nn.Sequential:
    """Four layers; without BatchNorm, whose batch is a rank's."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * 4 * 4, 32), nn.ReLU()),
        nn.Linear(32, 4),
    )


def _share(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 3, 8, 8, generator=generator)
    y = torch.randint(4, (ROWS,), generator=generator)
    part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return x[part], y[part]


def _train(device: torch.device, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """The model's state after training, and how many layers were frozen in each step."""
    model = _network().to(device)
    optimizer = SGD(model.parameters(), 0.05, 0.9, fused=True)
    example = _share(0, 0, 1)[0].to(device)
    freezer = FreezeOut(
        model, optimizer, STEPS, schedule=SCHEDULE, layers=list(model), example_inputs=example
    )
    net: Any = model
    if size > 1:
        check_ranks_agree(freezer)
        net = DistributedDataParallel(model)
    frozen = []
    for step in range(STEPS):
        x, y = _share(step, rank, size)
        torch.autograd.backward(cross_entropy(net(x.to(device)), y.to(device)))
        before = [p.detach().clone() for p in model[: freezer.num_frozen].parameters()]
        optimizer.step()
        optimizer.zero_grad()
        now = model[: freezer.num_frozen].parameters()
        if not all(torch.equal(p, value) for p, value in zip(now, before, strict=True)):
            raise Wrong(f"a frozen parameter moved in step {step} of rank {rank}")
        frozen.append(freezer.num_frozen)
        if freezer.step() and size > 1:
            net = rewrap(net)
    return {"model": {k: v.cpu() for k, v in model.state_dict().items()}, "frozen": frozen}


def two_ranks(setup: Setup) -> list[Row]:
    """Both ranks end with the same bits, and with what one process gets of the whole batch."""
    alone, _ = exactly(partial(_train, setup.device))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu.right_ranks"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder, str(setup.device)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=150)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        for rank, process in enumerate(ranks):
            if process.returncode:
                raise Wrong(f"rank {rank} ended with {process.returncode}: {said[rank][-2000:]}")
        one, other = (torch.load(Path(folder) / f"{i}.pt", weights_only=True) for i in range(2))
    if not alone["frozen"] == one["frozen"] == other["frozen"] or max(one["frozen"]) != 3:
        raise Wrong(f"layers frozen: {alone['frozen']}, {one['frozen']}, {other['frozen']}")
    between = largest_difference(_pairs(one, other))
    largest = largest_difference(_pairs(one, alone))
    if between:
        raise Wrong(f"the ranks differ by {between:.2g}")
    if largest > 1e-5:
        raise Wrong(f"two ranks differ from one process by {largest:.2g}")
    note = "the ranks' bits are equal; sums of two halves are in another order"
    return [row("two ranks beside one process", 1, int(largest == 0), largest, note)]


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return [(value, other["model"][name]) for name, value in one["model"].items()]


def main(rank: int, folder: Path, device: torch.device) -> None:
    """One rank."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found, _ = exactly(partial(_train, device, rank, 2))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
