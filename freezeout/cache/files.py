"""A folder of records, which any number of runs read and add to at once.

    KEY/about.json    what the records are of, in words
    KEY/NAME.bin      records, one behind the other
    KEY/NAME.index    of each record: of which sample and input it is, where, its checksum

KEY stands for the frozen weights, the number of frozen layers, the precision and the layout: where
one of them differs, records lie elsewhere. Each process writes files with a NAME of its own, and
to their ends only, so nothing is locked. A record counts once its entry in the index is whole,
which is written after its bytes: a process that is killed leaves whole records, and a reader sees
no half of one. A record's checksum is compared when a process first reads it, against what else
may happen to a file. What is not found, or damaged, is computed anew.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import write_atomically
from ..errors import CacheError, InvalidValue
from ..words import size
from .store import Damaged, Keys, Store, in_memory

ENTRY = np.dtype(
    [
        ("key", "<i8"),
        ("input", "<i8"),  # checksum of the sample's input
        ("offset", "<i8"),
        ("bytes", "<i8"),
        ("crc", "<u4"),  # of the bytes, and of the three numbers above but for the offset
        ("unused", "<u4"),
    ]
)
_VERSION = 4
_KEY = re.compile(r"[0-9a-f]{20}-[0-9]+-[0-9a-f]{8}")


def check_folder(path: Path) -> None:
    """InvalidValue if there is anything in the folder that is not a cache's."""
    names = os.listdir(path) if path.is_dir() else []
    odd = sorted(name for name in names if not _KEY.fullmatch(name))
    if odd:
        raise InvalidValue(f"{path} holds other files ({odd[0]}); give the cache its own folder")


