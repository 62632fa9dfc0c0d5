"""Seconds of work on a device."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

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


class Laps:
    """Seconds from each mark to the next, without waiting for the device.

    A CUDA device runs behind the program that gives it work, so the program's own clock would tell
    when work was given, not how long it took: there a mark is an event among the device's work, and
    its time is known once the device has come to it.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[Hashable, Any]] = deque()

    def mark(self, name: Hashable, device: torch.device) -> None:
        """Now, on the device, the lap called `name` ends."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def ended(self) -> Iterator[tuple[Any, float]]:
        """The laps that have ended since the last call, with their seconds. The first mark only
        begins the next one's lap, as does one on another kind of device."""
        marks = self._marks
        while len(marks) > 1:
            (_, begin), (name, end) = marks[0], marks[1]
            if isinstance(begin, float) != isinstance(end, float):
                marks.popleft()
            elif isinstance(begin, float):
                marks.popleft()
                yield name, end - begin
            elif begin.query() and end.query():
                marks.popleft()
                if begin.device == end.device:
                    yield name, begin.elapsed_time(end) / 1e3
            else:
                return
