"""The store that the option `where` names."""

import shutil
from pathlib import Path

import torch

from ..errors import InvalidValue
from .files import FileStore
from .store import Store, memory_available

_RESERVED = ("gpu", "cuda", "cpu", "memory", "auto", "off", "disk", "")


def store_for(where: str | Path, budget: int | None, keys: int, device: torch.device) -> Store:
    """A store for that many keys, whose records are read on `device`.

    Args:
        where: "ram", "device", or a folder.
        budget: bytes; None: half of the free memory, or nine tenths of the free disk.

    Raises:
        InvalidValue, CacheError: as `PrefixCache` does.
    """
    cpu = torch.device("cpu")
    if where == "ram":
        return Store(keys, budget or memory_available() // 2, cpu, device)
    if where == "device":
        if budget is None:
            free = memory_available()
            if device.type == "cuda":
                free = torch.cuda.mem_get_info(device)[0]
            budget = free // 2
        return Store(keys, budget, device, device)
    if not isinstance(where, Path) and ("/" not in where and where.lower() in _RESERVED):
        raise InvalidValue(f"where must be 'ram', 'device' or a folder, got {where!r}")
    path = Path(where)
    store = FileStore(path, keys, budget or 0, device)
    if budget is None:
        free = shutil.disk_usage(path).free + store.bytes_set_aside
        store.budget = free * 9 // 10
    return store
