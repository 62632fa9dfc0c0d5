"""FreezeOut in Keras: frozen variables at rest, the optimizer's slots carried along, learning
rates by hand, checkpoints, and models of every kind.

Runs on the backend that KERAS_BACKEND names, JAX where it names none. Nothing here needs torch,
nor imports a test module that does: `make test-keras` runs it on TensorFlow, without torch.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parent))

import keras
import keras_loop
import numpy as np
import pytest
from keras import layers as kl
from keras_loop import BATCH, ENDS, EPOCHS, SCHEDULE, STEPS, data, fit, new_model

from freezeout import Frozen, Plan, Schedule, Timeline
from freezeout.errors import InvalidType, InvalidValue, LayerOrderError
from freezeout.integrations.keras import FreezeOutCallback

# Raised inside Keras, which asks numpy for an array of a variable of its own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BACKEND = keras.config.backend()
ROOT = Path(__file__).parents[2]


def values(variables: Any) -> list[bytes]:
    return [np.asarray(v.numpy()).tobytes() for v in variables]


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """All variables before and after each update."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[list[bytes]] = []
        self.after: list[list[bytes]] = []

    def state(self) -> list[bytes]:
        return values(self.model.variables + self.model.optimizer.variables)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.before.append(self.state())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.after.append(self.state())

    def moved(self, *names: str) -> list[bool]:
        """In which updates any of the model's variables did whose path has one of these names."""
        variables = enumerate(self.model.variables)
        places = [i for i, v in variables if any(name in v.path for name in names)]
        assert places
        pairs = zip(self.before, self.after, strict=True)
        return [any(a[i] != b[i] for i in places) for a, b in pairs]


@dataclass
class Whole:
    """A run that nothing interrupted."""

    model: Any
    attributes: set[str]  # of the optimizer, before
    watch: Watch
    folder: Path  # a checkpoint an epoch

    def same(self, model: Any) -> bool:
        mine, theirs = self.model, model
        return values(mine.variables) == values(theirs.variables) and values(
            mine.optimizer.variables
        ) == values(theirs.optimizer.variables)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, model, watch = tmp_path_factory.mktemp("whole"), new_model(), Watch()
    attributes = {*vars(model.optimizer)}
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
    fit(model, FreezeOutCallback(schedule=SCHEDULE), checkpoint, watch)
    return Whole(model, attributes, watch, folder)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda: keras.optimizers.AdamW(3e-3, weight_decay=0.1, global_clipnorm=1.0),
    "ema": lambda: keras.optimizers.Adam(
        3e-3, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=4
    ),
    "nadam": lambda: keras.optimizers.Nadam(3e-3),
    "decay": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.ExponentialDecay(3e-3, 10, 0.9), weight_decay=0.1
    ),
}


# What compiles much and adds little is left to `make test-keras`, which runs all on each backend.
slow = pytest.mark.slow
MOST = [n if n in ("momentum", "adamw") else pytest.param(n, marks=slow) for n in OPTIMIZERS]


@pytest.mark.parametrize("name", MOST)
def test_frozen_variables_are_at_rest_and_slots_are_carried_over(name: str) -> None:
    model, watch = new_model(OPTIMIZERS[name]()), Watch()
    freezer = FreezeOutCallback(schedule=SCHEDULE)
    history = fit(model, freezer, watch)
    assert freezer.freeze_steps == ENDS
    assert history.history["num_frozen"] == [0, 1, 2, 2, 3, 3]
    # Between updates, where layers freeze and train functions are built, nothing changes at all:
    # not a slot either. (Between epochs, metrics start afresh; they are not among these.)
    for end, begin in zip(watch.after[:-1], watch.before[1:], strict=True):
        assert end == begin
    groups = enumerate(freezer.layers)
    layer_of = {
        v.path.replace("/", "_"): i for i, group in groups for u in group for v in u.variables
    }
    every = model.variables + model.optimizer.variables
    slots = 0
    for step, (before, after) in enumerate(zip(watch.before, watch.after, strict=True)):
        k = sum(end <= step for end in ENDS[:-1])
        for variable, old, new in zip(every, before, after, strict=True):
            path = variable.path.replace("/", "_")
            # A slot's name is the variable's and more: "adam/sequential_one_kernel_momentum".
            layer = next((i for name, i in layer_of.items() if name in path), len(ENDS))
            slots += path not in layer_of and layer < k
            assert new == old or layer >= k, (step, path)
            assert new != old or not path.endswith("kernel") or layer < k, (step, path)
    assert slots


@slow
def test_gradients_are_accumulated() -> None:
    model, watch = new_model(keras.optimizers.Adam(3e-3, gradient_accumulation_steps=2)), Watch()
    freezer = FreezeOutCallback(schedule=SCHEDULE)
    fit(model, freezer, watch)
    assert freezer.freeze_steps == (3, 6, 12, 15)
    kernels = [i for i, v in enumerate(model.variables) if v.path.endswith("kernel")]
    for batch, (before, after) in enumerate(zip(watch.before, watch.after, strict=True)):
        k = sum(2 * end <= batch for end in (3, 6, 12))
        moved = [before[i] != after[i] for i in kernels]
        assert moved == [layer >= k and batch % 2 == 1 for layer in range(4)], batch


