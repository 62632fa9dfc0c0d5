"""The data sets: what is read from which bytes, how it is split, and what a batch is made of."""

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from freezeout.errors import DataError, InvalidValue
from freezeout.lab.data import (
    CIFAR10,
    CIFAR100,
    ImageData,
    Source,
    batches,
    eval_batches,
    load_data,
    load_source,
    num_batches,
    sources,
)

TINY = Source(
    name="tiny",
    archive="tiny-binary.tar.gz",
    md5="0" * 32,
    folder="tiny-bin",
    train=(("a.bin", 6), ("b.bin", 4)),
    test=(("t.bin", 3),),
    label_bytes=1,
    label_index=0,
    num_classes=10,
    validation=2,
)
TINY100 = replace(TINY, name="tiny100", label_bytes=2, label_index=1, num_classes=100)


def write_source(source: Source, parent: Path, seed: int = 0) -> Path:
    """Files of random records whose fine label is the record's number, and coarse label 255."""
    folder = parent / source.folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, count in source.train + source.test:
        records = rng.integers(0, 256, (count, source.record_length), dtype=np.uint8)
        records[:, : source.label_bytes] = 255
        records[:, source.label_index] = np.arange(count)
        records.tofile(folder / name)
    return folder


def load(source: Source, data_dir: Path | None, validate: str = "valid") -> ImageData:
    return load_source(source, data_dir=data_dir, validate=validate, device="cpu")


