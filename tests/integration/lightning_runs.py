"""Lightning modules and runs that tests start, here or in processes of their own:

python -m tests.integration.lightning_runs FOLDER STOP PLAN     one run, killed after step STOP
torchrun ... -m tests.integration.lightning_runs ddp FILE PLAN  on two ranks, beside a plain loop
"""

import inspect
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (first: lets torchvision be imported)

# isort: split
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from freezeout.integrations.lightning import FreezeOutCallback
from tests.integration.processes import one_rank
from tests.models import conv_net, images
from tests.plain_loop import BATCHES, PLANS, update

EPOCHS = 3


def start_from(checkpoint: Path | None) -> dict[str, Any]:
    """Options of `Trainer.fit`. Lightning before 2.6 lets nobody ask for weights_only."""
    safely = "weights_only" in inspect.signature(Trainer.fit).parameters
    return {"ckpt_path": checkpoint} | ({"weights_only": True} if checkpoint and safely else {})


class Classifier(LightningModule):
    """`conv_net`, whose dropout draws the same masks in the n-th batch of every run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = conv_net()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        torch.manual_seed(self.trainer.current_epoch * BATCHES + batch_idx)
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), 0.01)
        scheduler = StepLR(optimizer, 4, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Batches:
    """A loader that shuffles anew each epoch, and whose state Lightning saves and restores, so
    that a run may go on in the middle of an epoch."""

    def __init__(self, size: int = BATCHES) -> None:
        self.size, self.epoch, self.done = size, 0, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in order[self.done :]:
            self.done += 1
            if self.done == self.size:
                self.epoch, self.done = self.epoch + 1, 0
            yield images(number)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


def loader(size: int = BATCHES) -> DataLoader[Any]:
    return DataLoader([images(i) for i in range(size)], batch_size=None)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


class Kill(ModelCheckpoint):
    """Saves at every step, then kills the process after one of them."""

    def __init__(self, folder: Path, stop: int) -> None:
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        self.stop = stop

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        super().on_train_batch_end(trainer, *others)
        if trainer.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGKILL)


def one_run(folder: Path, stop: int, plan: str = "early") -> LightningModule:
    """Goes on from the last checkpoint in the folder, if there is one."""
    torch.set_num_threads(1)
    saved = sorted(folder.glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1]))
    module, kill = Classifier(), Kill(folder, stop)
    run = trainer(FreezeOutCallback(PLANS[plan]), kill, enable_checkpointing=True)
    run.fit(module, Batches(), **start_from(saved[-1] if saved else None))
    return module


@one_rank()
def ddp(file: Path, plan: str) -> None:
    """In each of two ranks: a run in Lightning, one that was stopped and resumed, and torch's own
    DistributedDataParallel in a plain loop; rank by rank, the weights of each."""
    from torch.nn.parallel import DistributedDataParallel

    from freezeout import FreezeOut
    from freezeout.parallel import rewrap

    rank = int(os.environ["RANK"])
    data: Any = DataLoader([images(2 * i + rank) for i in range(BATCHES)], batch_size=None)  # type: ignore[arg-type]
    found: dict[str, Any] = {}

    def lightning(*callbacks: Callback, start: Path | None = None, **options: Any) -> Any:
        module, callback = Classifier(), FreezeOutCallback(PLANS[plan])
        run = trainer(
            callback,
            *callbacks,
            devices=2,
            strategy="ddp",
            use_distributed_sampler=False,
            **options,
        )
        run.fit(module, data, **start_from(start))
        assert isinstance(run.strategy.model, LightningModule)  # unwrapped again
        assert callback.freezer is not None
        found["summary"] = callback.freezer.summary().split(";")[0]
        return module.net.state_dict()

    found["lightning"] = lightning()
    keep = ModelCheckpoint(file.parent, filename="two", every_n_epochs=2, save_top_k=-1)
    lightning(keep, enable_checkpointing=True)
    found["resumed"] = lightning(start=file.parent / "two.ckpt")

    torch.manual_seed(0)
    net = conv_net()
    optimizer = AdamW(net.parameters(), 0.01)
    scheduler = StepLR(optimizer, 4, 0.5)
    freezer = FreezeOut(
        net, optimizer, EPOCHS * BATCHES, schedule=PLANS[plan], example_inputs=images(0)[0]
    )
    wrapper = DistributedDataParallel(net)
    for step in range(EPOCHS * BATCHES):
        net.train()
        torch.manual_seed(step)
        x, y = images(2 * (step % BATCHES) + rank)
        torch.autograd.backward(cross_entropy(wrapper(x), y))
        if update(freezer, [optimizer], [scheduler]):
            wrapper = rewrap(wrapper)
    found["plain"] = net.state_dict()
    torch.save(found, file.with_suffix(f".{rank}"))


if __name__ == "__main__":
    if sys.argv[1] == "ddp":
        ddp(Path(sys.argv[2]), sys.argv[3])
    else:
        one_run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
