"""`freezeout train` under torchrun, in real processes: shares, files, signals, errors."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from freezeout.errors import InvalidValue
from freezeout.lab.config import TrainConfig
from freezeout.lab.device import choose_device
from freezeout.lab.job import Job
from freezeout.lab.ranks import Ranks
from tests.command import (
    STEPS_PER_EPOCH,
    Outcome,
    differences,
    environment,
    options,
    read_checkpoint,
    read_rows,
    read_weights,
)

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals"),
]

EPOCHS = 3
# The command, with a network without BatchNorm beside the others, a record of each step's loss,
# and, on one rank alone, a signal at a step, other options or an error.
_COMMAND = """
import json, os, signal, sys
from torch import nn
import freezeout.lab.job as job
import freezeout.lab.models as models
from freezeout.cli import main
from freezeout.errors import InvalidValue
from freezeout.freezer import FreezeOut
from freezeout.lab.models.chain import Chain

class Plain(Chain):
    def __init__(self, *, num_classes, dropout=0.0):
        def block(n, m):
            return nn.Sequential(nn.Conv2d(n, m, 3, stride=2), nn.GroupNorm(2, m), nn.ReLU())
        super().__init__({
            "one": block(3, 8), "two": block(8, 8), "three": block(8, 16),
            "flat": nn.Flatten(), "head": nn.Linear(144, num_classes),
        })

models._MODELS["plain"] = (Plain, ())
rank = int(os.environ.get("RANK", "0"))
add, step, losses = job.Sums.add, FreezeOut.step, []

def recorded(sums, loss, logits, y):
    losses.append((loss.item() * len(y), len(y)))
    add(sums, loss, logits, y)

job.Sums.add = recorded
here = json.loads(os.environ.get("ON_RANK", "{}")).get(str(rank), {})
words = [*sys.argv[1:], *here.get("options", [])]
if "error" in here:
    def failing(*args):
        raise InvalidValue(here["error"])
    job.choose_device = failing
if "signal" in here:
    def signalled(freezer):
        if freezer.step_count == here["step"] - 1:
            os.kill(os.getpid(), signal.Signals[here["signal"]])
        return step(freezer)
    FreezeOut.step = signalled
try:
    main(["train", *words])
finally:
    # At the interpreter's end, a thread of the process group's would now and then abort.
    tasks = "/proc/self/task"
    for task in os.listdir(tasks) if os.path.exists(tasks) else ():
        if "gloo" in open(f"{tasks}/{task}/comm").read():
            print("a thread is left", file=sys.stderr)
    if "LOSSES" in os.environ:
        open(os.environ["LOSSES"] + str(rank), "w").write(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("command") / "command.py"
    file.write_text(_COMMAND)
    return file


def words(command: Path, ranks: int, *arguments: object) -> list[str]:
    """What starts the command on so many ranks; on one, without torchrun."""
    tail = [str(command), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *tail]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "--master-port", str(port), *tail]


