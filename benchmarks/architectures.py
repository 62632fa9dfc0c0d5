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
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType

import torch

import tests.conftest  # noqa: F401  (lets timm and torchvision be imported beside a CPU torch)
from freezeout import FreezeOutError
from freezeout.lab.device import hardware
from tests.architectures import Promise, check
from tests.zoo import Architecture, everything

SECONDS = 60  # a network's limit
ROOT = Path(__file__).parent.parent
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.architectures"


@dataclass
class Row:
    library: str
    family: str
    name: str
    verdict: str  # "ok", "refused: why" or "broken: what"
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
    row = Row(architecture.library, architecture.family, architecture.name, "ok")
    start = time.perf_counter()
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            report = check(*architecture.make())
        row = Row(row.library, row.family, row.name, "ok", **asdict(report))
    except FreezeOutError as error:
        row.verdict = f"refused: {error}"
    except Promise as error:
        row.verdict = f"broken: {error}"
    except Exception as error:
        row.verdict = f"broken: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        traceback.print_exc(limit=-3)
    row.seconds = time.perf_counter() - start
    return row


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


def versions() -> str:
    import timm
    import torchvision
    import transformers

    return (
        f"{hardware(torch.device('cpu'))}; torch {torch.__version__}, timm {timm.__version__}, "
        f"torchvision {torchvision.__version__}, transformers {transformers.__version__}"
    )


def counts(rows: list[Row]) -> str:
    kinds = [row.verdict.partition(":")[0] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("ok", "refused", "broken"))


def write(rows: list[Row], seconds: float) -> None:
    import timm

    missing = set(timm.list_modules()) - {row.family for row in rows if row.library == "timm"}
    head = [
        f"{len(rows)} networks: {counts(rows)}. {seconds:.0f} s in all.",
        f"timm's families without a network here: {', '.join(sorted(missing)) or 'none'}.",
        f"`{COMMAND}`; {versions()}.",
    ]
    results = ROOT / "results"
    results.mkdir(exist_ok=True)
    document = {"command": COMMAND, "environment": versions(), "seconds": round(seconds)}
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
    page = ROOT / "docs" / "architectures.md"
    before, begin, rest = page.read_text().partition("<!-- begin: generated -->\n")
    _, end, after = rest.partition("<!-- end: generated -->")
    tables = [f"{len(rows)} networks: {counts(rows)}. {versions().partition('; ')[2]}.\n"]
    for library, members in groupby(rows, lambda row: row.library):
        ordered = sorted(members, key=lambda row: (row.family, row.name))
        tables.append(f"### {library}\n\n{table(ordered)}\n")
    page.write_text(before + begin + "\n".join(tables) + end + after)


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = []
    for architecture in everything():
        if names and architecture.name not in names:
            continue
        rows.append(row := run(architecture))
        print(
            f"{row.library:12} {row.name:34} {len(row.layers):3} layers, find "
            f"{row.seconds_to_find:5.2f} s, {row.seconds:5.1f} s  {row.verdict}"
            + (f"  cut: {len(row.cut)}" if row.cut else "")
            + (f"  unused: {row.unused}" if row.unused else ""),
            flush=True,
        )
        if names:
            print(f"  {shortened(row.layers)}\n  cut: {row.cut}")
    print(counts(rows))
    if not names:
        write(rows, time.perf_counter() - start)
    return int(any(row.verdict.startswith("broken") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
