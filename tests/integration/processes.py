"""Runs in processes of their own, that tests start and some of which kill themselves."""

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
KILLED = -9


def process(*arguments: object, seconds: int = 150) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, in the repository's root, on one thread and without a network."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=seconds
    )


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` on several ranks of this machine."""
    return process(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *arguments)
    )


@contextmanager
def one_rank() -> Iterator[None]:
    """For a function that each of several ranks runs: on one thread, ended when all have ended."""
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that waits says where
    torch.set_num_threads(1)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