@pytest.mark.parametrize(("batches", "decay"), [(1, 0.05), pytest.param(2, 0.0, marks=slow)])
def test_weights_are_those_of_updates_made_by_hand(batches: int, decay: float) -> None:
    """Three layers of one weight each, SGD with momentum and decoupled weight decay, as Keras
    defines them, and eq. 1; one batch an update, and two. Tolerance: float32 against float64, over
    40 updates."""
    total, alpha, momentum = 40, 0.02, 0.9
    ends = (10, 25, 40)
    model = keras.Sequential([kl.Input((1,)), *(kl.Dense(1, use_bias=False) for _ in range(3))])
    model.set_weights([np.full((1, 1), w) for w in (0.9, 1.1, 0.8)])
    accumulated = None if batches == 1 else batches
    optimizer = keras.optimizers.SGD(
        alpha, momentum=momentum, weight_decay=decay, gradient_accumulation_steps=accumulated
    )
    model.compile(optimizer, loss="mse")
    x = np.random.default_rng(0).normal(size=(total * batches, 1)).astype(np.float32)
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.25, 0.625, 1)))
    model.fit(x, -x, batch_size=1, shuffle=False, verbose=0, callbacks=[freezer])

    w, velocity = np.array([0.9, 1.1, 0.8]), np.zeros(3)
    for step, samples in enumerate(x.reshape(total, batches).astype(float)):
        gradient = 2 * (samples**2).mean() * (w.prod() + 1) * w.prod() / w
        for i, end in enumerate(ends):
            if step < end:
                rate = 0.5 * alpha * total / end * (1 + np.cos(np.pi * step / end))
                assert freezer.learning_rates(step)[i] == pytest.approx(rate, rel=1e-6)
                w[i] -= w[i] * decay * rate
                velocity[i] = momentum * velocity[i] - rate * gradient[i]
                w[i] += velocity[i]
    np.testing.assert_allclose(np.ravel(model.get_weights()), w, rtol=0, atol=1e-6)


def test_norms_and_dropout_are_in_inference_mode_once_frozen(whole: Whole) -> None:
    x = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)

    def differs(layer: Any) -> bool:
        out, steady = np.asarray(layer(x, training=True)), np.asarray(layer(x, training=False))
        return not np.array_equal(out, steady)

    model, watch = new_model(dropout=0.5), Watch()
    fit(model, FreezeOutCallback(schedule=Schedule(times=(0.2, 1, 1, 1))), watch)
    # Dropout that is on draws from its seeds; and between steps the model is an ordinary one.
    assert watch.moved("seed") == [step < ENDS[0] for step in range(EPOCHS * STEPS)]
    assert differs(model.get_layer("dropout"))
    steps = list(zip(whole.watch.before, whole.watch.after, strict=True))
    for i, variable in enumerate(whole.model.variables):
        if "moving" in variable.path:
            end = ENDS["norm_2" in variable.path]
            assert [a[i] != b[i] for a, b in steps] == [s < end for s in range(len(steps))]


class Plain(kl.Layer):  # type: ignore[misc]
    """A composite layer that is not told whether it trains: Keras tells its norm all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = kl.Dense(4), kl.BatchNormalization()

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.norm.build((None, 4))

    def call(self, inputs: Any) -> Any:
        return self.norm(self.dense(inputs))


def test_norms_inside_a_frozen_layer_are_in_inference_mode() -> None:
    model = keras.Sequential([kl.Input((6,)), Plain(), kl.Dense(1)])
    model.compile("sgd", loss="mse")
    watch = Watch()
    fit(model, FreezeOutCallback(schedule=Schedule(times=(0.5, 1))), watch, epochs=2)
    mean = next(i for i, v in enumerate(model.variables) if "moving_mean" in v.path)
    moved = [a[mean] != b[mean] for a, b in zip(watch.before, watch.after, strict=True)]
    assert moved == [step < STEPS for step in range(2 * STEPS)]


class Counting(kl.Dense):  # type: ignore[misc]
    """Counts how often it is traced."""

    traced = 0

    def call(self, inputs: Any) -> Any:
        type(self).traced += 1
        return super().call(inputs)


class Tracing(keras.callbacks.Callback):  # type: ignore[misc]
    """The steps in which the model was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.step = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.traced = Counting.traced

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if Counting.traced != self.traced:
            self.steps.append(self.step)
        self.step += 1


@pytest.mark.skipif(BACKEND == "torch", reason="runs eagerly: there are no graphs")
@pytest.mark.parametrize(("freeze_every", "stages"), [(1, [0, 9, 20]), (15, [0, 15])])
def test_there_is_one_graph_a_stage(freeze_every: int, stages: list[int]) -> None:
    model = keras.Sequential([kl.Input((4,)), Counting(4), Counting(4), kl.Dense(1)])
    model.compile("adam", loss="mse")
    freezer, watch = (
        FreezeOutCallback(schedule=Schedule(0.3, "linear"), freeze_every=freeze_every),
        Tracing(),
    )
    x, y = np.ones((80, 4)), np.ones(80)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[freezer, watch])
    assert watch.steps == stages


def many(count: int) -> Any:
    """A network of so many layers, the first and the last of which count how often they are
    traced; one batch of 8 samples is a step."""
    keras.utils.set_random_seed(0)
    middle = (kl.Dense(4, activation="tanh") for _ in range(count - 2))
    model = keras.Sequential([kl.Input((6,)), Counting(4, name="first"), *middle, kl.Dense(6)])
    compiled(model)
    return model


