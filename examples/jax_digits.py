"""A small convolutional network learns handwritten digits, with FreezeOut, in JAX.

pip install 'freezeout[jax]' scikit-learn
python examples/jax_digits.py
"""

import time
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from freezeout.integrations.jax import FreezeOut

EPOCHS, BATCH, WIDTHS, CLASSES = 10, 64, (16, 32, 32, 64), 10


def new_params(key: jax.Array) -> list[dict[str, jax.Array]]:
    """A list of layers: convolutions, and the classifier."""
    shapes = [(3, 3, *pair) for pair in pairwise((1, *WIDTHS))] + [(4 * 4 * WIDTHS[-1], CLASSES)]
    kernel = jax.nn.initializers.he_normal()
    return [
        {"kernel": kernel(jax.random.fold_in(key, i), shape), "bias": jnp.zeros(shape[-1])}
        for i, shape in enumerate(shapes)
    ]


def logits(params: Any, x: Any) -> Any:  # x: (batch, 8, 8, 1)
    for i, layer in enumerate(params[:-1]):
        stride = (2, 2) if i == 2 else (1, 1)
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
    return x.reshape(len(x), -1) @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    train, test = slice(0, 1408), slice(1408, None)
    steps_per_epoch = 1408 // BATCH
    params = new_params(jax.random.key(0))

    freezer = FreezeOut(loss_fn, optax.adamw(3e-3), total_steps=EPOCHS * steps_per_epoch)
    state = freezer.init(params)
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        order = np.random.default_rng(epoch).permutation(1408)
        for batch in np.split(order, steps_per_epoch):
            state, loss = freezer.step(state, images[train][batch], labels[train][batch])
        loss.block_until_ready()
        seconds, frozen = time.perf_counter() - start, freezer.num_frozen(state.step)
        print(f"epoch {epoch + 1:2}: loss {loss:.3f}, {frozen} frozen, {seconds:.2f} s")

    wrong = jnp.mean(logits(state.params, images[test]).argmax(1) != labels[test])
    print(f"test error {wrong:.2%}; {freezer.flops_saved():.0%} of the run's FLOPs saved")


if __name__ == "__main__":
    main()
