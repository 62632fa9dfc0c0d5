"""The oracle: FreezeOut (arXiv 1706.04983) written out literally, to be read beside the paper.

Nothing here comes from the library, and nothing saves any work: freeze times are exact fractions,
the gradients of all layers are computed at every iteration, and those of frozen layers are thrown
away. SGD with Nesterov momentum and weight decay is done by hand, layer by layer.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn


def freeze_iterations(t_0: Fraction, power: int, num_layers: int, total: int) -> list[int]:
    """Section 2: layers freeze at times that go linearly from t_0 to 1, then to a power (1, 2
    or 3 for linear, squared, cubic). In whole iterations: the first one at or after that time."""
    linear = [t_0 + (1 - t_0) * Fraction(i, num_layers - 1) for i in range(num_layers - 1)]
    return [math.ceil(t**power * total) for t in [*linear, Fraction(1)]]


def learning_rate(alpha: float, iteration: int, end: int, total: int, scale_lr: bool) -> float:
    """Eq. 1, with time t and the layer's freeze time t_i as fractions of the run."""
    t = iteration / total
    t_i = end / total
    if t >= t_i:
        return 0.0
    alpha_i = alpha / t_i if scale_lr else alpha
    return 0.5 * alpha_i * (1 + math.cos(math.pi * t / t_i))


def train(
    layers: Sequence[nn.Module],  # run one after another, the first to freeze first
    criterion: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],  # one an iteration
    ends: Sequence[int],  # each layer's freeze iteration
    alpha: float,
    scale_lr: bool,
    momentum: float,
    weight_decay: float,
) -> None:
    """Train the layers in place, one iteration a batch."""
    parameters = [p for layer in layers for p in layer.parameters()]
    velocity = {p: torch.zeros_like(p) for p in parameters}
    for iteration, (x, y) in enumerate(batches):
        for layer, end in zip(layers, ends, strict=True):
            layer.train(iteration < end)  # a frozen layer's BatchNorm is in evaluation mode
            x = layer(x)
        gradients = torch.autograd.grad(criterion(x, y), parameters)  # frozen layers' too
        gradient = dict(zip(parameters, gradients, strict=True))
        for layer, end in zip(layers, ends, strict=True):
            if iteration >= end:
                continue  # frozen: the gradient is thrown away
            alpha_it = learning_rate(alpha, iteration, end, len(batches), scale_lr)
            for p in layer.parameters():
                decayed = gradient[p] + weight_decay * p.detach()
                velocity[p] = momentum * velocity[p] + decayed
                with torch.no_grad():
                    p.sub_(alpha_it * (decayed + momentum * velocity[p]))


def saved_share(depth: int, growth: int, t_0: float, how_scale: str) -> float:
    """Eq. 2 and 3 as the paper's code has them, for DenseNet-BC: the share of the time saved."""
    costs = [54 * growth * 1024]
    m = 2
    for places in (1024, 256, 64):
        for _ in range((depth - 4) // 6):
            costs.append((4 * m * growth**2 + 36 * growth**2) * places)
            m += 1
        m = m // 2
    power = {"linear": 1, "squared": 2, "cubic": 3}[how_scale]
    spent = 0.0
    for i, cost in enumerate(costs):
        t_i = (t_0 + (1 - t_0) * i / len(costs)) ** power
        spent += (1 + t_i) * cost
    saved = 1 - spent / (2 * sum(costs))
    return saved * 1.3 if how_scale == "linear" else saved