@pytest.mark.parametrize(
    ("count", "epochs", "schedule", "graphs"),
    [
        (16, 2, Schedule(0.2), 4),
        (16, 6, Schedule(0.2), 6),
        (16, 30, Schedule(0.2), 8),
        (16, 30, Frozen(3, then=Schedule(0.2)), 8),
        (4, 1, Schedule(0.2), 4),  # as the plan says
    ],
)
def test_a_run_has_few_train_functions_by_default(
    count: int, epochs: int, schedule: Plan, graphs: int
) -> None:
    freezer = FreezeOutCallback(schedule=schedule)
    begun(many(count), freezer, epochs=epochs, steps=STEPS)
    everywhere = schedule.timeline(count, epochs * STEPS)
    # At most so many, and where the plan has more, hardly fewer.
    assert len(freezer.timeline.depths) in (graphs, graphs - 1)
    assert len(everywhere.depths) > graphs or freezer.timeline == everywhere
    exact = FreezeOutCallback(schedule=schedule, freeze_every=1)
    begun(many(count), exact, epochs=epochs, steps=STEPS)
    assert exact.timeline == everywhere


@pytest.mark.skipif(BACKEND == "torch", reason="runs eagerly: there are no graphs")
def test_a_network_of_many_layers_compiles_a_few_times() -> None:
    watch = Tracing()
    freezer = FreezeOutCallback(schedule=Schedule(0.2))
    history = fit_small(many(12), freezer, watch, epochs=4)
    assert watch.steps == [step for step, _ in freezer.timeline.changes]
    assert len(watch.steps) == 4
    assert history.history["num_frozen"][-1] >= 8


def test_all_calls_of_fit_have_one_timeline() -> None:
    """Of a run of six epochs, whichever of them `fit` is asked for."""
    lines = []
    for epochs in (1, 3, 6):
        freezer = FreezeOutCallback(6 * STEPS, schedule=Schedule(0.2))
        begun(many(16), freezer, epochs=epochs, steps=STEPS)
        lines.append(freezer.timeline)
    assert lines[0] == lines[1] == lines[2]


def test_it_says_what_it_is() -> None:
    freezer = FreezeOutCallback(schedule=Frozen(1))
    assert repr(freezer) == "FreezeOutCallback(Frozen(first=1))"
    assert str(freezer) == f"{freezer!r}: the layers are found when fit begins"
    fit_small(small_model(), freezer)
    first, *table = str(freezer).splitlines()
    assert first == repr(freezer)
    assert repr(freezer) == (
        "FreezeOutCallback(3 layers, 1 frozen, step 10 of 10, Frozen(first=1))"
    )
    assert [line.split() for line in table] == [
        ["layer", "parameters", "freezes", "at"],
        *(["one", "42", "start"], ["two", "42", "never"], ["three", "42", "never"]),
    ]


# --- what is left when fit ends -------------------------------------------------------------


def test_the_model_and_the_optimizer_are_given_back(whole: Whole) -> None:
    built = {"_momentums", "_velocities", "_exclude_from_weight_decay_cache"}
    assert {*vars(whole.model.optimizer)} - built <= whole.attributes
    assert len(whole.model.trainable_variables) == 12
    assert all("call" not in vars(layer) for layer in whole.model.layers)
    assert all(layer.trainable for layer in whole.model.layers)


def test_a_second_fit_traces_anew() -> None:
    """Another schedule, and none: each must have a train function of its own."""

    def weights(first: bool) -> list[Any]:
        model = new_model(keras.optimizers.SGD(0.01))
        if first:
            start = model.get_weights()
            other = Schedule(times=(0.9, 0.9, 1, 1), scale_lr=False)
            fit(model, FreezeOutCallback(schedule=other))
            model.set_weights(start)
        fit(model, FreezeOutCallback(schedule=Schedule(times=(0.4, 0.4, 1, 1))))
        middle = model.get_weights()
        before = [np.array(variable) for variable in model.trainable_variables]
        fit(model, epochs=1)
        for old, new in zip(before, model.trainable_variables, strict=True):
            assert not np.array_equal(old, new)  # no layer is left out any more
        return [*middle, *model.get_weights()]

    for one, other in zip(weights(False), weights(True), strict=True):
        np.testing.assert_array_equal(one, other)


class Interrupt(keras.callbacks.Callback):  # type: ignore[misc]
    """Ctrl-C: at one of the moments at which Keras calls, in one of the run's steps."""

    def __init__(self, step: int, moment: str = "on_epoch_begin") -> None:
        super().__init__()
        setattr(self, moment, self.strike)
        self.step = step

    def strike(self, *arguments: Any, **options: Any) -> None:
        if int(self.model.optimizer.iterations.numpy()) >= self.step:
            raise KeyboardInterrupt


def test_an_interrupted_fit_is_released_by_the_next(whole: Whole) -> None:
    model = new_model()
    freezer = FreezeOutCallback(schedule=SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        fit(model, freezer, Interrupt(4 * STEPS))
    assert len(model.trainable_variables) == 12
    assert freezer.summary() == "froze 2 of 4 layers; made 20 of 30 steps"
    fit(model, FreezeOutCallback(schedule=SCHEDULE), initial_epoch=4)
    assert whole.same(model)
    assert len(model.trainable_variables) == 12


def test_an_interrupted_fit_can_be_released_by_hand() -> None:
    model = new_model()
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.1, 1, 1, 1)))
    with pytest.raises(KeyboardInterrupt):
        fit(model, freezer, Interrupt(STEPS))
    model.get_layer("two").trainable = False  # the user's own, from now on: it stays
    freezer.release()
    assert len(model.trainable_variables) == 10
    assert "make_train_function" not in vars(model)


