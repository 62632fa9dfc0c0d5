"""`Job`: the parts of a run, made from its configuration alone: data, model, optimizer, loss."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ..cache import PrefixCache, check_folder
from ..clock import wait
from ..cost import epochs_of_equal_cost
from ..errors import InvalidValue
from ..freezer import FreezeOut
from ..plan import Plan
from ..profile import count_step, measure_step_costs
from .config import VIEWS, TrainConfig
from .data import ImageData, batches, epoch_order, eval_batches, load_data, num_batches
from .device import choose_device, choose_precision, hardware, versions
from .frozen import check_named
from .models import build_model, model_layers
from .prediction import Prediction
from .ranks import Ranks

_EVAL_BATCH = 500
_LONG = 2600  # steps of a run to which the 52 of measuring add at most 2 %
_FEW = 2  # images that do for counting: FLOPs are proportional to their number


@dataclass
class Sums:
    """Sums over a rank's images of an epoch so far, on the device, and the time they took."""

    loss: Tensor  # float64
    wrong: Tensor  # int64
    images: int
    seconds: float  # of training alone
    step_seconds: list[float]
    rates: list[float] = field(default_factory=list)  # learning rates of the last update

    @classmethod
    def empty(cls, device: torch.device) -> "Sums":
        wide = torch.float64 if device.type != "mps" else torch.float32
        zero = torch.zeros((), device=device)
        return cls(zero.to(wide), zero.to(torch.int64), 0, 0.0, [])

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self.loss += loss.detach() * len(y)
        self.wrong += (logits.detach().argmax(1) != y).sum()
        self.images += len(y)

    def without_images(self) -> "Sums":
        """The times and rates, over no image."""
        zero = Sums.empty(self.loss.device)
        return replace(self, loss=zero.loss, wrong=zero.wrong, images=0)

    def over(self, ranks: Ranks) -> "Sums":
        """The sums over all ranks' images."""
        images = ranks.sum(torch.tensor(self.images, device=self.wrong.device))
        return replace(
            self, loss=ranks.sum(self.loss), wrong=ranks.sum(self.wrong), images=int(images)
        )

    def means(self) -> tuple[float, float]:
        """Loss and error per image."""
        return self.loss.item() / self.images, self.wrong.item() / self.images


