"""FreezeOut in JAX: frozen leaves at rest, one graph a stage, the FLOPs that were foretold, the
paper's own weights, and resuming."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

from freezeout import FreezeOut as TorchFreezeOut
from freezeout import Frozen, Plan, Schedule, Timeline
from freezeout.cost import saving
from freezeout.errors import (
    CheckpointError,
    FreezeOutError,
    InvalidType,
    InvalidValue,
    LayerOrderError,
)
from freezeout.integrations.jax import FreezeOut, TrainState, learning_rates
from tests import reference
from tests.integration import jax_loop

ROOT = Path(__file__).parents[2]
SCHEDULES = [
    Schedule(),
    Schedule(0.5, "linear", scale_lr=False),
    Schedule(0.3, "squared"),
    Schedule(1),
    Schedule(times=(0.2, 0.2, 0.7, 1)),
]


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def new_freezer(optimizer: optax.GradientTransformation, **changes: Any) -> FreezeOut:
    """Freezes layer 0 at step 6, and 1 and 2 together at step 12, of 24."""
    options: dict[str, Any] = {"layers": jax_loop.LAYERS, "compile_ahead": False}
    options["schedule"] = Schedule(times=(0.25, 0.5, 0.5, 1))
    options["total_steps"] = jax_loop.TOTAL
    return FreezeOut(jax_loop.loss_fn, optimizer, **(options | changes))


def trained(freezer: FreezeOut, state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        state, _ = freezer.step(state, *jax_loop.batch(state.step))
    return state


# --- learning rates -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("freeze_every", [1, 7])
def test_learning_rates_are_the_torch_core_s(schedule: Schedule, freeze_every: int) -> None:
    base, total = 0.1, 60
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=base)
    core = TorchFreezeOut(
        model,
        optimizer,
        total,
        schedule=schedule,
        example_inputs=torch.zeros(1, 2),
        freeze_every=freeze_every,
    )
    schedules = learning_rates(base, 4, total, schedule, freeze_every)
    traced = jax.jit(lambda step: [rate(step) for rate in schedules])
    freezer = jax_loop.new_freezer(schedule=schedule, freeze_every=freeze_every)
    freezer.total_steps = total
    freezer.init(jax_loop.params())
    for step in range(total):
        expected = core.learning_rates
        np.testing.assert_allclose(traced(step), expected, rtol=0, atol=1e-7)
        assert tuple(base * each for each in freezer.factors(step)) == expected
        assert freezer.num_frozen(step) == core.num_frozen
        optimizer.step()
        core.step()


def test_a_learning_rate_of_its_own_schedule_is_multiplied() -> None:
    warm = optax.linear_schedule(0.0, 1.0, 10)
    rates = [rate(5) for rate in learning_rates(warm, 2, 20, Schedule(0.5, "linear"))]
    assert [float(rate) for rate in rates] == pytest.approx([0.5 * 1.0, 0.5 * 0.8535534], abs=1e-7)


# --- what a step does -----------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "accumulated": lambda: optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.1), 3),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "masked": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=is_matrix(jax_loop.params())),
    "divided": lambda: optax.transforms.partition(
        {"matrix": optax.adamw(1e-2), "vector": optax.sgd(1e-2, momentum=0.9)},
        lambda params: jax.tree.map(lambda m: "matrix" if m else "vector", is_matrix(params)),
    ),
}


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_are_at_rest_and_the_other_layers_state_is_carried_over(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    freezer = new_freezer(OPTIMIZERS[name]())
    state = freezer.init(jax_loop.params())
    prune = freezer._pruned

    def watched(state: TrainState, k: int) -> Any:
        pruned = prune(state, k)
        before = dict(leaves(state.opt_state))
        assert all(bits(before[path]) == bits(leaf) for path, leaf in leaves(pruned))
        gone = before.keys() - dict(leaves(pruned)).keys()
        assert gone
        assert not any(
            f"['{layer}']" in str(path) for path in gone for layer in jax_loop.LAYERS[k:]
        )
        return pruned

    monkeypatch.setattr(freezer, "_pruned", watched)
    for step in range(jax_loop.TOTAL):
        k = 0 if step < 6 else 1 if step < 12 else 3
        assert freezer.num_frozen(step) == k
        following, _ = freezer.step(state, *jax_loop.batch(step))
        for i, layer in enumerate(jax_loop.LAYERS):
            moved = bits(following.params[layer]) != bits(state.params[layer])
            assert moved == (i >= k and (name != "accumulated" or step % 3 == 2)), (step, layer)
        held = " ".join(jax.tree_util.keystr(path) for path, _ in leaves(following.opt_state))
        gone = freezer.num_frozen(step + 1)
        assert [f"['{layer}']" in held for layer in jax_loop.LAYERS] == [
            i >= gone for i in range(4)
        ]
        state = following
    assert sorted(freezer.compiled) == [0, 1, 3]


def test_weights_are_those_of_the_paper_written_out() -> None:
    """SGD, Nesterov momentum, weight decay; tanh layers. float32 in two libraries: their matrix
    products round differently, by about 1e-7 a step, hence the tolerance."""
    torch.manual_seed(0)
    total, width = 40, 8
    modules: list[Any] = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)]
    params = [
        {"w": each[0].weight.detach().numpy().T.copy(), "b": each[0].bias.detach().numpy().copy()}
        for each in modules
    ]
    batches = [jax_loop.batch(step) for step in range(total)]
    schedule = Schedule(0.4, "linear")
    optimizer = optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)
    )

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.mean((x - y) ** 2)

    freezer = FreezeOut(loss_fn, optimizer, total, schedule=schedule)
    state = freezer.init(params)
    for batch in batches:
        state, _ = freezer.step(state, *batch)
    reference.train(
        modules,
        nn.functional.mse_loss,
        [(torch.from_numpy(x), torch.from_numpy(y.copy())) for x, y in batches],
        schedule.freeze_steps(4, total),
        *(0.1, True, 0.9, 0.01),
    )
    for layer, module in zip(state.params, modules, strict=True):
        np.testing.assert_allclose(layer["w"].T, module[0].weight.detach(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(layer["b"], module[0].bias.detach(), rtol=0, atol=1e-5)


# --- graphs ---------------------------------------------------------------------------------


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How often XLA has compiled a train step, as JAX itself logs it."""
    config: Any = jax.config
    config.update("jax_log_compiles", True)  # in all threads, unlike jax.log_compiles()
    with caplog.at_level(logging.WARNING):
        yield lambda: sum(
            "Finished XLA compilation of jit(_update)" in record.getMessage()
            for record in caplog.records
        )
    config.update("jax_log_compiles", False)


