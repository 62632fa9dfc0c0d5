"""What FreezeOut adds to a training step: python -m benchmarks.step_overhead

1. `FreezeOut.step()` between freezes, 100 layers and 300 parameters, beside
   `CosineAnnealingLR.step()` on as many groups.
2. The split `optimizer.step()` and `FreezeOut.step()`, beside the plain `optimizer.step()`, as a
   share of the whole step of a ResNet-50 (25.6 million parameters) on 8 images of 64x64.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from freezeout import FreezeOut

from .timing import environment, interleaved, timed


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with norms, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.shortcut(x)
        return y.relu()


def resnet50() -> nn.Sequential:
    """ResNet-50: 18 layers (stem, 16 blocks, classifier), 161 parameters."""
    blocks: list[nn.Module] = []
    channels = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            blocks.append(Bottleneck(channels, width, 2 if i == 0 and width > 64 else 1))
            channels = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
    return nn.Sequential(*stem, *blocks, *head)


def hundred_layers() -> nn.Sequential:
    """100 layers of 3 parameters each."""
    return nn.Sequential(*(_Three() for _ in range(100)))


class _Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.linear(x))


def bookkeeping() -> None:
    """Claim 1."""
    calls = 1000
    model = hundred_layers()
    driven = SGD(model.parameters(), lr=0.1)
    freezer = FreezeOut(model, driven, 10**9)
    for _ in range(25):  # steps without updates would be warned of at first
        driven.step()
        freezer.step()
    groups = [{"params": list(layer.parameters())} for layer in hundred_layers()]
    optimizer = SGD(groups, lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, 10**9)
    optimizer.step()

    def times(function: Callable[[], object]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls):
                function()

        return repeat

    seconds = interleaved({"freezeout": times(freezer.step), "cosine": times(scheduler.step)}, 7)
    ours, theirs = (1e6 * s / calls for s in seconds.values())
    print(f"FreezeOut.step()          {ours:8.2f} us")
    print(f"CosineAnnealingLR.step()  {theirs:8.2f} us   ratio {ours / theirs:.3f} (claim: <= 1)")


def whole_step(name: str, build: Callable[[nn.Module], Optimizer]) -> None:
    """Claim 2."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 64, 64), torch.randint(0, 1000, (8,))
    plain, split = resnet50(), resnet50()
    optimizers = {"plain": build(plain), "split": build(split)}
    freezer = FreezeOut(split, optimizers["split"], 10**9, example_inputs=x)

    def backward(model: nn.Module) -> None:
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))

    def step_split() -> None:
        optimizers["split"].step()
        freezer.step()

    for model in (plain, split):
        backward(model)  # gradients for the optimizers to use
    step = interleaved({"plain": optimizers["plain"].step, "split": step_split}, 40, 3)
    whole = min(timed(lambda: backward(plain)) for _ in range(5)) + step["plain"]
    added = step["split"] - step["plain"]
    print(
        f"{name:<12} whole step {1e3 * whole:7.1f} ms, optimizer {1e3 * step['plain']:6.2f} ms, "
        f"split into {len(freezer.layers)} layers {1e3 * step['split']:6.2f} ms: "
        f"{added / whole:+.2%} of the step (claim: <= 2 %)"
    )


def main() -> None:
    """Print both claims."""
    print(environment())
    bookkeeping()
    print("ResNet-50, 8 images of 64x64, float32")
    whole_step("SGD", lambda m: SGD(m.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4))
    whole_step("AdamW", lambda m: AdamW(m.parameters(), lr=0.0))
    whole_step("AdamW fused", lambda m: AdamW(m.parameters(), lr=0.0, fused=True))


if __name__ == "__main__":
    main()
