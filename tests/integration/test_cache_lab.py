"""`freezeout train --cache`: the same run, faster; killed, resumed, with damaged files."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from freezeout.cache.files import contents
from freezeout.errors import InvalidValue
from freezeout.lab.config import TrainConfig
from freezeout.lab.data import batches, epoch_order
from freezeout.lab.job import Job
from freezeout.lab.ranks import Ranks
from tests.command import (
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    differences,
    options,
    read_rows,
    read_weights,
    run_here,
    run_process,
)

KILLED = -9
PLAIN: dict[str, Any] = {"augment": False, "cache_budget": "1G"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a cache in files, never interrupted."""
    home = tmp_path_factory.mktemp("reference")
    ended = run_process(*options(out=home / "run", cache=home / "cache", **PLAIN))
    assert (ended.status, ended.err) == (0, "")
    assert "cache: up to" in ended.out
    assert "freezeout cache list" in ended.out  # it stays there for others
    return home / "run"


def uncached(folder: Path) -> Path:
    """The same without a cache."""
    out = folder / "uncached"
    ended = run_process(*options(out=out, augment=False))
    assert (ended.status, ended.err) == (0, "")
    return out


def assert_close(folder: Path, reference: Path) -> None:
    """Losses to rounding, over four epochs in which samples meet others."""
    for mine, theirs in zip(read_rows(folder), read_rows(reference), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert mine["frozen_layers"] == theirs["frozen_layers"]


def test_a_cached_run_is_the_uncached_one_to_rounding(reference: Path, tmp_path: Path) -> None:
    plain = uncached(tmp_path)
    assert_close(reference, plain)
    rows = read_rows(reference)
    # The first layer freezes in the first epoch: what follows is stored, served and taken on.
    assert rows[0]["cache_hits"] == 0 < rows[0]["cache_misses"]
    assert rows[0]["cache_bypassed"] > 0 == rows[-1]["cache_bypassed"]
    assert sum(row["cache_hits"] for row in rows) > 0
    assert sum(row["cache_advanced"] for row in rows) > 0
    assert rows[-1]["cache_bytes"] > 0
    assert "cache_hits" not in read_rows(plain)[0]
    mine, theirs = read_weights(reference), read_weights(plain)
    assert all(torch.allclose(mine[k], theirs[k], rtol=0.05, atol=1e-2) for k in theirs)


def killed(tmp_path: Path, step: int, moment: str = "step") -> tuple[Path, Path]:
    out, cache = tmp_path / "run", tmp_path / "cache"
    ended = run_process(*options(out=out, cache=cache, **PLAIN), at=("SIGKILL", moment, step))
    assert ended.status == KILLED, ended.err
    assert contents(cache)
    return out, cache


def test_killed_runs_reuse_their_files_and_end_with_the_same_bits(
    reference: Path, tmp_path: Path
) -> None:
    """In the second and the fourth epoch, in which layers freeze."""
    for number in (1, 3):
        step = random.randint(number * STEPS_PER_EPOCH + 3, (number + 1) * STEPS_PER_EPOCH - 1)
        home = tmp_path / str(step)
        home.mkdir()
        out, _ = killed(home, step)
        ended = run_process("--resume", out)
        assert (ended.status, ended.err) == (0, ""), step
        assert differences_aside_from_counts(out, reference) == [], step


def differences_aside_from_counts(folder: Path, reference: Path) -> list[str]:
    """A resumed epoch finds samples stored that the first attempt at it had to compute."""
    return [each for each in differences(folder, reference) if "cache_" not in each]


def test_a_damaged_file_is_noticed_and_computed_anew(reference: Path, tmp_path: Path) -> None:
    out, cache = killed(tmp_path, 2 * STEPS_PER_EPOCH + 5)
    for path in cache.glob("*/*.bin"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            for place in range(0, size - 64, size // 50):
                file.seek(place)
                file.write(b"\x7f" * 64)
    ended = run_process("--resume", out)
    assert ended.status == 0
    assert "some stored activations are damaged" in ended.err
    assert_close(out, reference)


def test_a_cache_in_memory_is_rebuilt_on_resume(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    step = 2 * STEPS_PER_EPOCH + 5
    ended = run_process(*options(out=out, cache="ram", **PLAIN), at=("SIGKILL", "step", step))
    assert ended.status == KILLED
    ended = run_process("--resume", out)
    assert (ended.status, ended.err) == (0, "")
    assert_close(out, reference)


IMAGES = 1437


@pytest.mark.parametrize("views", [1, 2])
def test_with_layers_frozen_from_the_start_the_first_pass_stores(
    views: int, tmp_path: Path
) -> None:
    """The number of frozen layers does not change, so that all that comes back is read: with one
    view from the second epoch on, with two from the third. Killed there, it goes on alike."""
    words = {"frozen": 3, "t_0": 1, "dropout": 0, "cache_budget": "1G", "views": views}
    words |= {"augment": views > 1}
    outs = []
    for name in ("whole", "killed"):
        out, cache = tmp_path / name, tmp_path / f"{name}-cache"
        at = ("SIGKILL", "step", 2 * STEPS_PER_EPOCH + 7) if name == "killed" else None
        ended = run_process(*options(out=out, cache=cache, **words), at=at)
        assert ended.status == (KILLED if at else 0), ended.err
        outs.append(out)
    rows = read_rows(outs[0])
    assert [row["frozen_layers"] for row in rows] == [3] * len(rows)
    stored = [epoch < views for epoch in range(len(rows))]
    assert [row["cache_misses"] for row in rows] == [IMAGES * new for new in stored]
    assert [row["cache_hits"] for row in rows] == [IMAGES * (not new) for new in stored]
    assert {row["cache_bypassed"] for row in rows} == {row["cache_advanced"] for row in rows} == {0}
    ended = run_process("--resume", outs[1])
    assert (ended.status, ended.err) == (0, "")
    assert differences_aside_from_counts(outs[1], outs[0]) == []
    if views == 1:  # the images are those of a run without a cache
        plain = tmp_path / "plain"
        words |= {"views": None, "cache_budget": None}
        assert run_process(*options(out=plain, **words)).status == 0
        assert_close(outs[0], plain)


def test_views_come_back_and_are_random_before(tmp_path: Path) -> None:
    """Two runs with views, one killed: the same bits, so the same images."""
    outs = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        words = options(out=out, cache=tmp_path / f"{name}-cache", views=2, cache_budget="1G")
        at = ("SIGKILL", "step", TOTAL_STEPS - 10) if name == "killed" else None
        ended = run_process(*words, at=at)
        assert ended.status == (KILLED if at else 0)
        outs.append(out)
    assert run_process("--resume", outs[1]).status == 0
    assert differences_aside_from_counts(outs[1], outs[0]) == []
    rows = read_rows(outs[0])
    assert sum(row["cache_misses"] for row in rows) > len(range(64))
    config = TrainConfig(**_job_options(views=2, cache="ram"))
    job = Job(config)

    def images(epoch: int, view: int | None) -> torch.Tensor:
        x = torch.cat([x for x, _, _ in job.batches(epoch, 0, view)])
        return x[job.ids(epoch).argsort()]  # by sample

    assert torch.equal(images(2, 0), images(3, 0))  # a view is the same in every epoch
    assert not torch.equal(images(2, 0), images(2, 1))
    assert not torch.equal(images(2, None), images(3, None))


def _job_options(**changes: Any) -> dict[str, Any]:
    words = {"model": "wrn", "depth": 10, "widen_factor": 1, "dataset": "digits"}
    return {**words, "device": "cpu", "precision": "fp32", "epochs": 4, **changes}


def test_the_order_is_that_of_the_batches() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous()
    labels = torch.arange(10)
    seen = [
        y
        for _, y in batches(
            images,
            labels,
            batch_size=4,
            seed=3,
            epoch=2,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            augment=False,
            flip=False,
        )
    ]
    assert torch.equal(torch.cat(seen), epoch_order(10, 3, 2, torch.device("cpu")))


def test_mistakes_in_the_options_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"cache_budget": "lots"}, "cache_budget must be a number of bytes such as 500M or 8G"),
        ({"cache": "ram", "freezeout": False}, "cache needs freezeout"),
        ({"cache": "ram", "cache_dtype": "int8"}, "cache_dtype must be one of auto, fp32"),
        ({"cache": "ram", "views": 0}, "views must be at least 1"),
        ({"cache": str(tmp_path)}, "holds other files (mine.txt)"),
    ]
    for changes, said in mistakes:
        (tmp_path / "mine.txt").write_text("")
        ended = run_here(capsys, *options(out=tmp_path / "run", **changes))
        assert ended.status == 2
        assert said in ended.err
        assert len(ended.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_several_ranks_and_a_cache_are_refused() -> None:
    with pytest.raises(InvalidValue, match="cache='ram' is for one process, and this run has 2"):
        Job(TrainConfig(**_job_options(cache="ram")), Ranks(0, 2))


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