@pytest.mark.parametrize(
    ("ahead", "freeze_every", "stages"),
    [(True, 1, (0, 1, 2, 3)), (True, 8, (0, 2)), (False, 1, (0, 1, 2, 3))],
)
def test_there_is_one_compilation_a_stage(
    ahead: bool, freeze_every: int, stages: tuple[int, ...], compilations: Callable[[], int]
) -> None:
    freezer = jax_loop.new_freezer(freeze_every=freeze_every, compile_ahead=ahead)
    state = freezer.init(jax_loop.params())
    state, _ = freezer.step(state, *jax_loop.batch(0))
    for future in freezer._graphs.values():
        future.result()
    assert compilations() == (2 if ahead else 1)  # the next is there before it is needed
    trained(freezer, state, jax_loop.TOTAL - 1)
    assert freezer.stages == stages
    assert compilations() == len(stages)
    assert tuple(sorted(freezer.compiled)) == stages


def test_compiling_ahead_changes_no_bit() -> None:
    results = []
    for ahead in (True, False):
        freezer = jax_loop.new_freezer(compile_ahead=ahead)
        results.append(bits(jax_loop.run(freezer, freezer.init(jax_loop.params()))))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "changed", [lambda x: x[:5], lambda x: x.astype(np.float16)], ids=["shape", "type"]
)
def test_another_kind_of_batch_gets_graphs_of_its_own(
    changed: Callable[[np.ndarray], np.ndarray], compilations: Callable[[], int]
) -> None:
    freezer = jax_loop.new_freezer(compile_ahead=False)
    state = freezer.init(jax_loop.params())
    for step in (0, 1, 2, 3):
        x, y = jax_loop.batch(step)
        state, _ = freezer.step(state, *((x, y) if step % 2 else (changed(x), changed(y))))
    assert compilations() == 2


def dense(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def conv(w: jax.Array, x: jax.Array) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)


def flops(function: Callable[..., Any], *inputs: Any) -> float:
    """XLA's count of one function alone, as it is written: nothing is fused or left out."""
    counted: Any = jax.jit(function).lower(*inputs).cost_analysis()
    return float(counted["flops"])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_flops_of_the_compiled_step_fall_as_foretold(kind: str) -> None:
    """Foretold from each layer alone: its product forward, its two products backward, its update.
    What remains is elementwise and small beside the products, hence the 3 %."""
    key = jax.random.key(0)
    product, widths = (dense, (96, 128, 128, 64, 96)) if kind == "mlp" else (conv, (4, 8, 12, 8))
    kernel, image = ((), ()) if kind == "mlp" else ((3, 3), (8, 8))
    params = [
        {"w": jax.random.normal(key, (*kernel, *pair)) / 10, "b": jnp.zeros(pair[1])}
        for pair in pairwise(widths)
    ]
    x = jax.random.normal(key, (32, *image, widths[0]))
    y = jnp.zeros((32, *image, widths[-1]))

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in params:
            x = jax.nn.relu(product(layer["w"], x) + layer["b"])
        return jnp.mean((x - y) ** 2)

    optimizer = optax.adamw(1e-3)
    n = len(params)
    times = tuple((i + 1) / n for i in range(n))
    freezer = FreezeOut(loss_fn, optimizer, n, schedule=Schedule(times=times))
    state = freezer.init(params)
    for _ in range(n):
        state, _ = freezer.step(state, x, y)

    forward: list[float] = []
    to_weights: list[float] = []
    to_inputs: list[float] = []
    update: list[float] = []
    for layer in params:
        w, out = layer["w"], product(layer["w"], x)
        forward.append(flops(product, w, x))
        for costs, of, fixed in ((to_weights, w, x), (to_inputs, x, w)):
            one = partial(product, fixed) if of is x else partial(_turned(product), fixed)
            transpose = jax.linear_transpose(one, of)  # a product's backward pass is its transpose
            costs.append(flops(transpose, out))
        update.append(flops(optimizer.update, layer, optimizer.init(layer), layer))
        x = out
    foretold = [
        sum(forward) + sum(to_weights[k:] + update[k:]) + sum(to_inputs[k + 1 :]) for k in range(n)
    ]
    counted = [freezer.flops(k) for k in range(n)]
    for k in range(1, n):
        assert counted[k] / counted[0] == pytest.approx(foretold[k] / foretold[0], rel=0.03)
    assert freezer.flops_saved() == pytest.approx(saving(foretold, [1] * n), rel=0.03)


