"""What the part takes from the tests, and what its proofs share: rows, and when bits may be
claimed."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from .part import Row

# Read when the first matrix product runs on a GPU; without it cuBLAS promises no bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_threads = torch.get_num_threads()
from tests import matrix  # noqa: E402
from tests.integration import user_loop  # noqa: E402

torch.set_num_threads(_threads)  # the tests take one

__all__ = ["difference", "exactly", "largest_difference", "matrix", "row", "user_loop"]

T = TypeVar("T")


def row(
    what: str,
    runs: int = 1,
    equal: int | None = None,
    largest: float | None = None,
    note: str | None = None,
) -> Row:
    """A line of the table; `equal`: in how many of the runs every bit was the reference's."""
    return {
        "what": what,
        "runs": runs,
        "equal bits": equal,
        "largest difference": largest,
        "note": note,
    }


def exactly(work: Callable[[], T]) -> tuple[T, bool]:
    """What `work` returns with deterministic kernels, and True; where torch has none for some
    operation, what it returns without, and False."""
    try:
        with _deterministic():
            return work(), True
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
    with _deterministic(warn_only=True):
        return work(), False


@contextmanager
def _deterministic(warn_only: bool = False) -> Iterator[None]:
    """The same kernels each time, and full fp32 unless a proof says otherwise."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = products.allow_tf32, convolutions.allow_tf32
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        convolutions.benchmark,
    )
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    convolutions.benchmark = products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        with warnings.catch_warnings():
            # Capturable optimizers step outside of a graph here, as they should.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        convolutions.benchmark = before[2]
        products.allow_tf32, convolutions.allow_tf32 = tf32


def difference(ours: Tensor, expected: Tensor) -> float:
    """The largest of two elements, as a share of the largest element; 0: equal bit for bit."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return float("inf")
    if torch.equal(ours, expected):
        return 0.0
    one, other = ours.detach().double().cpu(), expected.detach().double().cpu()
    share = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
    return share if share == share else float("inf")


def largest_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of several tensors."""
    return max(difference(ours, expected) for ours, expected in pairs)
