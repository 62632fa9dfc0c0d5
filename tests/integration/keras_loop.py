"""A run of Keras with its own checkpoints, to be killed and resumed.

    KERAS_BACKEND=jax python tests/integration/keras_loop.py FOLDER [KILL_AT]

Sends itself SIGKILL when update KILL_AT begins. Stands alone: no other test file is imported, so
that it runs where torch is not installed.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers as kl

from freezeout import Schedule
from freezeout.integrations.keras import FreezeOutCallback

EPOCHS, STEPS, BATCH, CLASSES = 6, 5, 8, 3
SCHEDULE = Schedule(times=(0.2, 0.4, 0.75, 1))  # freezes at 6, 12 and 23 of 30, inside epochs too
ENDS = (6, 12, 23, 30)


def data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(STEPS * BATCH, 6)).astype(np.float32)
    return x, generator.integers(0, CLASSES, len(x))


def new_model(optimizer: Any = None, dropout: float = 0.0, **options: Any) -> Any:
    """Four dense layers, two of them with norms; the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            *(kl.Input((6,)), kl.Dense(4, name="one"), kl.BatchNormalization(name="norm")),
            *(kl.ReLU(), kl.Dropout(dropout, seed=3, name="dropout")),
            *(kl.Dense(4, name="two"), kl.BatchNormalization(name="norm_2"), kl.ReLU()),
            *(kl.Dense(8, activation="tanh", name="three"), kl.Dense(CLASSES, name="four")),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizer or keras.optimizers.AdamW(3e-3, weight_decay=0.1)
    model.compile(optimizer, loss=loss, **options)
    return model


def fit(model: Any, *callbacks: Any, **options: Any) -> Any:
    options = {"epochs": EPOCHS, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(*data(), callbacks=list(callbacks), **options)


class Kill(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def main() -> None:
    folder = Path(sys.argv[1])
    kill = [Kill(int(sys.argv[2]))] if len(sys.argv) > 2 else []
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    model = new_model()
    freezer = FreezeOutCallback(schedule=SCHEDULE)
    fit(model, freezer, backup, *kill)
    every = model.variables + model.optimizer.variables
    np.savez(folder / "final.npz", *[v.numpy() for v in every])


if __name__ == "__main__":
    main()
