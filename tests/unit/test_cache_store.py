"""The cache's parts by themselves: layouts, checksums, stores in memory and in files."""

import doctest
import errno
import gc
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import freezeout.cache.pays
from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.cache.files import FileStore, contents, remove
from freezeout.cache.inputs import Batch
from freezeout.cache.layout import Layout
from freezeout.cache.pays import survey
from freezeout.cache.placeholders import Placeholders
from freezeout.cache.planning import make_plan
from freezeout.cache.prefix import _padded
from freezeout.cache.store import Damaged, Store
from freezeout.errors import CacheError, InvalidValue
from tests.models import conv_net, linear_net

CPU = torch.device("cpu")


def ram(budget: int = 10**6) -> Store:
    return Store(8, budget, CPU, CPU)


def files(path: Path, budget: int = 10**6, weights: str = "weights") -> FileStore:
    store = FileStore(path, 8, budget, CPU)
    store.open_depth(2, weights, ["layout"], {"model": "Net", "layers": ["a", "b", "c"]})
    store.open_depth(3, weights, ["layout"])
    return store


def found(store: FileStore, depth: int = 2, inputs: Any = None) -> list[int]:
    """Which of the keys 0 ... 3 are held at that depth, of inputs 0 ... 3 unless told otherwise."""
    some = np.arange(4)
    assert not store.find(some, some if inputs is None else inputs, depth).any()
    return np.flatnonzero(store.depths(some) == depth).tolist()


def index_of(path: Path) -> Path:
    (file,) = path.glob("*/*.index")
    return file


def rows(count: int, size: int = 100, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator)


