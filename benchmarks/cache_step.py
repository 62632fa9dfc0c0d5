"""A step whose frozen layers are served from memory, beside a step of the trained layers alone.

    python -m benchmarks.cache_step [--precision bf16]

DenseNet-BC-76 and WRN-40-4, batch 50, with a quarter, half and three quarters of the layers
frozen. Claim: the served step costs at most 1.10 times the other. Also printed: the step in which
frozen layers run. The first two take turns; medians.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from freezeout import FreezeOut, PrefixCache
from freezeout.lab.config import TrainConfig
from freezeout.lab.job import Job

from .timing import environment, interleaved

NETWORKS = {
    "DenseNet-BC-76": TrainConfig(model="densenet", dataset="digits"),
    "WRN-40-4": TrainConfig(model="wrn", dataset="digits"),
}
SHARES = (0.25, 0.5, 0.75)
BATCHES = 4  # stored, and served in turn


def measure(name: str, config: TrainConfig, share: float, rounds: int) -> None:
    """Print the ratio for one network at one depth."""
    job = Job(config)
    model = job.model.train()
    optimizer = job.optimizer(model)
    freezer = job.freezer(model, optimizer, 1000)
    depth = round(share * len(freezer.layers))
    freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, depth]]})
    cache = PrefixCache(freezer, BATCHES * config.batch_size, depths=[depth])
    stream = job.batches(0, 0)
    data = [next(stream)[:2] for _ in range(BATCHES)]
    prefix, suffix = halves(model, freezer, depth)
    turn = 0

    def step(call: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor]) -> None:
        nonlocal turn
        number = turn % BATCHES
        turn += 1
        first = number * config.batch_size
        ids = torch.arange(first, first + config.batch_size)
        net = _with_ids(call, ids)
        torch.autograd.backward(job.loss(net, inputs[number], data[number][1])[0])
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()

    images = [x for x, _ in data]
    for _ in range(2 * BATCHES):  # stored, then compared with the real forward pass
        step(lambda x, ids: cache(x, ids=ids), images)
    activations = []
    for x in images:
        with torch.no_grad(), job.autocast():
            activations.append(prefix(x))
    seconds = interleaved(
        {
            "served": lambda: step(lambda x, ids: cache(x, ids=ids), images),
            "suffix": lambda: step(lambda x, ids: suffix(x), activations),
        },
        rounds,
        2,
        job.device,
    )
    # By itself: its activations would leave nothing of the others' in the processor's cache.
    frozen = {"frozen": lambda: step(lambda x, ids: model(x), images)}
    seconds |= interleaved(frozen, rounds, 2, job.device)
    assert cache.stats.misses == len(images) * config.batch_size, cache.refusals
    size = cache.bytes_held / cache.num_samples
    print(
        f"{name:<15} {depth} of {len(freezer.layers)} layers frozen, {job.precision}: served "
        f"{1e3 * seconds['served']:.1f} ms, trained layers alone {1e3 * seconds['suffix']:.1f} ms, "
        f"ratio {seconds['served'] / seconds['suffix']:.3f} (claim: <= 1.10); frozen layers run "
        f"{1e3 * seconds['frozen']:.1f} ms; {size / 1e3:.0f} kB an image",
        flush=True,
    )


def _with_ids(call: Callable[[Tensor, Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: call(x, ids)


def halves(model: nn.Module, freezer: FreezeOut, depth: int) -> tuple[nn.Module, nn.Module]:
    """The network's first layers and the others, on the same weights."""
    frozen = {m for layer in freezer.layers[:depth] for m in layer.modules}
    children = list(model.children())
    first = [child for child in children if child in frozen]
    return nn.Sequential(*first), nn.Sequential(*[c for c in children if c not in frozen])


def main() -> None:
    """Print the ratio for each network and depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for name, config in NETWORKS.items():
        config = replace(config, precision=args.precision, device=args.device)
        for share in SHARES:
            measure(name, config, share, args.rounds)
    print(environment())


if __name__ == "__main__":
    main()
