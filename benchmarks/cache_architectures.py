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
from dataclasses import dataclass

from tests.cached import Report, check
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


@dataclass
class Row(Tried):
    report: Report
    seconds: float

    @property
    def depths(self) -> str:
        tried = len(self.report.served) + len(self.report.refused)
        return f"{len(self.report.served)} of {tried}"


def run(architecture: Architecture) -> Row:
    report = Report(0)

    def attempt() -> str:
        nonlocal report
        report = check(*architecture.make())
        if not report.served:
            return f"refused: {_reason(report)}"
        if report.difference > 1e-5:
            return f"broken: differs by {report.difference:.1e} in other company"
        return "served"

    start = time.perf_counter()
    verdict = verdict_of(attempt)
    seconds = time.perf_counter() - start
    identity = architecture.library, architecture.family, architecture.name
    return Row(*identity, verdict, report, seconds)


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


def write(rows: list[Row]) -> None:
    parts = [f"{len(rows)} networks: {counts(rows, 'served')}. {versions()}.\n"]
    for library, its in by_library(rows):
        families = {row.family for row in its if row.verdict == "served"}
        parts.append(f"### {library}: {len(families)} families served\n\n{table(its)}\n")
    write_generated(DOCS / "cache.md", parts)


def main(names: list[str]) -> int:
    def say(row: Row) -> None:
        print(
            f"{row.library:12} {row.name:34} {row.depths:>7} of {row.report.layers:2} layers, "
            f"{row.report.difference:.1e}, {row.seconds:5.1f} s  {row.verdict}",
            flush=True,
        )
        if names or row.verdict == "served":
            for depth, why in row.report.refused.items():
                print(f"    {depth}: {why}")

    rows = try_all(names, run, say)
    print(counts(rows, "served"))
    if not names:
        write(rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
