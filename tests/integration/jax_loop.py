"""A run in JAX that saves its state after every step, to be killed and resumed.

    python -m tests.integration.jax_loop FILE KILL_AT

In a process without torch. Sends itself SIGKILL once KILL_AT steps have been made and saved.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freezeout import Schedule
from freezeout.integrations.jax import FreezeOut, TrainState

TOTAL, WIDTH, BATCH = 24, 8, 16
LAYERS = ("first", "second", "third", "last")


def params() -> dict[str, dict[str, jax.Array]]:
    """Four dense layers, in a dict whose sorted keys are not the order of execution."""
    keys = jax.random.split(jax.random.key(0), len(LAYERS))
    return {
        name: {"w": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, "b": jnp.zeros(WIDTH)}
        for name, key in zip(LAYERS, keys, strict=True)
    }


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for name in LAYERS:
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return jnp.mean((x - y) ** 2)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(step)
    x = generator.normal(size=(BATCH, WIDTH)).astype(np.float32)
    return x, np.tanh(x[:, ::-1])


def new_freezer(**changes: Any) -> FreezeOut:
    options: dict[str, Any] = {"layers": LAYERS, "schedule": Schedule(0.4, "linear")}
    warm = optax.linear_schedule(1e-3, 1e-2, 6)
    return FreezeOut(loss_fn, optax.adamw(warm, weight_decay=0.1), TOTAL, **(options | changes))


def save(state: TrainState, file: Path) -> None:
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, *jax.tree.leaves(state))
    os.replace(temporary, file)


def load(freezer: FreezeOut, file: Path) -> TrainState:
    """The saved leaves, in the structure that belongs to their step, which is the first."""
    with np.load(file) as saved:
        leaves = [saved[name] for name in saved.files]
    fresh = freezer.init(params(), step=int(leaves[0]))
    state: TrainState = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    return state


def run(freezer: FreezeOut, state: TrainState, file: Path | None = None, kill_at: int = 0) -> Any:
    while state.step < TOTAL:
        state, _ = freezer.step(state, *batch(int(state.step)))  # an array, when loaded
        if file is not None:
            save(state, file)
        if state.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return state


if __name__ == "__main__":
    assert sys.modules.get("torch") is None
    freezer = new_freezer()
    run(freezer, freezer.init(params()), Path(sys.argv[1]), int(sys.argv[2]))
