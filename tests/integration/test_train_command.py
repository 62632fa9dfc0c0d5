"""`freezeout train` as a user meets it: what it writes and shows, and what each mistake says."""

import fcntl
import functools
import http.server
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import freezeout
from freezeout import FreezeOut, Frozen, Schedule
from freezeout.cli import main
from freezeout.cost import run_cost, saving
from freezeout.lab import job as lab_job
from freezeout.lab.config import TrainConfig
from freezeout.lab.data import CIFAR10, eval_batches, load_data
from freezeout.lab.models import build_model, model_layers
from freezeout.lab.prediction import Prediction
from tests.command import (
    EPOCHS,
    FILES,
    LAYERS,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Outcome,
    differences,
    environment,
    options,
    process,
    read_checkpoint,
    read_rows,
    read_weights,
    run_here,
    run_process,
)

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

STOPPED_AT = STEPS_PER_EPOCH + 5


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty current folder, a cache beside it, and no way to the network."""
    monkeypatch.setenv("FREEZEOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FREEZEOUT_DATA_URL", "http://127.0.0.1:9")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small run, finished; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *options(out=folder)])
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, stopped in its second epoch; not to be written to."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(STOPPED_AT, patch)
        with pytest.raises(SystemExit):
            main(["train", *options(out=folder)])
    return folder


def interrupt_at(step: int, patch: Patch) -> None:
    """This process gets SIGTERM as the run is about to count that step."""
    count = FreezeOut.step

    def watched(freezer: FreezeOut) -> object:
        if freezer.step_count + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return count(freezer)

    patch.setattr(FreezeOut, "step", watched)


@pytest.fixture
def copy_of(alone: Path) -> Callable[[Path], Path]:
    """A copy of a run folder, in the current one."""
    return lambda folder: shutil.copytree(folder, alone / "run")


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """All files below (their first bytes and the time of their last change), and all folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_dir():
            found[str(path)] = (0, b"folder")
        elif path.is_symlink():
            found[str(path)] = (0, b"link")
        else:
            with open(path, "rb") as file:
                found[str(path)] = (status.st_mtime_ns, file.read(1 << 20))
    return found


def mistake(capsys: Capture, *arguments: object) -> str:
    """The one line that a mistake is answered with: status 2, and nothing made or changed."""
    before = contents(Path.cwd())
    ended = run_here(capsys, *arguments)
    assert contents(Path.cwd()) == before
    return line_of(ended)


def line_of(ended: Outcome) -> str:
    assert ended.status == 2
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("freezeout: ")
    assert "Traceback" not in ended.out
    return lines[0]


# --- what is written


def test_metrics_say_for_each_epoch_how_well_and_how_fast_it_went(finished: Path) -> None:
    rows = read_rows(finished)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert list(row) == [
            *("epoch", "step", "train_loss", "train_error", "valid_loss", "valid_error"),
            *("lr_lowest", "lr_highest", "frozen_layers", "trained_parameters"),
            *("seconds", "step_seconds", "images_per_second"),
        ]
        assert row["step"] == row["epoch"] * STEPS_PER_EPOCH
        assert all(math.isfinite(value) for value in row.values())
        assert 0 <= row["train_error"] <= 1
        assert 0 <= row["valid_error"] <= 1
        assert row["images_per_second"] == pytest.approx(1437 / row["seconds"])
        assert 0 < row["step_seconds"] < row["seconds"]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_metrics_follow_the_schedule(finished: Path) -> None:
    schedule = Schedule(0.4, "squared")
    ends = schedule.freeze_steps(LAYERS, TOTAL_STEPS)
    model = build_model("densenet", num_classes=10, depth=10, growth=4, dropout=0.1)
    layers = model_layers(model)
    assert layers is not None
    sizes = [sum(p.numel() for m in layer for p in m.parameters()) for layer in layers]
    for row in read_rows(finished):
        frozen = sum(end <= row["step"] for end in ends[:-1])
        factors = schedule.factors(row["step"] - 1, schedule.timeline(LAYERS, TOTAL_STEPS))
        rates = [0.1 * factor for factor in factors if factor > 0]
        assert row["frozen_layers"] == frozen
        assert (row["lr_lowest"], row["lr_highest"]) == (min(rates), max(rates))
        assert row["trained_parameters"] == sum(sizes[frozen:])
    assert read_rows(finished)[-1]["frozen_layers"] == LAYERS - 1