def small_model(names: Sequence[str] = ("one", "two", "three")) -> Any:
    keras.utils.set_random_seed(0)
    dense = (kl.Dense(6, activation="tanh", name=name) for name in names)
    model = keras.Sequential([kl.Input((6,)), *dense])
    compiled(model)
    return model


def compiled(model: Any) -> None:
    model.compile(keras.optimizers.SGD(0.1), loss="mse")


def fit_small(model: Any, *callbacks: Any, **options: Any) -> Any:
    x, _ = data()
    options = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(x, x[:, ::-1], callbacks=list(callbacks), **options)


@pytest.fixture(scope="module")
def ordinary() -> Any:
    """A model after two epochs from the start without this package."""
    model = small_model()
    fit_small(model)
    return model


MOMENTS = ("on_train_batch_begin", "on_train_batch_end")
WAYS = ("fit", "compile", "callback", "clone", "load", "train_on_batch")


@pytest.mark.parametrize(("way", "moment"), [*zip(WAYS, 3 * MOMENTS, strict=True)])
def test_whatever_comes_after_an_interrupted_fit_trains_all_weights(
    way: str, moment: str, ordinary: Any, tmp_path: Path
) -> None:
    """`interrupted` keeps the frames of `fit` alive, as a notebook does."""
    schedule = Schedule(times=(0.2, 0.4, 1), scale_lr=False)
    model = small_model()
    start = model.get_weights()
    with pytest.raises(KeyboardInterrupt) as interrupted:
        fit_small(model, FreezeOutCallback(schedule=schedule), Interrupt(6, moment))
    assert len(model.trainable_variables) == 6
    assert all(layer.trainable for layer in model.layers)
    assert all("call" not in vars(layer) for layer in model.layers)
    assert "update_step" not in vars(model.optimizer)
    if way == "clone":
        model = keras.models.clone_model(model)
    elif way == "load":
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    model.set_weights(start)
    if way in ("compile", "callback", "clone"):
        compiled(model)
    if way == "callback":
        freezer = FreezeOutCallback(schedule=schedule)
        history = fit_small(model, freezer)
        assert (freezer.freeze_steps, history.history["num_frozen"]) == ((2, 4, 10), [2, 2])
        again = small_model()
        fit_small(again, FreezeOutCallback(schedule=schedule))
        assert values(model.variables) == values(again.variables)
    elif way == "train_on_batch":
        x, _ = data()
        for _ in range(2):
            for batch in np.split(x, STEPS):
                model.train_on_batch(batch, batch[:, ::-1])
        assert values(model.variables) == values(ordinary.variables)
    else:
        fit_small(model)
        assert values(model.variables) == values(ordinary.variables)
    assert interrupted.traceback


def test_a_callback_goes_from_one_interrupted_model_to_another() -> None:
    freezer = FreezeOutCallback(schedule=Frozen(1))
    one, other = small_model(), small_model()
    with pytest.raises(KeyboardInterrupt):
        fit_small(one, freezer, Interrupt(2, "on_train_batch_end"))
    fit_small(other, freezer)
    assert "make_train_function" not in vars(one)
    assert "make_train_function" not in vars(other)
    with pytest.raises(InvalidValue, match="two FreezeOutCallbacks"):
        fit_small(one, freezer, FreezeOutCallback())


# --- frozen from the start ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", pytest.param("ema", marks=slow)])
def test_layers_frozen_from_the_start_never_move(name: str) -> None:
    """Nor do their slots and statistics; and a run resumed from a checkpoint ends with the same
    bits."""
    plan = Frozen(1, then=Schedule(times=(0, 0.6, 1)))
    model, watch = new_model(OPTIMIZERS[name](), dropout=0.5), Watch()
    start = values(model.variables)
    freezer = FreezeOutCallback(schedule=plan)
    history = fit(model, freezer, watch, epochs=2)
    assert freezer.freeze_steps == (0, 0, 6, 10)
    assert history.history["num_frozen"] == [2, 3]
    every = [v.path.replace("/", "_") for v in model.variables + model.optimizer.variables]
    last = [start, *watch.after][-1]
    for path, old, new in zip(every, watch.before[0], last, strict=True):
        frozen = any(part in path for part in ("one_", "norm_", "two_", "seed"))
        assert (new == old) == frozen or "kernel" not in path, path
        assert new == old or not frozen, path
    assert start[:10] == values(model.variables)[:10]
    assert freezer.summary() == "froze 3 of 4 layers, 2 of them from the start"


