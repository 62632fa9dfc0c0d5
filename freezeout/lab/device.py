"""The device, the precision and the memory format of a run, and what machine it is."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..errors import InvalidValue


def choose_device(name: str, number: int | None = None) -> torch.device:
    """The device called `name`; "auto" is the first accelerator, or the CPU without one.

    `number`: of this process among several on this machine; it takes the accelerator of that
    number. InvalidValue if there is no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto" and found is None:
        return torch.device("cpu")
    if name == "auto" and found is not None:
        name = found.type
    if number is not None and name != "cpu":
        if ":" in name:
            raise InvalidValue(
                f"device {name!r} is one device, and each rank takes one of its own: give "
                f"{name.partition(':')[0]}"
            )
        name = f"{name}:{number}"
    here = ["cpu"]
    if found is not None:
        here += [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    if device is None or str(device) not in here:
        raise InvalidValue(f"device {name!r} is not there; this machine has {', '.join(here)}")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16". "auto" takes bf16 where the device computes it natively: weights stay in
    fp32 and autocast runs matrix products and convolutions in bf16, which needs no loss scaling.

    InvalidValue for bf16 on a CUDA device without it.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bf16" and not native:
            raise InvalidValue(f"precision 'bf16' is not supported by {device}; use fp32")
    elif device.type == "cpu":
        # Emulated bf16, on older CPUs, is slower than fp32.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return ("bf16" if native else "fp32") if name == "auto" else name


def hardware(device: torch.device) -> str:
    """One line: the processor or accelerator, and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, Any]:
    """Versions of what a run's numbers depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("freezeout", "numpy", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
