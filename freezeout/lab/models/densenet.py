"""DenseNet-BC (Huang et al., 2016, arXiv 1608.06993) for 32x32 images.

The FreezeOut paper (arXiv 1706.04983) puts ReLU before BatchNorm, and so does every part of this
network: ReLU, BatchNorm, convolution. The authors' own code does so in the transitions (and in
units without bottleneck, which the paper's networks do not have) but kept BatchNorm, ReLU,
convolution in the bottleneck units, and BatchNorm, ReLU before the classifier. The number of
parameters is the same either way.

No ReLU works in place: its input is also what the unit concatenates.
"""

import math

import torch
from torch import Tensor, nn

from .chain import Chain, check_int, conv, dropouts, units_per_block

COMPRESSION = 0.5  # the share of channels that a transition keeps (theta)
BOTTLENECK = 4  # channels between a unit's two convolutions, in units of the growth


class DenseUnit(nn.Module):
    """(batch, C, H, W) to (batch, C + growth, H, W): the input, with `growth` channels appended."""

    def __init__(self, channels: int, growth: int, dropout: float) -> None:
        super().__init__()
        inner = BOTTLENECK * growth
        self.body = nn.Sequential(
            *(nn.ReLU(), nn.BatchNorm2d(channels), conv(channels, inner, 1), *dropouts(dropout)),
            *(nn.ReLU(), nn.BatchNorm2d(inner), conv(inner, growth, 3), *dropouts(dropout)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


class DenseNet(Chain):
    """DenseNet-BC: (batch, 3, 32, 32) to logits (batch, num_classes).

    `depth` L = 6 n + 4 counts convolutions and the classifier, and gives three blocks of n units;
    each unit adds `growth` channels. 3 n + 4 layers: stem, units, two transitions, and the final
    norm with the classifier; 40 at L = 76. `dropout` is a probability, applied after both
    convolutions of a unit. InvalidValue for a depth that is not 6 n + 4 with n >= 1, `growth`
    below 1, `num_classes` below 2 and `dropout` outside [0, 1).
    """

    def __init__(
        self, num_classes: int, *, depth: int = 76, growth: int = 12, dropout: float = 0.0
    ) -> None:
        check_int("num_classes", num_classes, 2)
        check_int("growth", growth, 1)
        units = units_per_block("densenet", depth)
        channels = 2 * growth
        modules: dict[str, nn.Module] = {"stem": conv(3, channels, 3)}
        for block in (1, 2, 3):
            if block > 1:
                kept = math.floor(channels * COMPRESSION)
                modules[f"transition{block - 1}"] = nn.Sequential(
                    nn.ReLU(), nn.BatchNorm2d(channels), conv(channels, kept, 1), nn.AvgPool2d(2)
                )
                channels = kept
            for unit in range(1, units + 1):
                modules[f"block{block}_unit{unit}"] = DenseUnit(channels, growth, dropout)
                channels += growth
        modules["head"] = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
        super().__init__(modules)
