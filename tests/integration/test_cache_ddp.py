"""The cache on several processes: each holds its own samples, and gives the numbers of a run
without."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.cache_ddp_runs import BATCH, EPOCHS, SAMPLES, Net, dataset, plain
from tests.integration.processes import torchrun


def ranks(kind: str, folder: Path) -> list[dict[str, Any]]:
    """On each of two ranks what a run gave, "True" with the cache and "False" without."""
    ended = torchrun("-m", "tests.integration.cache_ddp_runs", kind, folder / "found")
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"found.{rank}", weights_only=True) for rank in range(2)]


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Samples are served beside others than those they were computed with."""
    return all(
        (a - b).norm() <= 1e-5 * b.norm()
        for a, b in zip(ours.values(), theirs.values(), strict=True)
        if b.is_floating_point()
    )


@pytest.mark.parametrize("kind", ["loop", "accelerate", "lightning", "transformers"])
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    if kind in ("accelerate", "transformers"):
        pytest.importorskip("accelerate")
    if kind == "lightning":
        pytest.importorskip("lightning.pytorch")
    found = ranks(kind, tmp_path)
    for rank in found:
        cached, without = rank["True"], rank["False"]
        assert cached["ids"] == without["ids"]
        assert cached["losses"] == pytest.approx(without["losses"], rel=1e-5)
        assert close(cached["weights"], without["weights"])
        assert cached["refusals"] == []
        hits, misses = cached["hits, misses"]
        samples = 10 if kind == "transformers" else SAMPLES // 2
        assert misses == samples
        # Lightning's adapter sees in the first step what is to be served.
        assert hits == (EPOCHS - 1) * samples - (BATCH if kind == "lightning" else 0)
    if kind == "transformers":
        return
    seen = []
    for rank in found:
        batches = rank["True"]["ids"]
        steps = len(batches) // EPOCHS
        epochs = [batches[i : i + steps] for i in range(0, len(batches), steps)]
        orders = [[number for batch in epoch for number in batch] for epoch in epochs]
        assert orders[0] != orders[1] != orders[2]
        assert set(orders[0]) == set(orders[1]) == set(orders[2])
        seen.append(set(orders[0]))
    assert seen[0] | seen[1] == set(range(SAMPLES))
    assert not seen[0] & seen[1]


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    """The loss is a mean, and both ranks have batches of one size: together they make the step
    that one process makes of both batches."""
    found = ranks("loop", tmp_path)
    x, y = dataset().tensors
    numbers = [
        torch.tensor(a + b)
        for a, b in zip(found[0]["True"]["ids"], found[1]["True"]["ids"], strict=True)
    ]
    steps = len(numbers) // EPOCHS

    def batches(epoch: int) -> Any:
        for ids in numbers[epoch * steps : (epoch + 1) * steps]:
            yield (x[ids], y[ids]), ids

    one = plain(False, batches, lambda net: net, Net())
    both = [rank["True"]["losses"] for rank in found]
    mean = [(a + b) / 2 for a, b in zip(*both, strict=True)]
    assert mean == pytest.approx(one.losses, rel=1e-5)
    assert close(found[0]["True"]["weights"], one.net.state_dict())


def test_a_model_that_talks_to_other_ranks_is_left_alone(tmp_path: Path) -> None:
    """A check is of one rank's batch alone: one that waited for the others would never end."""
    for rank in ranks("collective", tmp_path):
        cached, without = rank["True"], rank["False"]
        (refusal,) = cached["refusals"]
        assert "sends something to other processes" in refusal
        assert cached["losses"] == without["losses"]
        for name, weight in without["weights"].items():
            assert torch.equal(cached["weights"][name], weight)


def test_the_example() -> None:
    ended = torchrun("examples/ddp_cache.py")
    assert ended.returncode == 0, ended.stderr
    lines = sorted(line for line in ended.stdout.splitlines() if line.startswith("rank "))
    assert len(lines) == 2
    for line in lines:
        assert "the first 3 of 5 layers give of 899 of 1,797 samples" in line
        assert f"served {9 * 899:,} times" in line