def test_a_run_frozen_from_the_start_resumes_exactly(tmp_path: Path) -> None:
    def new() -> FreezeOutCallback:
        return FreezeOutCallback(schedule=Frozen(share=0.5))

    whole = new_model()
    fit(whole, new(), keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"), epochs=2)
    model = keras.models.load_model(tmp_path / "1.keras")
    freezer = new()
    fit(model, freezer, epochs=2, initial_epoch=1)
    assert freezer.layers[1][0].name == "two"
    assert freezer.num_frozen == 2
    assert values(model.variables) == values(whole.variables)


@pytest.mark.skipif(BACKEND == "torch", reason="runs eagerly: there are no graphs")
def test_a_run_frozen_from_the_start_has_one_graph() -> None:
    model = keras.Sequential([kl.Input((4,)), Counting(4), Counting(4), kl.Dense(1)])
    model.compile("adam", loss="mse")
    watch = Tracing()
    callbacks = [FreezeOutCallback(schedule=Frozen(2)), watch]
    model.fit(np.ones((40, 4)), np.ones(40), batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    assert watch.steps == [0]


def with_base(trainable: bool = False) -> Any:
    """As in transfer learning: augmentation, a base that the user froze, and a head."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            *(kl.Input((6,)), kl.Dense(6, name="a"), kl.Dropout(0.5, name="drop", seed=1)),
            *(kl.Dense(6, name="b"), kl.BatchNormalization(name="norm")),
        ],
        name="base",
    )
    base.trainable = trainable
    noise = kl.GaussianNoise(0.1, name="noise", seed=2)
    head = (kl.Dense(6, name="c"), kl.Dense(6, name="d"))
    model = keras.Sequential([kl.Input((6,)), noise, base, *head])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss="mse")
    return model


def seeds(model: Any, watch: Watch) -> dict[str, list[bool]]:
    """In which steps the augmentation, and dropout in the base, were on."""
    of = {layer.name: layer.seed_generator.state.path for layer in _random_layers(model)}
    return {name: watch.moved(path) for name, path in of.items()}


def _random_layers(model: Any) -> list[Any]:
    return [model.get_layer("noise"), model.get_layer("base").get_layer("drop")]


def test_layers_that_the_user_froze_are_frozen_from_the_start() -> None:
    model, watch = with_base(), Watch()
    start = values(model.variables)
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.5, 1)))
    with pytest.warns(
        UserWarning, match=r"the layers .* \(2: 'a' to 'b'\) are frozen from the start"
    ):
        fit_small(model, freezer, watch)
    assert [[u.name for u in group] for group in freezer.layers] == [
        *(["a", "drop"], ["b", "norm"], ["c"], ["d"])
    ]
    assert freezer.freeze_steps == (0, 0, 5, 10)
    assert seeds(model, watch) == {"noise": [True] * 10, "drop": [False] * 10}
    frozen = [i for i, v in enumerate(model.variables) if "base" in v.path or "norm" in v.path]
    assert all(values(model.variables)[i] == start[i] for i in frozen)
    assert watch.moved("c/") == [s < 5 for s in range(10)]
    # What the user froze stays so, and has no slots.
    assert not any(layer.trainable for layer in model.get_layer("base").layers)
    assert len(model.trainable_variables) == 4
    assert sum("momentum" in v.path for v in model.optimizer.variables) == 4
    fit_small(model, freezer)  # without another warning


def test_layers_that_the_user_froze_may_stay_awake() -> None:
    model, watch = with_base(), Watch()
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.5, 1)), keep_awake=True)
    fit_small(model, freezer, watch)
    assert [[u.name for u in group] for group in freezer.layers] == [
        *(["a", "drop", "b", "norm", "c"], ["d"])
    ]
    assert seeds(model, watch) == {"noise": [True] * 10, "drop": [s < 5 for s in range(10)]}


def test_a_layer_that_the_user_froze_among_others_goes_with_the_next() -> None:
    model = small_model(["one", "two", "three", "four", "five"])
    for name in ("one", "three", "five"):
        model.get_layer(name).trainable = False
    assert names(model) == ["one", "two", "three four five"]


@pytest.mark.parametrize(
    ("name", "count"), [("a", 1), ("b", 2), ("base", 2), ("base.b", 2), ("c", 3)]
)
def test_up_to_names_a_layer_or_a_model_inside(name: str, count: int) -> None:
    freezer = FreezeOutCallback(schedule=Frozen(up_to=name))
    begun(with_base(trainable=True), freezer)
    assert freezer.timeline.changes == ((0, count),)


class Thawing(Plan):
    """Freezes and thaws."""

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline.of(num_layers, total_steps, [(0, 2), (3, 1)], freeze_every)

    def __repr__(self) -> str:
        return "Thawing()"


class Short(Plan):
    """Gives too few factors."""

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        return Timeline(num_layers, total_steps)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        return (1.0, 1.0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Thawing(), r"a plan that thaws is not supported on Keras: .* Thawing\(\), \(\(0, 2\), "),
        (Frozen(4), r"Frozen\(first=4\) does not go with 3 layers: 0 to 2 of them can be frozen"),
        (Schedule(times=(0, 1)), "times has 2 entries for 3 layers"),
        (Frozen(up_to="neck"), "up_to='neck' is no module of the model"),
        (Short(), "gave 2 factors for 3 layers"),
    ],
)
def test_plans_that_do_not_go_are_refused(plan: Plan, message: str) -> None:
    model = small_model()
    with pytest.raises(InvalidValue, match=message) as raised:
        fit_small(model, FreezeOutCallback(schedule=plan))
    assert "\n" not in str(raised.value)
    assert "update_step" not in vars(model.optimizer)


@slow
def test_averages_are_exchanged_without_frozen_weights() -> None:
    """SwapEMAWeights puts averages in the place of weights at an epoch's end; frozen ones stay."""
    model = new_model(OPTIMIZERS["ema"]())
    start = values(model.get_layer("one").variables)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    checkpoints: list[list[bytes]] = []
    save = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: checkpoints.append(
            values(model.get_layer("one").variables)
        )
    )
    fit(model, FreezeOutCallback(schedule=Frozen(1)), swap, save)
    assert all(each == start for each in checkpoints)
    assert values(model.get_layer("one").variables) == start


# --- checkpoints ----------------------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": BACKEND}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(whole: Whole, tmp_path: Path) -> None:
    """By Keras' BackupAndRestore, which saves when an epoch ends: killed in the fifth, in which
    a layer has frozen already that had not when the epoch began."""
    script = keras_loop.__file__
    killed = process(script, tmp_path, 4 * STEPS + 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = process(script, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    every = whole.model.variables + whole.model.optimizer.variables
    with np.load(tmp_path / "final.npz") as final:
        different = [
            v.path
            for v, name in zip(every, final.files, strict=True)
            if not np.array_equal(v.numpy(), final[name])
        ]
    assert not different


def test_a_model_saved_in_the_middle_is_whole_and_goes_on(whole: Whole) -> None:
    model = keras.models.load_model(whole.folder / "4.keras")
    assert int(model.optimizer.iterations.numpy()) == 4 * STEPS
    assert len(model.trainable_variables) == 12
    freezer = FreezeOutCallback(schedule=SCHEDULE)
    history = fit(model, freezer, initial_epoch=4)
    assert history.history["num_frozen"] == [3, 3]
    assert whole.same(model)


@slow
def test_an_optimizer_that_has_made_steps_before_starts_at_zero() -> None:
    schedule = Schedule(times=(0.4, 0.4, 1, 1))
    models = [new_model(keras.optimizers.SGD(0.01)) for _ in range(2)]
    models[1].optimizer._iterations.assign(1000)
    for model in models:
        fit(model, FreezeOutCallback(schedule=schedule))
    assert values(models[0].variables) == values(models[1].variables)


@slow
@pytest.mark.parametrize("option", ["steps_per_execution", "run_eagerly"])
def test_other_ways_of_running(option: str) -> None:
    if (option, BACKEND) == ("steps_per_execution", "torch"):
        pytest.skip("PyTorch has no steps_per_execution")
    model = new_model(**{option: 5 if option == "steps_per_execution" else True})
    watch = Watch()
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.34, 1, 1, 1)), total_steps=30)
    fit(model, freezer, watch, epochs=3)
    # A layer that should freeze after 11 steps of five at a time freezes after 15.
    eagerly = [True] * 11 + [False] * 4
    assert watch.moved("one/") == (eagerly if option == "run_eagerly" else [True] * 3)
    assert freezer.num_frozen == (option == "run_eagerly")


