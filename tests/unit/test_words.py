"""Durations, sizes, and errors of others in a line, as a person reads them."""

import doctest

import pytest

import freezeout.words
from freezeout.words import duration, first_line, size


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.0, "0 s"), (-0.001, "0 s"), (1e-9, "0 s"), (0.25, "0.25 s"), (7.26, "7.3 s")),
        *((42.3, "42 s"), (89.4, "89 s"), (90.0, "2 min"), (110.0, "2 min"), (300.0, "5 min")),
        *((89.4 * 60, "89 min"), (90 * 60.0, "1 h 30 min"), (7300.0, "2 h 2 min")),
        *((100 * 3600.0, "100 h 0 min"), (-42.3, "-42 s"), (-7300.0, "-2 h 2 min")),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**20, "1 MiB")),
        *((3.2e9, "2.98 GiB"), (100 * 2.0**30, "100 GiB"), (1010 * 1024, "1010 KiB")),
    ],
)
def test_sizes(count: float, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("message", "line"),
    [("one", "one"), ("\n one \n two\n", "one"), ("", ""), (" \n ", "")],
)
def test_the_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


def test_the_examples_in_the_documentation() -> None:
    result = doctest.testmod(freezeout.words)
    assert result.attempted == 3
    assert result.failed == 0