def _turned(product: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, w: product(w, x)


def chain_of(count: int) -> list[jax.Array]:
    return [jnp.eye(4) + i / 100 for i in range(count)]


def product_loss(params: Any, x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


@pytest.mark.parametrize("plan", [Schedule(), Frozen(3, then=Schedule(0.2))], ids=str)
def test_a_run_has_few_graphs_by_default(plan: Plan) -> None:
    freezer = FreezeOut(product_loss, optax.sgd(0.1), 200, schedule=plan)
    freezer.init(chain_of(20))
    assert 7 <= len(freezer.stages) <= 8
    freezer = FreezeOut(product_loss, optax.sgd(0.1), 200, schedule=plan, freeze_every=1)
    freezer.init(chain_of(20))
    assert freezer.timeline == plan.timeline(20, 200)
    assert len(freezer.stages) > 15


def test_it_says_what_it_is() -> None:
    freezer = new_freezer(optax.sgd(0.1), schedule=Frozen(1))
    assert repr(freezer) == "FreezeOut(24 steps, Frozen(first=1))"
    assert str(freezer) == f"{freezer!r}: init(params) tells what the layers are"
    freezer.init(jax_loop.params())
    first, *table = str(freezer).splitlines()
    assert first == repr(freezer) == "FreezeOut(4 layers, 24 steps, Frozen(first=1))"
    assert [line.split() for line in table[:3]] == [
        ["layer", "parameters", "freezes", "at"],
        *(["first", "72", "start"], ["second", "72", "never"]),
    ]


# --- optimizers with extra arguments --------------------------------------------------------


def by_metric() -> optax.GradientTransformation:
    """A user's own: updates in proportion to a number that only the user knows."""

    def update(updates: Any, state: Any, params: Any = None, *, metric: Any, **extra: Any) -> Any:
        return jax.tree.map(lambda u: u * metric, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


EXTRA: dict[str, Callable[[], optax.GradientTransformation]] = {
    "plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(factor=0.9, patience=2, rtol=0.1)
    ),
    "polyak": lambda: optax.polyak_sgd(0.1),
    "momo": lambda: optax.contrib.momo(0.1),
    "accumulated": lambda: optax.MultiSteps(optax.polyak_sgd(0.1), 2),
    "injected": lambda: optax.inject_hyperparams(optax.polyak_sgd)(scaling=0.5),
    "sophia": lambda: optax.contrib.sophia(1e-3),
    "metric": lambda: optax.chain(by_metric(), optax.sgd(0.1)),
    "lbfgs": lambda: optax.lbfgs(0.5),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    ),
}


@pytest.mark.parametrize("name", EXTRA)
def test_optimizers_get_what_they_ask_for(name: str) -> None:
    """The weights are those of an ordinary run of optax over the layers that train."""
    params, optimizer, x = jax_loop.params(), EXTRA[name](), jax_loop.batch(0)
    freezer = new_freezer(optimizer, schedule=Frozen(2), total_steps=None)
    constant = {name: params[name] for name in jax_loop.LAYERS[:2]}
    others = {name: params[name] for name in jax_loop.LAYERS[2:]}
    state, opt_state = freezer.init(params), optimizer.init(others)
    given = {"metric": 0.25} if name == "metric" else {}

    def loss_of(others: Any) -> jax.Array:
        return jax_loop.loss_fn({**constant, **others}, *x)  # type: ignore[arg-type]

    @jax.jit
    def update(others: Any, opt_state: Any) -> Any:
        value, grad = jax.value_and_grad(loss_of)(others)
        asked: dict[str, Any] = {"value": value, "grad": grad, "value_fn": loss_of}
        if name == "sophia":
            asked = {"obj_fn": loss_of}
        take = optimizer if name == "accumulated" else optax.with_extra_args_support(optimizer)
        updates, opt_state = take.update(*(grad, opt_state, others), **(asked | given))
        return optax.apply_updates(others, updates), opt_state

    for _ in range(6):
        state, _ = freezer.step(state, *x, extra_args=given)
        others, opt_state = update(others, opt_state)
    assert bits({name: state.params[name] for name in constant}) == bits(constant)
    for mine, theirs in zip(
        jax.tree.leaves({name: state.params[name] for name in others}),
        jax.tree.leaves(others),
        strict=True,
    ):
        # Fused otherwise, which a search for the length of a step makes larger.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plateau", "polyak", "momo", "accumulated", "metric"])
def test_optimizers_with_extra_arguments_anneal_and_freeze(name: str) -> None:
    freezer = new_freezer(EXTRA[name](), compile_ahead=True)
    state = freezer.init(jax_loop.params())
    for step in range(jax_loop.TOTAL):
        previous, k = state, freezer.num_frozen(step)
        given = {"metric": jnp.float32(0.25)} if name == "metric" else None
        state, _ = freezer.step(state, *jax_loop.batch(step), extra_args=given)
        moved = [bits(state.params[x]) != bits(previous.params[x]) for x in jax_loop.LAYERS]
        assert moved == [i >= k and (name != "accumulated" or step % 2 == 1) for i in range(4)]
    assert sorted(freezer.compiled) == [0, 1, 3]
    assert freezer.flops_saved() > 0


def test_an_argument_that_is_missing_is_named() -> None:
    freezer = new_freezer(EXTRA["metric"]())
    message = r"the optimizer failed: .*'metric'.* given value, grad, .* extra_args=\{\.\.\.\}"
    with pytest.raises(InvalidType, match=message):
        trained(freezer, freezer.init(jax_loop.params()), 1)


def test_extra_arguments_of_the_user_s_come_first() -> None:
    """A plateau of the validation loss, say."""
    freezer = new_freezer(EXTRA["plateau"](), schedule=Frozen(1))
    state = freezer.init(jax_loop.params())
    for _ in range(4):
        state, _ = freezer.step(state, *jax_loop.batch(0), extra_args={"value": 7.0})
    assert float(state.opt_state[1].best_value) == 7.0


@pytest.mark.parametrize("name", ["lbfgs", "backtracking"])
def test_line_searches_go_with_plans_that_do_not_change(name: str) -> None:
    for plan in (Schedule(), Schedule(1), Frozen(1, then=Schedule())):
        freezer = new_freezer(EXTRA[name](), schedule=plan)
        with pytest.raises(InvalidType, match=r"line search \(LBFGS\) goes only with a plan"):
            freezer.init(jax_loop.params())


# --- trees, states and types ----------------------------------------------------------------


class Block(eqx.Module):
    linear: eqx.nn.Linear
    scale: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x)) * self.scale


