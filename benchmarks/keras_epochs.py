"""Seconds an epoch in Keras, as layers freeze, as a share of those of an ordinary run.

    KERAS_BACKEND=tensorflow python -m benchmarks.keras_epochs

One model trains with FreezeOut and one without, epoch by epoch in turn, on synthetic images. Two
epochs are made at each number of frozen layers; the second counts, as the first compiles.
"""

import argparse
import time
from typing import Any

import keras
import numpy as np
from keras import layers

from freezeout import Schedule
from freezeout.integrations.keras import FreezeOutCallback

WIDTHS, BATCH = (32, 64, 64, 64), 64


def new_model() -> Any:
    model = keras.Sequential([layers.Input((32, 32, 3))])
    for i, width in enumerate(WIDTHS):
        model.add(layers.Conv2D(width, 3, 2 if i == 1 else 1, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss=loss)
    return model


def main() -> None:
    """Print the seconds of each stage, with FreezeOut and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    x = generator.normal(size=(args.steps * BATCH, 32, 32, 3)).astype(np.float32)
    y = generator.integers(0, 10, len(x))
    stages = len(WIDTHS) + 1
    times = tuple((i + 1) / stages for i in range(stages))

    def epochs(model: Any, first: int, callbacks: list[Any]) -> list[float]:
        """Seconds of two epochs."""
        clock = Clock()
        model.fit(
            *(x, y, BATCH),
            epochs=first + 2,
            initial_epoch=first,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, clock],
        )
        return clock.seconds

    model, ordinary = new_model(), new_model()
    print("frozen  s an epoch  ordinary  share")
    for stage in range(stages):
        freezer = FreezeOutCallback(2 * stages * args.steps, schedule=Schedule(times=times))
        mine = epochs(model, 2 * stage, [freezer])[1]
        theirs = epochs(ordinary, 2 * stage, [])[1]
        print(
            f"{freezer.num_frozen:6}  {mine:10.2f}  {theirs:8.2f}  {mine / theirs:5.3f}", flush=True
        )
    print(f"{keras.config.backend()}, keras {keras.__version__}")


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)


if __name__ == "__main__":
    main()
