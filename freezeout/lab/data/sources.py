"""Where the images' bytes come from: the official binary archives, downloaded or given as files.

A `Source` describes one archive. `find_folder` turns it into a folder of .bin files, and
`read_records` turns those into tensors. Nothing here unpickles, and no bytes are used whose file
has not the exact size expected.
"""

import contextlib
import gzip
import hashlib
import logging
import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freezeout.errors import DataError

BASE_URL = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32
RETRIES = 2


@dataclass(frozen=True)
class Source:
    """One archive of fixed-length binary records: label bytes, then the R, G and B planes, 32x32.

    `train` and `test` are (file name, number of records) pairs in `folder`; the label that counts
    is byte `label_index` of the record; the last `validation` training images are those held out
    for validation.
    """

    name: str
    archive: str
    md5: str
    folder: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    label_bytes: int
    label_index: int
    num_classes: int
    validation: int

    @property
    def record_length(self) -> int:
        return self.label_bytes + PIXELS

    @property
    def url(self) -> str:
        """The archive's address; the environment variable FREEZEOUT_DATA_URL names a mirror."""
        return (os.environ.get("FREEZEOUT_DATA_URL") or BASE_URL).rstrip("/") + "/" + self.archive

    @property
    def file_sizes(self) -> dict[str, int]:
        """Every file of the folder that is needed, with its size in bytes."""
        return {name: count * self.record_length for name, count in self.train + self.test}


CIFAR10 = Source(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train=tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
    test=(("test_batch.bin", 10_000),),
    label_bytes=1,
    label_index=0,
    num_classes=10,
    validation=5_000,
)
CIFAR100 = Source(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train=(("train.bin", 50_000),),
    test=(("test.bin", 10_000),),
    label_bytes=2,  # the coarse label, then the fine one
    label_index=1,
    num_classes=100,
    validation=5_000,
)


def cache_folder() -> Path:
    """The folder of downloads: FREEZEOUT_CACHE, or else the system's folder for caches."""
    import pooch

    return Path(os.environ.get("FREEZEOUT_CACHE") or pooch.os_cache("freezeout")).expanduser()


def find_folder(source: Source, data_dir: Path | None) -> Path:
    """The folder that holds `source`'s .bin files, each present and of the right size.

    Without `data_dir` that is a folder of the cache, downloaded at first use. With it, nothing is
    downloaded: it is `data_dir/<folder>`, or `data_dir` itself if the files lie there, or else the
    archive in `data_dir`, unpacked into the cache (`data_dir` is never written to).

    Raises DataError when the data are missing, damaged or cannot be downloaded.
    """
    if data_dir is None:
        return _cached(source)
    if not data_dir.is_dir():
        found = "a file, not a folder" if data_dir.exists() else "no such folder"
        raise DataError(f"data folder {data_dir}: {found}")
    archive = data_dir / source.archive
    if (data_dir / source.folder).is_dir():
        folder = data_dir / source.folder
    elif any((data_dir / name).exists() for name in source.file_sizes):
        folder = data_dir
    elif archive.is_file():
        folder = _unpacked(source, archive)
    else:
        raise DataError(
            f"no {source.name} in {data_dir}: expected the folder {source.folder}, its .bin files "
            f"or {source.archive} (the binary version)"
        )
    _check_files(folder, source)
    return folder


