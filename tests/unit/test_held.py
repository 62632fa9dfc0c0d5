"""What frozen layers would do of their own accord: write tensors in a forward pass, take another
path because of their mode, add noise. And what stands on the data's side."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.optim import SGD

from freezeout import FreezeOut, FreezeOutError, Frozen, PrefixCache, Schedule, find_layers
from tests.models import layer_tensors

EARLY = Schedule(t_0=0.2, how_scale="linear")
STEPS = 20


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        if whole:
            self.body: nn.Module = nn.Transformer(16, 2, 3, 2, 32, 0.1, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.embed(tokens)
        if isinstance(self.body, nn.Transformer):
            x = self.body(x, x, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        else:
            x = self.body(x, src_key_padding_mask=padding)
        result: Tensor = self.head(x.masked_fill(padding[..., None], 0).sum(1))
        return result


class Normaliser(nn.Module):
    """Keeps a running mean in any mode."""

    mean: Tensor
    count: Tensor

    def __init__(self, replace: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.tensor(0))
        self.replace = replace

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        new = self.mean + (x.detach().mean(0) - self.mean) / self.count
        if self.replace:
            self.mean = new
        else:
            self.mean.data.copy_(new)  # no new version
        return x - self.mean


class Grows(nn.Module):
    """Has a buffer that gets its size in the first forward pass."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor([]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.largest.numel():
            self.largest.resize_(6).zero_()
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().amax(0)))
        return x / self.largest.clamp(min=1)


class Clipped(nn.Linear):
    """Clips its weight in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class OwnNorm(nn.BatchNorm1d):
    """Takes the statistics of its batch, and counts it, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


class Noise(nn.Module):
    def __init__(self, level: bool = False) -> None:
        super().__init__()
        if level:
            self.register_buffer("level", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


def words() -> Tensor:
    tokens = torch.randint(1, 20, (8, 10), generator=torch.Generator().manual_seed(1))
    for i in range(8):
        tokens[i, 10 - i % 4 :] = 0
    return tokens


def vectors() -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def with_module(module: nn.Module, first: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), module, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*parts[1::-1], *parts[2:]) if first else nn.Sequential(*parts)


