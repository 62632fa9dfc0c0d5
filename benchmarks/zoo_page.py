"""What the benchmarks of every architecture in the zoo share: each network is tried, what became
of it printed in a line, and the table of a page in docs/ written anew."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch

import tests.conftest  # noqa: F401  (lets timm and torchvision be imported beside a CPU torch)
from freezeout import FreezeOutError
from tests.architectures import Promise
from tests.zoo import Architecture, everything

DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class Tried:
    library: str
    family: str
    name: str
    verdict: str  # a word if all is well, "refused: why" or "broken: what"


Row = TypeVar("Row", bound=Tried)


def verdict_of(attempt: Callable[[], str]) -> str:
    """What the attempt returns; or that the library refused, or that something broke."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return attempt()
    except FreezeOutError as error:
        return f"refused: {error}"
    except Promise as error:
        return f"broken: {error}"
    except Exception as error:
        traceback.print_exc(limit=-3)
        return f"broken: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def try_all(
    names: Sequence[str], run: Callable[[Architecture], Row], say: Callable[[Row], None]
) -> list[Row]:
    """`run` each network, or those of the names given, on one thread; `say` what became of it."""
    torch.set_num_threads(1)
    rows = []
    for architecture in everything():
        if not names or architecture.name in names:
            rows.append(row := run(architecture))
            say(row)
    return rows


def counts(rows: Sequence[Tried], well: str) -> str:
    """How many of each verdict: "3 ok, 1 refused, 0 broken"."""
    kinds = [row.verdict.partition(":")[0] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in (well, "refused", "broken"))


def exit_status(rows: Sequence[Tried]) -> int:
    """1 if anything is broken."""
    return int(any(row.verdict.startswith("broken") for row in rows))


def versions() -> str:
    names = ("torch", "timm", "torchvision", "transformers")
    return ", ".join(f"{name} {version(name)}" for name in names)


def by_library(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Each library's rows, by family and name."""
    for library, members in groupby(rows, lambda row: row.library):
        yield library, sorted(members, key=lambda row: (row.family, row.name))


def write_generated(page: Path, parts: Sequence[str]) -> None:
    """Put the parts in the place of what is generated in the page."""
    before, begin, rest = page.read_text().partition("<!-- begin: generated -->\n")
    _, end, after = rest.partition("<!-- end: generated -->")
    page.write_text(before + begin + "\n".join(parts) + end + after)
