"""One short FreezeOut run of every architecture in the zoo: python -m benchmarks.architectures

From the repository's root, with timm, torchvision and transformers installed (`make test` does
that). Names as arguments: only those, and nothing is written. Otherwise results/architectures.json
and .md, and the table in docs/architectures.md, are written anew.

Every promise that `tests/architectures.py` lists is checked on each network; one that the library
refuses is listed with the library's own words. The exit status is 1 if any promise is broken.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch

from freezeout.lab.device import hardware
from tests.architectures import check
from tests.zoo import Architecture

from .zoo_page import (
    DOCS,
    Tried,
    by_library,
    counts,
    exit_status,
    try_all,
    verdict_of,
    versions,
    write_generated,
)

SECONDS = 60  # a network's limit
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.architectures"


@dataclass
class Row(Tried):
    layers: list[str] = field(default_factory=list)
    parameters: int = 0
    cut: list[str] = field(default_factory=list)
    unused: int = 0
    seconds_to_find: float = 0.0
    seconds: float = 0.0


class OutOfTime(Exception):
    pass


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run(architecture: Architecture) -> Row:
    found: dict[str, Any] = {}

    def attempt() -> str:
        with time_limit(SECONDS):
            found.update(asdict(check(*architecture.make())))
        return "ok"

    start = time.perf_counter()
    verdict = verdict_of(attempt)
    seconds = time.perf_counter() - start
    identity = architecture.library, architecture.family, architecture.name
    return Row(*identity, verdict, **found, seconds=seconds)


def shortened(names: list[str]) -> str:
    """Layers' names, runs that differ in one number written as a range.

    >>> shortened(["stem", "blocks.0", "blocks.1", "blocks.2", "head"])
    'stem, blocks.0-2, head'
    """
    runs: list[tuple[str, list[str]]] = []  # what stands before the numbers, and they
    for name in names:
        *_, number = re.finditer(r"\d+", name) if re.search(r"\d", name) else [None]
        if number is not None and runs:
            rest = f"{name[: number.start()]}#{name[number.end() :]}"
            if runs[-1][0] == rest and int(runs[-1][1][-1]) + 1 == int(number[0]):
                runs[-1][1].append(number[0])
                continue
        if number is None:
            runs.append((name, [""]))
        else:
            runs.append((f"{name[: number.start()]}#{name[number.end() :]}", [number[0]]))
    return ", ".join(
        pattern.replace("#", numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
        for pattern, numbers in runs
    )


def table(rows: list[Row]) -> str:
    lines = ["| family | network | layers | which |", "| --- | --- | ---: | --- |"]
    for row in rows:
        which = shortened(row.layers) if row.verdict == "ok" else row.verdict
        lines.append(f"| {row.family} | {row.name} | {len(row.layers) or ''} | {which} |")
    return "\n".join(lines)


def environment() -> str:
    return f"{hardware(torch.device('cpu'))}; {versions()}"


def write(rows: list[Row], seconds: float) -> None:
    import timm

    missing = set(timm.list_modules()) - {row.family for row in rows if row.library == "timm"}
    head = [
        f"{len(rows)} networks: {counts(rows, 'ok')}. {seconds:.0f} s in all.",
        f"timm's families without a network here: {', '.join(sorted(missing)) or 'none'}.",
        f"`{COMMAND}`; {environment()}.",
    ]
    results = DOCS.parent / "results"
    results.mkdir(exist_ok=True)
    document = {"command": COMMAND, "environment": environment(), "seconds": round(seconds)}
    for row in rows:
        row.seconds, row.seconds_to_find = round(row.seconds, 2), round(row.seconds_to_find, 3)
    (results / "architectures.json").write_text(
        json.dumps(document | {"networks": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    lines = ["# One FreezeOut run of each architecture", "", *head, ""]
    lines += [
        "Layers: how many were found. Find: seconds to find them beyond the forward pass. Run: "
        "seconds of all the checks. Cut: parameters that a frozen layer uses as well as a later "
        "one, whose earlier use has no gradient any more. Unused: parameters that a forward pass "
        "in evaluation mode does not use; they go with the last layer.",
        "",
        "| library | network | parameters | layers | find | run | cut | unused | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.library} | {row.name} | {row.parameters / 1e6:.2f} M | {len(row.layers)} "
            f"| {row.seconds_to_find:.2f} | {row.seconds:.1f} | {len(row.cut) or ''} "
            f"| {row.unused or ''} | {row.verdict} |"
        )
    (results / "architectures.md").write_text("\n".join(lines) + "\n")
    parts = [f"{len(rows)} networks: {counts(rows, 'ok')}. {versions()}.\n"]
    parts += [f"### {library}\n\n{table(its)}\n" for library, its in by_library(rows)]
    write_generated(DOCS / "architectures.md", parts)


def main(names: list[str]) -> int:
    start = time.perf_counter()

    def say(row: Row) -> None:
        print(
            f"{row.library:12} {row.name:34} {len(row.layers):3} layers, find "
            f"{row.seconds_to_find:5.2f} s, {row.seconds:5.1f} s  {row.verdict}"
            + (f"  cut: {len(row.cut)}" if row.cut else "")
            + (f"  unused: {row.unused}" if row.unused else ""),
            flush=True,
        )
        if names:
            print(f"  {shortened(row.layers)}\n  cut: {row.cut}")

    rows = try_all(names, run, say)
    print(counts(rows, "ok"))
    if not names:
        write(rows, time.perf_counter() - start)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
