"""FreezeOut in Lightning: one callback.

    python examples/lightning_module.py

Needs lightning and scikit-learn.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freezeout import Schedule
from freezeout.integrations.lightning import FreezeOutCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
        self.net = nn.Sequential(*blocks, nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 5) -> FreezeOutCallback:
    seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    module, loader = Digits(), DataLoader(data, batch_size=100, shuffle=True)

    freezeout = FreezeOutCallback(Schedule(t_0=0.8, how_scale="cubic"))
    trainer = Trainer(max_epochs=epochs, callbacks=[freezeout], accelerator="cpu", logger=False)
    trainer.fit(module, loader)

    assert freezeout.freezer is not None
    print(freezeout.freezer.summary())
    return freezeout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
