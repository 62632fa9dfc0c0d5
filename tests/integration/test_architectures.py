"""Architectures that nobody adapted, each through one short run with every promise checked.

A fast subset of `benchmarks/architectures.py`, which runs all of `tests/zoo.py`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezeout import FreezeOutError, Layer, find_layers
from freezeout.errors import InvalidValue
from tests.architectures import Promise, check
from tests.zoo import (
    Architecture,
    timm_architecture,
    torchvision_architecture,
    transformers_architecture,
)

TIMM = [
    *("test_vit", "deit_tiny_distilled_patch16_224", "convnext_atto", "mobileone_s0", "coat_tiny"),
    *("crossvit_9_dagger_240", "dla46_c", "efficientvit_m0", "ghostnet_050", "levit_128s"),
    *("mobilenetv3_small_050", "mobilevit_xxs", "regnetx_002", "starnet_s050"),
]
TORCHVISION = ["resnet18", "densenet121", "googlenet"]
TRANSFORMERS = ["bert", "gpt2", "gpt2, two heads", "vit", "albert", "t5", "llama", "mixtral"]
SUBSET = [
    *map(timm_architecture, TIMM),
    *map(torchvision_architecture, TORCHVISION),
    *map(transformers_architecture, TRANSFORMERS),
]
# What a person would say. The others are held by the table in docs/architectures.md.
LAYERS = {
    "deit_tiny_distilled_patch16_224": ["patch_embed", *(f"blocks.{i}" for i in range(12)), "head"],
    "crossvit_9_dagger_240": ["patch_embed.0", *(f"blocks.{i}" for i in range(3)), "head.0"],
    "gpt2": ["transformer.wpe", *(f"transformer.h.{i}" for i in range(3)), "lm_head"],
    "gpt2, two heads": ["transformer.wpe", *(f"transformer.h.{i}" for i in range(3)), "lm_head"],
    "mixtral": ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("architecture", SUBSET, ids=lambda each: f"{each.library}: {each.name}")
def test_every_promise_is_kept(architecture: Architecture) -> None:
    torch.manual_seed(0)
    report = check(*architecture.make())
    assert len(report.layers) >= 5
    if architecture.name in LAYERS:
        assert report.layers == LAYERS[architecture.name]


class Right(nn.Module):
    """Three layers; the subclasses break one promise each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))  # type: ignore[no-any-return]


def test_the_check_passes_what_is_right() -> None:
    assert check(Right(), torch.randn(3, 4)).layers == ["first", "second", "third"]


class Wakes(Right):
    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            module.training = True
        return super().forward(x)


class Moves(Right):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.first.weight.data.add_(1e-3)
        return super().forward(x)


class Bypasses(Right):
    """In training, the first layer's weight is used, and trained, behind the last layer too."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if not self.training else y + self.first.weight.requires_grad_().sum()


@pytest.mark.filterwarnings("ignore:freezing did not fully engage")  # as it did not
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wakes, "runs in evaluation mode"),
        (Moves, "stands still"),
        (Bypasses, "is not trained"),
    ],
)
def test_the_check_sees_a_broken_promise(model: type[nn.Module], message: str) -> None:
    with pytest.raises(Promise, match=message):
        check(model(), torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore:freezing did not fully engage")  # as it did not
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("detached", "hands on no gradient|makes no autograd node|keeps nothing for backward"),
        ("eval", "runs in evaluation mode"),
        ("requires_grad", "makes no autograd node|is not trained|keeps nothing for backward"),
    ],
)
def test_the_check_sees_what_freezing_leaves_out(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library broken in one place."""
    freeze = Layer.freeze

    def broken(layer: Layer, within: nn.Module | None = None) -> None:
        freeze(layer, within)
        if missing == "eval":
            for module in layer.modules:
                del module.__dict__["train"]
        if missing == "requires_grad":
            for p in layer.parameters:
                p.requires_grad_(True)

    if missing == "detached":
        monkeypatch.setattr("freezeout.layers.layer.detached", lambda value: value)
    else:
        monkeypatch.setattr(Layer, "freeze", broken)
    with pytest.raises(Promise, match=message):
        check(*transformers_architecture("gpt2").make())


