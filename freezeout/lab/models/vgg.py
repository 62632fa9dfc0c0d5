"""VGG-16 with BatchNorm (Simonyan and Zisserman, 2014, arXiv 1409.1556) for 32x32 images.

Convolutions have no bias, as in the FreezeOut authors' code: the BatchNorm that follows would
subtract it. That code also normalises the classifier, always drops half of its units and starts
its weights at normal(0, 0.01); this classifier has torch's own initialisation, no norm, and
dropout only where it is asked for.
"""

from torch import nn

from ...errors import InvalidValue
from .chain import Chain, check_int, conv, dropouts

# The channels of each convolution. Every block ends with max pooling: 32x32 becomes 1x1.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(Chain):
    """VGG-16 with BatchNorm: (batch, 3, 32, 32) to logits (batch, num_classes).

    14 layers: 13 times convolution, BatchNorm and ReLU, then the whole classifier. `dropout` is a
    probability, applied to the classifier's two hidden outputs. InvalidValue for a depth that is
    not 16, `num_classes` below 2 and `dropout` outside [0, 1).
    """

    def __init__(self, num_classes: int, *, depth: int = 16, dropout: float = 0.0) -> None:
        check_int("num_classes", num_classes, 2)
        if depth != 16:
            raise InvalidValue(f"depth of vgg must be 16, got {depth!r}")
        modules: dict[str, nn.Module] = {}
        channels = 3
        for block, widths in enumerate(BLOCKS, 1):
            for i, width in enumerate(widths, 1):
                modules[f"block{block}_conv{i}"] = nn.Sequential(
                    conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()
                )
                channels = width
            modules[f"pool{block}"] = nn.MaxPool2d(2)
        modules["classifier"] = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(channels, 512), nn.ReLU(), *dropouts(dropout)),
            *(nn.Linear(512, 512), nn.ReLU(), *dropouts(dropout)),
            nn.Linear(512, num_classes),
        )
        super().__init__(modules)