# --- which layers ---------------------------------------------------------------------------


def begun(model: Any, freezer: FreezeOutCallback, epochs: int = 3, steps: int = 3) -> None:
    """As `fit` begins."""
    freezer.set_params({"epochs": epochs, "steps": steps})
    freezer.set_model(model)
    freezer.on_train_begin()


def names(model: Any, layers: Any = None) -> list[str]:
    """The layers with variables, by the groups that freeze together."""
    model.compile("sgd", loss="mse")
    freezer = FreezeOutCallback(layers=layers)
    begun(model, freezer)
    return [" ".join(u.name for u in group if u.variables) for group in freezer.layers]


def test_a_functional_model_is_in_the_order_of_its_graph() -> None:
    last = kl.Dense(4, name="last")  # made first
    shared = kl.Dense(4, name="shared")
    inputs = kl.Input((4,))
    left = kl.BatchNormalization(name="norm")(kl.Dense(4, name="left")(inputs))
    right = kl.Dense(4, name="right")(shared(inputs))
    both = shared(kl.Add()([left, right]))  # used twice: its place is that of its last use
    model = keras.Model(inputs, last(both))
    found = names(model)
    assert {*found[:2]} == {"left norm", "right"}
    assert found[2:] == ["shared", "last"]


def test_models_inside_models_are_taken_apart() -> None:
    inner = keras.Sequential([kl.Input((4,)), kl.Dense(4, name="a"), kl.Dense(4, name="b")])
    inputs = kl.Input((4,))
    middle = keras.Model(inputs, kl.Dense(3, name="d")(inner(kl.Dense(4, name="c")(inputs))))
    model = keras.Sequential([kl.Input((4,)), middle, kl.Dense(2, name="e")])
    assert names(model) == ["c", "a", "b", "d", "e"]


class Block(kl.Layer):  # type: ignore[misc]
    """A composite layer that is no model: it freezes as one."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.first, self.norm, self.second = kl.Dense(4), kl.BatchNormalization(), kl.Dense(4)

    def build(self, shape: Any) -> None:
        for layer in (self.first, self.norm, self.second):
            layer.build(shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return inputs + self.second(self.norm(self.first(inputs), training=training))


class Subclassed(keras.Model):  # type: ignore[misc]
    """Defined in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = kl.Dense(1, name="head")
        self.blocks = [Block("block_0"), Block("block_1")]
        self.stem = kl.Dense(4, name="stem")

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x)


