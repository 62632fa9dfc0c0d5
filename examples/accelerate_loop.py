"""FreezeOut in a loop of one's own under Accelerate, with accumulation and checkpoints.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Needs accelerate and scikit-learn. Started again, it goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from freezeout import FreezeOut
from freezeout.parallel import rewrap


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """A checkpoint, whole or not at all."""
    accelerator.save_state(str(folder / "new"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "new").rename(folder / f"step_{step}")


def last(folder: Path) -> Path | None:
    saved = folder.glob("step_*")
    return max(saved, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def main(folder: Path, epochs: int = 4, save_every: int = 10) -> FreezeOut:
    set_seed(0)
    # The order of an epoch is a function of the seed and its number, so that it can be resumed.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    # A generator of its own: a loader that starts again takes none of dropout's random numbers.
    loader = DataLoader(data, batch_size=100, shuffle=True, generator=torch.Generator())
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4)]
    model: nn.Module = nn.Sequential(*blocks, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    net, per_epoch = accelerator.unwrap_model(model), -(-len(loader) // 2)
    freezer = FreezeOut(net, optimizer, total_steps=epochs * per_epoch, example_inputs=images[:2])
    accelerator.register_for_checkpointing(freezer)
    if (checkpoint := last(folder)) is not None:
        accelerator.load_state(str(checkpoint))
    if freezer.num_frozen and isinstance(model, DistributedDataParallel):
        model = rewrap(model)  # it was built when all layers trained

    first, done = divmod(freezer.step_count, per_epoch)
    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        skip = 2 * done if epoch == first else 0
        for x, y in accelerator.skip_first_batches(loader, skip) if skip else loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                layers = freezer.step()
                if layers and isinstance(model, DistributedDataParallel):
                    model = rewrap(model)
                if freezer.step_count % save_every == 0:
                    save(accelerator, folder, freezer.step_count)
    accelerator.print(freezer.summary())
    accelerator.end_training()
    return freezer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=10, help="updates between checkpoints")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs, arguments.save_every)