class _Segment:
    """The records that one process has added for one key."""

    def __init__(self, path: Path, depth: int, is_own: bool = False) -> None:
        self.path, self.depth, self.process = path, depth, os.getpid()
        # Own records are compared with the real forward pass like those in memory.
        self.is_trusted = is_own
        self.end = self.entries = 0  # bytes written, or entries read
        self._file = -1

    @property
    def key(self) -> str:
        return self.path.parent.name

    @property
    def data(self) -> Path:
        return self.path.with_name(self.path.name + ".bin")

    @property
    def index(self) -> Path:
        return self.path.with_name(self.path.name + ".index")

    def news(self) -> Any:
        """The entries that have come since the last call and can be right."""
        size, begin = self.index.stat().st_size, self.entries * ENTRY.itemsize
        count = (size - begin) // ENTRY.itemsize
        if count <= 0:
            return np.empty(0, ENTRY)
        with open(self.index, "rb") as file:
            file.seek(begin)
            read = file.read(count * ENTRY.itemsize)
        found = np.frombuffer(read[: len(read) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        self.entries += len(found)
        room = self.data.stat().st_size
        start, length = found["offset"], found["bytes"]
        return found[(start >= 0) & (length > 0) & (length <= room) & (start <= room - length)]

    def read(self, offset: int, into: memoryview) -> bool:
        """Whether there were as many bytes."""
        try:
            if self._file < 0:
                self._file = os.open(self.data, os.O_RDONLY)
            return os.preadv(self._file, [into], offset) == len(into)
        except OSError:
            return False

    def append(self, records: Sequence[memoryview], entries: Any) -> None:
        """Write records, then their entries, whose offsets are filled in here. OSError."""
        if self._file < 0:
            self._file = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._index = os.open(self.index, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        end = self.end
        for entry, record in zip(entries, records, strict=True):
            entry["offset"] = end
            _write_at(self._file, record, end)
            end += len(record)
        _write_at(self._index, memoryview(entries.tobytes()), self.entries * ENTRY.itemsize)
        self.end, self.entries = end, self.entries + len(entries)

    def close(self) -> None:
        for file in {self._file, getattr(self, "_index", -1)} - {-1}:
            os.close(file)
        self._file = self._index = -1


class FileStore(Store):
    """`Store` in the folder `path`, which is made if it does not exist. Of each key it knows one
    record, which may be another process's.

    Args:
        budget: bytes that the folder may take in all.

    Raises:
        InvalidValue: the folder holds other files.
        CacheError: it cannot be used.
    """

    def __init__(self, path: Path, keys: int, budget: int, serve_on: torch.device) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_folder(path)
            # By key.
            self._sizes = {key: _size(path / key) for key in _keys(path)}
        except OSError as error:
            raise CacheError(f"cannot use {path} for the cache: {error.strerror}") from error
        super().__init__(keys, budget, torch.device("cpu"), serve_on)
        self._start()

    def _start(self) -> None:
        keys = len(self.index)
        self.index = self._new_index(keys)
        self._segments: list[_Segment] = []
        self._own: dict[int, _Segment] = {}  # by depth
        self._names: set[Path] = set()  # of the segments
        self._of = np.zeros(keys, np.int32)  # in which segment a key's record is
        self._unread = np.ones(keys, bool)  # records that this process has not compared yet
        self._inputs = np.zeros((2, keys), np.int64)  # of this process: whether known, and which
        # Further records, by depth, key and input: a segment's number and an entry.
        self._others: dict[tuple[int, int, int], list[tuple[int, Any]]] = {}
        self._open: dict[int, tuple[str, str | None, dict[str, Any]]] = {}

    # --- what is there ------------------------------------------------------------------

    def open_depth(
        self, depth: int, fingerprint: str, layout: Any = None, about: dict[str, Any] | None = None
    ) -> None:
        begin = f"{_digest(_VERSION, fingerprint)[:20]}-{depth}-"
        end = None if layout is None else _digest(layout)[:8]
        if self._open.get(depth, ("", None, {}))[:2] == (begin, end):
            return
        self._open[depth] = begin, end, about or {}
        wrong = [
            number
            for number, segment in enumerate(self._segments)
            if segment.depth == depth and end is not None and segment.key != begin + end
        ]
        self.drop(np.flatnonzero((self.index["depth"] == depth) & np.isin(self._of, wrong)))
        self._look(depth)

    def _look(self, depth: int) -> None:
        """Take note of records that have come since the last look."""
        begin, end, _ = self._open[depth]
        with suppress(OSError):  # as good as none
            for key in [begin + end] if end is not None else _keys(self.path, begin):
                self._sizes[key] = _size(self.path / key)
                for name in sorted(os.listdir(self.path / key)):
                    path = self.path / key / name.removesuffix(".index")
                    if name.endswith(".index") and path not in self._names:
                        self._names.add(path)
                        self._segments.append(_Segment(path, depth))
        for number, segment in enumerate(self._segments):
            is_read = segment.depth == depth and segment is not self._own.get(depth)
            if is_read and segment.key.startswith(begin + (end or "")):
                with suppress(OSError):
                    self._take_note(number, segment.news(), depth)

    def _take_note(self, number: int, entries: Any, depth: int) -> None:
        entries = entries[(entries["key"] >= 0) & (entries["key"] < len(self.index))]
        # Of those with one key the first is used, and only where nothing as deep is held.
        first = np.zeros(len(entries), bool)
        first[np.unique(entries["key"], return_index=True)[1]] = True
        first &= self.index["depth"][entries["key"]] < depth
        for entry in entries[~first]:
            place = depth, int(entry["key"]), int(entry["input"])
            self._others.setdefault(place, []).append((number, entry))
        taken = entries[first]
        keys, index = taken["key"], self.index
        self._set_apart(keys[(index["depth"][keys] > 0) & (index["input"][keys] != taken["input"])])
        self._use(keys, number, taken, depth)

    def _set_apart(self, keys: Keys) -> None:
        """Records that may yet be used, of other inputs than those in sight."""
        for key in keys.tolist():
            old = self.index[key]
            entry = np.zeros((), ENTRY)
            entry["key"] = key
            for field in ("input", "offset", "bytes", "crc"):
                entry[field] = old[field]
            place = int(old["depth"]), key, int(old["input"])
            self._others.setdefault(place, []).append((int(self._of[key]), entry))
        self.index["depth"][keys] = 0

    def _use(self, keys: Any, number: int, entries: Any, depth: int) -> None:
        for field in ("input", "offset", "bytes", "crc"):
            self.index[field][keys] = entries[field]
        self._of[keys], self._unread[keys] = number, True
        self.index["depth"][keys] = depth

    def find(self, keys: Keys, inputs: Any, depth: int) -> Any:
        known, before = self._inputs[:, keys]
        changed = (known > 0) & (before != inputs) & (self.index["depth"][keys] > 0)
        if changed.any():
            return changed
        self._inputs[:, keys] = np.stack((np.ones_like(inputs), inputs))
        index = self.index
        if ((index["depth"][keys] == depth) & (index["input"][keys] == inputs)).all():
            return changed
        for each in self._open:
            self._look(each)
        held, other = index["depth"][keys], index["input"][keys] != inputs
        self._set_apart(keys[(held > 0) & (other | (held > depth))])
        for key, value in zip(keys.tolist(), inputs.tolist(), strict=True):
            for each in range(depth, int(index["depth"][key]), -1):
                if further := self._others.get((each, key, value)):
                    self._set_apart(np.array([key] if index["depth"][key] else [], np.int64))
                    number, entry = further.pop()
                    self._use(key, number, entry, each)
                    break
        return changed

    # --- whose they are -----------------------------------------------------------------

    def strangers(self, keys: Keys) -> list[int]:
        numbers = np.unique(self._of[keys[self.index["depth"][keys] > 0]]).tolist()
        return [number for number in numbers if not self._segments[number].is_trusted]

    def trust(self, strangers: Sequence[int]) -> None:
        for number in strangers:
            self._segments[number].is_trusted = True

    def distrust(self, strangers: Sequence[int]) -> None:
        held = self.index["depth"] > 0
        self.drop(np.flatnonzero(held & np.isin(self._of, list(strangers))))
        for place, found in self._others.items():
            self._others[place] = [each for each in found if each[0] not in strangers]
        for number in strangers:
            self._segments[number].depth = 0  # its name stays known, and it is not looked into

    # --- reading and writing ------------------------------------------------------------

    is_reserved = True

    @property
    def place(self) -> str:
        return str(self.path)

    def reserve(self, total: int) -> None:
        """Nothing: files grow."""

    @property
    def bytes_set_aside(self) -> int:
        return sum(self._sizes.values())

    def set_aside(self, keys: Keys, needed: Sequence[int], room: Sequence[int]) -> Any:
        each = np.asarray(needed, np.int64) + ENTRY.itemsize
        return self.bytes_set_aside + np.cumsum(each) <= self.budget

    def write_rows(self, keys: Keys, rows: Tensor, depth: int, inputs: Any) -> None:
        self.write(keys, list(in_memory(rows)), depth, inputs)

    def write(self, keys: Keys, records: Sequence[Tensor], depth: int, inputs: Any) -> None:
        once = np.unique(keys, return_index=True)[1]
        keys, inputs = keys[once], np.asarray(inputs, np.int64)[once]
        self.index["depth"][keys] = 0
        entries = np.zeros(len(keys), ENTRY)
        data = [records[i].cpu().contiguous().numpy().data for i in once.tolist()]
        entries["key"], entries["input"] = keys, inputs
        entries["bytes"] = [len(each) for each in data]
        entries["crc"] = [
            _checksum(*each, depth)
            for each in zip(data, keys.tolist(), inputs.tolist(), strict=True)
        ]
        number, segment = self._own_segment(depth)
        segment.append(data, entries)
        self._sizes[segment.key] += int(entries["bytes"].sum()) + entries.nbytes
        self._use(keys, number, entries, depth)
        self._unread[keys] = False

    def _own_segment(self, depth: int) -> tuple[int, _Segment]:
        if depth not in self._own or self._own[depth].process != os.getpid():  # a fork
            begin, end, about = self._open[depth]
            home = self.path / f"{begin}{end}"
            home.mkdir(parents=True, exist_ok=True)
            name = secrets.token_hex(8)
            # Several may write it at once, all of them the same.
            write_atomically(home / f"{name}.json", json.dumps(about, indent=1) + "\n")
            os.replace(home / f"{name}.json", home / "about.json")
            self._own[depth] = _Segment(home / name, depth, is_own=True)
            self._names.add(home / name)
            self._segments.append(self._own[depth])
            self._sizes.setdefault(home.name, 0)
        segment = self._own[depth]
        return self._segments.index(segment), segment

    def read_rows(self, keys: Keys) -> Tensor:
        rows = self._room(len(keys), int(self.index["bytes"][keys[0]]))
        self._read(keys, list(rows.numpy()))
        return rows.to(self.serve_on, non_blocking=True)

    def read(self, keys: Keys) -> list[Tensor]:
        counts = self.index["bytes"][keys].tolist()
        records = self._room(sum(counts))
        self._read(keys, np.split(records.numpy(), np.cumsum(counts)[:-1]))
        return list(torch.split(records.to(self.serve_on, non_blocking=True), counts))

    def _room(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.serve_on.type == "cuda")

    def _read(self, keys: Keys, places: Sequence[Any]) -> None:
        """Damaged if a record is not what was written, as far as can be told."""
        entries, segments = self.index[keys], self._segments
        whole = entries["bytes"] == [len(place) for place in places]
        where = zip(self._of[keys].tolist(), entries["offset"].tolist(), places, strict=True)
        whole &= [segments[number].read(offset, place.data) for number, offset, place in where]
        for i in np.flatnonzero(self._unread[keys] & whole).tolist():
            key, value, depth = int(keys[i]), int(entries["input"][i]), int(entries["depth"][i])
            whole[i] = _checksum(places[i].data, key, value, depth) == entries["crc"][i]
        if not whole.all():
            self.drop(keys[~whole])
            raise Damaged
        self._unread[keys] = False

    def clear(self) -> None:
        self._close_files()
        self._start()

    def _close_files(self) -> None:
        for segment in self._segments:
            segment.close()

    def close(self) -> None:
        super().close()
        self._close_files()


# --- looking after a folder -----------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a folder holds under one key.

    Attributes:
        about: what its writers said of it; empty if that is damaged.
        samples: records of different samples, or views of them.
        bytes: of all files.
    """

    key: str
    about: dict[str, Any]
    samples: int
    bytes: int

    def __str__(self) -> str:
        about, depth = self.about, int(self.key.split("-")[1])
        words = f"the first {depth} layers of {about.get('model', 'a model')}"
        if isinstance(names := about.get("layers"), list) and 0 < depth <= len(names):
            words += f", up to {names[depth - 1]}"
        words += f" ({about['computed']})" if "computed" in about else ""
        return f"{self.key}: {self.samples:,} samples, {size(self.bytes)}, of {words}"


def contents(path: Path, keys: Sequence[str] = ()) -> list[Held]:
    """What a cache's folder holds, by key; `keys`: only those that begin so. OSError if it cannot
    be read; InvalidValue for the beginning of no key, or of several."""
    held = [_held(path / key) for key in _keys(path)]
    for key in keys:
        if (count := sum(each.key.startswith(key) for each in held)) != 1:
            found = "no key" if not count else f"{count} keys"
            raise InvalidValue(f"{found} in {path} begin{'s' * (not count)} with {key!r}")
    return [each for each in held if not keys or each.key.startswith(tuple(keys))]


def _held(home: Path) -> Held:
    about: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads((home / "about.json").read_text())
        about = read if isinstance(read, dict) else {}
    found = [np.empty(0, np.int64)]
    for file in home.glob("*.index"):
        with suppress(OSError):  # it has just been removed
            found.append(_Segment(file.with_suffix(""), 0).news()["key"])
    return Held(home.name, about, len(np.unique(np.concatenate(found))), _size(home))


def remove(path: Path, keys: Sequence[str] = ()) -> list[Held]:
    """Delete what a folder holds under these keys, or all of it and the folder. Returns what went,
    as `contents`. A process that reads or writes there goes on."""
    gone = contents(path, keys)
    for each in gone:
        shutil.rmtree(path / each.key)
    if not keys:
        with suppress(OSError):  # another process has made something there
            path.rmdir()
    return gone


def _keys(path: Path, begin: str = "") -> Iterator[str]:
    for name in sorted(os.listdir(path)):
        if name.startswith(begin) and _KEY.fullmatch(name):
            yield name


def _size(home: Path) -> int:
    """Bytes of the files under a key."""
    size = 0
    for file in os.scandir(home):
        with suppress(OSError):  # it has just been removed
            size += file.stat().st_size
    return size


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _write_at(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def _checksum(data: memoryview, key: int, value: int, depth: int) -> int:
    """Of a record's bytes, and of what the index says about them."""
    return zlib.crc32(struct.pack("<qqq", key, depth, value), zlib.crc32(data))
