"""What a person sees: a live line in a terminal, plain lines elsewhere."""

import io
import re
from contextlib import redirect_stdout
from typing import Any

import pytest

from freezeout.lab.display import Display

ROW: dict[str, Any] = {
    "epoch": 3,
    "train_loss": 1.23456,
    "train_error": 0.5,
    "valid_error": 0.0625,
    "frozen_layers": 2,
    "seconds": 7.25,
    "images_per_second": 1234.5,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and nothing that makes rich take a file for a terminal or the reverse."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def shown_on(terminal: Terminal) -> list[str]:
    """What the terminal was sent, without colours and movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return re.split(r"[\r\n]+", text)


def test_elsewhere_an_epoch_is_a_line_and_steps_are_not_shown() -> None:
    plain = io.StringIO()
    with redirect_stdout(plain), Display(total_steps=92, done=0, num_layers=7) as display:
        assert not display.live
        display.say("a long line " * 20 + "[not markup]")
        display.step(10, "1/4", 2.5, 0)
        display.epoch(ROW, 10, 125.0)
        display.epoch(ROW | {"valid_error": None}, 4, 0.0)
    assert plain.getvalue().splitlines() == [
        "a long line " * 20 + "[not markup]",
        "epoch  3/10  loss 1.2346  error  6.25%  frozen 2/7  7.2 s  1234 images/s  2 min left",
        "epoch 3/4  loss 1.2346  train 50.00%  frozen 2/7  7.2 s  1234 images/s  0 s left",
    ]


def test_a_terminal_has_a_live_line_below_the_epochs() -> None:
    terminal = Terminal()
    with redirect_stdout(terminal), Display(total_steps=92, done=0, num_layers=7) as display:
        assert display.live
        display.step(46, "2/4", 2.5, 3)
        display.epoch(ROW, 4, 125.0)
    lines = shown_on(terminal)
    assert "epoch 3/4  loss 1.2346  error  6.25%  frozen 2/7  7.2 s  1234 images/s  2 min left" in (
        line.strip() for line in lines
    )
    live = [line for line in lines if "46/92" in line][-1]
    assert re.fullmatch(
        r"epoch 2/4 \S+ 46/92 loss 2\.500  frozen 3/7 \d:\d\d:\d\d left \S+", live.strip()
    )
    assert len(live) <= 80


def test_a_resumed_run_begins_where_it_stood() -> None:
    terminal = Terminal()
    with redirect_stdout(terminal), Display(total_steps=92, done=40, num_layers=7):
        pass
    assert any("40/92" in line for line in shown_on(terminal))


def test_the_cursor_is_given_back_after_an_error() -> None:
    terminal = Terminal()
    with redirect_stdout(terminal), pytest.raises(KeyboardInterrupt), Display(92, 0, 7):
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert 0 <= terminal.getvalue().rfind(hidden) < terminal.getvalue().rfind(shown)
