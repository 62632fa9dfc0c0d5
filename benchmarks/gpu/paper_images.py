"""Images of CIFAR-10 as JPEG, from one .npz file, to one file of the official binary layout.

    python -m benchmarks.gpu.paper_images CIFAR10.npz TARGET SPLIT FIRST COUNT

The .npz holds `jpeg_header`, which all images share, and for each split (train, test) `_scan`, the
rest of every JPEG in a row, `_length`, the bytes of each, and `_label`. A record of the target is
one byte of label and 3 x 32 x 32 of pixels. No torch is loaded here.
"""

import io
import sys
from pathlib import Path

import numpy as np


def records(archive: Path, split: str, first: int, count: int) -> bytes:
    """`count` images of a split and their labels, from number `first` on."""
    from PIL import Image

    with np.load(archive) as arrays:
        header, scan = arrays["jpeg_header"].tobytes(), arrays[f"{split}_scan"].tobytes()
        lengths, labels = arrays[f"{split}_length"].astype(np.int64), arrays[f"{split}_label"]
    ends = np.cumsum(lengths)
    if len(lengths) < first + count or ends[-1] != len(scan):
        raise ValueError(f"it has {len(lengths)} images of {split}, and not all of their bytes")
    written = []
    for number in range(first, first + count):
        image = Image.open(io.BytesIO(header + scan[ends[number] - lengths[number] : ends[number]]))
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        written += [bytes([labels[number]]), pixels.tobytes()]
    return b"".join(written)


if __name__ == "__main__":
    archive, target, split, first, count = sys.argv[1:]
    Path(target).write_bytes(records(Path(archive), split, int(first), int(count)))
