"""The lab's networks: sizes, layers, initialisation, and the errors of their options."""

import copy
import math
import pickle
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freezeout.errors import InvalidValue
from freezeout.lab.models import VGG, DenseNet, WideResNet, build_model, model_layers

# Small enough to run, deep enough to have every kind of part.
SMALL: dict[str, dict[str, Any]] = {
    "densenet": {"depth": 16, "growth": 4},
    "wrn": {"depth": 16, "widen_factor": 1},
    "vgg": {},
}
every_model = pytest.mark.parametrize("name", list(SMALL))


def small(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, **{"num_classes": 10, **SMALL[name], **options})


def layers_of(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    layers = model_layers(model)
    assert layers is not None
    return layers


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_step(model: nn.Module, x: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("densenet", 40), ("wrn", 20), ("vgg", 14)])
def test_number_of_layers_at_the_defaults(name: str, layers: int) -> None:
    with torch.device("meta"):
        assert len(layers_of(build_model(name, num_classes=10))) == layers


@pytest.mark.parametrize(
    ("name", "options", "millions", "digits"),
    [
        ("wrn", {"depth": 40, "widen_factor": 4}, 8.9, 1),  # Zagoruyko and Komodakis, table 5
        ("wrn", {"depth": 28, "widen_factor": 10}, 36.5, 1),
        ("wrn", {"depth": 16, "widen_factor": 8}, 11.0, 1),
        ("densenet", {"depth": 100, "growth": 12}, 0.8, 1),  # Huang et al., table 2
        ("densenet", {"depth": 250, "growth": 24}, 15.3, 1),
    ],
)
def test_parameters_as_published(
    name: str, options: dict[str, int], millions: float, digits: int
) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10, **options)
    assert round(count_parameters(model) / 1e6, digits) == millions


def test_parameters_counted_by_hand() -> None:
    with torch.device("meta"):
        vgg = VGG(10)
        densenet = DenseNet(10, depth=10, growth=2)
        wrn = WideResNet(10, depth=10, widen_factor=1)
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    convs = sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    assert count_parameters(vgg) == convs + 2 * (512 * 512 + 512) + 512 * 10 + 10
    # One unit a block: 4 channels -> 6 -> 3 -> 5 -> 2 (2.5, rounded down) -> 4; 8 inside a unit.
    units = sum(2 * c + 8 * c + 2 * 8 + 9 * 8 * 2 for c in (4, 3, 2))
    transitions = (2 * 6 + 6 * 3) + (2 * 5 + 5 * 2)
    assert count_parameters(densenet) == 27 * 4 + units + transitions + 2 * 4 + 4 * 10 + 10
    blocks = sum(
        2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)
        for a, b in ((16, 16), (16, 32), (32, 64))
    )
    assert count_parameters(wrn) == 27 * 16 + blocks + 2 * 64 + 64 * 10 + 10


@every_model
@pytest.mark.parametrize("num_classes", [10, 100])
def test_output_shape(name: str, num_classes: int) -> None:
    model = small(name, num_classes=num_classes).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, num_classes)


# --- layers ----------------------------------------------------------------------------------