def variables(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment(PYTHONPATH=path, **changes)


def run(command: Path, ranks: int, *arguments: object, **changes: str) -> Outcome:
    result = subprocess.run(
        words(command, ranks, *arguments),
        capture_output=True,
        text=True,
        env=variables(**changes),
        timeout=300,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def reference(command: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run on two ranks, with BatchNorm and dropout."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = run(command, 2, *options(out=folder, epochs=EPOCHS))
    assert ended.status == 0, ended.err
    assert "a thread is left" not in ended.err
    assert ended.out.count("epoch 1/") == ended.out.count("run folder:") == 1
    assert "2 ranks" in ended.out
    return folder


def test_a_single_process_takes_every_image_and_two_share_them() -> None:
    for count in (1, 2, 5, 50):
        assert Ranks().share(count) == (slice(0, count), 1.0)
        for size in (2, 3, 4):
            shares = [Ranks(rank, size).share(count) for rank in range(size)]
            taken = [i for part, weight in shares if weight for i in range(count)[part]]
            assert taken == list(range(count))
            # Averaged over ranks, weights times means give the mean of all.
            assert sum(w * (i.stop - i.start) > 0 for i, w in shares) == min(size, count)
            assert sum(w for _, w in shares) == pytest.approx(size)
            assert all(len(range(count)[part]) for part, _ in shares)


def test_the_first_20_losses_are_those_of_a_single_process(command: Path, tmp_path: Path) -> None:
    """Batches of 359 of 1,437 images: an odd number, and each epoch's last batch has one image,
    so that one rank has none. Three layers freeze on the way."""
    arguments = {"model": "plain", "depth": None, "growth": None, "dropout": None, "lr": 0.02}
    losses: dict[int, list[float]] = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        given = options(**arguments, steps=20, batch_size=359, validate="none", out=folder)
        ended = run(command, ranks, *given, LOSSES=f"{folder}-losses-")
        assert ended.status == 0, ended.err
        parts = [json.loads(Path(f"{folder}-losses-{r}").read_text()) for r in range(ranks)]
        last = [i for i in range(20) if i % 5 == 4]
        for part in parts[:-1]:  # the last rank has the only image of each epoch's last batch
            for i in last:
                part.insert(i, (0.0, 0))
        steps = [list(zip(*shares, strict=True)) for shares in zip(*parts, strict=True)]
        assert [sum(counts) for _, counts in steps] == [1 if i in last else 359 for i in range(20)]
        losses[ranks] = [sum(sums) / sum(counts) for sums, counts in steps]
    assert losses[2] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert losses[1][0] - losses[1][18] > 0.1  # something was learnt
    one, two = (read_rows(tmp_path / str(ranks)) for ranks in (1, 2))
    assert [row["frozen_layers"] for row in two] == [row["frozen_layers"] for row in one]
    assert two[-1]["frozen_layers"] == 3
    for mine, theirs in zip(two, one, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0, abs=1e-5)
        assert mine["train_error"] == pytest.approx(theirs["train_error"], abs=2 / 1437)
    for name, weight in read_weights(tmp_path / "1").items():
        torch.testing.assert_close(
            read_weights(tmp_path / "2")[name], weight, rtol=0, atol=1e-4, msg=name
        )


def test_ranks_freeze_layers_from_the_start_alike(command: Path, tmp_path: Path) -> None:
    """The first layer's weights stay the initial ones to the bit, on one rank and on two."""
    arguments = {"model": "plain", "depth": None, "growth": None, "dropout": None, "lr": 0.02}
    for ranks in (1, 2):
        given = options(**arguments, frozen=1, steps=30, validate="none", out=tmp_path / str(ranks))
        ended = run(command, ranks, *given)
        assert ended.status == 0, ended.err
    one, two = (read_rows(tmp_path / str(ranks)) for ranks in (1, 2))
    assert [row["frozen_layers"] for row in two] == [row["frozen_layers"] for row in one]
    assert two[0]["frozen_layers"] >= 1
    for mine, theirs in zip(two, one, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0, abs=1e-5)
    begun = first_weights(command)
    for ranks in (1, 2):
        weights = read_weights(tmp_path / str(ranks))
        same = {name for name, weight in weights.items() if torch.equal(weight, begun[name])}
        assert same == {name for name in weights if name.startswith("one.")}


def first_weights(command: Path) -> dict[str, torch.Tensor]:
    """Of the network without BatchNorm, before its first step."""
    names: dict[str, Any] = {}
    exec(command.read_text().partition("models._MODELS")[0], names)
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = names["Plain"](num_classes=10).state_dict()
    return weights


def test_a_killed_run_goes_on_as_if_never_killed(
    command: Path, reference: Path, tmp_path: Path
) -> None:
    """Killed after its first epoch, stopped in its last by a signal to one rank, and finished;
    from the kill, also on one rank."""
    folder, step = tmp_path / "killed", 2 * STEPS_PER_EPOCH + 6
    with subprocess.Popen(
        words(command, 2, *options(out=folder, epochs=EPOCHS)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=variables(),
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "epoch 1/" in line:
                break
        os.killpg(job.pid, signal.SIGKILL)  # torchrun and its ranks
    assert job.returncode == -signal.SIGKILL
    assert len(read_rows(folder)) < EPOCHS
    alone = shutil.copytree(folder, tmp_path / "alone")

    on_rank = {1: {"signal": "SIGTERM", "step": step}}
    ended = run(command, 2, "--resume", folder, ON_RANK=json.dumps(on_rank))
    assert ended.status != 0
    assert ended.err.count("freezeout: ") == 1
    advice = f"freezeout train --resume {folder}"
    assert f"freezeout: stopped after step {step}; go on with: {advice}\n" in ended.err
    assert "KeyboardInterrupt" not in ended.err
    state = read_checkpoint(folder)
    assert state["freezer"]["step"] == step
    assert state["sums"]["images"] == 6 * 64  # of both ranks
    assert len(state["random"]) == 2

    ended = run(command, 2, "--resume", folder)
    assert ended.status == 0, ended.err
    assert differences(folder, reference) == []  # dropout too

    ended = run(command, 1, "--resume", alone)
    assert (ended.status, ended.err) == (0, "")
    rows, expected = read_rows(alone), read_rows(reference)
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert [row["frozen_layers"] for row in rows] == [row["frozen_layers"] for row in expected]
    # Other dropout masks, and BatchNorm over whole batches, but the same run otherwise.
    assert rows[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=0.2)


@pytest.mark.parametrize(
    ("on_rank", "line"),
    [
        (
            {1: {"options": ["--t-0", "0.5"]}},
            "the ranks differ: t_0 is 0.4 on rank 0 and 0.5 on rank 1",
        ),
        ({1: {"error": "no such device"}}, "no such device (rank 1)"),
    ],
    ids=["schedules", "one-rank"],
)
def test_a_mistake_on_any_rank_ends_all_with_one_line(
    command: Path, tmp_path: Path, on_rank: dict[int, Any], line: str
) -> None:
    folder = tmp_path / "run"
    ended = run(command, 2, *options(out=folder), ON_RANK=json.dumps(on_rank))
    assert ended.status != 0
    assert ended.out == ""
    said = [each for each in ended.err.splitlines() if each.startswith("freezeout: ")]
    assert said == [f"freezeout: {line}"]
    assert not folder.exists()


def test_a_batch_must_have_an_image_for_each_rank() -> None:
    config = TrainConfig(dataset="digits", batch_size=3, device="cpu")
    with pytest.raises(InvalidValue, match=r"batch_size 3 is less .* each of 4 ranks"):
        Job(config, Ranks(0, 4))


def test_a_rank_takes_the_device_of_its_number() -> None:
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(InvalidValue, match=r"'cuda:1' is one device, .* give cuda"):
        choose_device("cuda:1", 0)
    with pytest.raises(InvalidValue, match="'cuda:9' is not there"):
        choose_device("cuda", 9)
