"""The matrix of proofs: cases of training, each beside a reference that knows nothing of the
library.

In the reference nothing is frozen: each layer has a parameter group, whose rate is set by hand,
frozen layers are put in evaluation mode by hand, and their gradients are discarded before clipping.
The cases cover every pair of choices, on the CPU or on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from freezeout import FreezeOut, Frozen, Plan, Schedule
from tests.models import CLASSES, layer_tensors

STEPS = 10
EARLY = Schedule(0.3, "linear")
PLANS: dict[str, Plan] = {
    "early": EARLY,
    "start": Frozen(1, then=EARLY),
    "static": Frozen(2),
}
CPU = torch.device("cpu")
Groups = list[dict[str, Any]]


# --- networks -------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(relu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class ImageBlock(nn.Module):
    """A convolution whose channels are weighted by two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(width), nn.Dropout(0.2)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(self.norm(x))
        weight = self.down(relu(self.up(y.mean((2, 3))))).sigmoid()
        return x + self.drop(y * weight[:, :, None, None])  # type: ignore[no-any-return]


class ImageHead(nn.Linear):
    """A classifier of the channels' means."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)))


class Net(nn.Module):
    """Four layers with batch statistics, dropout, matrices and vectors; takes (batch, width), or
    images of three channels."""

    def __init__(self, checkpointing: bool = False, images: bool = False, width: int = 5) -> None:
        super().__init__()
        if images:
            self.stem: nn.Module = nn.Conv2d(3, width, 3, padding=1)
            self.blocks = nn.ModuleList([ImageBlock(width), ImageBlock(width)])
            self.head: nn.Module = ImageHead(width, CLASSES)
        else:
            self.stem = nn.Linear(width, width)
            self.blocks = nn.ModuleList([Block(width), Block(width)])
            self.head = nn.Linear(width, CLASSES)
        self.checkpointing = checkpointing

    def layers(self) -> list[nn.Module]:
        return [self.stem, *self.blocks, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            if self.checkpointing and layer is not self.head:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def batch(number: int, shape: tuple[int, ...] = (6, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(CLASSES, shape[:1], generator=generator)


# --- choices --------------------------------------------------------------------------------


def simple(kind: Any, **options: Any) -> Callable[[Groups], list[Optimizer]]:
    return lambda groups: [kind(groups, **options)]


def muon_and_adamw(groups: Groups) -> list[Optimizer]:
    """The blocks' matrices to Muon, which is frozen before the end; the rest to AdamW."""

    def is_inside(parameter: Tensor) -> bool:
        return parameter.dim() == 2 and max(parameter.shape) == 2 * min(parameter.shape)

    matrices = [{"params": [p for p in g["params"] if is_inside(p)]} for g in groups]
    rest = [{"params": [p for p in g["params"] if not is_inside(p)]} for g in groups]
    return [
        torch.optim.Muon([g for g in matrices if g["params"]], lr=0.02, weight_decay=0.1),
        AdamW([g for g in rest if g["params"]], lr=0.01, weight_decay=0.1),
    ]


def rate_as_a_tensor(groups: Groups) -> list[Optimizer]:
    rate = torch.tensor(0.01, device=groups[0]["params"][0].device)
    return [AdamW(groups, lr=rate, weight_decay=0.5, capturable=True)]


