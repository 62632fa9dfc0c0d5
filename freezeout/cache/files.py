"""A store in a folder, which another process can go on with.

    activations.bin   the records, room for all of them set aside when it is made
    index.bin         for each key: where its record is, its depth, its checksums
    cache.json        what the records are of; written last, and replaced whole

A record counts once its depth stands in the index, which is written after its bytes; it does not
count while they are being replaced. So a process that is killed leaves whole records only. Its
checksum is compared when a process first reads it, against what else may happen to a file.
"""

import errno
import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import temporary_name, write_atomically
from ..errors import CacheError, InvalidValue
from .store import INDEX, Keys, Store, in_memory

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

RECORDS, INDEX_FILE, HEADER = "activations.bin", "index.bin", "cache.json"
_FILES = {RECORDS, INDEX_FILE, HEADER, temporary_name(Path(HEADER)).name, "lock"}
_VERSION = 3


class Damaged(Exception):
    """Records whose bytes are not what was written; the keys are the argument."""


def check_folder(path: Path) -> None:
    """InvalidValue if there are files in the folder that are not a cache's."""
    names = os.listdir(path) if path.is_dir() else []
    odd = sorted(name for name in names if name not in _FILES)
    if odd:
        raise InvalidValue(f"{path} holds other files ({odd[0]}); give the cache its own folder")


