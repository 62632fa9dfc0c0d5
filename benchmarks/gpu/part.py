"""What the parts of `benchmarks.gpu` share: cases that are run one by one, each result written at
once, so that a part that is stopped goes on where it was."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freezeout.atomic import write_atomically
from freezeout.lab.device import hardware, versions

Row = dict[str, Any]  # plain values, for JSON and for a line of a table
Rows = Mapping[str, Sequence[Row]]  # by case


@dataclass(frozen=True)
class Setup:
    """What a part is asked for.

    Attributes:
        device: to measure on.
        tiny: a few seconds' work on a CPU, to see that everything still runs.
        out: the folder of results.
        data: CIFAR-10 as JPEG, one .npz file; None: images are made up, or left out.
        deadline: of `time.monotonic()`; who takes long in one case stops there.
    """

    device: torch.device
    tiny: bool
    out: Path
    data: Path | None
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Case:
    """One measurement; its rows say what it is of."""

    name: str
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Part:
    """Cases that answer one question.

    Attributes:
        name: of the part and of its files.
        title: of its table.
        cases: what is measured.
        table: rows as Markdown; None: a column for each key of a row.
    """

    name: str
    title: str
    cases: Callable[[Setup], list[Case]]
    table: Callable[[Rows], str] | None = None


class Unfinished(Exception):
    """A case stopped at the deadline, and will go on from what it has kept."""


class Wrong(Exception):
    """What was to be proven is not so."""


def run_part(part: Part, setup: Setup) -> tuple[int, int]:
    """Run what has not been run yet until the deadline; returns how many cases failed, and how
    many are left. Results of another machine, or of other versions, are begun anew."""
    file = setup.out / f"{part.name}.json"
    found = _read(file)
    stamp = {"device": hardware(setup.device), "tiny": setup.tiny, **versions()}
    if found.get("environment") != stamp:
        found = {"environment": stamp, "cases": {}}
    done: dict[str, Row] = found["cases"]
    cases = part.cases(setup)
    left = [case for case in cases if "rows" not in done.get(case.name, {})]
    print(f"== {part.name}: {len(cases)} cases, {len(left)} to run", flush=True)
    while left and time.monotonic() < setup.deadline:
        case = left.pop(0)
        begin = time.perf_counter()
        try:
            result: Row = {"rows": case.run()}
        except Unfinished as stop:
            print(f"{case.name}: {stop}", flush=True)
            left.append(case)
            break
        except Exception as error:  # the other cases are still worth having
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - begin
        done[case.name] = {**result, "seconds": round(seconds, 1)}
        write_atomically(file, json.dumps(found, indent=1) + "\n")
        said = result.get("error") or "; ".join(_line(row) for row in result["rows"][-4:])
        print(f"{case.name} ({seconds:.1f} s): {said}", flush=True)
        _free(setup.device)
    names = {case.name for case in cases}
    failed = {k: v["error"] for k, v in done.items() if "error" in v and k in names}
    rows = {
        case.name: done[case.name]["rows"] for case in cases if "rows" in done.get(case.name, {})
    }
    write_atomically(setup.out / f"{part.name}.md", _page(part, stamp, rows, failed, len(left)))
    return len(failed), len(left)


def tables_of(rows: Sequence[Row]) -> str:
    """A line for each row, a table for those that have the same columns."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row), []).append(row)
    tables = []
    for columns, those in alike.items():
        lines = [list(columns), ["---"] * len(columns)]
        lines += [[_text(value) for value in row.values()] for row in those]
        tables.append("".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "\n".join(tables)


def _page(part: Part, stamp: Row, rows: Rows, failed: Mapping[str, str], left: int) -> str:
    every = [row for case in rows.values() for row in case]
    body = part.table(rows) if part.table is not None else tables_of(every)
    packages = ", ".join(f"{k} {v}" for k, v in stamp.items() if k not in ("device", "tiny"))
    text = f"## {part.title}\n\n{stamp['device']}; {packages}.\n"
    text += "Tiny sizes: no figure of a machine.\n" if stamp["tiny"] else ""
    text += f"\n{body}" if every else ""
    text += "".join(f"\n- {name}: failed: {_first(error)}" for name, error in failed.items())
    text += f"\n{left} cases are left to run.\n" if left else "\n"
    return text


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _free(device: torch.device) -> None:
    """Nothing of a case lies in the way of the next."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _line(row: Row) -> str:
    plain = {key: value for key, value in row.items() if not isinstance(value, list)}
    return ", ".join(f"{key} {_text(value)}" for key, value in plain.items())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|")


def _first(error: str) -> str:
    return error.strip().splitlines()[0][:300]
