"""The data sets: images and labels as tensors on the training device, split and described."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from freezeout.errors import DataError, InvalidValue
from freezeout.lab.data.sources import CIFAR10, CIFAR100, Source, find_folder, read_records

VALIDATE = ("valid", "test", "none")
_SOURCES = {source.name: source for source in (CIFAR10, CIFAR100)}
DATASETS = (*_SOURCES, "digits")

DIGITS_TEST = 360
DIGITS_VALIDATION = 144


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set on one device.

    `mean` and `std` are one number a channel, of the training images scaled to 0..1. `flip` says
    whether a mirrored image keeps its label. The held-out images are None where nothing is
    evaluated.
    """

    name: str
    num_classes: int
    train_images: Tensor  # uint8 (N, 3, 32, 32)
    train_labels: Tensor  # int64 (N,)
    heldout_images: Tensor | None  # uint8 (M, 3, 32, 32)
    heldout_labels: Tensor | None  # int64 (M,)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool


def load_data(
    name: str,
    *,
    data_dir: Path | None = None,
    validate: str = "valid",
    device: torch.device | str = "cpu",
) -> ImageData:
    """Load "cifar10", "cifar100" (fine labels) or "digits" onto `device`.

    `validate` is what is held out: "valid" takes the last 5,000 training images (144 of digits)
    from the training set, "test" is the test set, "none" is nothing; the latter two train on all
    training images. With `data_dir` nothing is downloaded (see `sources.find_folder`); digits come
    with scikit-learn and use no folder.

    Raises InvalidValue for an unknown name or `validate`, DataError for missing or damaged data
    and for a failed download.
    """
    if name in _SOURCES:
        return load_source(_SOURCES[name], data_dir=data_dir, validate=validate, device=device)
    if name != "digits":
        raise InvalidValue(f"unknown data set {name!r}; allowed: {', '.join(DATASETS)}")
    _check_validate(validate)
    images, labels = _digits()
    train, test = slice(None, -DIGITS_TEST), slice(-DIGITS_TEST, None)
    return _split(
        "digits",
        10,
        (images[train], labels[train]),
        (images[test], labels[test]) if validate == "test" else None,
        validation=DIGITS_VALIDATION if validate == "valid" else 0,
        flip=False,
        device=device,
    )


def load_source(
    source: Source, *, data_dir: Path | None, validate: str, device: torch.device | str
) -> ImageData:
    """`load_data` for a data set described by a `Source`."""
    _check_validate(validate)
    folder = find_folder(source, data_dir)
    return _split(
        source.name,
        source.num_classes,
        read_records(folder, source.train, source),
        read_records(folder, source.test, source) if validate == "test" else None,
        validation=source.validation if validate == "valid" else 0,
        flip=True,
        device=device,
    )


def _check_validate(validate: str) -> None:
    if validate not in VALIDATE:
        raise InvalidValue(f"validate={validate!r}; allowed: {', '.join(VALIDATE)}")


def _split(
    name: str,
    num_classes: int,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor] | None,
    *,
    validation: int,
    flip: bool,
    device: torch.device | str,
) -> ImageData:
    """Hold out the last `validation` training images, if any, and move all to `device`."""
    images, labels = train
    if validation:
        heldout = images[-validation:], labels[-validation:]
        images, labels = images[:-validation], labels[:-validation]
    mean, std = _channel_statistics(images)
    if min(std) == 0:  # a file of zeros has the right size too, and would train to NaN
        raise DataError(f"{name}: damaged data: a colour channel is the same everywhere")
    return ImageData(
        name=name,
        num_classes=num_classes,
        train_images=images.to(device),
        train_labels=labels.to(device),
        heldout_images=None if heldout is None else heldout[0].to(device),
        heldout_labels=None if heldout is None else heldout[1].to(device),
        mean=mean,
        std=std,
        flip=flip,
    )


def _channel_statistics(
    images: Tensor,  # uint8 (N, 3, 32, 32)
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, 0..1, in float64.

    From a histogram of the 256 values: exact counts, and no float copy of the images.
    """
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    weights = counts.double() / counts[0].sum()  # (3, 256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values  # (3,)
    std = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    (m0, m1, m2), (s0, s1, s2) = mean.tolist(), std.tolist()
    return (m0, m1, m2), (s0, s1, s2)


def _digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits: 8x8 with values 0..16 become uint8 (1797, 3, 32, 32), 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None]  # (1797, 1, 8, 8)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    grey = large.mul(255 / 16).round().to(torch.uint8)
    return grey.repeat(1, 3, 1, 1), torch.from_numpy(bunch.target).long()
