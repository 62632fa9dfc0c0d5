"""What `freezeout estimate` predicts, against whole runs beside ordinary ones.

    python -m benchmarks.predicted_savings [--steps 300] [--only NAME ...] [--target 0.2]

For each of eight networks: estimate, then train two copies, one with FreezeOut and one without,
twenty steps of each in turn, so that a machine whose speed drifts slows both. With --target, `t_0`
is the one that the estimate found for that saving. Claim: saved as predicted, within 5 points.

A freeze itself costs some milliseconds, once (the next forward pass is looked at, memory is got
anew). In a run of thousands of steps that is nothing, in one of two hundred with forty freezes it
shows; so there are at least 15 steps a layer.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tests.conftest  # noqa: F401  (lets timm be imported beside a CPU torch)
from freezeout.lab.device import hardware
from freezeout.lab.estimate.config import EstimateConfig
from freezeout.lab.estimate.estimate import estimate
from freezeout.lab.estimate.subject import Subject, build

MODELS = {
    "DenseNet-BC-76": EstimateConfig(model="densenet", batch_size=8),
    "WRN-40-4": EstimateConfig(model="wrn", batch_size=4),
    "VGG-16": EstimateConfig(model="vgg", batch_size=8),
    "ResNet-18": EstimateConfig(model="benchmarks.networks:resnet18"),
    "ResNet-50": EstimateConfig(model="benchmarks.networks:resnet50"),
    "ViT-tiny": EstimateConfig(model="benchmarks.networks:vit"),
    "ConvNeXt-atto": EstimateConfig(model="benchmarks.networks:convnext"),
    "GPT": EstimateConfig(model="benchmarks.networks:gpt"),
}

# Not few steps: the first of a block finds the processor's cache full of the other network's
# tensors. By medians WRN-40-4 saved 11.6 % in blocks of five, 14.1 % of twenty, 17.4 % alone.
_BLOCK = 20


@dataclass(frozen=True)
class Result:
    """Shares of the ordinary run's seconds; steps and medians for whoever reads the JSON."""

    name: str
    t_0: float
    layers: int
    predicted: float
    counted: float
    measured: float
    measured_by_medians: float
    seconds_a_step: float


def main() -> None:
    """Print a line a network, and write all of it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=MODELS)
    parser.add_argument("--target", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    machine = f"{hardware(torch.device('cpu'))}; torch {torch.__version__}"
    print(f"{machine}; {args.steps} steps, cubic freezing")
    for name in args.only or MODELS:
        config = replace(MODELS[name], device="cpu", target_saving=args.target, lr=0.01)
        result = compare(name, config, args.steps)
        results.append(result)
        print(
            f"{name:<15} t_0 {result.t_0:.3f}  predicted {result.predicted:6.1%}  "
            f"measured {result.measured:6.1%}  "
            f"difference {100 * (result.measured - result.predicted):+5.1f} points  "
            f"(counted FLOPs {result.counted:6.1%}; {result.seconds_a_step:.3f} s a step)",
            flush=True,
        )
        if args.json:  # after each network: a run that is cut off leaves what it has
            rows = [vars(result) for result in results]
            found = {"machine": machine, "steps": args.steps, "target": args.target}
            args.json.write_text(json.dumps({**found, "networks": rows}, indent=2) + "\n")
    worst = max(abs(r.measured - r.predicted) for r in results)
    print(f"largest difference {100 * worst:.1f} points (claim: at most 5)")


def compare(name: str, config: EstimateConfig, steps: int) -> Result:
    """Estimate a run of `steps` steps, then make it beside an ordinary one."""
    ordinary, frozen = subject(config), subject(config)
    steps = max(steps, 15 * len(frozen.layers))
    config = replace(config, images=steps * ordinary.batch_size, epochs=1)
    run = estimate(config).runs[1]
    assert run.schedule is not None
    assert run.schedule.t_0 is not None
    assert run.total_steps == steps
    freezer = frozen.freezer(steps, run.plan)
    seconds: dict[str, list[float]] = {"ordinary": [], "frozen": []}
    depths: list[int] = []

    def timed(which: str, step: Callable[[], Any]) -> None:
        start = time.perf_counter()
        step()
        seconds[which].append(time.perf_counter() - start)

    def frozen_step() -> None:
        frozen.step()
        freezer.step()

    for _ in range(3):
        ordinary.step()
    for block in range(0, steps, _BLOCK):
        pair = [("ordinary", ordinary.step), ("frozen", frozen_step)]
        for which, step in pair if block // _BLOCK % 2 else reversed(pair):
            for _ in range(min(_BLOCK, steps - block)):
                if which == "frozen":
                    depths.append(freezer.num_frozen)
                timed(which, step)
    assert tuple(freezer.freeze_steps) == run.freeze_steps
    full = median(seconds["ordinary"])
    by_depth = {
        depth: median(t for t, d in zip(seconds["frozen"], depths, strict=True) if d == depth)
        for depth in set(depths)
    }
    return Result(
        name,
        run.schedule.t_0,
        len(freezer.layers),
        run.saved,
        run.flops_saved,
        1 - sum(seconds["frozen"]) / sum(seconds["ordinary"]),
        1 - sum(by_depth[depth] for depth in depths) / (full * steps),
        full,
    )


def subject(config: EstimateConfig) -> Subject:
    """A copy of its own."""
    torch.manual_seed(0)
    return Subject(config, build(config), torch.device("cpu"))


if __name__ == "__main__":
    main()
