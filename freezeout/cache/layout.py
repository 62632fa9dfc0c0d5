"""How the tensors at a frontier become bytes, a record a sample, and tensors again."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .inputs import Batch
from .placeholders import Unservable
from .plan import ROWS, Plan


class Layout:
    """Records of one plan's frontier.

    A tensor whose second size is that of the attention mask is a sequence: its record ends at
    the sample's true length, and zeros are read in place of padding. The order in memory (NHWC,
    say) is kept, because kernels, and so last bits, depend on it.

    Args:
        dtype: of floating-point numbers in records; None: the one they have.
    """

    def __init__(self, plan: Plan, batch: Batch, dtype: torch.dtype | None) -> None:
        self._specs = plan.frontier.tensors
        self._orders, self._sequences, self._widths = [], [], []
        self._dtypes: list[torch.dtype] = []
        for spec in self._specs:
            if spec.sizes[0] != ROWS or any(size.per_sample for size in spec.sizes[1:]):
                raise Unservable("the frontier has a tensor without a row for each sample")
            shape = spec.shape(1)
            # (B, T) would be a number a token; a pooled (B, features) is what that shape means.
            is_sequence = batch.lengths is not None and len(shape) > 2 and shape[1] == batch.time
            outer = (0, 1) if is_sequence else (0,)
            order = spec.order if spec.order[: len(outer)] == outer else tuple(range(len(shape)))
            stored = spec.dtype
            if (
                dtype is not None
                and spec.dtype.is_floating_point
                and dtype.itemsize < stored.itemsize
            ):
                stored = dtype
            self._orders.append(order)
            self._sequences.append(is_sequence)
            self._dtypes.append(stored)
            self._widths.append(math.prod(shape[len(outer) :]) * stored.itemsize)
        self.is_ragged = any(self._sequences)
        self.is_lossy = any(
            spec.dtype != stored for spec, stored in zip(self._specs, self._dtypes, strict=True)
        )

    def bytes_of(self, length: int) -> int:
        """Of a record; `length`: the sample's true length where there are sequences."""
        return sum(
            width * (length if is_sequence else 1)
            for width, is_sequence in zip(self._widths, self._sequences, strict=True)
        )

    def describe(self) -> list[Any]:
        """What records of two layouts have to have in common, as plain values."""
        return [
            [
                [size.fixed for size in spec.sizes[2 if is_sequence else 1 :]],
                list(order),
                str(spec.dtype),
                str(stored),
                is_sequence,
            ]
            for spec, order, stored, is_sequence in zip(
                self._specs, self._orders, self._dtypes, self._sequences, strict=True
            )
        ]

    def rounded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they will be read, so that the first visit of a sample and later ones
        are the same."""
        return [
            tensor if tensor.dtype == stored else tensor.to(stored).to(tensor.dtype)
            for tensor, stored in zip(tensors, self._dtypes, strict=True)
        ]

    def overflows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether finite numbers are infinite once stored."""
        return any(
            stored == torch.float16
            and tensor.dtype != stored
            and bool((tensor.isfinite() & ~tensor.to(stored).isfinite()).any())
            for tensor, stored in zip(tensors, self._dtypes, strict=True)
        )

    def to_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """uint8 (B, bytes), where there are no sequences."""
        parts = [
            tensor.detach().to(stored).permute(order).contiguous().flatten(1).view(torch.uint8)
            for tensor, stored, order in zip(tensors, self._dtypes, self._orders, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def from_rows(self, rows: Tensor) -> list[Tensor]:
        """The tensors again, of uint8 (B, bytes); they may share memory with the rows."""
        tensors, start = [], 0
        for i, width in enumerate(self._widths):
            part = rows[:, start : start + width]
            start += width
            tensors.append(self._shaped(part.contiguous(), i, len(rows), None))
        return tensors

    def to_records(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """uint8 (bytes,) a sample, where there are sequences."""
        records: list[list[Tensor]] = [[] for _ in lengths]
        for i, tensor in enumerate(tensors):
            stored = tensor.detach().to(self._dtypes[i]).permute(self._orders[i]).contiguous()
            for record, row, length in zip(records, stored, lengths, strict=True):
                part = row[:length] if self._sequences[i] else row
                record.append(part.reshape(-1).view(torch.uint8))
        return [record[0] if len(record) == 1 else torch.cat(record) for record in records]

    def from_records(
        self, records: Sequence[Tensor], lengths: Sequence[int], time: int
    ) -> list[Tensor]:
        """The tensors again, sequences padded with zeros to `time`."""
        tensors, starts = [], [0] * len(records)
        for i, width in enumerate(self._widths):
            parts = []
            for number, (record, length) in enumerate(zip(records, lengths, strict=True)):
                count = width * (length if self._sequences[i] else 1)
                part = record[starts[number] : starts[number] + count]
                starts[number] += count
                parts.append(part.view(length, width) if self._sequences[i] else part)
            if self._sequences[i]:
                rows = pad_sequence(parts, batch_first=True)
                if rows.shape[1] < time:
                    rows = torch.cat(
                        (rows, rows.new_zeros(len(rows), time - rows.shape[1], width)), 1
                    )
                tensors.append(self._shaped(rows, i, len(records), time))
            else:
                tensors.append(self._shaped(torch.stack(parts), i, len(records), None))
        return tensors

    def _shaped(self, rows: Tensor, i: int, samples: int, time: int | None) -> Tensor:
        spec, order = self._specs[i], self._orders[i]
        shape = list(spec.shape(samples))
        if time is not None:
            shape[1] = time
        values = rows.view(self._dtypes[i]).view([shape[dimension] for dimension in order])
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return values.permute(inverse).to(spec.dtype)
