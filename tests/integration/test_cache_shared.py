"""Runs that share a cache's folder: at once, killed, of several models."""

import os
import random
from pathlib import Path

import pytest

from benchmarks.cache_shared import BOUND, difference, together, train
from freezeout.cache.files import contents


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_runs_on_one_folder_two_of_them_killed_are_those_without_a_cache(tmp_path: Path) -> None:
    """One round of `python -m benchmarks.cache_shared`, which makes twenty."""
    folder, rng = tmp_path / "cache", random.Random()
    first = rng.randrange(1000)
    seeds = [first, first + 1, first + 2, first + 3]
    logs, killed = together(folder, seeds, 2, rng)
    expected = {seed: train(seed, None)[0] for seed in seeds}
    for seed in seeds:
        assert difference(logs[seed], expected[seed]) <= BOUND, (seeds, killed)
    again = next(seed for seed in seeds if seed not in killed)
    losses, computed = train(again, folder)
    assert losses == pytest.approx(expected[again], rel=BOUND)
    assert computed == 0  # nothing is lost that was whole
    assert 4 <= len(contents(folder)) <= 2 * 4  # two models, four depths
