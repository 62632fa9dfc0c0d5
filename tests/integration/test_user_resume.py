"""FreezeOut in a user's own loop, killed by SIGKILL in processes of its own, and resumed: it ends
with the same bits as if it had never been killed. And the loop of docs/training_loops.md."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from freezeout import FreezeOut
from tests.integration import user_loop
from tests.integration.user_loop import CONFIGURATIONS, TOTAL, Loop, differences

KILLED = -9
ROOT = Path(__file__).parents[2]
LOOP = "tests.integration.user_loop"
DOCUMENT = ROOT / "docs" / "training_loops.md"

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
T = TypeVar("T")


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def together(work: Callable[[T], list[str]], items: Iterable[T]) -> list[str]:
    """What went wrong with each; two are at work at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [problem for problems in pool.map(work, items) for problem in problems]


def lived(name: str, file: Path) -> dict[str, Any]:
    """The state at the end of an uninterrupted run, in this process."""
    loop = Loop(CONFIGURATIONS[name])
    loop.train(TOTAL)
    loop.save(file)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@posix
def test_killed_and_resumed_in_another_order_of_loading(tmp_path: Path) -> None:
    """At random steps, before and after freezes; each part of the run in a process of its own."""
    kills = {"muon": 2, "fused": 1, "start": 1}
    kills = {name: times for name, times in kills.items() if name in CONFIGURATIONS}
    # One after another: they share torch's global generator.
    whole = {name: lived(name, tmp_path / f"{name}-lived.pt") for name in kills}

    def killed_and_resumed(name: str) -> list[str]:
        file = tmp_path / f"{name}.pt"
        stops = sorted(random.sample(range(1, TOTAL), kills[name]))
        for stop in (*stops, TOTAL):
            ended = process("-m", LOOP, name, file, random.randrange(1000), stop)
            if ended.returncode != (KILLED if stop < TOTAL else 0) or ended.stderr:
                return [f"{name}, {stops}: ended with {ended.returncode}: {ended.stderr}"]
        return [f"{name}, {stops}: {difference}" for difference in differences(file, whole[name])]

    assert together(killed_and_resumed, kills) == []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_at_every_step_in_any_order(name: str, tmp_path: Path) -> None:
    """Into new objects, or into some that stand elsewhere: one step on, all is as it was."""
    torch.set_num_threads(1)
    loop = Loop(CONFIGURATIONS[name])
    states: list[Path] = []
    frozen: list[int] = []
    for step in range(TOTAL + 1):
        loop.train(step)
        frozen.append(loop.freezer.num_frozen)
        states.append(tmp_path / f"{step}.pt")
        loop.save(states[-1])
    assert frozen[0] == (2 if name == "start" else 0)
    assert frozen[-1] == 3
    orders = list(permutations(loop.parts()))
    elsewhere = Loop(CONFIGURATIONS[name])
    for step in random.sample(range(TOTAL), TOTAL):
        for other in (elsewhere, Loop(CONFIGURATIONS[name])):
            order = random.choice(orders)
            other.load(states[step], order)
            other.train(step + 1)
            other.save(tmp_path / "resumed.pt")
            expected = torch.load(states[step + 1], weights_only=True)
            assert differences(tmp_path / "resumed.pt", expected) == [], (step, order)


def test_the_states_that_are_compared_differ_when_training_does(tmp_path: Path) -> None:
    """So that equality above means something: another seed, and a part that is not loaded."""
    for name, part in (("sgd", "optimizer0"), ("sgd", "freezer"), ("fused", "scaler")):
        loop = Loop(CONFIGURATIONS[name])
        loop.train(9)
        loop.save(tmp_path / "saved.pt")
        loop.train(12)
        loop.save(tmp_path / "lived.pt")
        other = Loop(CONFIGURATIONS[name])
        other.load(tmp_path / "saved.pt", [each for each in loop.parts() if each != part])
        other.train(12)
        other.save(tmp_path / "other.pt")
        expected = torch.load(tmp_path / "lived.pt", weights_only=True)
        assert differences(tmp_path / "other.pt", expected)


# --- the document ---------------------------------------------------------------------------

_USE = """

def run(path, kill_after):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    data = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    saved = 0
    replace = os.replace
    def replaced(*names):
        nonlocal saved
        replace(*names)
        saved += 1
        if saved == kill_after:
            os.kill(os.getpid(), 9)
    os.replace = replaced
    freezer = train(path, model, optimizer, data, (data[:, 0] > 0).long(), 4, 8)
    assert freezer.num_frozen == 2

import sys
run(sys.argv[1], int(sys.argv[2]))
"""


def snippet() -> str:
    """The one block of code in the document that stands alone."""
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
        if "def save" in block
    )
    assert isinstance(code, str)
    return code


@posix
def test_the_documents_loop_ends_with_the_same_bits_when_killed(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(snippet() + _USE)
    whole = process(script, tmp_path / "whole.pt", 0)
    assert (whole.returncode, whole.stderr) == (0, "")
    killed = process(script, tmp_path / "killed.pt", random.randint(1, 19))
    assert (killed.returncode, killed.stderr) == (KILLED, "")
    resumed = process(script, tmp_path / "killed.pt", 0)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert expected["freezer"]["step"] == 20
    assert differences(tmp_path / "killed.pt", expected) == []


def test_the_document_names_what_is_there() -> None:
    text = DOCUMENT.read_text()
    for name in ("state_dict", "load_state_dict", "release", "step"):
        assert f"{name}()" in text
        assert hasattr(FreezeOut, name)
    assert user_loop.__doc__ is not None