def failure(source: Source, data_dir: Path | None) -> str:
    """The message of the DataError that loading raises; it is one line."""
    with pytest.raises(DataError) as caught:
        load(source, data_dir, "test")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no way to the network."""
    monkeypatch.setenv("FREEZEOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FREEZEOUT_DATA_URL", "http://127.0.0.1:9")
    return tmp_path / "cache"


# --- records and splits


@pytest.mark.parametrize("source", [TINY, TINY100])
def test_records_are_parsed_byte_by_byte(source: Source, tmp_path: Path) -> None:
    folder = write_source(source, tmp_path)
    data = load(source, tmp_path, "test")
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    content = (folder / "a.bin").read_bytes()
    for record, channel, row, column in [(0, 0, 0, 0), (2, 1, 3, 4), (5, 2, 31, 31)]:
        position = record * source.record_length + source.label_bytes
        position += channel * 1024 + row * 32 + column
        assert data.train_images[record, channel, row, column] == content[position]
    assert data.train_images.shape == (10, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.name == source.name
    assert data.num_classes == source.num_classes
    assert data.flip


def test_splits(tmp_path: Path) -> None:
    write_source(TINY, tmp_path)
    none = load(TINY, tmp_path, "none")
    assert none.heldout_images is None
    assert none.heldout_labels is None
    assert len(none.train_images) == 10

    test = load(TINY, tmp_path, "test")
    assert torch.equal(test.train_images, none.train_images)
    assert test.heldout_labels is not None
    assert test.heldout_labels.tolist() == [0, 1, 2]

    valid = load(TINY, tmp_path)
    assert valid.heldout_images is not None
    assert valid.heldout_labels is not None
    assert torch.equal(valid.train_images, none.train_images[:8])
    assert torch.equal(valid.heldout_images, none.train_images[8:])
    assert valid.heldout_labels.tolist() == [2, 3]


def test_mean_and_std_are_of_the_training_images_used(tmp_path: Path) -> None:
    write_source(TINY, tmp_path)
    everything, part = load(TINY, tmp_path, "none"), load(TINY, tmp_path, "valid")
    for data in (everything, part):
        scaled = data.train_images.double() / 255
        assert data.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
        expected = scaled.std((0, 2, 3), unbiased=False).tolist()
        assert data.std == pytest.approx(expected, abs=1e-12)
    assert everything.mean != part.mean


def test_the_official_sources() -> None:
    assert CIFAR10.url == "http://127.0.0.1:9/cifar-10-binary.tar.gz"
    assert set(CIFAR10.file_sizes.values()) == {30_730_000}
    assert len(CIFAR10.file_sizes) == 6
    assert CIFAR100.file_sizes == {"train.bin": 153_700_000, "test.bin": 30_740_000}
    assert CIFAR10.validation == CIFAR100.validation == 5_000


def test_the_official_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FREEZEOUT_DATA_URL")
    assert CIFAR100.url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"


def test_digits() -> None:
    none, test, valid = (load_data("digits", validate=v) for v in ("none", "test", "valid"))
    assert none.train_images.shape == test.train_images.shape == (1437, 3, 32, 32)
    assert valid.train_images.shape == (1293, 3, 32, 32)
    assert test.heldout_images is not None
    assert test.heldout_labels is not None
    assert valid.heldout_images is not None
    assert test.heldout_images.shape == (360, 3, 32, 32)
    assert torch.equal(valid.heldout_images, none.train_images[-144:])
    assert none.train_images.dtype == torch.uint8
    assert none.train_images.min() == 0
    assert none.train_images.max() == 255
    assert torch.equal(none.train_images[:, 0], none.train_images[:, 2])
    assert none.num_classes == 10
    assert not none.flip
    assert none.train_labels[:10].tolist() == list(range(10))
    assert test.heldout_labels[-3:].tolist() == [8, 9, 8]
    assert none.train_labels.dtype == torch.int64
    # Bilinear: output i lies at (i + 1/2) / 4 - 1/2 of the input, and no further than its edges.
    weights = torch.zeros(32, 8, dtype=torch.float64)
    for i in range(32):
        place = min(max((i + 0.5) / 4 - 0.5, 0), 7)
        weights[i, int(place)] += 1 - place % 1
        weights[i, min(int(place) + 1, 7)] += place % 1
    original = torch.from_numpy(load_digits().images[:1437])
    expected = weights @ original @ weights.T * 255 / 16
    torch.testing.assert_close(none.train_images[:, 0].double(), expected, atol=0.501, rtol=0)


# --- what the user gave is wrong


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_bad_names(name: str) -> None:
    with pytest.raises(
        InvalidValue, match=r"unknown data set 'mnist'; .*cifar10, cifar100, digits"
    ):
        load_data("mnist")
    with pytest.raises(InvalidValue, match=r"validate='dev'; allowed: valid, test, none"):
        load_data(name, validate="dev")


def test_data_dir_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert failure(TINY, tmp_path / "no") == f"data folder {tmp_path / 'no'}: no such folder"
    assert "a file, not a folder" in failure(TINY, tmp_path / "file")


def test_data_dir_without_data(tmp_path: Path) -> None:
    message = failure(TINY, tmp_path)
    assert message.startswith(f"no tiny in {tmp_path}: expected the folder tiny-bin")
    assert "tiny-binary.tar.gz" in message


def test_missing_file(tmp_path: Path) -> None:
    folder = write_source(TINY, tmp_path)
    (folder / "b.bin").unlink()
    expected = f"{folder / 'b.bin'}: missing, expected a file of 12,292 bytes"
    assert failure(TINY, tmp_path) == failure(TINY, folder) == expected


@pytest.mark.parametrize("size", [0, 12_291, 12_293])
def test_wrong_size(size: int, tmp_path: Path) -> None:
    folder = write_source(TINY, tmp_path)
    os.truncate(folder / "b.bin", size)
    assert failure(TINY, tmp_path) == (f"{folder / 'b.bin'}: found {size:,} bytes, expected 12,292")


@pytest.mark.parametrize(("source", "label"), [(TINY, 10), (TINY100, 100)])
def test_label_out_of_range(source: Source, label: int, tmp_path: Path) -> None:
    folder = write_source(source, tmp_path)
    with (folder / "b.bin").open("r+b") as file:
        file.seek(2 * source.record_length + source.label_index)
        file.write(bytes([label]))
    assert failure(source, tmp_path) == (
        f"{folder / 'b.bin'}: record 2 has label {label}, expected 0..{label - 1}"
    )


def test_files_of_zeros(tmp_path: Path) -> None:
    folder = write_source(TINY, tmp_path)
    for name, size in TINY.file_sizes.items():
        (folder / name).write_bytes(bytes(size))
    assert failure(TINY, tmp_path) == (
        "tiny: damaged data: a colour channel is the same everywhere"
    )


# --- an archive in the data folder


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    folder = write_source(TINY, tmp_path / "made")
    (folder / "readme.html").write_text("not needed")
    pack(folder, tmp_path / "data" / TINY.archive)
    return tmp_path / "data" / TINY.archive


def test_three_ways_to_give_the_data(archive: Path, tmp_path: Path, cache: Path) -> None:
    made = tmp_path / "made"
    places = [made, made / TINY.folder, archive.parent]
    loaded = [load(TINY, place, "test") for place in places]
    for data in loaded[1:]:
        assert torch.equal(data.train_images, loaded[0].train_images)
        assert torch.equal(data.train_labels, loaded[0].train_labels)
    assert [path.name for path in archive.parent.iterdir()] == [TINY.archive]  # nothing written
    assert not (cache / TINY.folder).exists()  # where only what was checksummed may lie
    (unpacked,) = cache.rglob(TINY.folder)
    assert sorted(path.name for path in unpacked.iterdir()) == ["a.bin", "b.bin", "t.bin"]
    assert [path.name for path in unpacked.parent.iterdir()] == [TINY.folder]  # no remains


def test_archive_is_unpacked_once_and_again_when_replaced(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted = []
    original = tarfile.TarFile.extract

    def spy(self: tarfile.TarFile, member: Any, *args: Any, **kwargs: Any) -> None:
        extracted.append(member.name)
        original(self, member, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extract", spy)
    first = load(TINY, archive.parent)
    load(TINY, archive.parent)
    assert len(extracted) == 3
    pack(write_source(TINY, tmp_path / "other", seed=1), archive)
    assert not torch.equal(load(TINY, archive.parent).train_images, first.train_images)


def test_truncated_archive(archive: Path, cache: Path) -> None:
    os.truncate(archive, archive.stat().st_size // 2)
    assert failure(TINY, archive.parent).startswith(f"{archive}: damaged archive: ")
    assert not list(cache.rglob("*.bin"))


def test_archive_that_is_none(archive: Path) -> None:
    archive.write_text("<html>Not found</html>")
    assert failure(TINY, archive.parent).startswith(f"{archive}: damaged archive: ")


def test_archive_with_a_damaged_byte(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 0xFF
    archive.write_bytes(content)
    assert failure(TINY, archive.parent).startswith(f"{archive}: damaged archive: ")


def test_archive_with_a_short_file(archive: Path, tmp_path: Path) -> None:
    os.truncate(tmp_path / "made" / TINY.folder / "t.bin", 5)
    pack(tmp_path / "made" / TINY.folder, archive)
    assert failure(TINY, archive.parent) == (
        f"{archive}: member 'tiny-bin/t.bin' has 5 bytes, expected 9,219"
    )


def test_archive_without_a_file(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "made" / TINY.folder / "b.bin").unlink()
    pack(tmp_path / "made" / TINY.folder, archive)
    assert failure(TINY, archive.parent) == f"{archive}: no member tiny-bin/b.bin"


@pytest.mark.parametrize("name", ["../b.bin", "tiny-bin/../../b.bin", "/b.bin", "elsewhere/b.bin"])
def test_archive_with_a_member_outside_its_folder(name: str, archive: Path, cache: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert failure(TINY, archive.parent) == f"{archive}: member {name!r} lies outside tiny-bin"
    assert not list(cache.rglob("*.bin"))


def test_archive_with_a_link(archive: Path) -> None:
    member = tarfile.TarInfo("tiny-bin/a.bin")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member)
    assert failure(TINY, archive.parent) == (
        f"{archive}: member 'tiny-bin/a.bin' is not a plain file"
    )


def test_full_disk(archive: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    message = failure(TINY, archive.parent)
    assert message.startswith(f"cannot write to {cache}")
    assert "No space left on device; FREEZEOUT_CACHE names another folder" in message
    assert not [path for path in cache.rglob("*") if path.name.startswith(TINY.folder)]


def test_another_process_is_faster(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = archive.parent / "into"
    original = tarfile.TarFile.extract

    def overtaken(self: tarfile.TarFile, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        (into / TINY.folder).mkdir(exist_ok=True)
        (into / TINY.folder / "a.bin").write_text("the other's")

    monkeypatch.setattr(tarfile.TarFile, "extract", overtaken)
    sources._extract(archive, TINY, into)
    assert (into / TINY.folder / "a.bin").read_text() == "the other's"
    assert [path.name for path in into.iterdir()] == [TINY.folder]


# --- batches

Batch = tuple[Tensor, Tensor]
N = 53


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (N, 3, 32, 32), generator=seeded(1)).to(torch.uint8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epoch_of(images: Tensor, **changes: Any) -> Iterator[Batch]:
    """An epoch's batches; labels are the samples' numbers, mean 0 and std 1/255 keep the bytes."""
    arguments: dict[str, Any] = {
        "batch_size": 10,
        "seed": 3,
        "epoch": 5,
        "mean": (0.0, 0.0, 0.0),
        "std": (1 / 255, 1 / 255, 1 / 255),
        "augment": True,
        "flip": True,
        "channels_last": False,
    }
    labels = torch.arange(len(images), device=images.device)
    return batches(images, labels, **(arguments | changes))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def augmented(image: Tensor, down: int, right: int, mirror: bool) -> list[list[list[int]]]:
    """One image padded with 4 black pixels, cropped and mirrored, pixel by pixel."""
    source, out = image.tolist(), []
    for channel in range(3):
        rows = []
        for i in range(32):
            row = []
            for j in range(32):
                r, c = i + down - 4, j + right - 4
                inside = 0 <= r < 32 and 0 <= c < 32
                row.append(source[channel][r][c] if inside else 0)
            rows.append(row[::-1] if mirror else row)
        out.append(rows)
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_augmentation_is_pad_crop_flip(flip: bool, channels_last: bool, images: Tensor) -> None:
    """Every image is one of its 9 x 9 x (1 or 2) possible versions, bit for bit."""
    used = set()
    for x, y in epoch_of(images, flip=flip, channels_last=channels_last):
        for made, label in zip(x, y.tolist(), strict=True):
            # Found by its middle, which lies inside the image in every crop; then compared whole.
            padded = torch.nn.functional.pad(images[label], (4, 4, 4, 4)).float()
            version = next(
                (down, right, mirror)
                for down in range(9)
                for right in range(9)
                for mirror in (False, True)
                if torch.equal(
                    made.flip(2) if mirror else made,
                    padded[:, down : down + 32, right : right + 32],
                )
            )
            literal = torch.tensor(augmented(images[label], *version), dtype=torch.float32)
            torch.testing.assert_close(made.contiguous(), literal, atol=0, rtol=0)
            used.add(version)
    assert {down for down, _, _ in used} == {right for _, right, _ in used} == set(range(9))
    assert {mirror for _, _, mirror in used} == ({False, True} if flip else {False})


def test_versions_are_equally_likely() -> None:
    """9 x 9 crops and 2 mirrorings of one image, told apart by where a coordinate lands."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, 16, 16], image[1, 16, 17] = 255, 255
    x, _ = next(epoch_of(image.expand(16_200, 3, 32, 32), batch_size=16_200))
    first = x[:, 0].flatten(1).argmax(1)
    mirror = x[:, 1].flatten(1).argmax(1) < first
    counts = torch.zeros(32 * 32, 2)
    counts.index_put_((first, mirror.long()), torch.ones(()), accumulate=True)
    seen = counts[counts > 0]
    assert seen.shape == (9 * 9 * 2,)
    assert ((seen - 100).square() / 100).sum() < 161 + 4 * 2 * 161**0.5  # chi-squared


