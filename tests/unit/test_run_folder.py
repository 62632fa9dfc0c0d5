"""A run's folder: whoever reads a file finds the old content or the new one, or a clear line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from freezeout.errors import CheckpointError, InvalidValue
from freezeout.lab.run_folder import RunFolder

CPU = torch.device("cpu")
WRITES: dict[str, Callable[[RunFolder, int], None]] = {
    "config.json": lambda folder, n: folder.write_config({"n": n}),
    "metrics.jsonl": lambda folder, n: folder.write_metrics([{"epoch": i} for i in range(n)]),
    "checkpoint.pt": lambda folder, n: folder.save_checkpoint({"n": n}),
    "model.safetensors": lambda folder, n: folder.save_weights(nn.Linear(n, 1)),
}
writes = pytest.mark.parametrize("name", WRITES)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "one"
    path.mkdir()
    return RunFolder(path)


def test_a_new_folder_has_its_parents_and_its_config(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "two", {"a": 1})
    assert [file.name for file in folder.path.iterdir()] == ["config.json"]
    assert folder.read_config() == {"a": 1}


def test_what_exists_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {}).path
    (tmp_path / "file").touch()
    way_on = f"go on with freezeout train --resume {run}, or "
    for path, advice in ((run, way_on), (tmp_path / "file", "")):
        with pytest.raises(InvalidValue, match=f"{path} exists; {advice}choose another with --out"):
            RunFolder.create(path, {})


def test_a_folder_without_config_is_no_run(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"one is no run folder: it has no config\.json"):
        RunFolder.existing(folder.path)
    folder.write_config({})
    assert RunFolder.existing(folder.path).path == folder.path


def test_config_and_metrics_are_what_was_written(folder: RunFolder) -> None:
    config = {"a": 1, "b": {"c": None, "d": [0.1, 1e-300]}}
    rows: list[dict[str, Any]] = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": None}]
    folder.write_config(config)
    folder.write_metrics(rows)
    assert folder.read_config() == config
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_checkpoint_is_what_was_saved(folder: RunFolder) -> None:
    assert folder.load_checkpoint(CPU) is None
    state = {
        "step": 3,
        "rows": [{"a": None}],
        "x": torch.randn(2, 3),
        "random": torch.ones(1).byte(),
    }
    folder.save_checkpoint(state)
    loaded = folder.load_checkpoint(CPU)
    assert loaded is not None
    assert loaded.keys() == state.keys()
    assert (loaded["step"], loaded["rows"]) == (3, [{"a": None}])
    assert torch.equal(loaded["x"], state["x"])  # type: ignore[arg-type]
    assert loaded["random"].dtype == torch.uint8


def test_weights_and_buffers_in_any_memory_format_are_saved(folder: RunFolder) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[2].weight = model[0].weight  # shared memory, which safetensors does not take
    folder.save_weights(model)
    loaded = load_file(folder.path / "model.safetensors")
    state = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert "1.num_batches_tracked" in loaded


@writes
@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    name: str, stage: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = folder.path / name
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(os, stage, full)
            with pytest.raises(OSError, match=f"cannot write {path}: No space left") as caught:
                WRITES[name](folder, 2)
        assert caught.value.errno == 28
        assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == (
            {name: before} if before else {}
        )


@writes
def test_a_file_is_whole_and_on_the_disk_before_it_takes_its_name(
    name: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITES[name](folder, 2)
    path = folder.path / name
    old, events = path.read_bytes(), []
    replace, fsync = os.replace, os.fsync

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert target == path
        assert path.read_bytes() == old
        events.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    WRITES[name](folder, 3)
    (first, *same), (second, *other) = events[:2]
    assert (first, second) == ("fsync", "replace")
    assert same == other == [path.stat().st_ino, path.stat().st_size]
    assert path.read_bytes() != old
    assert [p.name for p in folder.path.iterdir()] == [name]


@writes
def test_what_a_killed_write_left_does_not_matter(name: str, folder: RunFolder) -> None:
    (folder.path / f".{name}.tmp").write_bytes(b"x" * 10_000)
    WRITES[name](folder, 2)
    assert [p.name for p in folder.path.iterdir()] == [name]
    assert b"xxx" not in (folder.path / name).read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3"])
def test_a_damaged_config_is_refused(content: bytes, folder: RunFolder) -> None:
    (folder.path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|holds no)"):
        folder.read_config()


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("made",)


@pytest.mark.parametrize("content", [b"", b"garbage", [1, 2], Hostile()])
def test_a_damaged_checkpoint_is_refused_and_runs_no_code(
    content: object, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    path = folder.path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is (damaged or no|no) checkpoint"):
        folder.load_checkpoint(CPU)
    assert os.listdir() == ["checkpoint.pt"]


def test_a_checkpoint_cut_anywhere_is_refused(folder: RunFolder) -> None:
    folder.save_checkpoint({"x": torch.randn(50), "rows": [{}] * 50})
    path = folder.path / "checkpoint.pt"
    whole = path.read_bytes()
    for kept in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="damaged"):
            folder.load_checkpoint(CPU)
