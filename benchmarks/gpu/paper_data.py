"""CIFAR-10 as JPEG, one .npz file, unpacked where the lab finds it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from freezeout.lab.data import CIFAR10

from .part import Wrong


def unpack(archive: Path, into: Path) -> Path:
    """The folder `into`, which has CIFAR-10's binary files in a folder of their own; they are
    written if they are not there, by one process for each."""
    target = into / CIFAR10.folder
    if target.is_dir():
        return into
    if find_spec("PIL") is None:
        raise Wrong(f"to unpack {archive} pillow is needed: pip install pillow")
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    processes = []
    for split, files in (("train", CIFAR10.train), ("test", CIFAR10.test)):
        first = 0
        for name, count in files:
            words = [str(archive), str(unfinished / name), split, str(first), str(count)]
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.paper_images", *words],
                stderr=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            processes.append(process)
            first += count
    said = [process.communicate()[1].decode(errors="replace").strip() for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            last = text.splitlines()[-1] if text else f"exit status {process.returncode}"
            raise Wrong(f"{archive} cannot be unpacked: {last}\n{text}")
    unfinished.rename(target)
    return into