class Job:
    """The parts of one run, made from its configuration alone; with several ranks, one's share."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        config.check()
        self.config = config
        self.ranks = ranks = Ranks() if ranks is None else ranks
        if config.batch_size < ranks.size:
            raise InvalidValue(
                f"batch_size {config.batch_size} is less than one image for each of "
                f"{ranks.size} ranks"
            )
        if config.cache != "off" and ranks.size > 1:
            raise InvalidValue(
                f"cache={config.cache!r} is for one process, and this run has {ranks.size} ranks"
            )
        if self.cache_folder is not None:
            check_folder(self.cache_folder)
        self.device = choose_device(config.device, ranks.local if ranks.size > 1 else None)
        if self.device.type == "cuda" and ranks.size > 1:
            torch.cuda.set_device(self.device)
        self.precision = choose_precision(config.precision, self.device)
        with torch.device("meta"):  # a mistake in the model is said before data are fetched
            self.build_model(num_classes=10)
        self.data: ImageData = ranks.first_then_others(self.load_data)  # downloaded once
        self.steps_per_epoch = num_batches(len(self.data.train_labels), config.batch_size)
        # Faster than NCHW on recent CPUs and on tensor cores.
        self.channels_last = self.device.type in ("cpu", "cuda")
        torch.manual_seed(config.seed)
        model = self.build_model(self.data.num_classes)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        ranks.reseed(config.seed)

    def load_data(self) -> ImageData:
        """The images, on the device."""
        config = self.config
        data = load_data(
            config.dataset,
            data_dir=config.data_dir,
            validate=config.validate,
            device=self.device,
        )
        count = len(data.train_labels) if config.images is None else config.images
        if count > len(data.train_labels):
            raise InvalidValue(
                f"images must be at most {len(data.train_labels)}, all that {config.dataset} has "
                f"for training, got {count}"
            )
        return replace(
            data, train_images=data.train_images[:count], train_labels=data.train_labels[:count]
        )

    def build_model(self, num_classes: int) -> nn.Module:
        """The network that the options name, with random weights, on torch's default device."""
        config = self.config
        return build_model(
            config.model,
            num_classes=num_classes,
            depth=config.depth,
            growth=config.growth,
            widen_factor=config.widen_factor,
            dropout=config.dropout,
        )

    @cached_property
    def layers(self) -> list[list[str]]:
        """For each layer, the names of its modules."""
        scratch = deepcopy(self.model)
        paths = {module: name for name, module in scratch.named_modules()}
        with self.freezer(scratch, self.optimizer(scratch), total_steps=1) as freezer:
            return [[paths[module] for module in layer.modules] for layer in freezer.layers]

    @cached_property
    def plan(self) -> Plan:
        """What trains when, for the model's layers."""
        return self.config.plan.resolved(self.layers)

    def foresee(self) -> tuple[int, Prediction | None]:
        """How many epochs to train, and what the steps should cost if layers freeze."""
        config = self.config
        epochs = config.epochs
        if config.steps is not None:
            epochs = -(-config.steps // self.steps_per_epoch)
        if not config.freezeout:
            return epochs, None
        prediction = self.predict(self.total_steps(epochs))
        if config.const_time:
            epochs = epochs_of_equal_cost(
                epochs, prediction.step_costs, self.plan, self.steps_per_epoch
            )
        return epochs, prediction

    def predict(self, total_steps: int) -> Prediction:
        """What a step costs at each depth: measured, if that is short beside the run or decides
        its length; counted otherwise."""
        if self.config.const_time or total_steps >= _LONG:
            return Prediction("measured", tuple(self.step_costs()))
        return Prediction("counted", tuple(self.step_costs(measured=False)))

    def step_costs(self, measured: bool = True) -> list[float]:
        """Seconds of one training step at each depth, or its FLOPs of a few images; on a copy of
        the model, with the run's own data."""
        scratch = deepcopy(self.model).train()
        optimizer = self.optimizer(scratch)
        freezer = self.freezer(scratch, optimizer, total_steps=1)
        freezer.release()
        x, y, _ = next(self.batches(epoch=0, start=0))

        def step() -> None:
            self.loss(scratch, x, y)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        state = random_state(self.device)  # dropout draws from it
        try:
            few = (x[:_FEW], y[:_FEW])
            count = count_step(scratch, freezer.layers, lambda: self.loss(scratch, *few)[0])
            flops = count.step_costs()
            if not measured:
                return flops
            return measure_step_costs(step, freezer.layers, shape=flops, device=self.device)
        finally:
            set_random_state(state, self.device)

    def total_steps(self, epochs: int) -> int:
        """Steps of the whole run."""
        return self.config.steps or epochs * self.steps_per_epoch

    def optimizer(self, model: nn.Module) -> SGD:
        """The paper's: SGD with Nesterov momentum and weight decay on every parameter."""
        config = self.config
        return SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def freezer(self, model: nn.Module, optimizer: SGD, total_steps: int) -> FreezeOut:
        """FreezeOut over the model's own layers, or over those that a forward pass finds."""
        check_named(self.config.plan, model)
        return FreezeOut(
            model,
            optimizer,
            total_steps,
            schedule=self.config.plan,
            layers=model_layers(model),
            example_inputs=next(self.batches(epoch=0, start=0))[0][:_FEW],
        )

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the cache, which other runs may share; None: there is none."""
        named = self.config.cache not in ("off", "auto", "ram")
        return Path(self.config.cache) if named else None

    def cache(self, freezer: FreezeOut) -> PrefixCache | None:
        """The cache that the options ask for; None: they do not."""
        config = self.config
        if config.cache == "off":
            return None
        return PrefixCache(
            freezer,
            len(self.data.train_labels),
            where=self.cache_folder or "ram",
            budget=config.cache_bytes,
            dtype=None if config.cache_dtype == "auto" else config.cache_dtype,
            views=(config.views or VIEWS) if config.augment else 1,
            depths="auto" if config.cache == "auto" else "all",
        )

    def ids(self, epoch: int) -> Tensor:
        """The training images' numbers in the order in which the epoch has them, on the CPU."""
        count = len(self.data.train_labels)
        return epoch_order(count, self.config.seed, epoch, self.data.train_images.device)

    def batches(
        self, epoch: int, start: int, view: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """This rank's share of an epoch's training batches, from batch number `start`, and the
        weight of its mean loss (see `Ranks.share`). `view`: of each image, as `data.batches`."""
        data = self.data
        for x, y in batches(
            data.train_images,
            data.train_labels,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            mean=data.mean,
            std=data.std,
            augment=self.config.augment,
            flip=data.flip,
            start=start,
            view=view,
            channels_last=self.channels_last,
        ):
            share, weight = self.ranks.share(len(y))
            yield x[share], y[share], weight

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 for matrix products and convolutions, where the run's precision is bf16."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, mean over the batch, and the logits (batch, classes)."""
        with self.autocast():
            logits = model(x)
        return F.cross_entropy(logits.float(), y), logits

    def description(self, epochs: int, prediction: Prediction | None) -> dict[str, Any]:
        """`config.json`: everything needed to repeat the run."""
        return {
            "config": self.config.to_json(),
            "resolved": {
                "epochs": epochs,
                "total_steps": self.total_steps(epochs),
                "frozen_from_start": self._frozen_from_start(epochs),
                "training_images": len(self.data.train_labels),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "device": str(self.device),
                "precision": self.precision,
                "memory_format": "channels_last" if self.channels_last else "contiguous",
                "prediction": None if prediction is None else prediction.to_json(),
            },
            "hardware": hardware(self.device),
            "ranks": self.ranks.size,
            "versions": versions(),
        }

    def _frozen_from_start(self, epochs: int) -> int:
        """How many layers."""
        if self.config.frozen is None:
            return 0
        return self.plan.timeline(len(self.layers), self.total_steps(epochs)).num_frozen(0)

    def evaluate(self, between: Callable[[], None]) -> tuple[float, float] | None:
        """Loss and error per held-out image; None if nothing is held out.

        BatchNorm's statistics become rank 0's. Each rank takes its share of each batch.
        """
        images, labels = self.data.heldout_images, self.data.heldout_labels
        if images is None or labels is None:
            return None
        sums = Sums.empty(self.device)
        self.ranks.take_buffers(self.model)
        self.model.eval()
        with torch.no_grad():
            for x, y in eval_batches(
                images,
                labels,
                batch_size=_EVAL_BATCH,
                mean=self.data.mean,
                std=self.data.std,
                channels_last=self.channels_last,
            ):
                between()
                share, weight = self.ranks.share(len(y))
                if weight:
                    sums.add(*self.loss(self.model, x[share], y[share]), y[share])
        return sums.over(self.ranks).means()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        wait(self.device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's own generators, of the CPU and of the device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