def test_config_holds_what_the_run_was_made_of(finished: Path) -> None:
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["model"] == "densenet"
    assert saved["config"]["t_0"] == 0.4
    assert saved["config"]["seed"] == 0
    prediction = saved["resolved"].pop("prediction")
    assert prediction["basis"] == "counted"  # the run is too short for measuring
    assert prediction["step_costs"] == sorted(prediction["step_costs"], reverse=True)
    assert len(set(prediction["step_costs"])) == LAYERS
    assert saved["resolved"] == {
        "epochs": EPOCHS,
        "total_steps": TOTAL_STEPS,
        "frozen_from_start": 0,
        "training_images": 1437,
        "parameters": 2666,
        "device": "cpu",
        "precision": "fp32",
        "memory_format": "channels_last",
    }
    assert f"{torch.get_num_threads()} threads" in saved["hardware"]
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["versions"]["freezeout"] == freezeout.__version__
    assert {"python", "numpy"} <= saved["versions"].keys()


def test_the_weights_give_the_last_epochs_error(finished: Path) -> None:
    model = build_model("densenet", num_classes=10, depth=10, growth=4, dropout=0.1)
    assert model.load_state_dict(read_weights(finished)).missing_keys == []
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    data = load_data("digits", validate="test")
    assert data.heldout_images is not None
    assert data.heldout_labels is not None
    ((x, y),) = eval_batches(
        data.heldout_images,
        data.heldout_labels,
        batch_size=500,
        mean=data.mean,
        std=data.std,
        channels_last=True,
    )
    with torch.no_grad():
        logits = model(x)
    row = read_rows(finished)[-1]
    assert row["valid_error"] == (logits.argmax(1) != y).double().mean().item()
    assert row["valid_loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-6)


def test_a_run_is_repeated_from_its_config(finished: Path, alone: Path, capsys: Capture) -> None:
    saved = json.loads((finished / "config.json").read_text())["config"]
    again = alone / "again"
    assert run_here(capsys, *options(**(saved | {"out": again}))).status == 0
    assert differences(again, finished) == []


def test_another_seed_is_another_run(finished: Path, alone: Path, capsys: Capture) -> None:
    run_here(capsys, *options(seed=1, steps=STEPS_PER_EPOCH, out=alone / "run"))
    assert read_rows(alone / "run")[0]["train_loss"] != read_rows(finished)[0]["train_loss"]


def test_without_freezeout_the_rate_is_plain_cosine(alone: Path, capsys: Capture) -> None:
    assert run_here(capsys, *options(freezeout=False, epochs=2, out=alone / "run")).status == 0
    optimizer = SGD([torch.zeros(1, requires_grad=True)], 0.1)
    cosine = CosineAnnealingLR(optimizer, 2 * STEPS_PER_EPOCH)
    rates = []
    for _ in range(2 * STEPS_PER_EPOCH):
        rates.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    rows = read_rows(alone / "run")
    for row in rows:
        assert row["lr_lowest"] == row["lr_highest"]
        assert row["lr_highest"] == pytest.approx(rates[row["step"] - 1], rel=1e-12)
    assert {(row["frozen_layers"], row["trained_parameters"]) for row in rows} == {(0, 2666)}


def test_a_run_of_so_many_steps_ends_within_an_epoch(alone: Path, capsys: Capture) -> None:
    folder = alone / "run"
    ended = run_here(capsys, *options(steps=STEPS_PER_EPOCH + 7, validate="none", out=folder))
    assert ended.status == 0
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 7]
    assert rows[-1]["frozen_layers"] == LAYERS - 1  # schedules end there too
    assert all(row["valid_loss"] is None and row["valid_error"] is None for row in rows)
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert resolved["total_steps"] == STEPS_PER_EPOCH + 7


def test_the_error_is_measured_as_often_as_asked_and_at_the_end(
    alone: Path, capsys: Capture
) -> None:
    words = options(epochs=3, validate_every=2, out=alone / "run")
    assert run_here(capsys, *words).status == 0
    rows, every = read_rows(alone / "run"), options(epochs=3, out=alone / "every")
    assert [row["valid_error"] is None for row in rows] == [True, False, False]
    assert run_here(capsys, *every).status == 0
    expected = [row["valid_error"] for row in read_rows(alone / "every")]
    assert [row["valid_error"] for row in rows[1:]] == expected[1:]  # training is the same


