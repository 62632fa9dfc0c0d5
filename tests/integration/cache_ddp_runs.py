"""Runs with and without the cache on each of several ranks, in a loop and in each framework.

torchrun --nproc-per-node 2 -m tests.integration.cache_ddp_runs KIND FILE
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tests.conftest  # noqa: F401  (first: lets torchvision be imported)

# isort: split
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.cache import with_ids
from freezeout.cache.shards import fixed_shards
from tests.integration.processes import one_rank

SAMPLES, BATCH, EPOCHS = 42, 4, 3  # on two ranks the last batch has one sample


class Net(nn.Sequential):
    def __init__(self, *inside: nn.Module) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()) for _ in range(4)]
        super().__init__(*blocks, nn.Sequential(nn.Linear(16, 3), *inside))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(SAMPLES, 16, generator=generator),
        torch.randint(3, (SAMPLES,), generator=generator),
    )


class Common(nn.Module):
    """Takes away the mean over all ranks' samples."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        dist.all_reduce(mean)
        return x - mean / dist.get_world_size()


class Run:
    """What a run gave: which samples came in each step, losses, weights, and the cache's hits."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.ids: list[list[int]] = []
        self.losses: list[float] = []
        self.cache: PrefixCache | None = None

    def found(self) -> dict[str, Any]:
        stats, refusals = (0, 0), list[str]()
        if self.cache is not None:
            stats = self.cache.stats.hits, self.cache.stats.misses
            refusals = self.cache.refusals
        return {
            "ids": self.ids,
            "losses": self.losses,
            "weights": self.net.state_dict(),
            "hits, misses": stats,
            "refusals": refusals,
        }


def loop(cached: bool, folder: Path, *inside: nn.Module) -> Run:
    """torch's own."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    data = dataset()
    sampler: DistributedSampler[int] = DistributedSampler(data, seed=3)
    loader = with_ids(DataLoader(data, BATCH, sampler=sampler))

    def batches(epoch: int) -> Iterator[Any]:
        sampler.set_epoch(epoch)
        yield from loader

    return plain(cached, batches, DistributedDataParallel, Net(*inside))


def collective(cached: bool, folder: Path) -> Run:
    """The model sends something to other ranks while it runs."""
    return loop(cached, folder, Common())


def plain(
    cached: bool, batches: Callable[[int], Iterator[Any]], wrap: Callable[..., Any], net: Net
) -> Run:
    run = Run(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    freezer = FreezeOut(net, optimizer, None, schedule=Frozen(3), layers=list(net))
    if cached:
        run.cache = PrefixCache(freezer, SAMPLES, depths="all", budget=10**6)
    model = wrap(net)
    for epoch in range(EPOCHS):
        for (x, y), ids in batches(epoch):
            if run.cache is None:
                output = model(x)
            else:
                with run.cache.batch(ids):
                    output = model(x)
            loss = cross_entropy(output, y)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
            run.ids.append(ids.tolist())
            run.losses.append(loss.item())
    return run


def accelerate(cached: bool, folder: Path) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = with_ids(accelerator.prepare(DataLoader(dataset(), BATCH, shuffle=True)))
    return plain(cached, lambda epoch: iter(loader), accelerator.prepare, Net())


def lightning(cached: bool, folder: Path) -> Run:
    from lightning.pytorch import LightningModule, Trainer

    from freezeout.integrations.lightning import FreezeOutCallback

    run = Run(net := Net())

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            run.ids.append(batch[2].tolist())
            run.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 0.01)

    callback = FreezeOutCallback(Frozen(3), layers=list(net), cache=CACHE if cached else False)
    off: Any = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    data = TensorDataset(*dataset().tensors, torch.arange(SAMPLES))
    loader: Any = DataLoader(data, BATCH, shuffle=True)
    if not cached:  # the samples that each rank sees with the cache
        sampler: Any = DistributedSampler(data, 2, int(os.environ["RANK"]))
        loader = DataLoader(data, batch_sampler=fixed_shards(BatchSampler(sampler, BATCH, False)))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        callbacks=[callback],
        default_root_dir=folder,
        use_distributed_sampler=cached,
        **dict[str, Any](dict.fromkeys(off, False)),
    )
    trainer.fit(Module(), loader)
    run.cache = callback.cache
    return run


def transformers(cached: bool, folder: Path) -> Run:
    from freezeout.integrations.transformers import FreezeOutTrainerCallback
    from tests.integration.trainer_runs import encoder, trainer

    run = Run(encoder())
    callback = FreezeOutTrainerCallback(Frozen(2), cache=CACHE if cached else False)
    batches: list[Any] = []
    started = trainer(run.net, folder, callback, batches=batches, eval_strategy="epoch")
    if not cached:  # the samples that each rank sees with the cache
        get = started.get_train_dataloader

        def get_train_dataloader() -> Any:
            loader = get()
            inner: Any = vars(loader)["base_dataloader"]  # torch's
            vars(inner)["batch_sampler"] = fixed_shards(inner.batch_sampler)
            return loader

        vars(started)["get_train_dataloader"] = get_train_dataloader
    started.train()
    run.cache = callback.cache
    run.ids = [batch["input_ids"].flatten().tolist() for batch in batches]
    rows = started.state.log_history
    run.losses = [row[key] for row in rows for key in ("loss", "eval_loss") if key in row]
    return run


CACHE = {"depths": "all", "budget": 10**6}
KINDS = {each.__name__: each for each in (loop, collective, accelerate, lightning, transformers)}


@one_rank()
def both(kind: str, file: Path) -> None:
    found = {str(cached): KINDS[kind](cached, file.parent).found() for cached in (False, True)}
    torch.save(found, file.with_suffix(f".{os.environ['RANK']}"))


if __name__ == "__main__":
    both(sys.argv[1], Path(sys.argv[2]))
