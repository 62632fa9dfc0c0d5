"""A training step with half the layers frozen, as a share of a full one.

    python -m benchmarks.half_frozen [--precision bf16]

Forward, backward and update of the paper's networks, batch 50, synthetic images; frozen layers
still run forward. Depths take turns; medians.
"""

import argparse
from dataclasses import replace

import torch

from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job

from .timing import environment, interleaved

NETWORKS = {  # name: (options, claimed share of a full step)
    "DenseNet-BC-76": (TrainConfig(model="densenet", dataset="digits"), 0.40),
    "WRN-40-4": (TrainConfig(model="wrn", dataset="digits"), 0.68),
}


def measure(name: str, config: TrainConfig, claim: float, rounds: int) -> None:
    """Print the share for one network."""
    job = Job(config)
    model = job.model.train()
    optimizer = job.optimizer(model)
    layers = job.freezer(model, optimizer, 1).layers
    x, y, _ = next(job.batches(0, 0))

    def step() -> None:
        torch.autograd.backward(job.loss(model, x, y)[0])
        optimizer.step()
        optimizer.zero_grad()

    def full() -> None:
        for layer in layers:
            layer.unfreeze()
        step()

    def half() -> None:
        for layer in layers[: len(layers) // 2]:
            layer.freeze()
        step()

    seconds = interleaved({"full": full, "half": half}, rounds, 2, job.device)
    print(
        f"{name:<15} {len(layers)} layers, {job.precision}: full step {1e3 * seconds['full']:.0f} "
        f"ms, {len(layers) // 2} layers frozen {1e3 * seconds['half']:.0f} ms, share "
        f"{seconds['half'] / seconds['full']:.3f} (claim: <= {claim})",
        flush=True,
    )


def main() -> None:
    """Print the share for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name, (config, claim) in NETWORKS.items():
        config = replace(config, precision=args.precision, device=args.device)
        measure(name, config, claim, args.rounds)
    print(environment())


if __name__ == "__main__":
    main()