def test_without_augmentation_the_images_come_as_they_are(images: Tensor) -> None:
    for x, y in epoch_of(images, augment=False):
        assert torch.equal(x, images[y].float())


def test_order_is_the_same_with_and_without_augmentation(images: Tensor) -> None:
    plain, changed = epoch_of(images, augment=False), epoch_of(images)
    assert [y.tolist() for _, y in plain] == [y.tolist() for _, y in changed]


def test_each_sample_comes_once_and_the_last_batch_is_partial(images: Tensor) -> None:
    epoch = list(epoch_of(images))
    assert [len(x) for x, _ in epoch] == [len(y) for _, y in epoch] == [10, 10, 10, 10, 10, 3]
    order = torch.cat([y for _, y in epoch]).tolist()
    assert order != list(range(N))
    assert sorted(order) == list(range(N))


def test_an_epoch_is_a_function_of_seed_and_epoch(images: Tensor) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([y for _, y in epoch_of(images, seed=seed, epoch=epoch)]).tolist()

    assert equal(list(epoch_of(images)), list(epoch_of(images)))
    orders = [order(seed, epoch) for seed in (-1, 0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == 9


@pytest.mark.parametrize("start", range(7))
def test_start_resumes_bit_for_bit(start: int, images: Tensor) -> None:
    assert equal(list(epoch_of(images, start=start)), list(epoch_of(images))[start:])


def test_yielded_batches_are_not_overwritten(images: Tensor) -> None:
    kept = [(x, x.clone()) for x, _ in epoch_of(images)]
    assert all(torch.equal(x, copy) for x, copy in kept)


def test_global_random_state_is_neither_read_nor_changed(images: Tensor) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(epoch_of(images))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert equal(list(epoch_of(images)), first)


def test_normalisation(images: Tensor) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    whole, _ = next(epoch_of(images, batch_size=99, mean=mean, std=std, augment=False))
    _, y = next(epoch_of(images, batch_size=99, augment=False))
    m, s = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    torch.testing.assert_close(
        whole.double(), (images[y].double() / 255 - m) / s, atol=2e-6, rtol=0
    )


def test_normalised_digits_have_mean_0_and_std_1() -> None:
    data = load_data("digits")
    x, _ = next(
        eval_batches(
            data.train_images, data.train_labels, batch_size=9999, mean=data.mean, std=data.std
        )
    )
    torch.testing.assert_close(
        x.double().mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(x.double().std((0, 2, 3)), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_padding_is_black_before_normalising() -> None:
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    x, _ = next(epoch_of(white, batch_size=200, mean=mean, std=std))
    black = [-m / s for m, s in zip(mean, std, strict=True)]
    assert x.amin((0, 2, 3)).tolist() == pytest.approx(black, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool, images: Tensor) -> None:
    for augment in (False, True):
        epoch = epoch_of(images, dtype=dtype, channels_last=channels_last, augment=augment)
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        for x, _ in epoch:
            assert x.dtype == dtype
            assert x.is_contiguous(memory_format=wanted)


def test_memory_format_changes_no_value(images: Tensor) -> None:
    assert equal(list(epoch_of(images)), list(epoch_of(images, channels_last=True)))


def test_eval_batches_are_in_order_and_unchanged(images: Tensor) -> None:
    mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    made = list(eval_batches(images, torch.arange(N), batch_size=20, mean=mean, std=std))
    assert [len(x) for x, _ in made] == [20, 20, 13]
    assert torch.equal(torch.cat([x for x, _ in made]), images.float())
    assert torch.cat([y for _, y in made]).tolist() == list(range(N))


@pytest.mark.parametrize(("n", "size", "expected"), [(50, 10, 5), (53, 10, 6), (3, 10, 1)])
def test_num_batches(n: int, size: int, expected: int) -> None:
    assert num_batches(n, size) == expected


@pytest.mark.parametrize("size", [0, -1])
def test_bad_batch_size(size: int, images: Tensor) -> None:
    """Reported by the call, not by the first batch asked for."""
    match = re.escape(f"batch_size={size}; allowed: at least 1")
    with pytest.raises(InvalidValue, match=match):
        num_batches(10, size)
    with pytest.raises(InvalidValue, match=match):
        epoch_of(images, batch_size=size)
    with pytest.raises(InvalidValue, match=match):
        eval_batches(images, torch.arange(N), batch_size=size, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("start", [-1, 7])
def test_bad_start(start: int, images: Tensor) -> None:
    with pytest.raises(InvalidValue, match=rf"start={start}; allowed: 0\.\.6"):
        epoch_of(images, start=start)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_made_on_the_gpu(images: Tensor) -> None:
    state = torch.cuda.get_rng_state()
    on_gpu = images.cuda()
    whole = list(epoch_of(on_gpu))
    assert all(x.is_cuda and y.is_cuda for x, y in whole)
    assert equal(list(epoch_of(on_gpu, start=2)), whole[2:])
    assert sorted(torch.cat([y for _, y in whole]).tolist()) == list(range(N))
    for x, y in epoch_of(on_gpu, augment=False):
        assert torch.equal(x.cpu(), images[y.cpu()].float())
    for x, y in whole:
        padded = torch.nn.functional.pad(images[y.cpu()], (4, 4, 4, 4)).float()
        crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32)
        both = torch.stack([crops, crops.flip(5)])
        same = (both == x.cpu()[None, :, :, None, None]).flatten(5).all(-1).all(2)
        assert same.flatten(2).any(-1).any(0).all()
    assert torch.equal(torch.cuda.get_rng_state(), state)
