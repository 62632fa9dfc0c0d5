"""Train the last layers of a network with Lightning, the cache on (needs scikit-learn)."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezeout import Frozen
from freezeout.integrations.lightning import FreezeOutCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
        self.net = nn.Sequential(*blocks, nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(cache: Any = True, **options: Any) -> tuple[FreezeOutCallback, Digits]:
    seed_everything(0)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(x.float() / 16, y), batch_size=100, shuffle=True)
    module, freezeout = Digits(), FreezeOutCallback(Frozen(3), cache=cache)
    Trainer(max_epochs=3, callbacks=[freezeout], accelerator="cpu", **options).fit(module, loader)
    return freezeout, module


if __name__ == "__main__":
    callback, _ = main(cache={"depths": "all"})
    assert callback.cache is not None
    print(callback.cache.stats)