def read_records(
    folder: Path, files: tuple[tuple[str, int], ...], source: Source
) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 3, 32, 32), and labels, int64 (N,), of `files` in order, on the CPU.

    Raises DataError for a label outside 0..num_classes-1.
    """
    total = sum(count for _, count in files)
    images = np.empty((total, PIXELS), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    start = 0
    for name, count in files:
        try:
            content = np.fromfile(folder / name, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"cannot read {folder / name}: {error.strerror}") from error
        records = content.reshape(count, source.record_length)
        labels[start : start + count] = records[:, source.label_index]
        images[start : start + count] = records[:, source.label_bytes :]
        wrong = np.flatnonzero(labels[start : start + count] >= source.num_classes)
        if wrong.size:
            raise DataError(
                f"{folder / name}: record {wrong[0]} has label {labels[start + wrong[0]]}, "
                f"expected 0..{source.num_classes - 1}"
            )
        start += count
    return torch.from_numpy(images.reshape(total, 3, 32, 32)), torch.from_numpy(labels)


def _check_files(folder: Path, source: Source) -> None:
    for name, expected in source.file_sizes.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing, expected a file of {expected:,} bytes")
        if (found := path.stat().st_size) != expected:
            raise DataError(f"{path}: found {found:,} bytes, expected {expected:,}")


def _cached(source: Source) -> Path:
    """The folder in the cache, downloaded and unpacked if it is not there."""
    cache = cache_folder()
    folder = cache / source.folder
    if not folder.is_dir():
        _extract(_download(source, cache), source, cache)
    try:
        _check_files(folder, source)
    except DataError as error:
        raise DataError(f"{error}; delete {folder} to have it fetched again") from error
    return folder


def _download(source: Source, cache: Path) -> Path:
    """The archive in the cache with its checksum verified; fetched only where it is not."""
    import pooch

    store = pooch.create(
        path=cache,
        base_url=source.url.removesuffix(source.archive),
        registry={source.archive: f"md5:{source.md5}"},
        retry_if_failed=RETRIES,
    )
    try:
        with _progress_bar(source.archive) as bar:
            downloader = pooch.HTTPDownloader(progressbar=bar or False, chunk_size=1 << 16)
            return Path(store.fetch(source.archive, downloader=downloader))
    except (OSError, ValueError) as error:
        # The network's errors and the checksum's (ValueError) carry no errno; the disk's do.
        if isinstance(error, OSError) and error.errno is not None:
            raise _cannot_write(cache, error) from error
        raise DataError(
            f"cannot download {source.url}: {_one_line(error)}; fetch {source.archive} yourself "
            "and name its folder with --data-dir, or use --dataset digits, which needs no download"
        ) from error


def _unpacked(source: Source, archive: Path) -> Path:
    """The user's archive, unpacked into the cache once.

    Apart from what was downloaded, since its checksum is nobody's promise, and under a name of its
    own, so that another archive at the same place is unpacked anew.
    """
    status = archive.stat()
    identity = f"{archive.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    into = cache_folder() / "unpacked" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = into / source.folder
    if not folder.is_dir():
        _extract(archive, source, into)
    return folder


def _extract(archive: Path, source: Source, into: Path) -> None:
    """Unpack the files needed into `into/<folder>`: after a crash it is whole or not there."""
    sizes = source.file_sizes
    target = into / source.folder
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=f"{source.folder}.") as temporary:
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if path.parts[:1] != (source.folder,) or ".." in path.parts:
                        raise DataError(
                            f"{archive}: member {member.name!r} lies outside {source.folder}"
                        )
                    if len(path.parts) != 2 or path.name not in sizes:
                        continue
                    # Before unpacking: a tiny archive may hold an enormous file.
                    if not member.isfile():
                        raise DataError(f"{archive}: member {member.name!r} is not a plain file")
                    if member.size != (expected := sizes.pop(path.name)):
                        raise DataError(
                            f"{archive}: member {member.name!r} has {member.size:,} bytes, "
                            f"expected {expected:,}"
                        )
                    tar.extract(member, temporary, filter="data")
                while stream.read(1 << 20):  # gzip compares its checksum at the very end
                    pass
            if sizes:
                raise DataError(f"{archive}: no member {source.folder}/{next(iter(sizes))}")
            try:
                Path(temporary, source.folder).rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
    except DataError:
        raise
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: damaged archive: {_one_line(error)}") from error
    except OSError as error:
        if error.errno is None:  # gzip's own
            raise DataError(f"{archive}: damaged archive: {_one_line(error)}") from error
        if error.filename == str(archive):
            raise DataError(f"cannot read {archive}: {error.strerror}") from error
        raise _cannot_write(into, error) from error


def _cannot_write(folder: Path, error: OSError) -> DataError:
    reason = error.strerror or _one_line(error)
    return DataError(
        f"cannot write to {folder}: {reason}; FREEZEOUT_CACHE names another folder for downloads"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _progress_bar(description: str) -> Iterator[Any]:
    """What pooch calls a progress bar, on stderr; None where that is no terminal.

    Then pooch's own line says what is downloaded from where.
    """
    if not sys.stderr.isatty():
        yield None
        return
    import pooch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # Pooch's lines would be written into the bar. (A level would not do: its logger stands apart
    # from the others, and `setLevel` leaves what such a one has cached.)
    pooch.get_logger().addFilter(_no_lines)
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield _PoochBar(progress, description)
    finally:
        pooch.get_logger().removeFilter(_no_lines)


def _no_lines(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


class _PoochBar:
    """rich's progress bar with the four names that pooch's HTTPDownloader uses."""

    def __init__(self, progress: Any, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    @property
    def total(self) -> int:
        return int(self._progress.tasks[0].total or 0)

    @total.setter
    def total(self, total: int) -> None:
        # Set at the start of each attempt, so a retry begins at zero again; 0 means "not known".
        self._progress.reset(self._task, total=total or None)

    def update(self, amount: int) -> None:
        self._progress.update(self._task, advance=amount)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()