OPTIMIZERS: dict[str, Callable[[Groups], list[Optimizer]]] = {
    "sgd": simple(SGD, lr=0.1, weight_decay=0.05),
    "momentum": simple(SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": simple(SGD, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    "sgd fused": simple(SGD, lr=0.1, momentum=0.9, weight_decay=0.05, fused=True),
    "adam": simple(Adam, lr=0.01, weight_decay=0.05, amsgrad=True),
    "adamw": simple(AdamW, lr=0.01, weight_decay=0.5),
    "adamw foreach": simple(AdamW, lr=0.01, weight_decay=0.5, foreach=True),
    "adamw fused": simple(AdamW, lr=0.01, weight_decay=0.5, fused=True),
    "rmsprop": simple(RMSprop, lr=0.003, momentum=0.9, weight_decay=0.05, centered=True),
    "adagrad": simple(Adagrad, lr=0.03, lr_decay=0.1, weight_decay=0.05),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    OPTIMIZERS["muon and adamw"] = muon_and_adamw
ON_GPU: dict[str, Callable[[Groups], list[Optimizer]]] = {
    "nesterov one by one": simple(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "adamw one by one": simple(AdamW, lr=0.01, weight_decay=0.5, foreach=False),
    "adamw capturable": simple(AdamW, lr=0.01, weight_decay=0.5, capturable=True),
    "adam fused capturable": simple(Adam, lr=0.01, fused=True, capturable=True),
    "rmsprop capturable": simple(RMSprop, lr=0.003, momentum=0.9, capturable=True),
    "adamw, its rate a tensor": rate_as_a_tensor,
}
CHOICES: dict[str, list[Any]] = {
    "optimizer": list(OPTIMIZERS),
    "zero_grad": ["none", "zeros", "model", "before"],
    "train_each_step": [True, False],
    "micro_batches": [1, 3],
    "clip": [None, "norm", "value"],
    "precision": ["fp32", "bf16", "scaler", "bf16 and scaler"],
    "average": [None, "ema", "swa"],
    "checkpointing": [False, True],
    "scheduler": [None, "before", "after"],
    "plan": list(PLANS),
    "net": ["vectors", "images", "images, channels last"],
}
CHOICES_ON_GPU: dict[str, list[Any]] = {
    **CHOICES,
    "optimizer": [*OPTIMIZERS, *ON_GPU],
    "precision": [*CHOICES["precision"], "tf32", "fp16 and scaler"],
}


class Case(NamedTuple):
    optimizer: str
    zero_grad: str
    train_each_step: bool
    micro_batches: int
    clip: str | None
    precision: str
    average: str | None
    checkpointing: bool
    scheduler: str | None
    plan: str
    net: str

    @property
    def is_exact(self) -> bool:
        """Bit for bit; the norm of two optimizers' gradients is summed in another order."""
        return self.optimizer != "muon and adamw" or self.clip != "norm"

    def __str__(self) -> str:
        return "-".join(map(str, self))


def pairs(values: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    return {(i, values[i], j, values[j]) for i, j in combinations(range(len(values)), 2)}


def pairwise_cases(choices: Mapping[str, Sequence[Any]] = CHOICES) -> Iterator[Case]:
    """Few cases, such that each two choices of different kinds meet in one: greedily."""
    options = list(choices.values())
    waiting = {
        (i, a, j, b)
        for i, j in combinations(range(len(options)), 2)
        for a in options[i]
        for b in options[j]
    }
    while waiting:
        i, a, j, b = min(waiting, key=repr)
        values: dict[int, Any] = {i: a, j: b}
        for k, choices_of_kind in enumerate(options):
            if k not in values:
                # The choice that meets most that it has not met.
                values[k] = max(
                    choices_of_kind,
                    key=lambda c: sum(
                        (min((n, v), (k, c), key=lambda nv: nv[0])
                         + max((n, v), (k, c), key=lambda nv: nv[0]))
                        in waiting
                        for n, v in values.items()
                    ),
                )  # fmt: skip
        case = [values[k] for k in range(len(options))]
        waiting -= pairs(case)
        yield Case(*case)


# --- training -------------------------------------------------------------------------------


class Training:
    """A model and what a user trains it with; `update` makes one update, as a user would."""

    def __init__(self, case: Case, by_layer: bool, device: torch.device = CPU) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        # On a GPU sizes for which there are tensor cores.
        width, rows, side = (5, 6, 4) if device.type == "cpu" else (64, 32, 8)
        images = case.net != "vectors"
        self._shape = (rows, 3, side, side) if images else (rows, width)
        self._format = torch.channels_last if "channels last" in case.net else torch.preserve_format
        self.model = Net(case.checkpointing, images, width)
        self.model.to(device=device, memory_format=self._format)  # type: ignore[call-overload]
        groups: Groups = (
            [{"params": list(layer.parameters())} for layer in self.model.layers()]
            if by_layer
            else [{"params": list(self.model.parameters())}]
        )
        self.optimizers = (OPTIMIZERS | ON_GPU)[case.optimizer](groups)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=8.0, growth_interval=3, enabled="scaler" in case.precision
        )
        self.average: AveragedModel | None = None
        if case.average == "ema":
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=get_ema_multi_avg_fn(0.8),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
        elif case.average == "swa":
            self.average = AveragedModel(self.model)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        x, y = batch(number, self._shape)
        return x.to(device=self.device, memory_format=self._format), y.to(self.device)

    def update(self, step: int, between: Callable[[], None] = lambda: None) -> None:
        case, n = self.case, self.case.micro_batches
        torch.manual_seed(step)
        if case.train_each_step:
            self.model.train()
        if case.zero_grad == "before":
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision.split()[0])
        autocast = torch.autocast(self.device.type, low) if low is not None else nullcontext()
        for micro in range(n):
            x, y = self.batch(n * step + micro)
            with autocast:
                loss = cross_entropy(self.model(x), y) / n
            torch.autograd.backward(self.scaler.scale(loss))
        between()
        if case.clip is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            if case.clip == "norm":
                clip_grad_norm_(self.model.parameters(), 0.5)
            else:
                clip_grad_value_(self.model.parameters(), 0.02)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            if case.zero_grad in ("none", "zeros"):
                optimizer.zero_grad(set_to_none=case.zero_grad == "none")
        if case.zero_grad == "model":
            self.model.zero_grad()
        if self.average is not None and (case.average == "ema" or step >= STEPS // 2):
            self.average.update_parameters(self.model)


def reference(case: Case, device: torch.device = CPU) -> Training:
    """All gradients computed, those of frozen layers discarded before clipping; rates by hand."""
    training = Training(case, by_layer=True, device=device)
    layers = training.model.layers()
    plan = PLANS[case.plan]
    timeline = plan.timeline(len(layers), STEPS)
    ends = [STEPS if end is None else end for end in timeline.freeze_steps]
    of_parameter = {p: i for i, layer in enumerate(layers) for p in layer.parameters()}
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    base = [group["lr"] for group in groups]
    for step in range(STEPS):
        # What a warm-up over four updates gives, then each layer's factor.
        warm_up = 1.0 if case.scheduler is None else min(1.0, 0.25 + 0.75 * step / 4)
        factors = plan.factors(step, timeline)
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * warm_up * factors[of_parameter[group["params"][0]]]
        if step == 0:
            training.model.train()
        # A frozen layer's norms and dropout do nothing, whatever train() says.
        for layer, end in zip(layers, ends, strict=True):
            if end <= step:
                for module in layer.modules():
                    module.training = False
                layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign,misc]

        def discard(step: int = step) -> None:
            for parameter, i in of_parameter.items():
                if ends[i] <= step:
                    parameter.grad = None

        discard()
        # An optimizer without gradients would stop the scaler: it has nothing to do.
        every = training.optimizers
        training.optimizers = [
            optimizer
            for optimizer in every
            if any(
                ends[of_parameter[p]] > step for g in optimizer.param_groups for p in g["params"]
            )
        ]
        training.update(step, discard)
        training.optimizers = every
    return training


# --- proofs ---------------------------------------------------------------------------------


class Compared(NamedTuple):
    """A tensor of the model, or of its average, after training."""

    name: str
    ours: Tensor
    reference: Tensor


def compare(case: Case, device: torch.device = CPU) -> list[Compared]:
    """Train both. AssertionError if anything frozen moved, had a gradient, or was awake."""
    with _tf32(case, device):
        return _compare(case, device)


def prove(case: Case, device: torch.device = CPU) -> None:
    """AssertionError if the case does not hold: what is frozen stands still, and what is trained
    equals the reference."""
    for name, ours, expected in compare(case, device):
        torch.testing.assert_close(
            ours,
            expected,
            rtol=0 if case.is_exact else 1e-5,
            atol=0 if case.is_exact else 1e-6,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


def _compare(case: Case, device: torch.device) -> list[Compared]:
    training = Training(case, by_layer=False, device=device)
    model, optimizers = training.model, training.optimizers

    def warm_ups() -> list[LinearLR]:
        return [LinearLR(optimizer, 0.25, total_iters=4) for optimizer in optimizers]

    schedulers = warm_ups() if case.scheduler == "before" else []
    plan = PLANS[case.plan]
    inputs = training.batch(0)[0]
    freezer = FreezeOut(model, optimizers, STEPS, schedule=plan, example_inputs=inputs)
    schedulers += warm_ups() if case.scheduler == "after" else []
    found = [set(layer.parameters) for layer in freezer.layers]
    assert found == [set(layer.parameters()) for layer in model.layers()], freezer.layers
    awake: list[str] = []

    def record(module: nn.Module, args: object) -> None:
        frozen = {m for layer in freezer.layers[: freezer.num_frozen] for m in layer.modules}
        if module in frozen and module.training:
            awake.append(f"{module} at step {freezer.step_count}")

    for module in model.modules():
        module.register_forward_pre_hook(record)
    frozen = [layer_tensors(layer) for layer in freezer.layers[: freezer.num_frozen]]
    for step in range(STEPS):
        training.update(step)
        for scheduler in schedulers:
            scheduler.step()
        for layer, values in zip(freezer.layers, frozen, strict=False):
            still = all(map(torch.equal, layer_tensors(layer), values))
            assert still, f"frozen {layer} moved in step {step}"
            without = all(p.grad is None for p in layer.parameters)
            assert without, f"frozen {layer} has a gradient in step {step}"
        frozen += [layer_tensors(layer) for layer in freezer.step()]
    assert len(frozen) == (2 if case.plan == "static" else 3), f"{len(frozen)} layers are frozen"
    assert awake == [], f"frozen and in training mode: {awake}"
    expected = reference(case, device)
    models: list[tuple[str, nn.Module, nn.Module]] = [("", model, expected.model)]
    if training.average is not None and expected.average is not None:
        models.append(("average of ", training.average, expected.average))
    scales = training.scaler.get_scale(), expected.scaler.get_scale()
    assert scales[0] == scales[1], f"loss scales: {scales}"
    return [
        Compared(f"{of}{name}", ours.state_dict()[name], value)
        for of, ours, theirs in models
        for name, value in theirs.state_dict().items()
    ]


@contextmanager
def _tf32(case: Case, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = case.precision == "tf32"
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