# --- groupings that come from the flow of data ------------------------------------------------


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """A block with a gate and experts, of which each row takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                out[rows] += expert(x[rows]) * weights[rows, i, None]
        return x + out


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(5, 4), nn.ModuleList(blocks), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_experts_are_part_of_their_block() -> None:
    model = Blocks(Mixture(), Mixture())
    x = torch.randn(8, 5)
    assert [layer.name for layer in find_layers(model, x)] == [
        "stem",
        "blocks.0",
        "blocks.1",
        "head",
    ]
    x = x[:1]  # two of the three experts see nothing
    layers = find_layers(model, x)
    assert [layer.name for layer in layers] == ["stem", "blocks.0", "blocks.1", "head"]
    assert set(layers[1].parameters) == set(model.blocks[0].parameters())
    check(model, x)


def test_experts_in_a_list_that_do_feed_each_other_are_layers_each() -> None:
    class Chain(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            for expert in self.experts:
                x = x + expert(x)
            return x + self.gate(x).mean()  # type: ignore[no-any-return]

    names = [layer.name for layer in find_layers(Blocks(Chain()), torch.randn(8, 5))]
    assert names == ["stem", *(f"blocks.0.experts.{i}" for i in range(3)), "blocks.0.gate", "head"]


def test_stages_of_one_class_are_split_alike_also_where_one_has_a_single_block() -> None:
    class Stage(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.down, self.blocks = (
                nn.Linear(4, 4),
                nn.Sequential(*(Expert() for _ in range(depth))),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.down(x))  # type: ignore[no-any-return]

    names = [layer.name for layer in find_layers(Blocks(Stage(1), Stage(2)), torch.randn(8, 5))]
    assert names[1:-1] == [
        *("blocks.0.down", "blocks.0.blocks.0"),
        *("blocks.1.down", "blocks.1.blocks.0", "blocks.1.blocks.1"),
    ]


def test_parallel_heads_are_one_layer_and_so_are_parallel_stems() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)
            self.body, self.norm = Expert(), nn.LayerNorm(4)
            self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.norm(self.body(self.left(x) + self.right(x)).view(-1, 2, 4))
            return self.one(h), self.two(h), self.three(h)

    layers = find_layers(Ends(), torch.randn(8, 5))
    assert [layer.name for layer in layers] == ["left", "body", "one"]
    assert [len(layer.parameters) for layer in layers] == [4, 4, 8]


def test_a_module_in_several_blocks_is_of_the_one_it_runs_in_last() -> None:
    shared = nn.Linear(4, 4)

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = shared, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.own(self.shared(x))  # type: ignore[no-any-return]

    class Owner(Blocks):
        def __init__(self) -> None:
            super().__init__(Sharing(), Sharing())
            self.position = shared

    model = Owner()
    layers = find_layers(model, torch.randn(8, 5))
    assert [layer.name for layer in layers] == ["stem", "blocks.0", "blocks.1", "head"]
    assert shared in layers[2].modules
    report = check(model, torch.randn(8, 5))
    assert report.cut == ["blocks.0.shared.bias", "blocks.0.shared.weight"]


def test_branches_are_one_block_whatever_they_hold() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(Expert(), Expert()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branches[0](x) + self.branches[1](x)  # type: ignore[no-any-return]

    model = Blocks(Branches(), Branches(), Branches())
    names = [layer.name for layer in find_layers(model, torch.randn(8, 5))]
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_dropout_behind_a_parameter_of_the_next_layer_does_not_cut_it() -> None:
    """A ViT's position embedding, added to what the stem gives."""

    class Positions(Blocks):
        def __init__(self) -> None:
            super().__init__(Expert(), Expert())
            self.position, self.drop = nn.Parameter(torch.randn(8, 4)), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Any:
            x = self.drop(self.stem(x) + self.position)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Positions()
    layers = find_layers(model, torch.randn(8, 5))
    assert [model.drop in layer.modules for layer in layers] == [False, True, False, False]
    assert check(model, torch.randn(8, 5)).cut == []


def test_a_part_of_which_only_a_method_is_called_is_not_cut_from_its_layer() -> None:
    """A relative position bias computed once, before the blocks."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def bias(self) -> Any:
            return self.net(torch.ones(4))

    class Positions(Blocks):
        def __init__(self) -> None:
            super().__init__(Expert(), Expert())
            self.position = Bias()

        def forward(self, x: Tensor) -> Any:
            x, bias = self.stem(x), self.position.bias()
            for block in self.blocks:
                x = block(x + bias)
            return self.head(x)

    check(Positions(), torch.randn(8, 5))


# --- refusals ---------------------------------------------------------------------------------


def test_what_cannot_be_frozen_is_refused_with_a_reason() -> None:
    with pytest.raises(InvalidValue, match="forward pass on example_inputs failed with") as refused:
        check_find(torchvision_architecture("resnet18"), torch.randn(2, 5, 32, 32))
    assert isinstance(refused.value, FreezeOutError)


def check_find(architecture: Architecture, inputs: Tensor) -> list[Layer]:
    return find_layers(architecture.make()[0], inputs)
