"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoint.pt`, `model.safetensors`, and where
layers freeze `savings.json`.

Each file is replaced whole: whoever reads it, after a crash too, finds the old content or the new
one.
"""

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..atomic import write_atomically
from ..errors import CheckpointError, InvalidValue
from .runs import CONFIG, METRICS, SAVINGS, WEIGHTS

CHECKPOINT = "checkpoint.pt"


class RunFolder:
    """The files of one run, at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """InvalidValue if something of that name exists."""
        if path.exists():
            way_on = f"go on with {resume_command(path)}, or " if (path / CONFIG).exists() else ""
            raise InvalidValue(f"run folder {path} exists; {way_on}choose another with --out")

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """A new folder with its config.json. InvalidValue if something of that name exists; if
        the file cannot be written, the folder is taken away again."""
        cls.refuse_existing(path)
        path.mkdir(parents=True)
        folder = cls(path)
        try:
            folder.write_config(config)
        except OSError:
            path.rmdir()
            raise
        return folder

    def is_complete(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the weights are there, and these metrics: all that is written last."""
        metrics = self.path / METRICS
        return (
            (self.path / WEIGHTS).exists()
            and metrics.exists()
            and metrics.read_text() == _lines(rows)
        )

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started. CheckpointError if it is none."""
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is no run folder: it has no {CONFIG}")
        return cls(path)

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote. CheckpointError if it cannot be read."""
        try:
            config = json.loads((self.path / CONFIG).read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.path / CONFIG} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.path / CONFIG} holds no configuration")
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Everything needed to repeat the run."""
        self._write(CONFIG, json.dumps(config, indent=2) + "\n")

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One JSON object a line, one line an epoch."""
        self._write(METRICS, _lines(rows))

    def write_savings(self, savings: Mapping[str, Any]) -> None:
        """Predicted and measured seconds of a step at each depth (see prediction.py)."""
        self._write(SAVINGS, json.dumps(savings, indent=2) + "\n")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, once the new one is whole and on the disk."""
        # In memory first: a full disk is then an OSError that says so.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        self._write(CHECKPOINT, buffer.getbuffer())

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, None if there is none yet. CheckpointError if it is damaged."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch and zipfile raise a dozen kinds for damaged files
            raise CheckpointError(
                f"{path} is damaged or no checkpoint ({type(error).__name__})"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} is no checkpoint of a run")
        return state

    def save_weights(self, model: nn.Module) -> None:
        """The trained weights and buffers, as safetensors."""
        # Copies: safetensors takes neither shared nor channels-last memory.
        state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        self._write(WEIGHTS, save(state))

    def _write(self, name: str, content: str | bytes | memoryview) -> None:
        write_atomically(self.path / name, content)


def resume_command(path: Path) -> str:
    """What to type, into a shell, to go on with the run in `path`."""
    return f"freezeout train --resume {shlex.quote(str(path))}"


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
