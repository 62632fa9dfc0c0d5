"""Which networks the cache serves: python -m benchmarks.cache_architectures

From the repository's root, with timm, torchvision and transformers installed (`make test` does
that). Names as arguments: only those, and nothing is written. Otherwise the table in
docs/cache.md is written anew.

Each network of the zoo is frozen in four moves; at each depth a stored batch is served, and
outputs, gradients and activations are compared with the real ones bit for bit. What the cache
refuses is listed with its reason. The exit status is 1 if any number is wrong.
"""

import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  (lets timm and torchvision be imported beside a CPU torch)
from freezeout import FreezeOutError
from tests.cached import Report, check
from tests.zoo import Architecture, everything

PAGE = Path(__file__).parent.parent / "docs" / "cache.md"


@dataclass
class Row:
    library: str
    family: str
    name: str
    verdict: str  # "served", "refused: why" or "broken: what"
    report: Report
    seconds: float

    @property
    def depths(self) -> str:
        tried = len(self.report.served) + len(self.report.refused)
        return f"{len(self.report.served)} of {tried}"


def run(architecture: Architecture) -> Row:
    start, report = time.perf_counter(), Report(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            report = check(*architecture.make())
        verdict = "served" if report.served else f"refused: {_reason(report)}"
        if report.served and report.difference > 1e-5:
            verdict = f"broken: differs by {report.difference:.1e} in other company"
    except FreezeOutError as error:
        verdict = f"refused: {error}"
    except Exception as error:
        verdict = f"broken: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        traceback.print_exc(limit=-3)
    seconds = time.perf_counter() - start
    return Row(
        architecture.library, architecture.family, architecture.name, verdict, report, seconds
    )


def _reason(report: Report) -> str:
    return next(iter(report.refused.values()), "it has one layer")


def table(rows: list[Row]) -> str:
    lines = [
        "| family | network | depths served | why not at the others |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        why = "; ".join(dict.fromkeys(row.report.refused.values()))
        if row.verdict != "served":
            why = row.verdict.partition(": ")[2]
        lines.append(f"| {row.family} | {row.name} | {row.depths} | {why} |")
    return "\n".join(lines)


def versions() -> str:
    names = ("torch", "timm", "torchvision", "transformers")
    return ", ".join(f"{name} {version(name)}" for name in names)


def counts(rows: list[Row]) -> str:
    kinds = [row.verdict.partition(":")[0] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("served", "refused", "broken"))


def write(rows: list[Row]) -> None:
    before, begin, rest = PAGE.read_text().partition("<!-- begin: generated -->\n")
    _, end, after = rest.partition("<!-- end: generated -->")
    parts = [f"{len(rows)} networks: {counts(rows)}. {versions()}.\n"]
    for library, members in groupby(rows, lambda row: row.library):
        chosen = sorted(members, key=lambda row: (row.family, row.name))
        families = {row.family for row in chosen if row.verdict == "served"}
        parts.append(f"### {library}: {len(families)} families served\n\n{table(chosen)}\n")
    PAGE.write_text(before + begin + "\n".join(parts) + end + after)


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    rows = []
    for architecture in everything():
        if names and architecture.name not in names:
            continue
        rows.append(row := run(architecture))
        print(
            f"{row.library:12} {row.name:34} {row.depths:>7} of {row.report.layers:2} layers, "
            f"{row.report.difference:.1e}, {row.seconds:5.1f} s  {row.verdict}",
            flush=True,
        )
        if names or row.verdict == "served":
            for depth, why in row.report.refused.items():
                print(f"    {depth}: {why}")
    print(counts(rows))
    if not names:
        write(rows)
    return int(any(row.verdict.startswith("broken") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
