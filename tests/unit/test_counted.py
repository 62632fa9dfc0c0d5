"""FLOPs and activations counted from one step, against steps with layers really frozen."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from freezeout import FreezeOut, Layer, find_layers
from freezeout.errors import FreezeOutError, InvalidValue
from freezeout.lab.models import build_model, model_layers
from freezeout.layers import ExampleInputs
from freezeout.layers.find import given_layers
from freezeout.profile import count_step
from freezeout.profile.counted import flop_counter
from freezeout.profile.fake import faked
from tests.counting import count_literally, loss_of
from tests.models import ResNet, TiedTransformer, images, tokens
from tests.zoo import timm_architecture, torchvision_architecture, transformers_architecture


def layers_of(model: nn.Module, inputs: ExampleInputs) -> list[Layer]:
    """Those that FreezeOut would freeze."""
    freezer = FreezeOut(model, SGD(model.parameters()), 1, example_inputs=inputs)
    freezer.release()
    return freezer.layers


def check(model: nn.Module, inputs: ExampleInputs, layers: list[Layer] | None = None) -> None:
    layers = layers_of(model, inputs) if layers is None else layers
    loss = loss_of(model, inputs)
    counted = count_step(model.train(), layers, loss)
    forward, backward, saved = count_literally(model, layers, loss, inputs)
    assert sum(counted.forward) == forward[0]
    # In evaluation mode attention may take a kernel that torch counts otherwise, or not at all.
    assert all(each <= forward[0] for each in forward)
    assert list(counted.backward) == backward
    assert list(counted.saved_bytes) == saved
    assert counted.step_costs() == [forward[0] + each for each in backward]


@pytest.mark.parametrize("name", ["densenet", "wrn", "vgg"])
def test_the_papers_networks(name: str) -> None:
    depth = {"densenet": 22, "wrn": 10, "vgg": 16}[name]
    with torch.device("meta"):
        model = build_model(name, num_classes=10, depth=depth)
        x = torch.empty(2, 3, 32, 32)
        given = model_layers(model)
        assert given is not None
        check(model, x, given_layers(model, given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "architecture",
    [
        *map(timm_architecture, ["test_vit", "convnext_atto", "mobilenetv3_small_050"]),
        *map(torchvision_architecture, ["resnet18"]),
        *map(transformers_architecture, ["gpt2", "albert", "llama"]),
    ],
    ids=lambda each: each.name,
)
def test_networks_that_nobody_adapted(architecture: object) -> None:
    torch.manual_seed(0)
    check(*architecture.make())  # type: ignore[attr-defined]


def test_a_weight_tied_to_the_last_layer() -> None:
    check(TiedTransformer(), tokens(0)[0])


class Checkpointed(nn.Module):
    """Its second block is computed again in backward, but for what only its result needs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i == 1 else block(x)
        return x


def test_what_checkpointing_computes_again_is_counted_until_its_layer_freezes() -> None:
    model, x = Checkpointed(), torch.randn(3, 4)
    layers = given_layers(model, list(model.blocks), x)
    loss = loss_of(model, x)
    counted = count_step(model, layers, loss)
    assert list(counted.backward) == count_literally(model, layers, loss, x)[1]
    one = 2 * 3 * 4 * 4  # of one Linear, and of each of its gradients
    assert counted.forward == (2 * one,) * 4
    # Two gradients of each Linear, one Linear again, and no gradient of the first input.
    assert counted.backward == (16 * one, 12 * one, 7 * one, 3 * one)


def test_a_grouped_convolutions_gradients_cost_what_its_forward_pass_does() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    forward = 2 * 2 * 16 * 8 * 9
    with flop_counter() as counter:
        output = conv(x)
        assert counter.get_total_flops() == forward
        torch.autograd.backward(output.sum())
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as torchs:  # why ours is there: 8 times for the weight
        torch.autograd.backward(conv(x).sum())
    assert torchs.get_total_flops() == (1 + 1 + 8) * forward


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_every_convolutions_backward_is_two_forwards(
    kind: type[nn.Conv2d | nn.ConvTranspose2d], groups: int
) -> None:
    conv = kind(4, 6, 3, stride=2, groups=groups)
    with flop_counter() as counter:
        output = conv(torch.randn(2, 4, 7, 7, requires_grad=True))
        forward = counter.get_total_flops()
        torch.autograd.backward(output.sum())
    assert counter.get_total_flops() == 3 * forward > 0


def test_counting_leaves_no_mark() -> None:
    torch.manual_seed(0)
    model = ResNet().train()
    x, y = images(0)
    torch.autograd.backward(cross_entropy(model(x), y))
    layers = layers_of(model, x)
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    model.eval()  # so that nothing is tracked
    count_step(model, layers, lambda: cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]
        assert p.grad is not None
        assert torch.equal(copies[name], p.grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_prefix_is_the_forward_pass_of_the_first_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    layers = find_layers(model, x)
    counted = count_step(model, layers, loss_of(model, x))
    assert counted.prefix_costs() == [0, 2 * 3 * 4 * 8]


def test_frozen_layers_are_refused() -> None:
    model, x = ResNet(), images(0)[0]
    layers = find_layers(model, x)
    layers[0].freeze()
    with pytest.raises(FreezeOutError, match="as they start"):
        count_step(model, layers, loss_of(model, x))


def test_a_loss_without_gradient_is_refused() -> None:
    model, x = ResNet(), images(0)[0]
    layers = find_layers(model, x)
    with pytest.raises(InvalidValue, match="none of the model's trained parameters"):
        count_step(model, layers, lambda: model(x).detach().sum())


def test_without_memory_the_counts_are_the_same() -> None:
    def counts(model: nn.Module, x: Tensor) -> object:
        layers = layers_of(model, x)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):  # which passes meta tensors by
                return loss_of(model, x)()

        return count_step(model, layers, loss)

    torch.manual_seed(0)
    real = counts(TiedTransformer(), tokens(0)[0])
    with torch.device("meta"):
        model, x = TiedTransformer(), torch.zeros(4, 6, dtype=torch.int64)
    with faked(model, x, torch.device("cpu")) as x:
        assert model.lm_head.weight is model.wte.weight
        assert counts(model, x) == real


def test_a_layer_in_front_that_is_used_through_a_function_alone() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.body = nn.Linear(5, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(linear(x, self.weight)))  # type: ignore[no-any-return]

    check(Functional(), torch.randn(3, 4))
