"""Wide ResNet (Zagoruyko and Komodakis, 2016, arXiv 1605.07146) for 32x32 images.

Pre-activation blocks: BatchNorm, ReLU, convolution, twice. Where a block changes the shape, its
shortcut is a 1x1 convolution of the block's first activation; elsewhere it is the input itself,
which is why no ReLU works in place.
"""

from torch import Tensor, nn

from .chain import Chain, check_int, conv, dropouts, units_per_block


class WideBlock(nn.Module):
    """(batch, C, H, W) to (batch, width, H / stride, W / stride)."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(
            conv(channels, width, 3, stride),
            *(nn.BatchNorm2d(width), nn.ReLU(), *dropouts(dropout)),
            conv(width, width, 3),
        )
        same = channels == width and stride == 1
        self.shortcut = None if same else conv(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active: Tensor = self.activation(x)
        out: Tensor = self.body(active)
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(Chain):
    """WRN-depth-widen_factor: (batch, 3, 32, 32) to logits (batch, num_classes).

    `depth` 6 n + 4 gives three groups of n blocks of 16, 32 and 64 times `widen_factor` channels.
    3 n + 2 layers: stem, blocks, and the final norm with the classifier; 20 at depth 40. `dropout`
    is a probability, applied between a block's two convolutions. InvalidValue for a depth that is
    not 6 n + 4 with n >= 1, `widen_factor` below 1, `num_classes` below 2 and `dropout` outside
    [0, 1).
    """

    def __init__(
        self, num_classes: int, *, depth: int = 40, widen_factor: int = 4, dropout: float = 0.0
    ) -> None:
        check_int("num_classes", num_classes, 2)
        check_int("widen_factor", widen_factor, 1)
        blocks = units_per_block("wrn", depth)
        channels = 16
        modules: dict[str, nn.Module] = {"stem": conv(3, channels, 3)}
        for group in (1, 2, 3):
            width = 2 ** (group + 3) * widen_factor
            for block in range(1, blocks + 1):
                stride = 2 if group > 1 and block == 1 else 1
                modules[f"group{group}_block{block}"] = WideBlock(channels, width, stride, dropout)
                channels = width
        modules["head"] = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
        super().__init__(modules)
