"""`Laps`: seconds between marks, on the device's own clock where it has one."""

import time
from typing import Any

import pytest
import torch

from freezeout.clock import Laps

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Device:
    """CUDA's events in small: the device is `behind` the program, and is never waited for."""

    def __init__(self) -> None:
        self.done = 0.0  # milliseconds of its work done

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        device = self

        class Event:
            device = CUDA

            def record(self, stream: object) -> None:
                self.at = device.given

            def query(self) -> bool:
                return self.at <= device.done

            def elapsed_time(self, other: "Event") -> float:
                assert self.query()
                assert other.query()
                return other.at - self.at

        return Event()

    given = 0.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return device


def test_laps_of_a_cpu_are_those_of_the_programs_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    laps = Laps()
    for name in "abc":
        laps.mark(name, CPU)
    assert list(laps.ended()) == [("b", 0.5), ("c", 2.5)]
    assert list(laps.ended()) == []


def test_laps_of_cuda_are_known_once_the_device_has_come_to_them(cuda: Device) -> None:
    laps = Laps()
    for name, work in (("a", 5.0), ("b", 20.0), ("c", 30.0)):
        cuda.given += work
        laps.mark(name, CUDA)
    assert list(laps.ended()) == []  # the program is ahead
    cuda.done = 30.0
    assert list(laps.ended()) == [("b", 0.02)]
    cuda.done = 55.0
    assert list(laps.ended()) == [("c", 0.03)]


def test_a_model_that_changes_devices_has_no_lap_between(cuda: Device) -> None:
    laps = Laps()
    cuda.done = 100.0
    laps.mark("a", CPU)
    laps.mark("b", CUDA)
    cuda.given += 4.0
    laps.mark("c", CUDA)
    assert list(laps.ended()) == [("c", 0.004)]
    laps.mark("d", CPU)
    assert list(laps.ended()) == []
