"""Batches as tensors on the images' device: shuffled, augmented, normalised.

All that is random in an epoch is a pure function of (seed, epoch), drawn before its first batch:
an epoch entered in its middle yields exactly the batches that the whole one would have.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from freezeout.errors import InvalidValue

PAD = 4  # black pixels added at each side before a crop of the original size


def num_batches(
    n: int,  # samples
    batch_size: int,
) -> int:
    """How many batches an epoch has; the last may be smaller.

    >>> num_batches(45_000, 50), num_batches(101, 50), num_batches(0, 50)
    (900, 3, 0)
    """
    if batch_size < 1:
        raise InvalidValue(f"batch_size={batch_size}; allowed: at least 1")
    return -(-n // batch_size)


def batches(
    images: Tensor,  # uint8 (N, 3, H, W)
    labels: Tensor,  # int64 (N,)
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    mean: Sequence[float],  # one a channel, of values scaled to 0..1
    std: Sequence[float],
    augment: bool,
    flip: bool,
    start: int = 0,
    view: int | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches `start`, `start + 1`, ... of an epoch: x, `dtype` (B, 3, H, W); y, int64 (B,).

    Each sample comes once an epoch. `augment` pads an image with 4 black pixels, crops it at a
    random place, and with `flip` mirrors it with probability 1/2. With a `view`, place and mirror
    are functions of the seed, the sample and the view, not of the epoch: the same pixels each
    time. No global random state is read or changed.

    Raises InvalidValue for a batch size below 1 or a `start` outside the epoch.
    """
    total = num_batches(len(images), batch_size)
    if not 0 <= start <= total:
        raise InvalidValue(f"start={start}; allowed: 0..{total}, the number of batches")
    normalise = _Normalise(images, mean, std, dtype, channels_last)
    # A generator function runs at the first `next`: what is wrong is reported here, before that.
    return _epoch(images, labels, batch_size, seed, epoch, normalise, augment, flip, start, view)


def epoch_order(
    n: int,  # samples
    seed: int,
    epoch: int,
    device: torch.device,
) -> Tensor:
    """int64 (n,) on the CPU: the samples in the order in which the epoch's batches have them."""
    generator = _generator(seed, epoch, device)
    return torch.randperm(n, generator=generator, device=device).cpu()


def eval_batches(
    images: Tensor,  # uint8 (N, 3, H, W)
    labels: Tensor,  # int64 (N,)
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples in order, unaugmented: x, `dtype` (B, 3, H, W), and y, int64 (B,).

    Raises InvalidValue for a batch size below 1.
    """
    firsts = range(0, num_batches(len(images), batch_size) * batch_size, batch_size)
    normalise = _Normalise(images, mean, std, dtype, channels_last)
    return (
        (normalise(images[first : first + batch_size]), labels[first : first + batch_size])
        for first in firsts
    )


def _epoch(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    normalise: "_Normalise",
    augment: bool,
    flip: bool,
    start: int,
    view: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    n, device = len(images), images.device
    generator = _generator(seed, epoch, device)
    # The order is drawn first, so that it is the same with and without augmentation.
    order = torch.randperm(n, generator=generator, device=device)
    if augment:
        if view is not None:
            generator = _generator(seed, f"view {view}", device)
        shifts = torch.randint(2 * PAD + 1, (2, n), generator=generator, device=device)
        flips = torch.randint(2, (n,), generator=generator, device=device).bool()
        if view is not None:  # drawn by sample, not by place
            shifts, flips = shifts[:, order], flips[order]
        crop = _Crop(images, min(batch_size, n))
    for first in range(start * batch_size, n, batch_size):
        samples = order[first : first + batch_size]
        x = images.index_select(0, samples)
        if augment:
            x = crop(x, *shifts[:, first : first + batch_size])
            if flip:
                mirrored = flips[first : first + batch_size].view(-1, 1, 1, 1)
                x = torch.where(mirrored, x.flip(3), x)
        yield normalise(x), labels.index_select(0, samples)


def _generator(seed: int, epoch: int | str, device: torch.device) -> torch.Generator:
    # Hashed, because seed + epoch would give run 0's epoch 1 to run 1 as its epoch 0.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)


class _Crop:
    """Pad a batch with black and cut each image out at its own place, without a loop."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        _, channels, height, width = images.shape
        self._padded = images.new_zeros(
            batch_size, channels, height + 2 * PAD, width + 2 * PAD
        )  # the border stays black; the inside is overwritten at each batch
        self._inside = self._padded[:, :, PAD:-PAD, PAD:-PAD]
        # A view of every possible crop: (B, 3, 2 PAD + 1, 2 PAD + 1, H, W), no memory.
        self._crops = self._padded.unfold(2, height, 1).unfold(3, width, 1)
        self._rows = torch.arange(batch_size, device=images.device)

    def __call__(
        self,
        x: Tensor,  # uint8 (B, 3, H, W)
        down: Tensor,  # int64 (B,), 0..2 PAD
        right: Tensor,
    ) -> Tensor:
        self._inside[: len(x)] = x
        return self._crops[self._rows[: len(x)], :, down, right]


class _Normalise:
    """uint8 to (x / 255 - mean) / std, as one multiplication and one subtraction in float32."""

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        mean64, std64 = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self._scale = (1 / (255 * std64)).to(images.device, torch.float32)
        self._shift = (mean64 / std64).to(images.device, torch.float32)
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        # Reordered while still bytes: a quarter of the memory traffic.
        x = x.contiguous(memory_format=self._format)
        return x.to(torch.float32).mul_(self._scale).sub_(self._shift).to(self._dtype)
