"""Where records lie: in RAM, in the accelerator's memory, or in files that outlive the process.

A store has a fixed number of keys, and one record a key at most: its bytes, the depth at which
it was taken and the checksum of the input that it was taken of. In memory, the room for a key is
set aside when it is first written. What does not fit any more is not stored.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from .shards import num_processes

Keys = np.ndarray[Any, np.dtype[np.int64]]

INDEX = np.dtype(
    [
        ("depth", "<i4"),  # layers in front of the frontier; 0: there is no record
        ("crc", "<u4"),  # of the bytes
        ("offset", "<i8"),  # of the room set aside, -1: none
        ("room", "<i8"),
        ("bytes", "<i8"),
        ("input", "<i8"),  # checksum of the sample's input
    ]
)
ALIGNMENT = 64


class Damaged(Exception):
    """Records that are not to be used, and are dropped now. Its text says why, for a user."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(
            reason
            or "some stored activations are damaged, or laid out in another way; they are computed "
            "anew"
        )


class Store:
    """Records by key, in the computer's memory or an accelerator's.

    Args:
        keys: how many there are.
        budget: bytes that records may take in all.
        device: where they lie.
        serve_on: the device that reads are for.
    """

    def __init__(
        self, keys: int, budget: int, device: torch.device, serve_on: torch.device
    ) -> None:
        self.budget, self.device, self.serve_on = budget, device, serve_on
        self.index = self._new_index(keys)
        self._end = 0  # of what is set aside
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def _new_index(self, keys: int) -> Any:
        index = np.zeros(keys, INDEX)
        index["offset"] = -1
        return index

    def reserve(self, total: int) -> None:
        """Make room for that many bytes, or for the budget if it is less. What is there stays."""
        total = min(total, self.budget)
        # It outlives the call, which may be in inference mode.
        with torch.inference_mode(False):
            room = torch.empty(total, dtype=torch.uint8, device=self.device)
            room[: len(self._bytes)] = self._bytes
        self._bytes = room

    @property
    def place(self) -> str:
        """Where they lie, in words."""
        return "memory" if self.device.type == "cpu" else f"the memory of {self.device}"

    @property
    def is_reserved(self) -> bool:
        return len(self._bytes) > 0

    @property
    def bytes_set_aside(self) -> int:
        """Room for records, taken or not."""
        return len(self._bytes)

    @property
    def bytes_held(self) -> int:
        """Of all records."""
        return int(self.index["bytes"][self.index["depth"] > 0].sum())

    def depths(self, keys: Keys) -> Any:
        """The depth of each key's record; 0: there is none."""
        return self.index["depth"][keys]

    def find(self, keys: Keys, inputs: Any, depth: int) -> Any:
        """Look for records of these inputs, at most so deep, before the keys' records are used.
        Returns which inputs are not what they were."""
        return (self.index["depth"][keys] > 0) & (self.index["input"][keys] != inputs)

    def strangers(self, keys: Keys) -> list[int]:
        """Other processes, as numbers, that these keys' records come from, none of whose records
        have been compared with the real forward pass."""
        return []

    def trust(self, strangers: Sequence[int]) -> None:
        """They have been, and are right."""

    def distrust(self, strangers: Sequence[int]) -> None:
        """They are wrong: forget the records of these processes."""

    def drop(self, keys: Any) -> None:
        """Forget records, keeping the room set aside."""
        self.index["depth"][keys] = 0

    def set_aside(self, keys: Keys, needed: Sequence[int], room: Sequence[int]) -> Any:
        """Whether each key has room for the bytes it needs, which may be set aside now; `room`:
        what to set aside, so that later records fit as well."""
        index = self.index
        fits = (index["offset"][keys] >= 0) & (index["room"][keys] >= np.asarray(needed))
        for i in np.flatnonzero(~fits).tolist():
            key = keys[i]
            if index["offset"][key] >= 0 and index["room"][key] >= needed[i]:  # it came before
                fits[i] = True
                continue
            size = -(-max(room[i], needed[i]) // ALIGNMENT) * ALIGNMENT
            if self._end + size > len(self._bytes):
                self._grow(self._end + size)
            if self._end + size <= len(self._bytes):
                index["depth"][key] = 0
                index["room"][key], index["offset"][key] = size, self._end
                self._end += size
                fits[i] = True
        return fits

    def _grow(self, needed: int) -> None:
        """How long sequences are is not known when room is made first."""
        if len(self._bytes) < needed <= self.budget:
            try:
                self.reserve(max(needed, 2 * len(self._bytes)))
            except (CacheError, RuntimeError, MemoryError):
                self.budget = len(self._bytes)  # so much there is, and no more

    def write_rows(self, keys: Keys, rows: Tensor, depth: int, inputs: Any) -> None:
        """uint8 (B, bytes), one row a key, for which there is room."""
        self.index["depth"][keys] = 0
        count = rows.shape[1]
        offsets = self.index["offset"][keys]
        room = self._common_room(keys, offsets)
        if room is not None and self.device.type == "cpu":  # where index_copy_ is slow on bytes
            self._by_room(room)[:, :count].numpy()[offsets // room] = in_memory(rows).numpy()
        elif room is not None:
            self._by_room(room)[:, :count].index_copy_(
                0, self._numbers(offsets // room), rows.to(self.device)
            )
        else:
            for offset, row in zip(offsets, rows.to(self.device), strict=True):
                self._bytes[offset : offset + count] = row
        self._finish(keys, [count] * len(keys), depth, inputs)

    def write(self, keys: Keys, records: Sequence[Tensor], depth: int, inputs: Any) -> None:
        """uint8 (bytes,) a key, for which there is room."""
        self.index["depth"][keys] = 0
        for offset, record in zip(self.index["offset"][keys], records, strict=True):
            self._bytes[offset : offset + len(record)] = record.to(self.device)
        self._finish(keys, [len(record) for record in records], depth, inputs)

    def _finish(self, keys: Keys, counts: Sequence[int], depth: int, inputs: Any) -> None:
        index = self.index
        index["bytes"][keys], index["input"][keys] = counts, inputs
        index["depth"][keys] = depth

    def read_rows(self, keys: Keys) -> Tensor:
        """uint8 (B, bytes) of records of equal length; a copy, never the store's own memory."""
        offsets = self.index["offset"][keys]
        count = int(self.index["bytes"][keys[0]])
        room = self._common_room(keys, offsets)
        if room is None:
            return torch.stack(self.read(keys))
        rows = self._by_room(room)
        if count % 8 == 0 == room % 8:  # fewer elements to gather
            rows, count = rows.view(torch.int64), count // 8
        rows, numbers = rows[:, :count], self._numbers(offsets // room)
        if self.device == self.serve_on:
            return rows.index_select(0, numbers).view(torch.uint8)
        pinned = torch.empty(len(keys), count, dtype=rows.dtype, pin_memory=True)
        torch.index_select(rows, 0, numbers, out=pinned)
        return pinned.to(self.serve_on, non_blocking=True).view(torch.uint8)

    def read(self, keys: Keys) -> list[Tensor]:
        """uint8 (bytes,) a key: copies."""
        offsets, counts = self.index["offset"][keys].tolist(), self.index["bytes"][keys].tolist()
        records = [self._bytes[o : o + count] for o, count in zip(offsets, counts, strict=True)]
        if self.device == self.serve_on:
            return [record.clone() for record in records]
        pinned = torch.empty(sum(counts), dtype=torch.uint8, pin_memory=True)
        torch.cat(records, out=pinned)
        return list(torch.split(pinned.to(self.serve_on, non_blocking=True), counts))

    def _common_room(self, keys: Keys, offsets: Any) -> int | None:
        """The room of each key, where all are alike and stand in one row."""
        rooms = self.index["room"][keys]
        room = int(rooms[0])
        same = bool((rooms == room).all()) and not (offsets % room).any()
        return room if same else None

    def _by_room(self, room: int) -> Tensor:
        count = len(self._bytes) // room
        return self._bytes[: count * room].view(count, room)

    def _numbers(self, numbers: Any) -> Tensor:
        # Not waited for: what lies in pageable memory has been read when the call returns.
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device, non_blocking=True)

    def open_depth(
        self, depth: int, fingerprint: str, layout: Any = None, about: dict[str, Any] | None = None
    ) -> None:
        """Records of this depth are going to be read, and written if their layout is known. From
        here on none counts that is of other frozen weights (`fingerprint`) or laid out in another
        way. `about`: plain values that tell a user what the records are of."""

    def clear(self) -> None:
        """Forget every record."""
        self.index["depth"] = 0

    def close(self) -> None:
        """Give the memory back; what is in files stays there."""
        self._bytes = torch.empty(0, dtype=torch.uint8)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor in the computer's memory, by way of pinned memory from CUDA, which is faster."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def memory_available() -> int:
    """Bytes of memory that this process can still have, where others on this computer that train
    together with it take as much."""
    return _memory_free() // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def _memory_free() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