def test_constant_time_adds_epochs_until_the_predicted_time_is_the_baselines(
    alone: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    arguments = {"t_0": 0.3, "how_scale": "linear", "const_time": True}
    folder = alone / "run"
    assert run_here(capsys, *options(**arguments, dropout=0, epochs=3, out=folder)).status == 0
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    epochs: int = resolved["epochs"]
    costs: list[float] = resolved["prediction"]["step_costs"]
    assert len(costs) == LAYERS
    assert len(read_rows(folder)) == epochs > 3

    def missed(epochs: int) -> float:
        line = Schedule(0.3, "linear").timeline(LAYERS, epochs * STEPS_PER_EPOCH)
        return abs(run_cost(costs, line.counts()) - 3 * STEPS_PER_EPOCH * costs[0])

    assert epochs == min(range(1, 30), key=missed)

    # Resumed, it keeps to that number: nothing is measured again.
    monkeypatch.delattr(lab_job, "measure_step_costs")
    again = alone / "again"
    again.mkdir()
    shutil.copy(folder / "config.json", again)
    assert run_here(capsys, "--resume", again).status == 0
    assert differences(again, folder) == []


def test_constant_time_of_a_long_run_is_right_to_the_epoch(monkeypatch: Patch) -> None:
    costs = [float(LAYERS - k) for k in range(LAYERS)]
    monkeypatch.setattr(lab_job, "measure_step_costs", lambda *args, **options: costs)
    config = TrainConfig(
        model="densenet",
        depth=10,
        growth=4,
        dataset="digits",
        validate="test",
        epochs=40,
        batch_size=64,
        t_0=0.3,
        how_scale="linear",
        const_time=True,
        device="cpu",
    )

    def missed(epochs: int) -> float:
        line = Schedule(0.3, "linear").timeline(LAYERS, epochs * STEPS_PER_EPOCH)
        return abs(run_cost(costs, line.counts()) - 40 * STEPS_PER_EPOCH * costs[0])

    epochs, recorded = lab_job.Job(config).foresee()
    assert recorded == Prediction("measured", tuple(costs))
    assert epochs == min(range(1, 200), key=missed) > 50


def first_weights(**changes: Any) -> dict[str, Tensor]:
    """Of the small run's network, before its first step."""
    torch.manual_seed(0)
    sizes = {"depth": 10, "growth": 4, "dropout": 0.1, **changes}
    return build_model("densenet", num_classes=10, **sizes).state_dict()


def is_of_first(name: str, count: int) -> bool:
    """Whether a tensor belongs to one of the small network's first layers."""
    layers = ("stem", "block1_unit1", "transition1", "block2_unit1", "transition2", "block3_unit1")
    return name.split(".")[0] in layers[:count]


@pytest.mark.parametrize("frozen", ["3", "-4", "0.5", "transition1"])
def test_layers_frozen_from_the_start_stay_as_they_were(
    frozen: str, alone: Path, capsys: Capture
) -> None:
    """Seven layers, the first three of them frozen; BatchNorm's statistics stay, too."""
    total, folder = 30, alone / "run"
    ended = run_here(capsys, *options(frozen=frozen, steps=total, out=folder))
    assert (ended.status, ended.err) == (0, "")
    assert "frozen from the start: 3 of 7 layers\n" in ended.out
    plan = Frozen(3, then=Schedule(0.4, "squared"))
    line = plan.timeline(LAYERS, total)
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [STEPS_PER_EPOCH, total]
    for row in rows:
        rates = [0.1 * f for f in plan.factors(row["step"] - 1, line) if f > 0]
        assert row["frozen_layers"] == line.num_frozen(row["step"]) >= 3
        assert (row["lr_lowest"], row["lr_highest"]) == (min(rates), max(rates))
    weights, begun = read_weights(folder), first_weights()
    for name, weight in weights.items():
        same = torch.equal(weight, begun[name])
        assert same if is_of_first(name, 3) else not same or weight.numel() == 0, name
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["frozen"] == frozen
    assert saved["resolved"]["frozen_from_start"] == 3
    savings = json.loads((folder / "savings.json").read_text())
    costs = saved["resolved"]["prediction"]["step_costs"]
    assert [each["frozen_layers"] for each in savings["depths"]] == list(line.depths)
    assert savings["predicted_share"] == pytest.approx(saving(costs, line.counts()))
    # No full step was ever made.
    assert (savings["full_steps"], savings["measured_share"]) == ("predicted", None)


def test_with_t_0_of_1_the_other_layers_only_anneal(alone: Path, capsys: Capture) -> None:
    ended = run_here(capsys, *options(frozen=2, t_0=1, epochs=1))
    assert (ended.status, ended.err) == (0, "")
    folder = Path("runs/densenet-10-k4-digits-squared-1-frozen-2-seed0")
    (row,) = read_rows(folder)
    cosine = 0.5 * (1 + math.cos(math.pi * (STEPS_PER_EPOCH - 1) / STEPS_PER_EPOCH))
    assert (row["frozen_layers"], row["lr_lowest"], row["lr_highest"]) == (
        2,
        0.1 * cosine,
        0.1 * cosine,
    )


def test_constant_time_counts_what_is_frozen_from_the_start(monkeypatch: Patch) -> None:
    costs = [float(LAYERS - k) for k in range(LAYERS)]
    monkeypatch.setattr(lab_job, "measure_step_costs", lambda *args, **options: costs)
    config = TrainConfig(
        model="densenet",
        depth=10,
        growth=4,
        dataset="digits",
        epochs=10,
        batch_size=64,
        frozen="transition1",
        const_time=True,
        device="cpu",
    )
    job = lab_job.Job(config)
    plan = Frozen(3, then=Schedule())
    assert job.plan == plan

    def missed(epochs: int) -> float:
        line = plan.timeline(LAYERS, epochs * job.steps_per_epoch)
        return abs(run_cost(costs, line.counts()) - 10 * job.steps_per_epoch * costs[0])

    assert job.foresee()[0] == min(range(1, 60), key=missed) > 17


def test_without_out_the_folder_is_named_after_the_run(alone: Path, capsys: Capture) -> None:
    ended = run_here(capsys, *options(steps=1, batch_size=8, validate="none"))
    folder = Path("runs/densenet-10-k4-digits-squared-0.4-seed0")
    assert ended.status == 0
    assert sorted(os.listdir(folder)) == list(FILES)
    assert f"run folder: {folder}\n" in ended.out


def test_bf16_trains(alone: Path, capsys: Capture) -> None:
    arguments = options(precision="bf16", steps=4, validate="none", out=alone / "run")
    assert run_here(capsys, *arguments).status == 0
    saved = json.loads((alone / "run" / "config.json").read_text())
    assert saved["resolved"]["precision"] == "bf16"
    assert math.isfinite(read_rows(alone / "run")[0]["train_loss"])


def test_cifar_from_a_folder(cifar10: Path, alone: Path, capsys: Capture) -> None:
    arguments = {"dataset": "cifar10", "data_dir": cifar10.parent, "validate": "none"}
    ended = run_here(capsys, *options(**arguments, steps=2, out=alone / "run"))
    assert (ended.status, ended.err) == (0, "")
    saved = json.loads((alone / "run" / "config.json").read_text())
    assert saved["resolved"]["training_images"] == 50_000
    assert read_rows(alone / "run")[0]["step"] == 2


class Writer:
    """Stands in for TensorBoard's."""

    def __init__(self, path: Path, purge_step: int) -> None:
        path.joinpath("events").touch()
        self.purge_step = purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flush = lambda: None
        made.append(self)

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.scalars.append((name, value, epoch))


made: list[Writer] = []


def test_tensorboard_gets_every_metric(alone: Path, capsys: Capture, monkeypatch: Patch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    arguments = options(tensorboard=True, epochs=1, steps=2, out=alone / "run")
    assert run_here(capsys, *arguments).status == 0
    (row,) = read_rows(alone / "run")
    expected = {k: v for k, v in row.items() if k not in ("epoch", "step")}
    assert {name: value for name, value, _ in made[-1].scalars} == expected
    assert {epoch for *_, epoch in made[-1].scalars} == {made[-1].purge_step} == {1}


# --- what is shown


def test_without_a_terminal_there_are_plain_lines(alone: Path) -> None:
    folder = alone / "run"
    ended = run_process(*options(epochs=2, out=folder))
    assert (ended.status, ended.err) == (0, "")
    assert not re.search(r"[\x1b\r]", ended.out)
    lines = ended.out.splitlines()
    assert "densenet" in lines[0]
    assert "46 steps" in lines[0]
    assert "layers freeze from step 8 to step 38; the largest starting rate is 0.575" in lines[1]
    assert lines[2] == f"if it is stopped, go on with: freezeout train --resume {folder}"
    for number, row in enumerate(read_rows(folder)):
        assert re.fullmatch(
            rf"epoch {number + 1}/2  loss {row['train_loss']:.4f}  error .*%  "
            rf"frozen {row['frozen_layers']}/7  .* s  \d+ images/s  [\d.]+ s left",
            lines[3 + number],
        )
    assert lines[5].startswith("froze 6 of 7 layers")
    assert lines[6] == f"run folder: {folder}"


def test_a_terminal_has_a_live_line_with_loss_frozen_layers_and_time_left(alone: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = environment(TERM="xterm")
    del variables["COLUMNS"]
    with subprocess.Popen(
        process(*options(out=alone / "run")), stdout=slave, stderr=slave, env=variables
    ) as child:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(master)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    live = re.findall(
        r"epoch \d/4 \S+ +(\d+)/92 loss \d\.\d{3}  frozen \d/7 \d:\d\d:\d\d left (\S+)", text
    )
    assert len(live) > EPOCHS
    assert any(re.fullmatch(r"\d:\d\d:\d\d", left) for _, left in live)
    assert len(re.findall(r"epoch \d/4  loss .* left\r\n", text)) == EPOCHS
    assert live[-1][0] == "92"  # the line that stays is full


def test_help_needs_no_torch() -> None:
    code = """
import sys
from freezeout.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, "train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--const-time" in shown.stdout
    assert "--resume" in shown.stdout


def test_without_the_extra_a_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['tyro'] = None; from freezeout.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code, "train"], capture_output=True, text=True)
    assert shown.returncode != 0
    assert len(shown.stderr.splitlines()) == 1
    assert "pip install 'freezeout[lab]'" in shown.stderr


# --- stopping and going on


def test_a_stopped_run_goes_on_bit_for_bit(
    finished: Path, stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    assert read_checkpoint(stopped)["freezer"]["step"] == STOPPED_AT
    assert [row["epoch"] for row in read_rows(stopped)] == [1]
    folder = copy_of(stopped)
    assert run_here(capsys, "--resume", folder).status == 0
    assert differences(folder, finished) == []


def test_a_run_stopped_in_its_evaluation_goes_on_bit_for_bit(
    finished: Path, alone: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def evaluation(*args: Any, **options: Any) -> Iterator[Any]:
        signal.raise_signal(signal.SIGINT)
        return eval_batches(*args, **options)

    monkeypatch.setattr(lab_job, "eval_batches", evaluation)
    ended = run_here(capsys, *options(out=alone / "run"))
    assert ended.status == 130
    assert f"stopped after step {STEPS_PER_EPOCH};" in ended.err
    monkeypatch.setattr(lab_job, "eval_batches", eval_batches)
    assert run_here(capsys, "--resume", alone / "run").status == 0
    assert differences(alone / "run", finished) == []


def test_a_run_is_resumed_wherever_its_folder_was_moved(
    finished: Path, stopped: Path, alone: Path, capsys: Capture
) -> None:
    shutil.copytree(stopped, alone / "moved")
    assert run_here(capsys, "--resume", "moved").status == 0
    assert differences(alone / "moved", finished) == []


def test_signals_are_handled_as_before_once_a_run_has_ended(
    alone: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt_at(1, monkeypatch)
    assert run_here(capsys, *options(out=alone / "run")).status == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_way_to_go_on_can_be_pasted_into_a_shell(
    alone: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    interrupt_at(1, monkeypatch)
    ended = run_here(capsys, *options(out=alone / "a run's folder"))
    said = re.findall("go on with: (.*)", ended.out + ended.err)
    assert len(said) == 2  # before and after
    for command in said:
        shell = f"freezeout() {{ printf '%s\\n' \"$@\"; }}; {command}"
        words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout
        assert words.splitlines() == ["train", "--resume", str(alone / "a run's folder")]


# --- mistakes in the options


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"t_0": t}, rf"t_0 must be .*\(0, 1\].*{t}")
            for t in ("0", "-0.1", "1.5", "nan", "inf")
        ),
        ({"how_scale": "quartic"}, "how_scale must be 'linear', 'squared' or 'cubic'.*quartic"),
        ({"model": "resnext"}, "model must be densenet, wrn, vgg or timm:NAME, got 'resnext'"),
        ({"dataset": "imagenet"}, "'imagenet'.*cifar10, cifar100, digits"),
        ({"validate": "half"}, "'half'.*valid, test, none"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
        ({"device": "abacus"}, "device 'abacus' is not there; this machine has cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there; this machine has cpu"),
        ({"device": "meta"}, "device 'meta' is not there; this machine has cpu"),
        ({"device": ""}, "device '' is not there; this machine has cpu"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": -3}, "epochs must be at least 1, got -3"),
        ({"validate_every": 0}, "validate_every must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"seed": -1}, "seed must be .*-1"),
        ({"seed": 2**64}, f"seed must be .*{2**64}"),
        ({"lr": "nan"}, r"lr must be in \(0, inf\), got nan"),
        ({"lr": 0}, r"lr must be in \(0, inf\), got 0"),
        ({"lr": "inf"}, r"lr must be in \(0, inf\), got inf"),
        ({"weight_decay": "nan"}, r"weight_decay must be in \[0, inf\), got nan"),
        ({"weight_decay": -1}, r"weight_decay must be in \[0, inf\), got -1"),
        ({"momentum": 1}, r"momentum must be in \[0, 1\), got 1"),
        ({"momentum": "nan"}, r"momentum must be in \[0, 1\), got nan"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"dropout": "nan"}, r"dropout must be in \[0, 1\), got nan"),
        ({"depth": 0}, "depth of densenet.*6 n \\+ 4.*got 0"),
        ({"depth": 75}, "depth of densenet.*6 n \\+ 4.*got 75"),
        ({"depth": -2}, "depth of densenet.*6 n \\+ 4.*got -2"),
        ({"growth": 0}, "growth .*got 0"),
        ({"model": "wrn", "growth": None, "depth": 17}, "depth of wrn.*6 n \\+ 4.*got 17"),
        ({"model": "wrn", "growth": None, "widen_factor": 0}, "widen_factor .*got 0"),
        ({"model": "wrn"}, "growth is not an option of wrn, which takes depth, widen_factor"),
        ({"model": "vgg", "growth": None, "depth": 15}, "depth .*vgg.*got 15"),
        ({"widen_factor": 2}, "widen_factor is not an option of densenet"),
        ({"const_time": True, "steps": 9}, "const_time needs freezeout and whole epochs"),
        ({"const_time": True, "freezeout": False}, "const_time needs freezeout"),
        ({"frozen": "0.0.1"}, "a number of layers .*module's name such as .*; got '0.0.1'"),
        ({"frozen": "layer99"}, "a number of layers .*module's name such as .*; got 'layer99'"),
        ({"frozen": "transition3"}, "such as transition2, transition1; got 'transition3'"),
        ({"frozen": 99}, r"first=99\) does not go with 7 layers: 0 to 6 of them can be frozen"),
        ({"frozen": 7}, r"first=7\) does not go with 7 layers: 0 to 6 of them can be frozen"),
        ({"frozen": "head"}, r"up_to='head'\) does not go with 7 layers: 0 to 6 of them"),
        ({"frozen": -8}, r"all_but_last=8\) does not go with 7 layers"),
        ({"frozen": 0}, "a number of layers .*, got '0'; for none, leave it out"),
        ({"frozen": 1.5}, r"a share of them in \(0, 1\) .*, got '1.5'"),
        ({"frozen": ""}, "a number of layers .*, got ''"),
        ({"frozen": 3, "freezeout": False}, "frozen='3' needs freezeout"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_one_line(changes: dict[str, Any], said: str, capsys: Capture) -> None:
    assert re.search(said, mistake(capsys, *options(**changes)))


def test_an_unknown_timm_model_is_one_line(capsys: Capture) -> None:
    pytest.importorskip("timm")
    arguments = options(model="timm:nonesuch", depth=None, growth=None)
    assert "nonesuch" in mistake(capsys, *arguments)


@pytest.mark.parametrize(
    "changes",
    [{"model": "resnext"}, {"depth": 75}, {"growth": 0}, {"widen_factor": 2}],
    ids=str,
)
def test_a_bad_network_is_reported_before_any_data_are_fetched(
    changes: dict[str, Any], capsys: Capture, monkeypatch: Patch
) -> None:
    def fetched(*args: object, **options: object) -> None:
        raise AssertionError("data were fetched")

    monkeypatch.setattr(lab_job, "load_data", fetched)
    assert mistake(capsys, *options(dataset="cifar100", **changes))


@pytest.mark.parametrize(
    "arguments", [["--epochs", "many"], ["--t-0", "soon"], ["--colour", "red"], ["--epochs"]]
)
def test_what_is_no_option_is_refused(arguments: list[str], capsys: Capture) -> None:
    ended = run_here(capsys, *arguments)
    assert ended.status == 2
    assert arguments[0] in ended.err
    assert "Traceback" not in ended.err
    assert contents(Path.cwd()) == {}


def test_a_mistake_through_a_process_of_its_own(alone: Path) -> None:
    ended = run_process(*options(t_0="nan"), cwd=alone)
    assert re.fullmatch(r"freezeout: t_0 must be .*\(0, 1\].*nan", line_of(ended))
    assert contents(alone) == {}


def test_tensorboard_that_is_not_installed_is_one_line(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = mistake(capsys, *options(tensorboard=True, steps=1, batch_size=8))
    assert "pip install 'freezeout[tensorboard]'" in line


def test_a_run_that_diverges_says_what_to_change(alone: Path, capsys: Capture) -> None:
    ended = run_here(capsys, *options(lr=1e30, out=alone / "run"))
    assert "the run diverged; try a lower --lr than 1e+30" in line_of(ended)


# --- mistakes in the run folder


def test_a_folder_that_exists_is_not_touched(finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    line = mistake(capsys, *options(out=finished))
    assert f"run folder {finished} exists; go on with freezeout train --resume {finished}" in line
    assert contents(finished) == before


def test_a_folder_that_exists_under_the_runs_own_name(alone: Path, capsys: Capture) -> None:
    (alone / "runs/densenet-10-k4-digits-squared-0.4-seed0").mkdir(parents=True)
    assert "seed0 exists" in mistake(capsys, *options())


def test_a_file_in_the_place_of_the_folder(alone: Path, capsys: Capture) -> None:
    (alone / "file").write_text("mine")
    assert "run folder file exists" in mistake(capsys, *options(out="file"))
    assert "file/run" in mistake(capsys, *options(out="file/run", steps=1, batch_size=8))


def test_resuming_takes_no_other_option(stopped: Path, capsys: Capture) -> None:
    before = contents(stopped)
    assert "leave out --epochs" in mistake(capsys, "--resume", stopped, "--epochs", 9)
    assert "leave out --no-freezeout" in mistake(capsys, "--resume", stopped, "--no-freezeout")
    assert contents(stopped) == before


def test_resuming_refuses_an_option_that_has_its_default_value(
    stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    """100 epochs are the default, and are not what the folder's run has."""
    assert "leave out --epochs" in mistake(capsys, "--resume", copy_of(stopped), "--epochs", 100)


def test_resuming_what_is_no_run(alone: Path, capsys: Capture) -> None:
    (alone / "empty").mkdir()
    (alone / "file").touch()
    for name in ("empty", "file", "nothing"):
        assert f"{name} is no run folder" in mistake(capsys, "--resume", name)


def damage(folder: Path, *path: str, to: object = None) -> None:
    """Change a value in config.json, or take it out."""
    whole = inner = json.loads((folder / "config.json").read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    if to is None:
        del inner[path[-1]]
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"config": {}, "resolved": 3}', b"null"]
)
def test_a_config_that_is_damaged(
    content: bytes, stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    folder = copy_of(stopped)
    (folder / "config.json").write_bytes(content)
    assert f"{folder}" in mistake(capsys, "--resume", folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "lr"), None),
        (("config", "colour"), "red"),
        (("config", "lr"), "fast"),
        (("config", "model"), 5),
        (("config", "dataset"), ["digits"]),
        (("config", "device"), 5),
        (("config", "augment"), "no"),
        (("config", "depth"), "deep"),
        (("resolved", "epochs"), None),
        (("resolved", "epochs"), 0),
        (("resolved", "precision"), "fp8"),
        (("resolved",), None),
    ],
)
def test_a_config_with_a_value_that_cannot_be(
    path: tuple[str, ...],
    value: object,
    stopped: Path,
    copy_of: Callable[[Path], Path],
    capsys: Capture,
) -> None:
    folder = copy_of(stopped)
    damage(folder, *path, to=value)
    line = mistake(capsys, "--resume", folder)
    assert path[-1] in line or "is not a run's configuration" in line


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("config", "lr"), 0.2, "another configuration: its lr is 0.1, config.json says 0.2"),
        (("config", "seed"), 7, "another configuration: its seed is 0, config.json says 7"),
        (("config", "t_0"), 0.5, "another configuration: its t_0 is 0.4"),
        (("config", "growth"), 5, "another configuration: its growth is 4"),
        (("resolved", "epochs"), 9, "another configuration: its resolved epochs is 4"),
    ],
)
def test_a_checkpoint_of_another_configuration(
    path: tuple[str, ...],
    value: object,
    said: str,
    stopped: Path,
    copy_of: Callable[[Path], Path],
    capsys: Capture,
) -> None:
    folder = copy_of(stopped)
    damage(folder, *path, to=value)
    assert said in mistake(capsys, "--resume", folder)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint(
    kept: float, stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    folder = copy_of(stopped)
    path = folder / "checkpoint.pt"
    os.truncate(path, int(kept * path.stat().st_size))
    assert f"{path} is damaged or no checkpoint" in mistake(capsys, "--resume", folder)


class Hostile:
    """Pickled, it makes whoever reads it write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("written"),)


@pytest.mark.parametrize(
    "content",
    [5, [1], {}, {"config": 3}, {"config": {}}, Hostile(), "garbage"],
    ids=lambda value: type(value).__name__ + str(value)[:12],
)
def test_what_is_no_checkpoint(
    content: object, stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    folder = copy_of(stopped)
    path = folder / "checkpoint.pt"
    if content == "garbage":
        path.write_bytes(os.urandom(4096))
    else:
        torch.save(content, path)
    assert f"{path} is " in mistake(capsys, "--resume", folder)


@pytest.mark.parametrize(
    "key", ["model", "optimizer", "freezer", "random", "sums", "rows", "times"]
)
def test_a_checkpoint_that_lacks_a_part(
    key: str, stopped: Path, copy_of: Callable[[Path], Path], capsys: Capture
) -> None:
    folder = copy_of(stopped)
    state = read_checkpoint(folder)
    del state[key]
    torch.save(state, folder / "checkpoint.pt")
    line = mistake(capsys, "--resume", folder)
    assert f"{folder}/checkpoint.pt does not fit this run: KeyError: '{key}'" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "model.safetensors"])
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_written(
    name: str,
    finished: Path,
    stopped: Path,
    copy_of: Callable[[Path], Path],
    capsys: Capture,
) -> None:
    folder = copy_of(stopped)
    before = contents(folder).get(str(folder / name))
    (folder / f".{name}.tmp").symlink_to("/dev/full")
    line = line_of(run_here(capsys, "--resume", folder))
    assert f"cannot write {folder / name}: No space left on device" in line
    assert contents(folder).get(str(folder / name)) == before
    assert Path("/dev/full").is_char_device()
    assert not (folder / f".{name}.tmp").is_symlink()
    # With room again, the run goes on.
    assert run_here(capsys, "--resume", folder).status == 0
    assert differences(folder, finished) == []


def test_a_run_that_could_not_begin_can_begin_again(
    alone: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """The disk was full when its first file was written."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in line_of(run_here(capsys, *options(out="run")))
    assert run_here(capsys, *options(steps=1, batch_size=8, out="run")).status == 0


# --- mistakes in the data


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of CIFAR-10's names and sizes: one of random images, linked."""
    folder = tmp_path_factory.mktemp("cifar") / CIFAR10.folder
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    first, *others = CIFAR10.file_sizes
    records.tofile(folder / first)
    for name in others:
        os.link(folder / first, folder / name)
    return folder


def make_files(data: Path, name: str = "", size: int | None = 30_730_000) -> Path:
    """Empty (sparse) files of the right names and sizes, of which one may be of another size."""
    folder = data / CIFAR10.folder
    folder.mkdir(parents=True)
    for each, right in CIFAR10.file_sizes.items():
        if each != name or size is not None:
            (folder / each).touch()
            os.truncate(folder / each, size if each == name and size is not None else right)
    return folder


def bad_data(capsys: Capture, data: object) -> str:
    return mistake(capsys, *options(dataset="cifar10", data_dir=data))


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("data_batch_3.bin", None, "missing, expected a file of 30,730,000 bytes"),
        ("data_batch_5.bin", 30_729_999, "found 30,729,999 bytes, expected 30,730,000"),
        ("test_batch.bin", 0, "found 0 bytes, expected 30,730,000"),
        ("data_batch_1.bin", 30_733_073, "found 30,733,073 bytes, expected 30,730,000"),
    ],
)
def test_data_that_are_missing_truncated_or_too_long(
    name: str, size: int | None, found: str, alone: Path, capsys: Capture
) -> None:
    folder = make_files(alone / "data", name, size)
    assert f"{alone / 'data' / folder.name / name}: {found}" in bad_data(capsys, alone / "data")


