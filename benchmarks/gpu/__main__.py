"""Measure freezing on this machine's GPU: python -m benchmarks.gpu [OUT] [--data CIFAR10.npz]

Parts, each of under eight minutes on a large GPU:

    right   the proofs: frozen bits stay, trained ones are the reference's; resume, compile, ranks
    fast    time and memory of a step with none, a quarter, half, three quarters frozen
    cache   steps served from the cache, and the largest batch that fits
    paper   WRN-16-4 on CIFAR-10: FreezeOut, ordinary and shortened runs, three seeds

OUT (runs/gpu, if not given) gets a JSON file and a Markdown table for each. Stopped, at --minutes
or by hand, the same command goes on with the cases that are not done. --tiny runs a small version
of everything, on a CPU too. Exit status: 0 all done, 1 a case failed, 3 cases are left.
"""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from freezeout.errors import InvalidValue
from freezeout.lab.device import choose_device

from .part import Setup, run_part

PARTS = ("right", "fast", "cache", "paper")  # each a module, which has a PART


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", default=Path("runs/gpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: auto)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as JPEG, one .npz file (part paper)")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most, for each part")
    args = parser.parse_args()
    try:
        device = choose_device(args.device)
    except InvalidValue as error:
        parser.error(str(error))
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = left = 0
    for name in args.parts:
        deadline = time.monotonic() + 60 * args.minutes
        setup = Setup(device, args.tiny, args.out, args.data, deadline)
        counts = run_part(import_module(f".{name}", __package__).PART, setup)
        failed, left = failed + counts[0], left + counts[1]
        print((args.out / f"{name}.md").read_text(), flush=True)
    if left:
        print(f"{left} cases are left: run the same command again", flush=True)
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main())
