"""Runs in processes of their own, that tests start and some of which kill themselves."""

import os
import subprocess
import sys
from pathlib import Path

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
