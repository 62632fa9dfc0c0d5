"""Small models, data and training loops that several tests share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.optim import Optimizer

from freezeout import FreezeOut, Layer

CLASSES = 3


def conv_net(width: int = 4) -> nn.Sequential:
    """Four layers, "0", "4", "7" and "12": three of convolution + norm, and a classifier."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)),
    )


def linear_net(num_layers: int = 4) -> nn.Sequential:
    """As many layers as asked for, named "0", "2", "4", ...; takes (batch, 5)."""
    return nn.Sequential(
        *(
            part
            for i in range(num_layers)
            for part in (nn.Linear(5, 5 if i < num_layers - 1 else CLASSES), nn.ReLU())
        )
    )


class BasicBlock(nn.Module):
    """A residual block as in torchvision's ResNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem, two stages of two residual blocks, classifier: six layers."""

    names = ("conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, height, width)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class Reversed(nn.Module):
    """Its modules are defined last to first."""

    names = ("stem", "middle", "head")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)
        self.middle = nn.Linear(5, 5)
        self.stem_norm = nn.BatchNorm1d(5)
        self.stem = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 5)
        return self.head(relu(self.middle(relu(self.stem_norm(self.stem(x))))))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TiedTransformer(nn.Module):
    """A small GPT whose output matrix is its embedding."""

    names = ("wpe", "blocks.0", "blocks.1", "blocks.2", "lm_head")
    vocabulary = 11

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.wte = nn.Embedding(self.vocabulary, width)
        self.wpe = nn.Embedding(6, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(3))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, self.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time), at most 6 long
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]


def batch(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one step, always the same."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, *shape, generator=generator)
    return x, torch.randint(CLASSES, (8,), generator=generator)


def images(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, (3, 6, 6))


def vectors(step: int) -> tuple[Tensor, Tensor]:
    return batch(step, (5,))


def tokens(step: int) -> tuple[Tensor, Tensor]:
    """Input and next tokens."""
    text = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(step))
    return text[:, :-1], text[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return cross_entropy(output.flatten(0, -2), y.flatten())


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    freezer: FreezeOut | None,
    data: Callable[[int], tuple[Tensor, Tensor]],
    steps: range,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Iterator[list[Layer]]:
    """An ordinary training loop; yields after each step the layers that it froze."""
    for step in steps:
        torch.manual_seed(step)
        model.train()
        torch.autograd.backward(loss_of(model, *data(step)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        yield [] if freezer is None else freezer.step()


def run(*args: Any, **kwargs: Any) -> list[list[Layer]]:
    """`train` to its end."""
    return list(train(*args, **kwargs))


def layer_tensors(layer: Layer) -> list[Tensor]:
    """Copies of a layer's own parameters and of its modules' buffers."""
    buffers = [b for module in layer.modules for b in module.buffers(recurse=False)]
    return [t.detach().clone() for t in (*layer.parameters, *buffers)]


def graph_of(loss: Tensor) -> set[Any]:
    """Every node that backward would visit."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def check_prefix_left_graph(freezer: FreezeOut, x: Tensor, y: Tensor) -> None:
    """In a forward pass now, backward reaches no parameter of a frozen layer and no node that
    one of its modules made, nothing that a frozen layer hands on requires a gradient, and every
    parameter that is still trained is reached."""
    frozen = freezer.layers[: freezer.num_frozen]
    trained = freezer.layers[freezer.num_frozen :]
    tied = {
        m for layer in frozen for m in layer.modules if any(p.requires_grad for p in m.parameters())
    }
    made: set[Any] = set()
    handed_on: list[bool] = []
    depth = 0

    def before(module: nn.Module, args: object) -> None:
        nonlocal depth
        depth += 1

    def before_detaching(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made.add(output.grad_fn)

    def after(module: nn.Module, args: object, output: object) -> None:
        nonlocal depth
        depth -= 1
        # What it says inside is its own affair. What a weight that is still trained, as a tied one,
        # makes is detached after this hook.
        if isinstance(output, Tensor) and depth == 0 and module not in tied:
            handed_on.append(output.requires_grad)

    handles = []
    for layer in frozen:
        for module in layer.modules:
            handles.append(module.register_forward_pre_hook(before, prepend=True))
            handles.append(module.register_forward_hook(before_detaching, prepend=True))
            handles.append(module.register_forward_hook(after))
    loss = loss_of(freezer.model, x, y)
    for handle in handles:
        handle.remove()
    graph = graph_of(loss)
    reached = {node.variable for node in graph if hasattr(node, "variable")}
    assert handed_on
    assert not any(handed_on)
    assert not graph & made
    assert not reached & {p for layer in frozen for p in layer.parameters}
    assert {p for layer in trained for p in layer.parameters if p.requires_grad} <= reached