def test_data_of_the_right_size_that_hold_nothing(alone: Path, capsys: Capture) -> None:
    make_files(alone / "data")
    assert "a colour channel is the same everywhere" in bad_data(capsys, alone / "data")


def test_a_label_that_cannot_be(alone: Path, capsys: Capture) -> None:
    folder = make_files(alone / "data")
    with open(folder / "data_batch_1.bin", "r+b") as file:
        file.seek(3073 * 7)
        file.write(b"\x0a")
    assert "record 7 has label 10, expected 0..9" in bad_data(capsys, alone / "data")


def test_a_data_folder_that_is_not_there(alone: Path, capsys: Capture) -> None:
    (alone / "file").touch()
    (alone / "empty").mkdir()
    assert "data folder nowhere: no such folder" in bad_data(capsys, "nowhere")
    assert "data folder file: a file, not a folder" in bad_data(capsys, "file")
    assert "no cifar10 in empty: expected" in bad_data(capsys, "empty")


def archive_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/outside.bin", "cifar-10-batches-bin/../../outside.bin"]
)
def test_an_archive_with_a_path_outside_its_folder(name: str, alone: Path, capsys: Capture) -> None:
    (alone / CIFAR10.archive).write_bytes(archive_of([name]))
    line = bad_data(capsys, alone)
    assert f"member {name!r} lies outside cifar-10-batches-bin" in line
    assert not [path for path in alone.parent.rglob("*") if path.name == "outside.bin"]


