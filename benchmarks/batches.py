"""What making a batch costs beside a training step: `python -m benchmarks.batches`.

Augmented 32x32 images for a Wide ResNet 16-1; making a batch and training on it take turns, so
that whatever else the machine does meets both. Prints medians and their ratio, in milliseconds;
`--help` lists what can be changed.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from freezeout.lab.data import batches
from freezeout.lab.device import choose_precision
from freezeout.lab.models import build_model

from .timing import environment

WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200, help="at most one epoch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bf16 = choose_precision(args.precision, device) == "bf16"
    torch.manual_seed(0)
    model = build_model("wrn", num_classes=10, depth=16, widen_factor=1).to(device)
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    epoch = batches(
        torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, device=device),
        torch.randint(10, (50_000,), device=device),
        batch_size=args.batch_size,
        seed=0,
        epoch=0,
        mean=(0.49, 0.48, 0.45),
        std=(0.25, 0.24, 0.26),
        augment=True,
        flip=True,
        channels_last=True,
    )
    making: list[float] = []
    training: list[float] = []
    start = now(device)
    for x, y in epoch:
        made = now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        trained = now(device)
        making.append(made - start)
        training.append(trained - made)
        if len(making) == WARM_UP + args.steps:
            break
        start = now(device)

    batch, step = (1e3 * statistics.median(times[WARM_UP:]) for times in (making, training))
    print(f"{environment(device)}; channels-last, {'bf16' if bf16 else 'fp32'}")
    print(f"batch        {batch:8.3f} ms  (size {args.batch_size}, augmented)")
    print(f"step         {step:8.3f} ms  (WRN-16-1: forward, backward, SGD)")
    print(f"batch/step   {batch / step:8.2%}")
    print(f"first batch  {1e3 * making[0]:8.3f} ms  (with all that is random in the epoch)")


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