def embedding(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    table = nn.Embedding(20, 6, max_norm=0.5, **options)
    return nn.Sequential(table, nn.Flatten(), nn.Linear(60, 6), nn.ReLU(), nn.Linear(6, 3))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def train(model: nn.Module, x: Tensor, freezer: FreezeOut, optimizer: SGD, steps: int) -> list[str]:
    """The names of layers of which something has moved since they were frozen."""
    kept: dict[str, list[Tensor]] = {}
    moved = []
    for step in range(steps):
        model.train()
        given = x * (1 + step / 10) if x.is_floating_point() else x.roll(step, 0)
        model(given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        for layer in freezer.layers[: freezer.num_frozen]:
            before = kept.setdefault(layer.name, layer_tensors(layer))
            now = layer_tensors(layer)
            if len(now) != len(before) or not all(map(torch.equal, before, now)):
                moved.append(layer.name)
    return moved


# --- tensors that a forward pass writes -----------------------------------------------------

WRITERS: dict[str, Callable[[], tuple[nn.Sequential, Tensor]]] = {
    "normaliser": lambda: (with_module(Normaliser()), vectors()),
    "normaliser of the input": lambda: (with_module(Normaliser(), first=True), vectors()),
    "new tensors": lambda: (with_module(Normaliser(replace=True)), vectors()),
    "a norm of one's own": lambda: (with_module(OwnNorm(6)), vectors()),
    "sizes": lambda: (with_module(Grows()), vectors()),
    "clipped": lambda: (with_module(Clipped(6, 6)), vectors()),
    "max_norm": lambda: (embedding(), words()),
    "scaled": lambda: (embedding(scale_grad_by_freq=True), words()),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_finding_layers_leaves_no_mark_on_what_a_forward_pass_writes(kind: str) -> None:
    model, x = WRITERS[kind]()
    before = state(model)
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    find_layers(model, x)
    assert same(before, state(model))
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("plan", [EARLY, Frozen(2)], ids=["early", "from the start"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_forward_pass_writes_stands_still_once_frozen(
    kind: str, plan: Any, example: bool
) -> None:
    if kind == "clipped" and not example and plan != EARLY:
        pytest.skip("refused, as the test below says")
    model, x = WRITERS[kind]()
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(
        model, optimizer, STEPS, schedule=plan, example_inputs=x if example else None
    )
    start = state(model)
    assert train(model, x, freezer, optimizer, STEPS) == []
    assert freezer.num_frozen >= 2
    if plan != EARLY:
        names = [n for n in start if n.startswith(("0.", "1."))]
        assert all(torch.equal(start[n], model.state_dict()[n]) for n in names)
    freezer.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_parameter_that_is_written_though_frozen_is_refused_where_it_was_not_foreseen() -> None:
    model = with_module(Clipped(6, 6))
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=Frozen(2))
    with pytest.raises(FreezeOutError, match=r"'weight' of a Clipped in layer '1'.*example_inputs"):
        train(model, vectors(), freezer, optimizer, 1)


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
def test_a_buffer_that_code_outside_of_its_module_writes_is_told_of(example: bool) -> None:
    class Outside(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            normaliser: Any = self[1]
            normaliser.count += 1
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]

    model, x = Outside(*with_module(Normaliser())), vectors()
    optimizer = SGD(model.parameters(), 1e-3)
    inputs = x if example else None
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=inputs)
    with pytest.warns(UserWarning, match="writing buffer 'count' of a Normaliser in frozen layer"):
        train(model, x, freezer, optimizer, STEPS)


def test_frozen_layers_that_write_compute_what_they_did() -> None:
    model, x = WRITERS["max_norm"]()
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=Frozen(1), example_inputs=x)
    ordinary = copy.deepcopy(model)
    weight: Any = model[0].weight
    version = weight._version
    for _ in range(2):
        assert torch.equal(model[0](x), ordinary[0](x))
    assert weight.norm(dim=1).max() > 0.5 >= ordinary.state_dict()["0.weight"][x].norm(dim=-1).max()
    assert freezer.num_frozen == 1
    assert weight._version == version


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training() -> None:
    quantization: Any = torch.ao.quantization
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        quantization.QuantStub(),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
        quantization.DeQuantStub(),
    ).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    for block in (model[1], model[2]):
        quantization.fuse_modules_qat(block, ["0", "1", "2"], inplace=True)
    model = quantization.prepare_qat(model)
    x = torch.randn(8, 1, 8, 8)
    before = state(model)
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)
    assert same(before, state(model))
    train(model, x, freezer, optimizer, 5)
    assert freezer.num_frozen == 1
    computed = model[1](model[0](x))
    assert train(model, x, freezer, optimizer, STEPS - 5) == []
    assert torch.equal(model[1](model[0](x)), computed)
    freezer.release()
    assert all(m.observer_enabled == 1 for m in model.modules() if hasattr(m, "observer_enabled"))


# --- paths that depend on a mode ------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["encoder", "transformer"])
def test_encoders_with_a_padding_mask(whole: bool) -> None:
    torch.manual_seed(0)
    model, x = Encoder(whole), words()
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)
    for _ in range(STEPS):
        assert train(model, x, freezer, optimizer, 1) == []
        ordinary = copy.deepcopy(model)
        names = {module: name for name, module in model.named_modules()}
        for layer in freezer.layers[: freezer.num_frozen]:
            for module in layer.modules:
                ordinary.get_submodule(names[module]).training = False
        torch.manual_seed(1)
        ours = model(x)
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.manual_seed(1)
        theirs = ordinary(x)
        torch.backends.mha.set_fastpath_enabled(enabled)
        assert enabled
        assert torch.equal(ours, theirs)
    assert freezer.num_frozen == len(freezer.layers) - 1
    freezer.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("__reduce_ex__" in vars(m) for m in model.modules())


def test_the_path_for_inference_is_taken_in_evaluation_mode_and_comes_back_after_an_error() -> None:
    model, x = Encoder(), words()
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=Frozen(3), example_inputs=x)
    seen: list[bool] = []
    attention = model.get_submodule("body.layers.0.self_attn")

    def look(*_: object) -> None:
        seen.append(torch.backends.mha.get_fastpath_enabled())

    attention.register_forward_pre_hook(look)
    model.train()(x)
    model.eval()(x)  # layers that train do not take nested tensors here either
    assert seen == [False, False]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        model(x)
    assert seen == [False, False, True]
    with pytest.raises(AssertionError):
        model.train().body(torch.zeros(2, 3, 5))
    assert torch.backends.mha.get_fastpath_enabled()
    assert freezer.num_frozen


# --- the data's side ------------------------------------------------------------------------