# By name: gzip writes the time into its head, so the bytes differ from one process to the next, and
# pytest's parallel workers must all collect the same names.
@pytest.mark.parametrize("content", ["empty", "garbage", "truncated"])
def test_an_archive_that_is_damaged(content: str, alone: Path, capsys: Capture) -> None:
    truncated = archive_of(["cifar-10-batches-bin/x"])[:60]
    data = {"empty": b"", "garbage": b"garbage", "truncated": truncated}[content]
    (alone / CIFAR10.archive).write_bytes(data)
    assert f"{alone / CIFAR10.archive}: damaged archive: " in bad_data(capsys, alone)


def test_a_corrupt_download(alone: Path, tmp_path: Path) -> None:
    """Through a process of its own, which pooch writes to stderr of as well."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / CIFAR10.archive).write_bytes(b"not what it was")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        ended = run_process(
            *options(dataset="cifar10"), cwd=alone, FREEZEOUT_DATA_URL=address, NO_PROXY="127.0.0.1"
        )
        server.shutdown()
        thread.join()
    assert ended.status == 2
    assert "Traceback" not in ended.err
    *progress, line = ended.err.splitlines()
    assert line.startswith(f"freezeout: cannot download {address}/{CIFAR10.archive}: ")
    assert "--data-dir" in line
    assert not any(text.startswith("freezeout: ") for text in progress)
    assert contents(alone) == {}
    assert not list((tmp_path / "cache").glob("*"))
