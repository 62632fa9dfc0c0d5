"""The recipe of examples/accelerate_loop.py, killed when it has saved at step STOP:

python -m tests.integration.accelerate_runs FOLDER STOP
"""

import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import tests.conftest  # noqa: F401  (first: lets torchvision be imported)

# isort: split

from tests.integration.test_examples import example


def one_run(folder: Path, stop: int, epochs: int = 4) -> tuple[ModuleType, Any]:
    """Saves at every third step; goes on from the last checkpoint in the folder."""
    torch.set_num_threads(1)
    recipe = example("accelerate_loop")
    save = recipe.save

    def save_and_stop(accelerator: Any, folder: Path, step: int) -> None:
        save(accelerator, folder, step)
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    recipe.save = save_and_stop  # type: ignore[attr-defined]
    return recipe, recipe.main(folder, epochs, 3)


if __name__ == "__main__":
    one_run(Path(sys.argv[1]), int(sys.argv[2]))
