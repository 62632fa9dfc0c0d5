"""What a person sees while a sweep is at work: a live line in a terminal, plain lines elsewhere."""

from pathlib import Path

from rich.status import Status

from ..words import duration
from .display import LiveDisplay
from .runs import Run


class SweepDisplay(LiveDisplay):
    """Shows the runs of a sweep, on standard output.

    Args:
        total: runs of the whole sweep.
    """

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self._status = Status("", console=self.console) if self.console.is_terminal else None
        self._line = self._status

    def introduce(self, folder: Path, done: int, command: str) -> None:
        """Say what is going to be done, and how to go on with it."""
        before = f", {done} of them finished before" if done else ""
        self.say(f"{self.total} runs into {folder}{before}")
        self.say(f"if it is stopped, go on with: {command}")

    def progress(self, running: list[str], seconds_left: float | None) -> None:
        """Move the live line."""
        if self._status is not None:
            left = "" if seconds_left is None else f"; {duration(seconds_left)} left"
            self._status.update(" and ".join(running) + left)

    def finished(self, number: int, name: str, run: Run, seconds_left: float | None) -> None:
        """Print a finished run's line."""
        error = "" if run.error is None else f"error {run.error:.2%}, "
        left = "" if seconds_left is None else f"; {duration(seconds_left)} left"
        steps = f"{run.total_steps:,} steps, "
        self.say(f"{self._count(number)} {name}: {error}{steps}{duration(run.seconds)}{left}")

    def failed(self, number: int, name: str, reason: str, log: Path | None) -> None:
        """Print a failed run's line."""
        where = "" if log is None else f" (see {log})"
        self.say(f"{self._count(number)} {name}: FAILED: {reason}{where}")

    def finish(self, folder: Path) -> None:
        """Say where the runs are, and what to do with them."""
        self.say(f"look at them with: freezeout report {folder}")

    def _count(self, number: int) -> str:
        return f"[{number:>{len(str(self.total))}}/{self.total}]"
