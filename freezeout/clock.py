"""Seconds of work on a device."""

import time
from collections.abc import Callable

import torch


def wait(device: torch.device | None) -> None:
    """Until an accelerator has done what it was given. None, as the CPU, is not waited for."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device | None) -> float:
    """Seconds that `work` takes, begun when the device is idle and over when it is idle again."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start