@every_model
def test_layers_hold_every_parameter_once(name: str) -> None:
    model = small(name)
    held = [id(p) for layer in layers_of(model) for module in layer for p in module.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


@every_model
def test_layers_are_in_execution_order(name: str) -> None:
    model = small(name)
    expected = [module for layer in layers_of(model) for module in layer]
    called: list[nn.Module] = []
    for module in expected:
        module.register_forward_hook(lambda module, args, output: called.append(module))
    model(torch.randn(2, 3, 32, 32))
    assert [id(m) for m in called] == [id(m) for m in expected]


def test_layers_property_and_models_without_one() -> None:
    model = VGG(10)
    assert [m for (m,) in model.layers] == [m for (m,) in layers_of(model)]

    class Swinlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    assert model_layers(nn.Linear(2, 2)) is None
    assert model_layers(Swinlike()) is None


def test_densenet_puts_relu_before_batch_norm() -> None:
    kinds = {"ReLU": "R", "BatchNorm2d": "B", "Conv2d": "C", "Linear": "L"}
    found = {
        name: "".join(kinds.get(type(m).__name__, "") for m in child.modules())
        for name, child in DenseNet(10, depth=10, growth=2).named_children()
    }
    assert found == {
        "stem": "C",
        **dict.fromkeys(("block1_unit1", "block2_unit1", "block3_unit1"), "RBCRBC"),
        **dict.fromkeys(("transition1", "transition2"), "RBC"),
        "head": "RBL",
    }


def test_densenet_unit_keeps_its_input() -> None:
    unit = dict(DenseNet(10, depth=10, growth=2).named_children())["block1_unit1"]
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    out = unit(x)
    assert out.shape == (2, 6, 8, 8)
    assert torch.equal(out[:, :4], before)  # not rectified: no ReLU wrote into it
    assert torch.equal(x, before)


def test_wide_block_shortcuts() -> None:
    model = WideResNet(10, depth=16, widen_factor=2)
    projected = [name for name, child in model.named_children() if getattr(child, "shortcut", None)]
    assert projected == ["group1_block1", "group2_block1", "group3_block1"]
    blocks = dict(model.named_children())
    x = torch.randn(2, 64, 8, 8)
    silent = blocks["group2_block2"]
    nn.init.zeros_(silent.body[-1].weight)  # type: ignore[union-attr, index]
    assert torch.equal(silent(x), x)
    # The projection sees the first activation, so an input that is negative throughout gives zero.
    silent = blocks["group3_block1"].eval()
    nn.init.zeros_(silent.body[-1].weight)  # type: ignore[union-attr, index]
    assert silent(x).any()
    assert not silent(-x.abs()).any()


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("densenet", {"block1_unit2": 32, "block2_unit2": 16, "block3_unit2": 8}),
        ("wrn", {"group1_block2": 32, "group2_block2": 16, "group3_block2": 8}),
        ("vgg", {"block1_conv2": 32, "block2_conv2": 16, "block3_conv3": 8, "block5_conv3": 2}),
    ],
)
def test_image_sizes(name: str, ends: dict[str, int]) -> None:
    sizes: dict[str, int] = {}
    x = torch.randn(2, 3, 32, 32)
    for child_name, child in small(name).named_children():
        x = child(x)
        sizes[child_name] = x.shape[-1]
    assert {end: sizes[end] for end in ends} == ends


