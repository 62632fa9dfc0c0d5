"""Ctrl-C and SIGTERM are noted while a run or a sweep lasts, and mean what they did afterwards."""

import signal
from threading import Thread

import pytest

from freezeout.lab.signals import stop_signals
from freezeout.lab.sweep import _Stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def noted_twice(number: signal.Signals) -> None:
    signal.raise_signal(number)
    signal.raise_signal(number)
    raise ZeroDivisionError


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    noted: list[int] = []
    with pytest.raises(ZeroDivisionError), stop_signals(noted.append):
        noted_twice(number)
    assert noted == [number, number]
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone() -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    seen: list[object] = []

    def run() -> None:
        with stop_signals(lambda number: None):
            seen.extend(signal.getsignal(each) for each in NUMBERS)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_a_sweep_knows_which_signal_came_and_whether_it_came_again() -> None:
    stop = _Stop()
    with stop_signals(stop.note):
        assert (stop.number, stop.again) == (None, False)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.number, stop.again) == (signal.SIGTERM, False)
        signal.raise_signal(signal.SIGINT)
        assert (stop.number, stop.again) == (signal.SIGINT, True)
