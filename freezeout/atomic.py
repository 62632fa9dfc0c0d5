"""Files that are whole or absent, whenever a process is killed or a disk is full."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace the file `path`, or make it: written under a temporary name in the same folder,
    synced, renamed. Text is written as UTF-8.

    Raises:
        OSError: it cannot be written; the old file is as it was, and nothing else is left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def temporary_name(path: Path) -> Path:
    """Under which `path` is written, and where a killed process leaves what it wrote."""
    return path.with_name(f".{path.name}.tmp")
