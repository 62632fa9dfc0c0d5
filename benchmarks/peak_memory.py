"""Predicted peak memory of a training step against real steps, as layers freeze.

    python -m benchmarks.peak_memory [--device cuda]

On a CPU the real figure is the bytes of all tensors alive at once; what torch's allocator handed
out, which counts the workspaces that single operations take as well, stands beside it. On CUDA it
is `torch.cuda.max_memory_allocated`. Claim: predicted within 10 % of the tensors counted.
"""

import argparse

import torch

import tests.conftest  # noqa: F401  (lets timm be imported beside a CPU torch)
from freezeout.lab.device import hardware
from freezeout.lab.estimate.config import EstimateConfig
from freezeout.lab.estimate.subject import Subject, build, moved
from freezeout.profile import count_step, peak_bytes, predict_memory
from freezeout.profile.fake import faked
from freezeout.words import size
from tests.memory import allocator_peak_bytes, freeze, resident

from .predicted_savings import MODELS


def main() -> None:
    """Print three depths of each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    print(f"{hardware(device)}; torch {torch.__version__}")
    worst = 0.0
    for name, config in MODELS.items():
        with torch.device("meta"):
            built = moved(build(config), torch.device("meta"))
        with faked(*built, device) as inputs:
            fake = Subject(config, (built[0], inputs), device)
            saved = count_step(fake.model, fake.layers, fake.loss).saved_bytes
            memory = predict_memory(
                fake.step, fake.model, fake.layers, fake.optimizer, fake.batch, saved
            )
        real = make(config, device)
        real.step()
        last = len(real.layers) - 1
        for depth in (0, last // 2, last):
            freeze(real.layers[:depth], real.optimizer)
            counted, allocated = measure(real, device)
            predicted = memory.steps[depth].peak
            worst = max(worst, abs(predicted / counted - 1))
            print(
                f"{name:<15} {depth:>2} of {last} frozen  predicted {size(predicted):>9}  "
                f"measured {size(counted):>9} ({predicted / counted - 1:+.1%})  "
                f"allocator {size(allocated):>9} ({predicted / allocated - 1:+.1%})",
                flush=True,
            )
    print(f"largest difference {worst:.1%} (claim: at most 10 %)")


def make(config: EstimateConfig, device: torch.device) -> Subject:
    """A real one."""
    torch.manual_seed(0)
    with torch.device(device):
        return Subject(config, moved(build(config), device), device)


def measure(subject: Subject, device: torch.device) -> tuple[int, int]:
    """The peak of the tensors, and of the allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        subject.step()
        peak = torch.cuda.max_memory_allocated(device)
        return peak, peak
    tensors = resident(subject.model, subject.optimizer, subject.batch)
    return peak_bytes(subject.step, tensors), allocator_peak_bytes(subject.step, tensors)


if __name__ == "__main__":
    main()
