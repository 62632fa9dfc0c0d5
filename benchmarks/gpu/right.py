"""The proofs on this machine's device: what is frozen does not move, what is trained equals a
reference; resumed runs, compiled ones, CUDA graphs, two ranks."""

import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from . import right_device, right_graphs, right_ranks
from .part import Case, Part, Row, Setup, Wrong
from .right_proofs import difference, exactly, matrix, row, user_loop

FINE, COARSE = 1e-5, 2e-2  # what may differ in fp32, and in TF32, bf16 and fp16


def cases(setup: Setup) -> list[Case]:
    """What is proven."""
    choices = matrix.CHOICES_ON_GPU if setup.on_gpu else matrix.CHOICES
    every = list(matrix.pairwise_cases(choices))
    if setup.tiny:
        every = every[::8]
    found = [
        Case(f"matrix, {precision}", partial(_matrix, setup.device, precision, group))
        for precision in choices["precision"]
        if (group := [case for case in every if case.precision == precision])
    ]
    names = list(user_loop.CONFIGURATIONS)
    stops = [7] if setup.tiny else [2, 7, 11, 14]
    found += [
        Case("synchronisations", partial(right_device.synchronisations, setup)),
        Case("memory returned", partial(right_device.memory_returned, setup)),
        *(
            Case(f"resume, {name}", partial(_resume, setup.device, name, stops))
            for name in (names[1:2] if setup.tiny else names)
        ),
        Case("two ranks", partial(right_ranks.two_ranks, setup)),
        *right_graphs.cases(setup),
    ]
    return found


def _matrix(device: torch.device, precision: str, group: Sequence[matrix.Case]) -> list[Row]:
    """One row. A case that is wrong is named; the others are still run."""
    equal, largest = 0, 0.0
    notes: list[str] = []
    wrong: list[str] = []
    for case in group:
        try:
            compared, with_kernels = exactly(partial(matrix.compare, case, device))
        except Exception as error:  # a choice that this torch refuses is named, too
            wrong.append(f"{case}: {type(error).__name__}: {error}")
            continue
        tensors = [(each.name, difference(each.ours, each.reference)) for each in compared]
        worst = max(share for _, share in tensors)
        equal, largest = equal + (worst == 0), max(largest, worst)
        if worst:
            first = next(name for name, share in tensors if share)
            notes.append(f"{case} differs by {worst:.2g} (first {first})")
        if not with_kernels:
            notes.append(f"{case} has no deterministic kernels")
        is_coarse = "16" in precision or precision == "tf32" or not case.is_exact
        if worst > (COARSE if is_coarse else FINE):
            wrong.append(f"{case} differs by {worst:.2g}")
    more = [f"and {len(notes) - 3} more"] if len(notes) > 3 else []
    note = "; ".join(notes[:3] + more) or None
    rows = [row(f"matrix, {precision}", len(group), equal, largest, note)]
    if wrong:
        print(*rows, *notes, sep="\n", flush=True)
        raise Wrong(f"{len(wrong)} of {len(group)} cases: {'; '.join(wrong)}")
    return rows


def _resume(device: torch.device, name: str, stops: Sequence[int]) -> list[Row]:
    """A whole run, beside runs that go on from what it saved: in new objects, and in some that
    stand elsewhere."""
    found, with_kernels = exactly(partial(_resumed, device, name, stops))
    if found:
        raise Wrong(f"resumed runs of {name!r} differ: {'; '.join(found)}")
    runs = 2 * len(stops)
    note = None if with_kernels else "without deterministic kernels"
    return [row(f"resume, {name}", runs, runs, 0.0, note)]


def _resumed(device: torch.device, name: str, stops: Sequence[int]) -> list[str]:
    configuration, total = user_loop.CONFIGURATIONS[name], user_loop.TOTAL
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {step: Path(folder) / f"{step}.pt" for step in (*stops, total)}
        whole = user_loop.Loop(configuration, device)

        def save(step: int) -> None:
            if step in files:
                whole.save(files[step])

        whole.train(total, save)
        expected = torch.load(files[total], weights_only=True)
        elsewhere = user_loop.Loop(configuration, device)
        elsewhere.train(5)
        shuffled = random.Random(0)
        for stop in stops:
            for other in (elsewhere, user_loop.Loop(configuration, device)):
                order = list(other.parts())
                shuffled.shuffle(order)
                other.load(files[stop], order)
                other.train(total)
                end = Path(folder) / "end.pt"
                other.save(end)
                parts = user_loop.differences(end, expected)
                found += [f"{part} from step {stop}" for part in parts]
    return found


PART = Part("right", "Proofs: frozen bits stay, trained ones are the reference's", cases)