def test_a_subclassed_model_trains_in_the_order_in_which_it_runs() -> None:
    model = Subclassed()
    model.compile("adam", loss="mse")
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    if BACKEND == "tensorflow":
        with pytest.raises(InvalidValue, match="must be built before fit"):
            model.fit(x, x[:, :1], verbose=0, callbacks=[FreezeOutCallback()])
    model(x[:1])
    watch = Watch()
    freezer = FreezeOutCallback(schedule=Schedule(times=(0.25, 0.5, 0.75, 1)))
    model.fit(x, x[:, :1], batch_size=8, epochs=4, verbose=0, callbacks=[freezer, watch])
    found = [[unit.name for unit in group] for group in freezer.layers]
    assert found == [["stem"], ["block_0"], ["block_1"], ["head"]]
    for end, name in zip((5, 10, 15, 20), ("stem", "block_0", "block_1", "head"), strict=True):
        assert watch.moved(f"{name}/") == [s < end for s in range(20)]
    norm = next(i for i, v in enumerate(model.variables) if "moving_mean" in v.path)
    moved = [a[norm] != b[norm] for a, b in zip(watch.before, watch.after, strict=True)]
    assert moved == [s < 10 for s in range(20)]


def test_layers_can_be_given() -> None:
    model = new_model()
    assert names(model, [["one", "norm"], model.get_layer("two"), ["three", "four"]]) == [
        *("one norm", "two", "three four")
    ]
    with pytest.raises(LayerOrderError, match="layer 'two' runs after 'one', and must come after"):
        names(model, ["two", "one", "three", "four"])
    with pytest.raises(InvalidType, match="must hold Keras layers or their names, got 3"):
        names(model, [3])


# --- what no weight has reached -------------------------------------------------------------


class Stem(kl.Layer):  # type: ignore[misc]
    """Augments only in training, before its weights; drops out after them."""

    def __init__(self) -> None:
        super().__init__(name="stem")
        self.noise = kl.GaussianNoise(0.1, seed=1, name="before")
        self.dense = kl.Dense(6)
        self.norm = kl.BatchNormalization(name="norm")
        self.drop = kl.Dropout(0.5, seed=2, name="after")

    def build(self, shape: Any) -> None:
        for layer in (self.dense, self.norm):
            layer.build(shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = inputs / 2.0
        if training:
            x = self.noise(x, training=True)
        return self.drop(self.norm(self.dense(x), training=training), training=training)


def before(name: str = "before") -> Any:
    return kl.GaussianNoise(0.1, seed=1, name=name)


def after() -> Any:
    return kl.Dropout(0.5, seed=2, name="after")


def at_the_head() -> Any:
    flip = kl.RandomFlip("horizontal", seed=3, name="before_too")
    steps = [flip, kl.Reshape((6,)), before(), kl.Rescaling(0.5), kl.Dense(6), after()]
    return keras.Sequential([kl.Input((6,)), kl.Reshape((1, 6, 1)), *steps, kl.Dense(6)])


def in_a_model_inside() -> Any:
    augment = keras.Sequential([kl.Input((6,)), before()], name="augment")
    body = keras.Sequential([kl.Input((6,)), kl.Dense(6), after()], name="body")
    return keras.Sequential([kl.Input((6,)), augment, body, kl.Dense(6)])


def with_statistics() -> Any:
    """Preprocessing with a state, and a norm without weights."""
    prepared = kl.Normalization(mean=0.1, variance=2.0)
    norm = kl.BatchNormalization(center=False, scale=False, name="before_too")
    layers = [prepared, norm, before(), kl.Dense(6), after(), kl.Dense(6)]
    return keras.Sequential([kl.Input((6,)), *layers], name="net")


def in_another_branch() -> Any:
    inputs = kl.Input((6,))
    left = after()(kl.Dense(6)(kl.Dense(6)(inputs)))
    right = kl.Dense(6)(before()(inputs))
    return keras.Model(inputs, kl.Dense(6)(kl.Add()([left, right])))


def in_a_layer() -> Any:
    return keras.Sequential([kl.Input((6,)), Stem(), kl.Dense(6)])


HEADS = [at_the_head, in_a_model_inside, with_statistics, in_another_branch, in_a_layer]


@pytest.mark.parametrize("make", HEADS)
def test_a_frozen_layer_leaves_on_what_is_ahead_of_it(make: Callable[[], Any]) -> None:
    """The same random numbers are drawn, and statistics gathered, as in an ordinary fit; behind
    the first weights neither is, once the layer is frozen."""
    states = []
    for freezers in ([FreezeOutCallback(schedule=Frozen(all_but_last=1))], []):
        keras.utils.set_random_seed(0)
        model, watch = make(), Watch()
        compiled(model)
        fit_small(model, *freezers, watch)
        steps = [True] * (2 * STEPS)
        on = {name: watch.moved(name) for name in _heads(model)}
        states.append({name: _state_of(model, name) for name in on if "before" in name})
        for name, moved in on.items():
            assert moved == steps or ("after" in name and freezers and not any(moved)), name
    assert states[0] == states[1]


def _heads(model: Any) -> list[str]:
    """Paths of what moves in training without being trained, of layers of the names above."""
    found = [v.path for v in model.variables if not v.trainable]
    return [path for path in found if "before" in path or "after" in path]


def _state_of(model: Any, path: str) -> list[bytes]:
    return values(v for v in model.variables if v.path == path)


@pytest.mark.parametrize("readable", [True, False])
def test_layers_that_name_what_is_ahead_of_weights(
    readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given with the first layer, where the order can be read from a pass, and where not."""
    model, watch = with_base(trainable=True), Watch()
    if not readable:
        monkeypatch.setattr(type(model), "get_build_config", lambda self: {"input_shape": "?"})
        monkeypatch.setattr(type(model), "input", property(lambda self: self.no_such_thing))
    base = model.get_layer("base")
    freezer = FreezeOutCallback(layers=[["noise", base], "c", "d"], schedule=Frozen(1))
    fit_small(model, freezer, watch)
    assert [[u.name for u in group] for group in freezer.layers] == [["base"], ["c"], ["d"]]
    assert seeds(model, watch) == {"noise": [True] * 10, "drop": [False] * 10}


class Tied(kl.Layer):  # type: ignore[misc]
    """Uses another layer's kernel, transposed."""

    def __init__(self, other: Any) -> None:
        super().__init__(name="tied")
        self.other = other
        self.shift = self.add_weight(shape=(6,), name="shift")

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, keras.ops.transpose(self.other.kernel)) + self.shift


def test_a_shared_variable_freezes_with_the_last_layer_that_has_it() -> None:
    """And one of a layer that was not given, with the last of all."""
    first = kl.Dense(4, use_bias=False, name="first")
    middle, norm = kl.Dense(4, name="middle"), kl.BatchNormalization(name="norm")
    inputs = kl.Input((6,))
    model = keras.Model(inputs, kl.Dense(1, name="last")(Tied(first)(norm(middle(first(inputs))))))
    model.compile("sgd", loss="mse")
    freezer = FreezeOutCallback(
        layers=["first", "middle", "tied", "last"], schedule=Schedule(times=(0.2, 0.4, 0.6, 1))
    )
    watch = Watch()
    fit(model, freezer, watch, epochs=2)
    for end, name in ((6, "first/kernel"), (4, "middle/kernel"), (10, "norm/gamma")):
        assert watch.moved(name) == [s < end for s in range(2 * STEPS)]


@slow
def test_mixed_bfloat16() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, watch = new_model(), Watch()
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model, FreezeOutCallback(schedule=SCHEDULE), watch)
    assert watch.before[ENDS[0]][:2] == watch.after[-1][:2] != watch.before[ENDS[0] - 1][:2]