@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize(
    "head",
    [Noise, lambda: Noise(level=True), lambda: nn.Dropout(0.5), lambda: nn.Sequential(Noise())],
    ids=["noise", "with a buffer", "dropout", "container"],
)
def test_what_runs_on_the_raw_input_keeps_its_mode(
    head: Callable[[], nn.Module], example: bool
) -> None:
    model, x = with_module(head(), first=True), vectors()
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(
        model, optimizer, STEPS, schedule=EARLY, example_inputs=x if example else None
    )
    train(model, x, freezer, optimizer, STEPS)
    assert freezer.num_frozen == 2
    assert not torch.equal(model[0](x), x)
    assert torch.equal(model.eval()[0](x), x)
    assert not torch.equal(model.train()[0](x), x)
    assert all(model[0] not in layer.modules for layer in freezer.layers[:-1])


def test_a_norm_of_the_raw_input_freezes_with_the_first_layer() -> None:
    model, x = with_module(nn.BatchNorm1d(6, affine=False), first=True), vectors()
    layers = find_layers(model, x)
    assert model[0] in layers[0].modules


class Padded(nn.Conv2d):
    """Pads by a module of its own, before it uses its weights."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__(channels, features, 3)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


def test_what_a_layer_does_before_it_uses_its_weights_is_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Padded(3, 4), nn.ReLU(), Padded(4, 4), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(8, 3, 4, 4)
    freezer = FreezeOut(
        model, SGD(model.parameters(), 1e-3), None, schedule=Frozen(1), example_inputs=x
    )
    assert model[0].pad in freezer.layers[0].modules
    cache = PrefixCache(freezer, len(x), depths=[1], budget=10**6)
    for _ in range(2):
        assert torch.equal(cache(x, ids=torch.arange(8)), model(x))
    assert cache.stats.hits == 8
    assert cache.refusals == []


def test_noise_inside_of_a_frozen_layer_ends() -> None:
    model, x = with_module(Noise()), vectors()
    optimizer = SGD(model.parameters(), 1e-3)
    FreezeOut(model, optimizer, STEPS, schedule=Frozen(2), example_inputs=x)
    assert torch.equal(model.train()[:2](x), model[:2](x))


def noisy(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """As NEFTune's."""
    return output + torch.rand_like(output) if module.training else output


def test_noise_that_a_hook_adds_to_a_frozen_module_goes_on() -> None:
    model, x = embedding(), words()
    model[0].register_forward_hook(noisy)
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=Frozen(1), example_inputs=x)
    model.train()
    assert not torch.equal(model[0](x), model[0](x))
    assert not model[0].training
    model.eval()
    assert torch.equal(model[0](x), model[0](x))
    freezer.release()
    assert list(model[0]._forward_hooks.values()) == [noisy]


@pytest.mark.parametrize("kind", ["head", "hook", "statistics"])
def test_the_cache_says_why_it_is_not_for_noise(kind: str) -> None:
    class InTraining(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.lerp_(x.mean(0), 0.1)
            return x - self.mean

    heads = {"head": Noise(), "statistics": InTraining(), "hook": nn.Identity()}
    model, x = with_module(heads[kind], first=True), vectors()
    if kind == "hook":
        model[1].register_forward_hook(noisy)
        noisy.__module__ = "transformers.integrations.neftune"
    optimizer = SGD(model.parameters(), 1e-3)
    try:
        freezer = FreezeOut(model, optimizer, STEPS, schedule=Frozen(1), example_inputs=x)
        cache = PrefixCache(freezer, len(x), depths="all")
        reasons = {"head": "random numbers", "hook": "forward hook", "statistics": "InTraining"}
        with pytest.warns(UserWarning, match=reasons[kind]):
            cache(x, ids=torch.arange(len(x)))
        cache(x, ids=torch.arange(len(x)))
    finally:
        noisy.__module__ = __name__
    assert cache.stats.hits == 0


# --- statistics reset from outside ----------------------------------------------------------


def test_statistics_of_frozen_norms_that_were_reset_are_refused() -> None:
    model, x = with_module(nn.BatchNorm1d(6)), vectors()
    norm: Any = model[1]
    optimizer = SGD(model.parameters(), 1e-3)
    freezer = FreezeOut(model, optimizer, STEPS, schedule=EARLY, example_inputs=x)
    assert train(model, x, freezer, optimizer, 12) == []
    assert freezer.num_frozen
    assert norm.num_batches_tracked > 0
    averages = state(model)
    model.load_state_dict(averages)  # weights exchanged for others: the same layers stay frozen
    model.eval()(x)
    model.train()
    norm.running_mean = torch.zeros(6)  # as Lightning's StochasticWeightAveraging does
    norm.num_batches_tracked *= 0
    with pytest.raises(FreezeOutError, match=r"statistics of a frozen BatchNorm1d were reset.*rel"):
        model.train()
    freezer.release()
    model.train()(x)
    assert norm.num_batches_tracked == 1
