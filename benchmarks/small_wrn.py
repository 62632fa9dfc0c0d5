"""The network of the cache's studies of whole runs, and the options that they share."""

import argparse
from pathlib import Path

from freezeout.lab.config import TrainConfig


def add_options(parser: argparse.ArgumentParser, dataset: str, images: int | None) -> None:
    """The data and the length of the runs, with these defaults."""
    parser.add_argument("--dataset", default=dataset)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--epochs", type=int, default=30)


def small_wrn(args: argparse.Namespace) -> TrainConfig:
    """WRN-16-1 with FreezeOut, as asked for; 8 GB for a cache."""
    return TrainConfig(
        model="wrn",
        depth=16,
        widen_factor=1,
        dataset=args.dataset,
        data_dir=args.data_dir,
        images=args.images,
        epochs=args.epochs,
        cache_budget="8G",
    )