class Network(eqx.Module):
    blocks: tuple[Block, ...]
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_an_equinox_model_trains() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    blocks = tuple(Block(eqx.nn.Linear(8, 8, key=key), jnp.ones(8)) for key in keys[:3])
    model = Network(blocks, eqx.nn.Linear(8, 8, key=keys[3]))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params: Network, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    layers = ("blocks.0", "blocks.1", ["blocks.2.linear", "blocks.2.scale"], "head")
    freezer = FreezeOut(
        *(loss_fn, optax.adamw(1e-2), jax_loop.TOTAL),
        layers=layers,
        schedule=Schedule(0.4, "linear"),
    )
    state, losses = freezer.init(params), []
    for step in range(jax_loop.TOTAL):
        previous = state
        state, loss = freezer.step(state, *jax_loop.batch(step))
        k = freezer.num_frozen(step)
        assert bits(state.params.blocks[:k]) == bits(previous.params.blocks[:k])
        assert bits(state.params.blocks[k:]) != bits(previous.params.blocks[k:]) or k == 3
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert bits(params) == bits(freezer.init(params).params)  # the user's own are not changed


def normalize(x: jax.Array, state: Any, training: bool) -> tuple[jax.Array, Any]:
    """BatchNorm without scale and shift."""
    if training:
        mean, state = x.mean(0), {"mean": 0.9 * state["mean"] + 0.1 * x.mean(0)}
    else:
        mean = state["mean"]
    return x - mean, state


def with_norms(heedless: bool) -> Callable[..., Any]:
    """A loss with BatchNorm's means as its state; heedless of which layers are frozen, or not."""

    def loss_fn(params: Any, stats: Any, x: jax.Array, y: jax.Array, *, num_frozen: int) -> Any:
        new = {}
        for i, name in enumerate(jax_loop.LAYERS):
            x = x @ params[name]["w"] + params[name]["b"]
            x, new[name] = normalize(x, stats[name], heedless or i >= num_frozen)
            x = jnp.tanh(x)
        return jnp.mean((x - y) ** 2), new

    return loss_fn