# --- mistakes -------------------------------------------------------------------------------


def test_what_is_given_is_checked() -> None:
    with pytest.raises(InvalidValue, match="total_steps must be at least 1"):
        FreezeOutCallback(0)
    with pytest.raises(InvalidType, match=r"schedule must be a plan, .* got float"):
        FreezeOutCallback(schedule=0.8)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="total_steps must be at least the 30 steps of 6 epochs"):
        fit(new_model(), FreezeOutCallback(20))
    with pytest.raises(InvalidValue, match="times has 2 entries for 4 layers"):
        fit(new_model(), FreezeOutCallback(schedule=Schedule(times=(0.5, 1))))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    with pytest.raises(InvalidType, match="LossScaleOptimizer"):
        fit(new_model(optimizer), FreezeOutCallback())
    frozen = new_model()
    frozen.trainable = False
    with pytest.raises(InvalidValue, match="no trainable variables"):
        fit(frozen, FreezeOutCallback())


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # which is how its end is seen
def test_batches_of_unknown_number_need_total_steps() -> None:
    def batches() -> Any:
        x, y = data()
        for start in range(0, len(x), BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]

    with pytest.raises(InvalidValue, match="total_steps must be given"):
        new_model().fit(batches(), verbose=0, shuffle=False, callbacks=[FreezeOutCallback()])
    freezer = FreezeOutCallback(STEPS, schedule=Schedule(0.3, "linear"))
    new_model().fit(batches(), verbose=0, shuffle=False, callbacks=[freezer])
    assert freezer.num_frozen == 3
    assert freezer.summary() == "froze 3 of 4 layers"
    watch, freezer = Watch(), FreezeOutCallback(3)
    model = new_model()
    with pytest.warns(UserWarning, match="goes on after the run's total_steps = 3") as warned:
        model.fit(batches(), verbose=0, shuffle=False, callbacks=[freezer, watch])
    assert sum("total_steps" in str(each.message) for each in warned) == 1
    assert len(watch.after) == STEPS
    del watch.before[STEPS:]  # where one more batch began than there are
    weights = [v.path for v in model.variables]
    for before, after in zip(watch.before[3:], watch.after[3:], strict=True):
        assert before[: len(weights)] == after[: len(weights)]  # norms' statistics are among them
    assert watch.moved("four/") == [True] * 3 + [False] * 2
    assert freezer.num_frozen == 2
    # A plan that needs no length gets none.
    freezer = FreezeOutCallback(schedule=Frozen(2))
    new_model().fit(batches(), verbose=0, shuffle=False, callbacks=[freezer])
    assert freezer.freeze_steps == (0, 0, None, None)
    assert freezer.summary() == "froze 2 of 4 layers, 2 of them from the start"


@pytest.mark.skipif(BACKEND == "torch", reason="this backend is torch")
def test_torch_is_not_needed() -> None:
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name, name="torch")
sys.meta_path.insert(0, NoTorch())
import keras, freezeout.integrations.keras
print(keras.config.backend(), "torch" in sys.modules)
"""
    result = process("-c", code)
    assert result.stdout == f"{BACKEND} False\n", result.stderr
