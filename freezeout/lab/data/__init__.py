"""CIFAR-10, CIFAR-100 and scikit-learn's digits as tensors on the training device.

`load_data` reads (and, without a data folder, downloads) a data set; `batches` and `eval_batches`
cut it into normalised batches on the device where the images lie. No worker processes.
"""

from freezeout.lab.data.batches import batches, epoch_order, eval_batches, num_batches
from freezeout.lab.data.images import DATASETS, VALIDATE, ImageData, load_data, load_source
from freezeout.lab.data.sources import CIFAR10, CIFAR100, Source

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATASETS",
    "VALIDATE",
    "ImageData",
    "Source",
    "batches",
    "epoch_order",
    "eval_batches",
    "load_data",
    "load_source",
    "num_batches",
]
