"""A file that is replaced is the old one or the new one, and nothing is left beside it."""

import os
from pathlib import Path

import pytest

from freezeout.atomic import temporary_name, write_atomically


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content", [b"", b"\0\xff\r\n" * 100_000, memoryview(b"one"), "µ\n"])
@pytest.mark.parametrize("before", [None, b"old, and longer than the new"])
def test_the_content_is_whole_and_nothing_is_left_beside_it(
    content: str | bytes | memoryview, before: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    temporary_name(path).write_bytes(b"x" * 1_000_000)  # as a killed process leaves it
    write_atomically(path, content)
    expected = "µ\n".encode() if isinstance(content, str) else bytes(content)
    assert contents(tmp_path) == {"file": expected}


def test_the_new_name_comes_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    replace, fsync = os.replace, os.fsync

    def watched_fsync(descriptor: int) -> None:
        seen.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert path.read_bytes() == b"old"
        assert source.parent == target.parent == tmp_path  # else a rename might be a copy
        seen.append(("replace", source.stat().st_ino, source.stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomically(path, b"new one")
    inode = path.stat().st_ino
    assert seen == [("fsync", inode, 7), ("replace", inode, 7)]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(
    stage: str,
    before: bytes | None,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise error

    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setattr(os, stage, fail)
        with pytest.raises(type(error)) as caught:
            write_atomically(path, b"new")
    if isinstance(error, OSError):
        assert str(caught.value) == f"[Errno 28] cannot write {path}: No space left on device"
    assert contents(tmp_path) == ({} if before is None else {"file": before})


def test_a_folder_that_is_none_is_an_error_about_the_file(tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    for path in (tmp_path / "none" / "file", tmp_path / "absent" / "file"):
        with pytest.raises(OSError, match=f"cannot write {path}: No"):
            write_atomically(path, b"")
