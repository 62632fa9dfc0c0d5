"""What the paper's three networks share: `Chain`, the initialisation, and checks of options."""

import math
from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

from ...errors import InvalidValue


class Chain(nn.Sequential):
    """Named modules run one after another; each that has parameters is one layer."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(modules))
        init_weights(self)

    @property
    def layers(self) -> list[tuple[nn.Module, ...]]:
        """Modules that freeze together, in execution order; every parameter is in exactly one."""
        return [(m,) for m in self if next(m.parameters(), None) is not None]


def init_weights(model: nn.Module) -> None:
    """Convolutions: normal(0, sqrt(2 / (k k out_channels))); BatchNorm: 1 and 0; biases: 0.

    He initialisation over the fan-out (arXiv 1502.01852). Linear weights keep torch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image's size at stride 1; `kernel` is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def dropouts(probability: float) -> list[nn.Module]:
    """One Dropout module, or none at probability 0; InvalidValue outside [0, 1)."""
    # Written so that NaN fails too.
    if isinstance(probability, bool) or not 0 <= probability < 1:
        raise InvalidValue(f"dropout must be a probability in [0, 1), got {probability!r}")
    return [nn.Dropout(probability)] if probability > 0 else []


def check_int(name: str, value: object, minimum: int) -> None:
    """InvalidValue unless `value` is an integer (a bool is none) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidValue(f"{name} must be an integer of at least {minimum}, got {value!r}")


def units_per_block(model: str, depth: int) -> int:
    """The n of depth = 6 n + 4: three blocks of n units of two convolutions, and four layers more.

    InvalidValue, naming the nearest valid depths, for a depth without such an n >= 1.
    """
    check_int(f"depth of {model}, 6 n + 4,", depth, 10)
    n, rest = divmod(depth - 4, 6)
    if rest:
        raise InvalidValue(
            f"depth of {model} must be 6 n + 4 (nearest: {6 * n + 4} and {6 * n + 10}), got {depth}"
        )
    return n
