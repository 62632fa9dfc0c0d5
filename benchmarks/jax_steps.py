"""A training step in JAX at each number of frozen layers, as a share of a full one.

    python -m benchmarks.jax_steps

Seconds and XLA's FLOPs of a convolutional network's compiled steps, batch 64, synthetic images.
Stages take turns; medians. The last line is the share of the run's time and FLOPs that freezing
saves, with the default schedule.
"""

import argparse
import time
from itertools import pairwise
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freezeout.cost import saving
from freezeout.integrations.jax import FreezeOut, TrainState

WIDTHS = (3, 32, 64, 64, 64, 128, 128)


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> Any:
    for i, layer in enumerate(params[:-1]):
        stride = (2, 2) if i in (1, 4) else (1, 1)
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, layer["w"], stride, "SAME", dimension_numbers=dimensions
        )
        x = jax.nn.relu(x + layer["b"])
    out = x.mean((1, 2)) @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()


def main() -> None:
    """Print a table of the stages, and what the run saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    key = jax.random.key(0)
    shapes = [(3, 3, *pair) for pair in pairwise(WIDTHS)] + [(WIDTHS[-1], 10)]
    init = jax.nn.initializers.he_normal()
    params = [{"w": init(key, shape), "b": jnp.zeros(shape[-1])} for shape in shapes]
    x, y = jax.random.normal(key, (64, 32, 32, 3)), np.arange(64) % 10
    total = 1000
    freezer = FreezeOut(loss_fn, optax.adamw(1e-3), total, compile_ahead=False)
    freezer.init(params)
    states = {k: freezer.init(params, step=step) for step, k in freezer.timeline.changes}

    def seconds(state: TrainState) -> float:
        start = time.perf_counter()
        freezer.step(state, x, y)[1].block_until_ready()
        return time.perf_counter() - start

    compile_seconds = {k: seconds(state) for k, state in states.items()}
    times: dict[int, list[float]] = {k: [] for k in states}
    for _ in range(1 + args.rounds):
        for k, state in states.items():
            times[k].append(seconds(state))
    medians = {k: median(each[1:]) for k, each in times.items()}
    flops = {k: freezer.flops(k) for k in states}
    print("frozen  ms a step  share   GFLOPs  share   compiled in")
    for k in states:
        print(
            f"{k:6}  {1e3 * medians[k]:9.1f}  {medians[k] / medians[0]:5.3f}  "
            f"{flops[k] / 1e9:7.3f}  {flops[k] / flops[0]:5.3f}  {compile_seconds[k]:8.2f} s"
        )
    share = saving(list(medians.values()), freezer.timeline.counts())
    device = jax.devices()[0].device_kind
    print(
        f"time saved {share:.1%}, FLOPs saved {freezer.flops_saved():.1%}; "
        f"{device}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()
