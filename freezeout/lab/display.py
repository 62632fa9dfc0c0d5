"""What a person sees while a run trains: a live line in a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status

from ..words import duration


class LiveDisplay:
    """Lines on standard output, above a live one while the block lasts.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._line: Progress | Status | None = None  # a subclass sets it, in a terminal

    def __enter__(self) -> Self:
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._line is not None:
            self._line.stop()

    def say(self, text: str) -> None:
        """Print a line, above the live one if there is one."""
        self.console.print(text, markup=False)


class Display(LiveDisplay):
    """Shows a run's steps and epochs on standard output.

    Args:
        total_steps: steps of the whole run; `done`: those made before this process.
        num_layers: layers that freeze, for "frozen k/n".
        quiet: show nothing, as another rank does.
    """

    def __init__(self, total_steps: int, done: int, num_layers: int, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._num_layers = num_layers
        self._progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._line = self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  frozen {task.fields[frozen]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
                # Long enough to average over epochs, short enough to see steps get cheaper.
                speed_estimate_period=120,
            )
            self._task = self._progress.add_task(
                "train", total=total_steps, completed=done, epoch="", loss="", frozen=""
            )

    @property
    def live(self) -> bool:
        """Whether `step` shows anything: computing its arguments may be left out if not."""
        return self._progress is not None

    def step(self, step: int, epoch: str, loss: float, num_frozen: int, more: str = "") -> None:
        """Move the live line, which ends with `more`."""
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=step,
                epoch=epoch,
                loss=f"{loss:.3f}",
                frozen=f"{num_frozen}/{self._num_layers}{more}",
            )

    def epoch(self, row: dict[str, Any], epochs: int, seconds_left: float) -> None:
        """Print one epoch's line."""
        error = row["valid_error"]
        shown = f"error {error:6.2%}" if error is not None else f"train {row['train_error']:6.2%}"
        self.say(
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}  "
            f"{shown}  frozen {row['frozen_layers']}/{self._num_layers}  {row['seconds']:.1f} s  "
            f"{row['images_per_second']:.0f} images/s  {duration(seconds_left)} left"
        )