@pytest.mark.parametrize(("heedless", "collection"), [(False, False), (True, True)])
def test_statistics_of_frozen_layers_do_not_move(heedless: bool, collection: bool) -> None:
    inner = with_norms(heedless)

    def loss_fn(params: Any, state: Any, *batch: Any, num_frozen: int) -> Any:
        stats = state["batch_stats"] if collection else state
        loss, new = inner(params, stats, *batch, num_frozen=num_frozen)
        return loss, ({"batch_stats": new} if collection else new, {"frozen": num_frozen})

    freezer = FreezeOut(
        *(loss_fn, optax.adam(1e-2), jax_loop.TOTAL),
        layers=jax_loop.LAYERS,
        schedule=Schedule(times=(0.25, 0.5, 0.5, 1)),
        has_aux=True,
    )
    stats: Any = {name: {"mean": np.ones(8, np.float32)} for name in jax_loop.LAYERS}
    stats = {"batch_stats": stats} if collection else stats
    state = freezer.init(jax_loop.params(), stats)
    for step in range(jax_loop.TOTAL):
        previous = state
        state, (_, aux) = freezer.step(state, *jax_loop.batch(step))
        old, new = previous.model_state, state.model_state
        old, new = (old["batch_stats"], new["batch_stats"]) if collection else (old, new)
        k = freezer.num_frozen(step)
        assert int(aux["frozen"]) == k
        moved = [bits(old[name]) != bits(new[name]) for name in jax_loop.LAYERS]
        assert moved == [i >= k for i in range(4)]


def test_a_frozen_norm_uses_its_stored_statistics() -> None:
    freezer = FreezeOut(
        *(with_norms(False), optax.sgd(0.0), 4),
        layers=jax_loop.LAYERS,
        schedule=Schedule(times=(0.25, 0.25, 0.25, 1)),
    )
    stats = {name: {"mean": jnp.full(8, 0.5)} for name in jax_loop.LAYERS}
    state = freezer.init(jax_loop.params(), stats, step=1)
    x, y = jax_loop.batch(0)
    out = jnp.asarray(x)
    for name in jax_loop.LAYERS[:3]:
        out = jnp.tanh(out @ state.params[name]["w"] + state.params[name]["b"] - 0.5)
    out = out @ state.params["last"]["w"] + state.params["last"]["b"]
    expected = jnp.mean((jnp.tanh(out - out.mean(0)) - y) ** 2)
    assert float(freezer.step(state, x, y)[1]) == pytest.approx(float(expected), rel=1e-6)


def test_bfloat16_stays_bfloat16() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax_loop.params())
    freezer = jax_loop.new_freezer()
    state = trained(freezer, freezer.init(params), jax_loop.TOTAL)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}


def test_donated_states_are_overwritten_and_others_are_not() -> None:
    results = []
    for donate in (True, False):
        freezer = jax_loop.new_freezer(donate=donate)
        given = jax_loop.params()
        first = freezer.init(given)
        results.append(bits(jax_loop.run(freezer, first)))
        overwritten = jax.tree.leaves((first.params, first.opt_state))
        assert all(leaf.is_deleted() == donate for leaf in overwritten)
        assert bits(given) == bits(jax_loop.params())
    assert results[0] == results[1]


def test_what_else_the_loss_returns_is_handed_on() -> None:
    def with_aux(params: Any, x: jax.Array, y: jax.Array) -> Any:
        loss = jax_loop.loss_fn(params, x, y)
        return loss, {"twice": 2 * loss}

    freezer = FreezeOut(with_aux, optax.sgd(0.1), 9, layers=jax_loop.LAYERS, has_aux=True)
    _, (loss, aux) = freezer.step(freezer.init(jax_loop.params()), *jax_loop.batch(0))
    assert float(aux["twice"]) == 2 * float(loss) > 0


def test_layers_whose_names_begin_alike_are_told_apart() -> None:
    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["dense_1"]["w"] @ params["dense_10"]["w"] - y) ** 2)

    options: Any = {"layers": ["dense_1", "dense_10"], "schedule": Schedule(times=(0.5, 1))}
    freezer = FreezeOut(loss_fn, optax.sgd(0.1), 4, **options)
    first = freezer.init({name: {"w": jnp.eye(jax_loop.WIDTH)} for name in options["layers"]})
    state = trained(freezer, first, 2)
    after = trained(freezer, state, 1)
    assert bits(after.params["dense_1"]) == bits(state.params["dense_1"])
    assert bits(after.params["dense_10"]) != bits(state.params["dense_10"])


# --- resuming -------------------------------------------------------------------------------


def process(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    file = tmp_path / "state.npz"
    script = Path(jax_loop.__file__)
    start = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]"
    start += "; runpy.run_path(sys.argv[0], None, '__main__')"
    killed = process("-c", start, script, file, 17)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    freezer = jax_loop.new_freezer()
    state = jax_loop.load(freezer, file)
    assert (state.step, freezer.num_frozen(state.step)) == (17, 2)
    resumed = jax_loop.run(freezer, state)
    assert sorted(freezer.compiled) == [2, 3]
    whole = jax_loop.new_freezer()
    assert bits(resumed) == bits(jax_loop.run(whole, whole.init(jax_loop.params())))


