"""Networks of the sizes that people train, written in torch alone, with random weights.

Each stands for the published one: the same operations, widths, depths and numbers of parameters;
what costs nothing (initial weights, dropout of 0) is left out. `SHAPES` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu

from freezeout.lab.models import build_model

from ..step_overhead import resnet50


class ConvNextBlock(nn.Module):
    """7x7 depthwise convolution, norm, and an MLP four times as wide, on (batch, c, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(depths: tuple[int, ...], widths: tuple[int, ...], classes: int = 1000) -> nn.Module:
    """ConvNeXt (arXiv 2201.03545)."""
    parts: list[nn.Module] = []
    before = 3
    for depth, width in zip(depths, widths, strict=True):
        size = 4 if before == 3 else 2
        convolution = nn.Conv2d(before, width, size, size)
        norm = ChannelNorm(width if before == 3 else before)
        parts += [convolution, norm] if before == 3 else [norm, convolution]
        parts += [ConvNextBlock(width) for _ in range(depth)]
        before = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(before), nn.Linear(before, classes))
    return nn.Sequential(*parts, *head)


class Attention(nn.Module):
    """Self-attention on (batch, time, width); fewer heads for keys and values if so asked for."""

    def __init__(self, width: int, heads: int, shared: int, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.causal = heads, shared, causal
        size = width // heads
        self.query = nn.Linear(width, width, bias=not rotary)
        self.key_value = nn.Linear(width, 2 * shared * size, bias=not rotary)
        self.out = nn.Linear(width, width, bias=not rotary)
        self.rotary = rotary

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        batch, time, width = x.shape
        q = self.query(x).view(batch, time, self.heads, -1).transpose(1, 2)
        kv = self.key_value(x).view(batch, time, 2, self.shared, -1)
        k, v = kv.transpose(1, 3).unbind(2)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        y = scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.shared != self.heads
        )
        return self.out(y.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): pairs turned by `angles`, (time, size / 2)."""
    one, two = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


class Gated(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Size:
    """Of a transformer."""

    width: int
    blocks: int
    heads: int
    inner: int
    shared: int | None = None  # heads of keys and values, if fewer
    causal: bool = True
    llama: bool = False  # RMS norms, rotary positions, gated MLPs, no biases


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = nn.RMSNorm if size.llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(size.width), norm(size.width)
        shared = size.shared or size.heads
        self.attention = Attention(size.width, size.heads, shared, size.causal, size.llama)
        self.mlp = (
            Gated(size.width, size.inner)
            if size.llama
            else nn.Sequential(
                nn.Linear(size.width, size.inner), nn.GELU(), nn.Linear(size.inner, size.width)
            )
        )

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Language(nn.Module):
    """GPT-2 or Llama, its output matrix tied to its embedding; takes tokens (batch, time)."""

    def __init__(self, size: Size, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.places = None if size.llama else nn.Embedding(longest, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = (nn.RMSNorm if size.llama else nn.LayerNorm)(size.width)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight
        half = size.width // size.heads // 2
        frequencies = 500_000.0 ** -(torch.arange(half) / half)
        self.register_buffer("angles", torch.outer(torch.arange(longest), frequencies))
        self.angles: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(time, device=x.device))
        angles = self.angles[:time] if self.places is None else None
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Vision(nn.Module):
    """ViT (arXiv 2010.11929) on images (batch, 3, pixels, pixels) in patches of 16."""

    def __init__(self, size: Size, pixels: int, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (pixels // 16) ** 2 + 1, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.blocks)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


VIT_B = Size(768, 12, 12, 3072, causal=False)
VIT_L = Size(1024, 24, 16, 4096, causal=False)
GPT2 = Size(768, 12, 12, 3072)
LLAMA_1B = Size(2048, 16, 32, 8192, shared=8, llama=True)  # of Llama 3.2 1B
_TINY = Size(16, 4, 2, 32)


@dataclass(frozen=True)
class Shape:
    """A network and a batch for it.

    Attributes:
        name: as in tables.
        build: the network, on torch's default device.
        batch: items in a batch.
        inputs: what `batch` items are like: (pixels,) of an image, or (time, vocabulary).
        classes: of labels.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    inputs: tuple[int, ...]
    classes: int = 1000

    def data(self, device: torch.device, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random inputs and labels, always the same."""
        batch = batch or self.batch
        generator = torch.Generator().manual_seed(0)
        if len(self.inputs) == 1:
            (pixels,) = self.inputs
            x = torch.randn(batch, 3, pixels, pixels, generator=generator)
            y = torch.randint(self.classes, (batch,), generator=generator)
        else:
            time, vocabulary = self.inputs
            text = torch.randint(vocabulary, (batch, time + 1), generator=generator)
            x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        return x.to(device), y.to(device)


def loss_of(model: Callable[[Any], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, classes) or (batch, time, classes), in the output's type."""
    output = model(x)
    return cross_entropy(output.flatten(0, -2), y.flatten())


def _paper(name: str, classes: int = 100, **options: int) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=classes, **options)


SHAPES = [
    Shape("DenseNet-BC-76", _paper("densenet"), 50, (32,), 100),
    Shape("WRN-40-4", _paper("wrn"), 50, (32,), 100),
    Shape("VGG-16", _paper("vgg"), 50, (32,), 100),
    Shape("ResNet-50", resnet50, 128, (224,)),
    Shape("ConvNeXt-T", lambda: convnext((3, 3, 9, 3), (96, 192, 384, 768)), 128, (224,)),
    Shape("ViT-B/16", lambda: Vision(VIT_B, 224), 128, (224,)),
    Shape("GPT-2 small", lambda: Language(GPT2, 50257, 1024), 16, (1024, 50257), 50257),
    Shape("Llama 1B", lambda: Language(LLAMA_1B, 128256, 1024), 4, (1024, 128256), 128256),
]
LARGE = {  # for the largest batch that fits
    "ViT-L/16": Shape("ViT-L/16", lambda: Vision(VIT_L, 224), 64, (224,)),
    "Llama 1B": SHAPES[-1],
}
TINY = [
    Shape("tiny WRN", _paper("wrn", 10, depth=10, widen_factor=1), 4, (16,), 10),
    Shape("tiny ConvNeXt", lambda: convnext((1, 1), (8, 16), 10), 4, (32,), 10),
    Shape("tiny ViT", lambda: Vision(Size(16, 3, 2, 32, causal=False), 32, 10), 4, (32,), 10),
    Shape("tiny GPT-2", lambda: Language(_TINY, 50, 16), 2, (16, 50), 50),
    Shape(
        "tiny Llama", lambda: Language(Size(16, 4, 4, 32, 2, llama=True), 50, 16), 2, (16, 50), 50
    ),
]