# --- initialisation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("densenet", {"depth": 40, "growth": 24}), ("wrn", {"depth": 16}), ("vgg", {})],
)
def test_initialisation(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    checked = 0
    for module in build_model(name, num_classes=10, **options).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            expected = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            n = module.weight.numel()
            # Five standard errors, of the mean and of the standard deviation.
            assert abs(module.weight.mean().item()) < 5 * expected / math.sqrt(n)
            assert abs(module.weight.std().item() / expected - 1) < 5 / math.sqrt(2 * n)
            checked += 1
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
    assert checked >= 13


# --- use -------------------------------------------------------------------------------------


@every_model
def test_trains_in_channels_last(name: str) -> None:
    plain = small(name)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 32, 32)
    losses = train_step(plain, x), train_step(last, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(*losses)
    for p in last.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.any()


@every_model
def test_copies_and_pickles(name: str) -> None:
    model = small(name, dropout=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
            assert len(layers_of(twin)) == len(layers_of(model))
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@every_model
def test_compiles_in_one_graph(name: str) -> None:
    model = small(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


@every_model
def test_dropout(name: str) -> None:
    def drops(model: nn.Module) -> list[float]:
        return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    model = small(name, dropout=0.25)
    assert drops(small(name)) == []
    # Two a dense unit (6 at depth 16), one a wide block (6), two in VGG's classifier.
    assert drops(model) == [0.25] * {"densenet": 12, "wrn": 6, "vgg": 2}[name]
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    still = model(x)
    assert torch.equal(model(x), still)
    for m in model.modules():
        m.train(isinstance(m, nn.Dropout))
    assert not torch.equal(model(x), still)


@every_model
def test_no_relu_works_in_place(name: str) -> None:
    relus = [m for m in small(name).modules() if isinstance(m, nn.ReLU)]
    assert relus
    assert not any(m.inplace for m in relus)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "densenet",
            {"depth": 75},
            r"depth of densenet must be 6 n \+ 4 \(nearest: 70 and 76\), got 75",
        ),
        ("wrn", {"depth": 15}, r"depth of wrn must be 6 n \+ 4 \(nearest: 10 and 16\), got 15"),
        ("wrn", {"depth": 4}, r"depth of wrn, 6 n \+ 4, must be an integer of at least 10, got 4"),
        ("densenet", {"depth": -2}, "at least 10, got -2"),
        ("densenet", {"depth": True}, "got True"),
        ("densenet", {"depth": math.nan}, "got nan"),
        ("densenet", {"depth": 76.0}, r"got 76\.0"),
        ("densenet", {"growth": 0}, "growth must be an integer of at least 1, got 0"),
        ("densenet", {"growth": True}, "growth .* got True"),
        ("wrn", {"widen_factor": -1}, "widen_factor must be an integer of at least 1, got -1"),
        ("wrn", {"widen_factor": math.nan}, "widen_factor .* got nan"),
        ("vgg", {"depth": 19}, "depth of vgg must be 16, got 19"),
        ("vgg", {"depth": True}, "depth of vgg must be 16, got True"),
        ("wrn", {"growth": 12}, "growth is not an option of wrn, which takes depth, widen_factor"),
        ("vgg", {"widen_factor": 4}, "widen_factor is not an option of vgg"),
        ("densenet", {"widen_factor": 4}, "widen_factor is not an option of densenet"),
        ("timm:resnet18", {"depth": 18}, "depth is not an option of timm:resnet18"),
        ("resnet", {}, "model must be densenet, wrn, vgg or timm:NAME, got 'resnet'"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        build_model(name, num_classes=10, **options)


@pytest.mark.parametrize("name", [*SMALL, "timm:resnet18"])
def test_refused_classes_and_dropout(name: str) -> None:
    for classes in (1, -10, True, 10.0, math.nan):
        with pytest.raises(InvalidValue, match="num_classes must be an integer of at least 2, got"):
            build_model(name, num_classes=classes)  # type: ignore[arg-type]
    for dropout in (1.0, -0.1, math.nan, True, False):
        with pytest.raises(InvalidValue, match=r"dropout must be a probability in \[0, 1\), got"):
            build_model(name, num_classes=10, dropout=dropout)


# --- timm ------------------------------------------------------------------------------------


class FakeTimm(ModuleType):
    """As much of timm as is used, so that these tests run without it."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.calls: list[dict[str, Any]] = []

    def is_model(self, name: str) -> bool:
        return name in self.list_models()

    def list_models(self) -> list[str]:
        return ["resnet18", "resnet34", "resnet50", "vit_tiny", "odd", "broken"]

    def create_model(self, name: str, **options: Any) -> nn.Module:
        self.calls.append({"name": name, **options})
        if name == "resnet18" and "img_size" in options:
            raise TypeError("ResNet.__init__() got an unexpected keyword argument 'img_size'")
        if name == "odd" and "drop_rate" in options:
            raise TypeError("Odd.__init__() got an unexpected keyword argument 'drop_rate'")
        if name == "broken":
            raise AssertionError("window larger than image\nand more")
        return nn.Linear(1, options["num_classes"])


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_timm_options(fake_timm: FakeTimm) -> None:
    common = {"num_classes": 7, "pretrained": False}
    build_model("timm:vit_tiny", num_classes=7, dropout=0.5)
    assert fake_timm.calls == [{"name": "vit_tiny", "img_size": 32, "drop_rate": 0.5, **common}]
    fake_timm.calls.clear()
    model = build_model("timm:resnet18", num_classes=7)
    assert fake_timm.calls[1:] == [{"name": "resnet18", **common}]
    assert model_layers(model) is None


def test_timm_unknown_name(fake_timm: FakeTimm) -> None:
    with pytest.raises(InvalidValue, match="no model 'resnet_34'; close matches: resnet34, "):
        build_model("timm:resnet_34", num_classes=10)
    for name in ("", "zzz", "hf-hub:someone/zzz"):
        with pytest.raises(InvalidValue, match=r"see timm\.list_models\(\)"):
            build_model(f"timm:{name}", num_classes=10)
    assert fake_timm.calls == []


def test_timm_model_that_cannot_be_built(fake_timm: FakeTimm) -> None:
    with pytest.raises(InvalidValue, match=r"broken cannot be .* 32x32 .*: window .* image$"):
        build_model("timm:broken", num_classes=10)
    with pytest.raises(InvalidValue, match=r"odd cannot be built .* 'drop_rate'"):
        build_model("timm:odd", num_classes=10, dropout=0.1)


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InvalidValue, match="pip install timm"):
        build_model("timm:resnet18", num_classes=10)


@pytest.mark.parametrize(
    "failure",
    ["RuntimeError('operator torchvision::nms does not exist\\nmore')", "ImportError('libz.so')"],
)
def test_timm_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str) -> None:
    (tmp_path / "timm.py").write_text(f"raise {failure}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(InvalidValue, match=r"timm is installed but .* torchvision that") as caught:
        build_model("timm:resnet18", num_classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_timm_itself(name: str) -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    model = build_model(f"timm:{name}", num_classes=10, dropout=0.1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InvalidValue, match=r"close matches: .*resnet18"):
        build_model("timm:resnet_18", num_classes=10)