_TWO_DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.integration.jax_loop import batch, new_freezer, params
mesh = jax.make_mesh((2,), ("data",))
everywhere = NamedSharding(mesh, PartitionSpec())
halves = NamedSharding(mesh, PartitionSpec("data"))
runs = []
for place in (lambda x, how: x, jax.device_put):
    freezer = new_freezer()
    state = place(freezer.init(params()), everywhere)
    state = state._replace(step=0)
    for step in range(freezer.total_steps):
        state, loss = freezer.step(state, *place(batch(step), halves))
    runs.append(state.params)
print(len(runs[1]["last"]["w"].sharding.device_set), sorted(freezer.compiled))
difference = jax.tree.map(lambda a, b: abs(np.asarray(a) - np.asarray(b)).max(), *runs)
assert max(jax.tree.leaves(difference)) < 1e-5, difference  # sums of halves round differently
"""


def test_batches_divided_among_two_devices() -> None:
    result = process("-c", _TWO_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.stdout == "2 [0, 1, 2, 3]\n", result.stderr


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pair"),
    [
        (("second", "first", "third", "last"), ("second", "first")),
        (("first", "last", "third", "second"), ("third", "second")),
        ((["first", "third"], "second", "last"), ("first, third", "second")),
    ],
)
def test_another_order_than_that_of_execution_is_refused(layers: Any, pair: Any) -> None:
    freezer = jax_loop.new_freezer(layers=layers)
    message = f"layer '{pair[0]}' works on what layer '{pair[1]}' returned"
    with pytest.raises(LayerOrderError, match=message):
        trained(freezer, freezer.init(jax_loop.params()), 1)


def test_the_order_is_read_through_loops_branches_and_checkpoints() -> None:
    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        first, second, third = params
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ first.T), None), x, None, length=3)
        x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, second.astype(jnp.bfloat16))
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ third, lambda x: x - third[0], x)
        penalty = sum(jnp.sum(w**2) for w in params)  # touches all, after all: no matter
        return jnp.mean(x**2) + 1e-3 * penalty

    weights = [jnp.eye(4) + i / 10 for i in range(3)]
    x = jnp.ones((2, 4))
    freezer = FreezeOut(loss_fn, optax.adam(1e-3), 9)
    freezer.step(freezer.init(weights), x)
    for wrong in ([1, 0, 2], [0, 2, 1]):
        freezer = FreezeOut(loss_fn, optax.adam(1e-3), 9, layers=wrong)
        with pytest.raises(LayerOrderError):
            freezer.step(freezer.init(weights), x)


def compiled_whole(params: Any, x: jax.Array) -> jax.Array:
    """What users write who compile the loss themselves."""
    loss: jax.Array = jax.jit(lambda p, x: jnp.mean(jnp.tanh(x @ p[0]) @ p[1]))(params, x)
    return loss


def by_a_number(params: Any, x: jax.Array) -> jax.Array:
    """The first layer reaches the second as a single number: a gate of the whole batch."""
    gate = jax.nn.sigmoid(jnp.mean(x @ params[0]))
    return jnp.mean((gate * x) @ params[1])


@pytest.mark.parametrize("loss_fn", [compiled_whole, by_a_number])
def test_the_order_is_read_inside_compiled_functions_and_through_numbers(
    loss_fn: Callable[[Any, jax.Array], jax.Array],
) -> None:
    weights, x = [jnp.eye(4), jnp.eye(4) + 1], jnp.ones((2, 4))
    freezer = FreezeOut(loss_fn, optax.sgd(0.1), 9)
    freezer.step(freezer.init(weights), x)
    freezer = FreezeOut(loss_fn, optax.sgd(0.1), 9, layers=[1, 0])
    with pytest.raises(LayerOrderError, match="layer '1' works on what layer '0' returned"):
        freezer.step(freezer.init(weights), x)


def test_what_is_given_is_checked() -> None:
    params = jax_loop.params()
    with pytest.raises(InvalidValue, match=r"params\.last\.b must belong to one .* got none"):
        jax_loop.new_freezer(layers=jax_loop.LAYERS[:3]).init(params)
    with pytest.raises(InvalidValue, match=r"got 'first' and 'first\.w, second, third, last'"):
        jax_loop.new_freezer(layers=["first", ["first.w", *jax_loop.LAYERS[1:]]]).init(params)
    with pytest.raises(InvalidValue, match=r"layer 'fifth' has no parameters"):
        jax_loop.new_freezer(layers=[*jax_loop.LAYERS, "fifth"]).init(params)
    with pytest.raises(InvalidType, match=r"layers must be given for parameters in a dict"):
        jax_loop.new_freezer(layers=None).init(params)
    with pytest.raises(InvalidValue, match=r"params\.0 must be an array of floating-point .* int"):
        jax_loop.new_freezer(layers=None).init([jnp.ones(2, int)])
    with pytest.raises(InvalidValue, match=r"params\.0 .* got .*, pass equinox"):
        jax_loop.new_freezer(layers=None).init([jax.nn.relu])
    with pytest.raises(InvalidType, match=r"schedule must be a plan, such as .* got str"):
        jax_loop.new_freezer(schedule="cubic")
    with pytest.raises(InvalidType, match="loss_fn must take num_frozen"):
        jax_loop.new_freezer().init(params, {"mean": jnp.ones(2)})
    with pytest.raises(FreezeOutError, match="init"):
        jax_loop.new_freezer().num_frozen(3)
    with pytest.raises(InvalidValue, match=r"state \[0\]\.mu cannot be divided among layers"):
        new_freezer(optax.flatten(optax.adam(1e-3))).init(params)


def test_the_run_s_length_and_other_states_are_refused() -> None:
    freezer = jax_loop.new_freezer()
    state = freezer.init(jax_loop.params())
    with pytest.raises(FreezeOutError, match="0 layers frozen is not compiled yet"):
        freezer.flops_saved()
    with pytest.raises(CheckpointError, match="at step 20 3 layers are frozen"):
        freezer.step(state._replace(step=20), *jax_loop.batch(0))
    late = freezer.init(jax_loop.params(), step=24)
    with pytest.warns(UserWarning, match="goes on after its total_steps = 24 steps"):
        after, loss = freezer.step(late, *jax_loop.batch(0))
    x, y = map(jnp.asarray, jax_loop.batch(0))
    assert float(loss) == pytest.approx(float(jax_loop.loss_fn(late.params, x, y)))
    again, _ = freezer.step(after, *jax_loop.batch(1))  # without another warning
    assert (after.step, again.step) == (25, 26)
    assert bits(again._replace(step=24)) == bits(late)


# --- plans --------------------------------------------------------------------------------


PLANS = [
    (Frozen(2), (2,)),
    (Frozen(all_but_last=1), (3,)),
    (Frozen(up_to="second"), (2,)),
    (Frozen(1, then=Schedule(times=(0.25, 0.5, 1))), (1, 2, 3)),
    (Schedule(times=(0, 0, 0.5, 1)), (2, 3)),
]


@pytest.mark.parametrize(("plan", "stages"), PLANS, ids=str)
def test_layers_frozen_from_the_start(plan: Plan, stages: tuple[int, ...]) -> None:
    freezer = new_freezer(optax.adamw(1e-2, weight_decay=0.1), schedule=plan)
    state = freezer.init(jax_loop.params())
    assert freezer.stages == stages
    for step in range(jax_loop.TOTAL):
        k = freezer.num_frozen(step)
        held = " ".join(jax.tree_util.keystr(path) for path, _ in leaves(state.opt_state))
        assert [f"['{layer}']" in held for layer in jax_loop.LAYERS] == [i >= k for i in range(4)]
        previous = state
        state, _ = freezer.step(state, *jax_loop.batch(step))
        moved = [bits(state.params[x]) != bits(previous.params[x]) for x in jax_loop.LAYERS]
        assert moved == [i >= k for i in range(4)]
    assert {*freezer.compiled} == {*stages}
    costs = [freezer.flops_saved(1)]  # of the first step alone, against one that trains all
    whole = new_freezer(optax.adamw(1e-2, weight_decay=0.1), schedule=Schedule(1))
    trained(whole, whole.init(jax_loop.params()), 1)
    assert costs[0] == pytest.approx(1 - freezer.flops(stages[0]) / whole.flops(0), abs=1e-12)
    assert freezer.flops_saved() >= costs[0] > 0
    saved = f"{freezer.flops_saved():.0%} of the FLOPs saved"
    start = f"froze {stages[-1]} of 4 layers, {stages[0]} of them from the start"
    assert freezer.summary(state) == f"{start}; {saved}"
    early = freezer.summary(freezer.init(jax_loop.params(), step=3))
    assert "; made 3 of 24 steps" in early


def test_a_frozen_prefix_trains_as_if_its_parameters_were_constants() -> None:
    """The same bits as an ordinary run of optax over the other layers alone."""
    params, optimizer = jax_loop.params(), optax.adamw(1e-2, weight_decay=0.1)
    freezer = new_freezer(optimizer, schedule=Frozen(2), total_steps=None)
    state = trained(freezer, freezer.init(params), 6)

    constant = {name: params[name] for name in jax_loop.LAYERS[:2]}
    others = {name: params[name] for name in jax_loop.LAYERS[2:]}
    opt_state = optimizer.init(others)

    @jax.jit
    def update(others: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(lambda p: jax_loop.loss_fn({**constant, **p}, x, y))(others)
        updates, opt_state = optimizer.update(grads, opt_state, others)
        return optax.apply_updates(others, updates), opt_state

    for step in range(6):
        others, opt_state = update(others, opt_state, *jax_loop.batch(step))
    for mine, theirs in zip(
        jax.tree.leaves({name: state.params[name] for name in others}),
        jax.tree.leaves(others),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-7)  # fused otherwise
    assert bits({name: state.params[name] for name in constant}) == bits(constant)


def test_a_run_frozen_from_the_start_needs_no_length_and_resumes_exactly() -> None:
    def new() -> FreezeOut:
        return new_freezer(optax.adamw(1e-2), schedule=Frozen(2), total_steps=None)

    freezer = new()
    state = trained(freezer, freezer.init(jax_loop.params()), 5)
    assert freezer.freeze_steps == (0, 0, None, None)
    assert freezer.factors(10**9) == (0.0, 0.0, 1.0, 1.0)
    whole = trained(freezer, state, 5)
    assert freezer.flops_saved(10) > 0
    with pytest.raises(InvalidValue, match="give total_steps"):
        freezer.flops_saved()
    other = new()
    fresh = other.init(jax_loop.params(), step=5)
    restored = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(state))
    assert bits(trained(other, restored, 5)) == bits(whole)


def test_a_norm_frozen_from_the_start_keeps_its_statistics() -> None:
    freezer = FreezeOut(
        *(with_norms(False), optax.sgd(0.1), 4), layers=jax_loop.LAYERS, schedule=Frozen(2)
    )
    stats = {name: {"mean": jnp.full(8, 0.5)} for name in jax_loop.LAYERS}
    state = trained(freezer, freezer.init(jax_loop.params(), stats), 2)
    moved = [bits(state.model_state[x]) != bits(stats[x]) for x in jax_loop.LAYERS]
    assert moved == [False, False, True, True]


def test_up_to_names_a_part_of_the_tree() -> None:
    params = {"stem": {"w": jnp.eye(8)}, "trunk": [{"w": jnp.eye(8)}] * 2, "head": jnp.eye(8)}

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for w in (params["stem"]["w"], *(each["w"] for each in params["trunk"]), params["head"]):
            x = x @ w
        return jnp.mean((x - y) ** 2)

    def frozen(layers: Any, name: str) -> int:
        freezer = FreezeOut(loss_fn, optax.sgd(0.1), 4, layers=layers, schedule=Frozen(up_to=name))
        freezer.init(params)
        return freezer.num_frozen(0)

    fine, coarse = ["stem", "trunk.0", "trunk.1", "head"], ["stem", "trunk", "head"]
    assert [frozen(fine, name) for name in ("stem", "trunk.0", "trunk")] == [1, 2, 3]
    assert [frozen(coarse, name) for name in ("stem", "trunk.0", "trunk")] == [1, 2, 2]
    with pytest.raises(InvalidValue, match="up_to='neck' is no module of the model"):
        frozen(fine, "neck")


class Thawing(Plan):
    """Freezes and thaws."""

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline.of(num_layers, total_steps, [(0, 2), (10, 1)], freeze_every)

    def __repr__(self) -> str:
        return "Thawing()"


class Short(Plan):
    """Gives too few factors."""

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline(num_layers, total_steps)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        return (1.0, 1.0)


def test_plans_that_do_not_go_are_refused() -> None:
    refused: list[tuple[Any, str]] = [
        (Thawing(), r"a plan that thaws is not supported on JAX: .* Thawing\(\), \(\(0, 2\), "),
        (Frozen(4), r"Frozen\(first=4\) does not go with 4 layers: 0 to 3 of them can be frozen"),
        (Schedule(times=(0, 1)), "times has 2 entries for 4 layers"),
    ]
    for plan, message in refused:
        with pytest.raises(InvalidValue, match=message) as raised:
            new_freezer(optax.sgd(0.1), schedule=plan).init(jax_loop.params())
        assert "\n" not in str(raised.value)
    with pytest.raises(InvalidValue, match="a plan that thaws is not supported on JAX"):
        learning_rates(0.1, 4, 20, Thawing())
    with pytest.raises(InvalidValue, match="so total_steps must be given"):
        new_freezer(optax.sgd(0.1), total_steps=None).init(jax_loop.params())
    freezer = new_freezer(optax.sgd(0.1), schedule=Short())
    with pytest.raises(InvalidValue, match="gave 2 factors for 4 layers"):
        trained(freezer, freezer.init(jax_loop.params()), 1)


def test_learning_rates_of_layers_frozen_from_the_start() -> None:
    rates = learning_rates(0.1, 3, 20, Frozen(1))
    assert [[float(rate(step)) for rate in rates] for step in (0, 19, 20)] == [
        [0, pytest.approx(0.1), pytest.approx(0.1)],
        [0, pytest.approx(0.1), pytest.approx(0.1)],
        [0, 0, 0],
    ]


def test_a_changed_model_state_is_refused() -> None:
    def loss_fn(params: Any, state: Any, x: Any, y: Any, num_frozen: int) -> Any:
        return jax_loop.loss_fn(params, x, y), {"other": x}

    freezer = FreezeOut(loss_fn, optax.sgd(0.1), 9, layers=jax_loop.LAYERS)
    state = freezer.init(jax_loop.params(), {"first": jnp.ones(2)})
    with pytest.raises(InvalidValue, match="was given a model state"):
        freezer.step(state, *jax_loop.batch(0))