class FileStore(Store):
    """`Store` in the folder `path`, which is made if it does not exist.

    Args:
        purpose: plain values that tell what may be stored here: number of samples, views and the
            like. A folder with another purpose is started anew.

    Raises:
        InvalidValue: the folder holds other files, or another process uses it.
        CacheError: it cannot be written.
    """

    def __init__(
        self, path: Path, keys: int, budget: int, serve_on: torch.device, purpose: dict[str, Any]
    ) -> None:
        self.path, self._purpose = path, {"version": _VERSION, **purpose}
        self._depths: dict[str, Any] = {}  # of each depth: fingerprint and layout
        self._file = self._lock = -1
        try:
            self._open(path)
        except OSError as error:
            raise CacheError(f"cannot use {path} for the cache: {error.strerror}") from error
        super().__init__(keys, budget, torch.device("cpu"), serve_on)
        self._unread = np.ones(keys, bool)  # records that this process has not compared yet
        header = self._read_header()
        if header is not None and header["purpose"] == self._purpose:
            self._take_over(header)
        elif header is not None:
            self.news = f"{path} holds a cache of something else, which is dropped"

    def _open(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        check_folder(path)
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise InvalidValue(f"{path} is in use by another process") from error

    def _read_header(self) -> Any:
        try:
            header = json.loads((self.path / HEADER).read_text())
            ok = isinstance(header["purpose"], dict) and isinstance(header["depths"], dict)
            return header if ok and isinstance(header["bytes"], int) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.news = f"{self.path / HEADER} is damaged; the cache starts anew"
            return None

    def _take_over(self, header: Any) -> None:
        """Go on with what another process left."""
        keys, total = len(self.index), header["bytes"]
        try:
            whole = (self.path / RECORDS).stat().st_size == total and (
                self.path / INDEX_FILE
            ).stat().st_size == keys * INDEX.itemsize
        except OSError:
            whole = False
        if not whole:
            self.news = f"files in {self.path} are missing or cut short; the cache starts anew"
            return
        self._map(total)
        index = self.index
        room = (index["offset"] >= 0) & (index["room"] > 0)
        end = index["offset"] + index["room"]
        odd = (index["depth"] > 0) & ~(room & (end <= total) & (index["bytes"] <= index["room"]))
        starts = np.sort(index["offset"][room])
        overlap = bool((np.sort(end[room])[:-1] > starts[1:]).any()) if room.any() else False
        if odd.any() or overlap or (index["depth"] < 0).any() or (end[room] > total).any():
            self.news = f"{self.path / INDEX_FILE} is damaged; the cache starts anew"
            self._forget()
            return
        self._end = int(end[room].max()) if room.any() else 0
        self._depths = header["depths"]

    def reserve(self, total: int) -> None:
        total, is_new = min(total, self.budget), not self.is_reserved
        try:
            if is_new:
                (self.path / HEADER).unlink(missing_ok=True)
                _set_aside(self.path / INDEX_FILE, len(self.index) * INDEX.itemsize, "wb")
            _set_aside(self.path / RECORDS, total, "wb" if is_new else "r+b")
            self._map(total)
            if is_new:
                self.index["offset"] = -1
            self._write_header()
        except OSError as error:
            if is_new:
                for name in (RECORDS, INDEX_FILE):
                    (self.path / name).unlink(missing_ok=True)
            else:
                os.truncate(self.path / RECORDS, len(self._bytes))
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise CacheError(
                f"cannot set {total:,} bytes aside in {self.path} for the cache: {what}"
            ) from error

    def _map(self, total: int) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self.path / RECORDS, os.O_RDWR)
        mapped = np.memmap(self.path / RECORDS, np.uint8, "r+", shape=(total,))
        self._bytes = torch.from_numpy(mapped)
        self.index = np.memmap(self.path / INDEX_FILE, INDEX, "r+", shape=(len(self.index),))

    def _forget(self) -> None:
        self.index = self._new_index(len(self.index))
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._end = 0

    def resume_depth(self, depth: int, fingerprint: str) -> bool:
        known = self._depths.get(str(depth))
        if isinstance(known, dict) and known.get("fingerprint") == fingerprint:
            return True
        self.drop(np.flatnonzero(self.index["depth"] == depth))
        self.news = f"records of other weights in {self.path} are dropped"
        return False

    def check_layout(self, depth: int, layout: Any) -> None:
        known = self._depths.get(str(depth))
        if known is not None and known.get("layout") != layout:
            self.drop(np.flatnonzero(self.index["depth"] == depth))

    def begin_depth(self, depth: int, fingerprint: str, layout: Any) -> None:
        known = {"fingerprint": fingerprint, "layout": layout}
        if self._depths.get(str(depth)) == known:
            return
        if (self.index["depth"] == depth).any():
            self.news = f"records of other weights in {self.path} are dropped"
        self.index["depth"][self.index["depth"] == depth] = 0
        self.index.flush()  # or, after a power cut, old records might stand under the new header
        self._depths[str(depth)] = known
        try:
            self._write_header()
        except OSError as error:
            raise CacheError(str(error)) from error

    def _write_header(self) -> None:
        header = {"purpose": self._purpose, "depths": self._depths, "bytes": len(self._bytes)}
        write_atomically(self.path / HEADER, json.dumps(header, indent=1) + "\n")

    def write_rows(self, keys: Keys, rows: Tensor, depth: int, inputs: Any) -> None:
        self.write(keys, list(in_memory(rows)), depth, inputs)

    def write(self, keys: Keys, records: Sequence[Tensor], depth: int, inputs: Any) -> None:
        self.index["depth"][keys] = 0
        crc = []
        for key, record, value in zip(keys.tolist(), records, inputs.tolist(), strict=True):
            data, offset = record.cpu().contiguous().numpy().data, int(self.index["offset"][key])
            crc.append(_checksum(data, key, depth, int(value)))
            # Not through the mapping, where a disk that is full would end the process.
            self._write_at(offset, data)
        self.index["crc"][keys] = crc
        self._unread[keys] = False
        self._finish(keys, [len(record) for record in records], depth, inputs)

    def _write_at(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], offset + done)

    def read_rows(self, keys: Keys) -> Tensor:
        self.compare(keys)
        return super().read_rows(keys)

    def read(self, keys: Keys) -> list[Tensor]:
        self.compare(keys)
        return super().read(keys)

    def compare(self, keys: Keys) -> None:
        unread = keys[self._unread[keys]]
        if not len(unread):
            return
        wrong = []
        records = self._bytes.numpy()
        for key in unread.tolist():
            entry = self.index[key]
            start = int(entry["offset"])
            data = records[start : start + int(entry["bytes"])].data
            if _checksum(data, key, int(entry["depth"]), int(entry["input"])) != entry["crc"]:
                wrong.append(key)
        self._unread[unread] = False
        if wrong:
            self.drop(np.array(wrong))
            raise Damaged(wrong)

    def close(self, delete: bool = False) -> None:
        super().close()
        if self._file >= 0:
            self.index.flush()
            self.index = self._new_index(len(self.index))
            os.close(self._file)
            self._file = -1
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            if delete:
                for name in _FILES:
                    (self.path / name).unlink(missing_ok=True)
                if not os.listdir(self.path):
                    self.path.rmdir()


def _set_aside(path: Path, size: int, mode: str) -> None:
    """Make the file that large now, not to find out about a full disk in the middle of a run."""
    with open(path, mode) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        file.truncate(size)


def _checksum(data: memoryview, key: int, depth: int, value: int) -> int:
    """Of a record's bytes, and of what the index says about them."""
    return zlib.crc32(struct.pack("<qqq", key, depth, value), zlib.crc32(data))
