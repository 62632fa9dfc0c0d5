"""Ctrl-C and SIGTERM, noted in place of ending the process."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM do no more than call `note` with their number. Outside
    of the main thread nothing is changed: whoever calls handles signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {each: signal.signal(each, lambda number, frame: note(number)) for each in numbers}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