def keys(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


def fill(store: Store, depth: int = 2) -> Tensor:
    """Records for keys 0 ... 3, returned."""
    assert store.set_aside(keys(0, 1, 2, 3), [100] * 4, [100] * 4).all()
    store.write_rows(keys(0, 1, 2, 3), data := rows(4), depth, np.arange(4))
    return data


@pytest.mark.parametrize("kind", ["ram", "files"])
def test_records_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    store = ram() if kind == "ram" else files(tmp_path / "cache")
    store.reserve(8 * 128)
    data = fill(store)
    assert store.depths(keys(0, 3, 4)).tolist() == [2, 2, 0]
    assert torch.equal(store.read_rows(keys(3, 0)), data[[3, 0]])
    served = store.read_rows(keys(1))
    served.zero_()  # what is served is a copy
    assert torch.equal(store.read_rows(keys(1)), data[1:2])
    shorter = [torch.arange(5, dtype=torch.uint8), torch.arange(70, dtype=torch.uint8)]
    store.write(keys(2, 0), shorter, 3, np.zeros(2))
    assert all(map(torch.equal, store.read(keys(2, 0)), shorter))
    assert store.bytes_held == 275
    store.drop(keys(0))
    assert store.depths(keys(0, 2)).tolist() == [0, 3]


def test_what_does_not_fit_is_not_stored() -> None:
    store = ram(budget=300)
    store.reserve(8 * 128)
    assert store.set_aside(keys(0, 1, 2), [100] * 3, [100] * 3).tolist() == [True, True, False]
    # A record that outgrows its room takes new room, and is gone where there is none.
    assert store.set_aside(keys(0), [200], [200]).tolist() == [False]


def test_a_key_that_comes_twice_takes_room_once() -> None:
    store = ram(budget=300)
    store.reserve(8 * 128)
    assert store.set_aside(keys(5, 5, 5, 1), [100] * 4, [100] * 4).all()
    assert store.set_aside(keys(2), [100], [100]).tolist() == [False]


def test_another_process_goes_on_with_the_files(tmp_path: Path) -> None:
    store = files(tmp_path)
    data = fill(store)
    other = files(tmp_path)  # at the same time
    assert found(other) == [0, 1, 2, 3]
    assert torch.equal(other.read_rows(keys(3, 0, 1, 2)), data[[3, 0, 1, 2]])
    # What comes later is found when something is missed, and a deeper record comes first.
    store.write_rows(keys(1), rows(1, seed=1), 3, np.array([1]))
    assert found(other) == [0, 1, 2, 3]
    assert found(other, 3) == [1]
    assert torch.equal(other.read_rows(keys(1)), rows(1, seed=1))
    store.close()
    assert torch.equal(other.read_rows(keys(2)), data[2:3])


def test_other_weights_layouts_and_inputs_are_misses_and_lose_nothing(tmp_path: Path) -> None:
    store = files(tmp_path)
    data = fill(store)
    assert found(files(tmp_path, weights="others")) == []
    other = FileStore(tmp_path, 8, 10**6, CPU)
    other.open_depth(2, "weights")  # in any layout, until it is known
    assert found(other) == [0, 1, 2, 3]
    other.open_depth(2, "weights", ["other layout"])
    assert found(other) == []
    # A changed file, another tokenizer: its records stand beside the first ones.
    changed, mine = np.array([0, 1, 9, 3]), files(tmp_path)
    assert found(mine, inputs=changed) == [0, 1, 3]
    mine.write_rows(keys(2), rows(1, seed=1), 2, np.array([9]))
    for _ in range(2):
        first, second = files(tmp_path), files(tmp_path)
        assert found(first) == found(second, inputs=changed) == [0, 1, 2, 3]
        assert torch.equal(first.read_rows(keys(2)), data[2:3])
        assert torch.equal(second.read_rows(keys(2)), rows(1, seed=1))
    # In one process, a number stands for one input.
    assert mine.find(keys(2), keys(2), 2).tolist() == [True]


@pytest.mark.parametrize("damage", ["data", "index", "entry", "cut", "random", "zeros", "gone"])
def test_what_is_damaged_is_a_miss_and_the_rest_is_there(damage: str, tmp_path: Path) -> None:
    store = files(tmp_path)
    data = fill(store)
    store.close()
    index = index_of(tmp_path)
    held, whole = index.with_suffix(".bin"), index.read_bytes()
    if damage == "data":
        held.write_bytes(held.read_bytes()[:350])
    elif damage == "index":
        index.write_bytes(whole[:-1])
    elif damage == "entry":
        index.write_bytes(whole[:121] + b"\1" + whole[122:])  # of the last, which key it is of
    elif damage == "cut":
        held.unlink()
    elif damage == "random":
        index.write_bytes(random.Random(0).randbytes(len(whole)))
    elif damage == "zeros":
        index.write_bytes(bytes(len(whole)))
    else:
        index.unlink()
        (index.parent / "about.json").write_text("{")
    store = files(tmp_path)
    left = [0, 1, 2] if damage in ("data", "index", "entry") else []
    assert found(store) == left
    if left:
        assert torch.equal(store.read_rows(keys(*left)), data[left])
    assert torch.equal(fill(store), store.read_rows(keys(0, 1, 2, 3)))
    assert found(files(tmp_path)) == [0, 1, 2, 3]
    assert len(contents(tmp_path)) == 1


def test_a_changed_byte_is_noticed_and_another_record_of_it_found(tmp_path: Path) -> None:
    data = fill(files(tmp_path))
    (path,) = tmp_path.glob("*/*.bin")
    content = bytearray(path.read_bytes())
    content[250] ^= 1  # the third record's
    path.write_bytes(content)
    store = files(tmp_path)
    assert found(store) == [0, 1, 2, 3]
    with pytest.raises(Damaged):
        store.read_rows(keys(1, 2, 3))
    assert found(store) == [0, 1, 3]
    assert torch.equal(store.read_rows(keys(1, 3)), data[[1, 3]])
    store.write_rows(keys(2), data[2:3], 2, np.array([2]))
    store = files(tmp_path)
    for _ in range(2):
        assert found(store) == [0, 1, 2, 3]
        try:
            assert torch.equal(store.read_rows(keys(2)), data[2:3])
        except Damaged:
            continue
    assert torch.equal(store.read_rows(keys(2)), data[2:3])


def test_depths_in_turn_are_found_again_and_not_stored_again(tmp_path: Path) -> None:
    """Batches of one kind may be served at a depth that others are not."""
    store, sizes = files(tmp_path), []
    for _ in range(4):
        for depth in (2, 3):
            missing = [key for key in range(4) if key not in found(store, depth)]
            if missing:
                data = rows(4, seed=depth)[missing]
                store.write_rows(keys(*missing), data, depth, keys(*missing))
            assert torch.equal(store.read_rows(keys(0, 1, 2, 3)), rows(4, seed=depth))
        sizes.append(store.bytes_set_aside)
    assert sizes[1] == sizes[2] == sizes[3] <= 3 * 4 * 140 + 200
    assert found(files(tmp_path), 2) == found(files(tmp_path), 3) == [0, 1, 2, 3]


def test_a_fork_writes_files_of_its_own(tmp_path: Path) -> None:
    store = files(tmp_path)
    fill(store)
    if (child := os.fork()) == 0:
        store.write_rows(keys(4), rows(1, seed=4), 2, keys(4))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.write_rows(keys(5), rows(1, seed=5), 2, keys(5))
    other = files(tmp_path)
    assert not other.find(keys(4, 5), keys(4, 5), 2).any()
    assert torch.equal(other.read_rows(keys(4)), rows(1, seed=4))
    assert torch.equal(other.read_rows(keys(5)), rows(1, seed=5))


def test_what_another_process_stored_can_be_distrusted(tmp_path: Path) -> None:
    mine, other, reader = files(tmp_path), files(tmp_path), files(tmp_path)
    data = fill(other)
    mine.write_rows(keys(0), data[:1], 2, keys(0))
    assert found(reader) == [0, 1, 2, 3]
    assert mine.strangers(keys(0)) == []
    first, second = reader.strangers(keys(0)), reader.strangers(keys(1, 2))
    reader.trust(first)
    assert reader.strangers(keys(0)) == []
    for each in {*first, *second} - {*first}:
        reader.distrust([each])
        assert found(reader) in ([0], [])


_WRITER = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_cache_store import files, keys, rows
import numpy as np
store = files(Path(sys.argv[1]))
writes, left = os.pwrite, int(sys.argv[2])
def pwrite(*args):
    global left
    left -= 1
    if left == 0:
        writes(args[0], args[1][:50], args[2])  # part of a record, or of its entries
        os.kill(os.getpid(), signal.SIGKILL)
    return writes(*args)
os.pwrite = pwrite
for first in (0, 2):
    some = keys(first, first + 1)
    store.write_rows(some, rows(4)[some], 2, some)
"""


@pytest.mark.parametrize(("place", "left"), [(2, []), (3, [0]), (5, [0, 1]), (6, [0, 1, 2])])
def test_a_process_killed_while_it_writes_leaves_whole_records(
    place: int, left: list[int], tmp_path: Path
) -> None:
    ended = subprocess.run([sys.executable, "-c", _WRITER, str(tmp_path), str(place)])
    assert ended.returncode == -9
    store = files(tmp_path)
    assert found(store) == left
    if left:
        assert torch.equal(store.read_rows(keys(*left)), rows(4)[left])


def test_what_a_folder_holds_is_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(files(folder))
    fill(files(folder))
    files(folder, weights="others").write_rows(keys(5), rows(1), 2, keys(5))
    held = contents(folder)
    assert sorted(each.samples for each in held) == [1, 4]
    assert held[0].about == {"model": "Net", "layers": ["a", "b", "c"]}
    assert "samples, " in str(held[0])
    assert str(held[0]).endswith("of the first 2 layers of Net, up to b")
    assert sum(each.bytes for each in held) > 900
    with pytest.raises(InvalidValue, match="2 keys in"):
        remove(folder, [""])
    with pytest.raises(InvalidValue, match="no key in"):
        remove(folder, ["x"])
    store = files(folder)
    assert found(store) == [0, 1, 2, 3]
    assert remove(folder, [held[0].key[:12]]) == held[:1]
    assert contents(folder) == held[1:]
    remove(folder)
    assert not folder.exists()
    fill(store)  # goes on
    with pytest.raises(InvalidValue, match="holds other files"):
        files(tmp_path)


def test_the_command_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from freezeout.cli import main

    def run(*words: object) -> tuple[Any, str, str]:
        try:
            main(["cache", *map(str, words)])
            status: Any = 0
        except SystemExit as end:
            status = end.code
        return (status, *capsys.readouterr())

    folder = tmp_path / "cache"
    fill(files(folder))
    (key,) = (each.key for each in contents(folder))
    status, out, err = run("list", folder)
    assert (status, err) == (0, "")
    assert out.startswith(f"{key}: 4 samples, ")
    assert "first 2 layers of Net, up to b" in out
    assert "held under 1 key\n" in out
    (tmp_path / "mine.txt").write_text("")
    for words, said in (
        (("list", tmp_path / "none"), "there is no folder"),
        (("remove", tmp_path), "holds other files (cache)"),
        (("remove", folder, "--key", "x"), "no key in"),
    ):
        status, out, err = run(*words)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert said in err
    assert run("remove", folder, "--key", key[:6])[0] == 0
    assert contents(folder) == []
    assert run("remove", folder)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["mine.txt"]


def trained(cache: PrefixCache, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.train()
    return [cache(x[i : i + 4], ids=range(i, i + 4)) for i in (0, 4)]


def frozen(depth: int = 2) -> tuple[nn.Module, FreezeOut, Tensor]:
    torch.manual_seed(0)
    model, x = linear_net(), torch.randn(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, schedule=Frozen(depth), example_inputs=x)
    return model, freezer, x


@pytest.mark.parametrize("moment", ["mkdir", "pwrite", "replace"])
def test_a_disk_that_fills_up_does_not_stop_training(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, freezer, x = frozen()
    cache = PrefixCache(freezer, 8, where=tmp_path / "cache", depths="all", budget=10**6)
    expected = [model(x[:4]), model(x[4:])]
    monkeypatch.setattr(os, moment, full)
    with pytest.warns(UserWarning, match="cannot write to the cache: the disk is full"):
        outputs = trained(cache, model, x)
    assert all(map(torch.equal, outputs, expected))
    assert all(map(torch.equal, trained(cache, model, x), expected))
    assert cache.stats.hits == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot use .*file/cache for the cache"):
        files(tmp_path / "file" / "cache")


def test_runs_share_a_folder_where_weights_and_options_are_alike(tmp_path: Path) -> None:
    def run(change: Any = None) -> tuple[int, int]:
        model, freezer, x = frozen()
        if change is not None:
            change(model)
        cache = PrefixCache(freezer, 8, where=tmp_path / "cache", depths="all", budget=10**6)
        outputs = trained(cache, model, x)
        assert all(map(torch.equal, outputs, [model(x[:4]), model(x[4:])]))
        return cache.stats.hits, cache.stats.misses

    def weights(model: nn.Module) -> None:
        next(model.parameters()).data[0, 0] += 1e-3

    def options(model: nn.Module) -> None:
        next(model.children()).option = 3  # type: ignore[assignment]

    assert run() == (0, 8)
    assert run() == (8, 0)
    assert run(weights) == (0, 8)
    assert run(options) == (0, 8)
    assert run() == (8, 0)
    assert len(contents(tmp_path / "cache")) == 3


def test_a_model_that_computes_otherwise_with_the_same_weights_is_noticed(tmp_path: Path) -> None:
    """What its code does is in no fingerprint: what others stored is compared before it counts."""

    def run(factor: float) -> PrefixCache:
        model, freezer, x = frozen()
        first = next(model.children())
        first.forward = lambda x, own=first.forward: own(x) * factor
        cache = PrefixCache(freezer, 8, where=tmp_path / "cache", depths="all", budget=10**6)
        for _ in range(2):
            outputs = trained(cache, model, x)
            assert all(map(torch.equal, outputs, [model(x[:4]), model(x[4:])]))
        return cache

    run(1.0)
    with pytest.warns(UserWarning, match="what another run has stored is left alone"):
        cache = run(2.0)
    assert (cache.stats.hits, cache.stats.misses) == (8, 8)
    assert cache.off is None


def test_layouts_keep_the_order_in_memory() -> None:
    model = conv_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, schedule=Frozen(1), example_inputs=x)
    batch = Batch((x,), {}, 4)
    plan = make_plan(model, freezer.layers, 1, batch, Placeholders())
    layout = Layout(plan, batch, None)
    (real,) = plan.prefix(batch)
    (back,) = layout.from_rows(layout.to_rows([real]))
    assert torch.equal(back, real)
    assert back.stride() == real.stride()
    assert layout.bytes_of(0) == 4 * 4 * 36


def test_checksums_tell_samples_apart_and_do_not_depend_on_company() -> None:
    x = torch.randn(6, 3, 40, 40)
    sums = Batch((x,), {}, 6).checksums()
    assert len(set(sums.tolist())) == 6
    assert Batch((x[[4, 1]],), {}, 2).checksums().tolist() == sums[[4, 1]].tolist()
    swapped = x.clone()
    swapped[0] = x[0].flip(2)
    assert Batch((swapped,), {}, 6).checksums()[0] != sums[0]


def test_checksums_cover_every_pixel_of_a_small_image() -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = Batch((x,), {}, 2).checksums()
    for place in range(0, 3 * 32 * 32, 13):
        changed = x.clone()
        changed[1].view(-1)[place] += 1
        assert list(Batch((changed,), {}, 2).checksums() == expected) == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksums_notice_signs(dtype: torch.dtype) -> None:
    """The highest bits, which carry into none: equal changes of two must not cancel out."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = {int(Batch((x,), {}, 1).checksums()[0]), int(Batch((-x,), {}, 1).checksums()[0])}
    for first in range(0, 64, 2):
        changed = x.clone()
        changed.view(-1)[first : first + 2] *= -1
        sums.add(int(Batch((changed,), {}, 1).checksums()[0]))
    assert len(sums) == 2 + 32


@pytest.mark.parametrize("size", [32, 224])
def test_checksums_do_not_depend_on_the_layout_in_memory(size: int) -> None:
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    expected = Batch((x,), {}, 3).checksums().tolist()
    assert Batch((last,), {}, 3).checksums().tolist() == expected


def test_checksums_of_large_images_look_everywhere() -> None:
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = Batch((x,), {}, 1).checksums()
    for channel in range(3):
        for corner in range(0, 224, 16):
            changed = x.clone()
            changed[0, channel, corner : corner + 16, 224 - 16 - corner : 224 - corner] += 1
            assert Batch((changed,), {}, 1).checksums() != expected


def test_checksums_leave_padding_and_labels_out() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = (tokens > 0).long()

    def sums(width: int, label: int) -> list[int]:
        kwargs = {"input_ids": tokens[:, :width], "attention_mask": mask[:, :width]}
        batch = Batch((), kwargs | {"labels": torch.full((2,), label)}, 2)
        assert batch.lengths is not None
        assert batch.lengths.tolist() == [3, 2]
        return list(batch.checksums().tolist())

    assert sums(4, 0) == sums(3, 1)


def test_sizes_at_every_depth_are_known_before_anything_is_frozen() -> None:
    torch.manual_seed(0)
    model, x = conv_net(), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, example_inputs=x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = survey(model, freezer.layers, Batch((x,), {}, 4), CPU)
    assert [found.bytes_at(k, None) for k in range(4)] == [None, 576, 576, 16]  # pooled
    assert found.bytes_at(1, torch.bfloat16) == 288
    assert found.seconds == sorted(found.seconds)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training


def test_what_was_decided_is_saved_and_of_the_same_layers_only() -> None:
    _, freezer, x = frozen(depth=1)
    cache = PrefixCache(freezer, 8, depths="all")
    assert cache.depths is None
    cache.prepare(x[:4])
    assert cache.depths == [1, 2, 3]
    other = PrefixCache(freezer, 8)
    other.load_state_dict(cache.state_dict())
    assert other.depths == [1, 2, 3]
    with pytest.raises(ValueError, match="other layers"):
        other.load_state_dict(cache.state_dict() | {"layers": ["a"]})
    with pytest.raises(ValueError, match="no PrefixCache state"):
        other.load_state_dict({})


def test_the_break_even_is_as_its_examples_say() -> None:
    result = doctest.testmod(freezeout.cache.pays)
    assert (result.failed, result.attempted) == (0, 6)


@pytest.mark.parametrize(("total", "samples"), [(100, 8 * 50), (1000, 8 * 500)])
def test_nothing_is_measured_where_samples_do_not_come_back(
    total: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer freezes at 51 % of the steps: from there on less than one epoch is left."""
    model, x = linear_net(), torch.randn(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, total, example_inputs=x)
    monkeypatch.setattr("freezeout.cache.depths.survey", None)  # it would fail
    cache = PrefixCache(freezer, samples)
    with pytest.warns(UserWarning, match="samples do not come back once layers are frozen"):
        cache.prepare(x)
    assert cache.depths == []
    # Where layers are frozen already, all steps are left.
    freezer.load_state_dict(freezer.state_dict() | {"changes": [[0, 1]]})
    with pytest.raises(TypeError):
        PrefixCache(freezer, samples).prepare(x)


def test_groups_have_few_sizes() -> None:
    for size in (1, 5, 8, 50, 256):
        sizes = set()
        for count in range(1, size + 1):
            rows = np.arange(count) * 3
            padded = _padded(rows, size)
            assert padded[:count].tolist() == rows.tolist()
            assert set(padded[count:]) <= {rows[-1]}
            sizes.add(len(padded))
        assert max(sizes) <= size
        assert len(sizes) <= 8


def test_a_cache_that_would_not_pay_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freezeout.cache.depths.measure_store", lambda *args: (1.0, 1.0, 1.0))
    model, freezer, x = frozen()
    cache = PrefixCache(freezer, 8, depths="auto")
    with pytest.warns(UserWarning, match="would not save time here: (storing|reading)"):
        outputs = trained(cache, model, x)
    assert torch.equal(outputs[0], model(x[:4]))
    assert (cache.stats.bypassed, cache.depths) == (8, [])


def test_samples_come_back_as_often_when_a_step_takes_several_batches() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 3, schedule=Frozen(1), layers=list(model))
    for accumulate, visits in ((1, 1), (2, 3)):  # of 8 samples, in batches of 4
        cache = PrefixCache(freezer, 8, accumulate=accumulate)
        found = cache._depths._visits(Batch((x[:4],), {}, 4), cache._activations.store)
        assert found[1] == visits


def test_a_cache_says_what_it_keeps_what_that_saved_and_why_not_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(400, 400) for _ in range(5))), torch.randn(8, 400)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = FreezeOut(model, optimizer, 100, schedule=Frozen(4), example_inputs=x)
    cache = PrefixCache(freezer, 10, where=tmp_path, depths="all", budget=10**6)
    assert str(cache) == f"<cache in {tmp_path}: nothing of 10 samples>"
    for _ in range(3):
        trained(cache, model, x)
    cache.stats.take()  # the summary is of the whole run
    held = f"cache in {tmp_path}: what the first 4 of 5 layers give of 8 of 10 samples, 12.5 KiB"
    assert cache.summary().startswith(f"{held}; served 16 times; ")
    assert re.search(r"s saved \(.* s of frozen layers not computed, less .* s of", repr(cache))
    assert cache.summary() in freezer.summary()
    budget = PrefixCache(freezer, 10, depths="all", budget=1600 * 5)
    with pytest.warns(UserWarning, match="budget of 8,000 bytes is used up with 4 of 10 samples"):
        trained(budget, model, x)
    assert "further ones are computed anew each time, 1,600 bytes each" in budget.summary()
    assert cache.num_held == 8
    del budget
    gc.collect()
    assert "8,000" not in freezer.summary()
