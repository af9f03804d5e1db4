"""Parts of packed tensors as the padded tensors that kernels take, and back.

Shape legend: T packed rows, N sequences of a part, L padded rows of each, P = N·L, X heads, Y head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.concepts import Packing

# Longer sequences are computed each alone, as views: nothing is padded or moved, and a kernel has enough to do. Shorter ones
# are padded together, since each call costs as much as the attention of a hundred tokens.
ALONE = 256


@dataclass(frozen=True)
class Run:
    """`n` sequences of one length that follow each other: views, no copies."""

    start: int
    stop: int
    n: int = 1

    def take(self, x_TXY: Tensor) -> Tensor:
        """The part of x, (N, X, L, Y)."""
        return x_TXY[self.start : self.stop].unflatten(0, (self.n, -1)).transpose(1, 2)

    def take_filled(self, x_TXY: Tensor, _: float) -> Tensor:
        """The same: nothing is padded."""
        return self.take(x_TXY)

    def put(self, part_NXLY: Tensor, x_TXY: Tensor) -> None:
        """Write the part of x."""
        self.take(x_TXY).copy_(part_NXLY)

    def add(self, part_NXLY: Tensor, x_TXY: Tensor) -> None:
        """Add to the part of x."""
        self.take(x_TXY).add_(part_NXLY)


@dataclass(frozen=True)
class Padded:
    """Sequences of different length, padded on the right.

    Attributes:
        n: N.
        index_P: row of x for every place; any row for padding.
        padding_P11: which places are padding; None where none is.
        real_T: the places that are not padding, and
        row_T: their rows.
    """

    n: int
    index_P: Tensor
    padding_P11: Tensor | None
    real_T: Tensor
    row_T: Tensor

    @classmethod
    def build(cls, index_NL: Tensor, real_NL: Tensor) -> "Padded":
        """From the row of every place, and which places are real."""
        index_P, real_P = index_NL.flatten(), real_NL.flatten()
        real_T = real_P.nonzero().squeeze(1)
        padding_P11 = None if real_T.numel() == index_P.numel() else ~real_P[:, None, None]
        return cls(index_NL.shape[0], index_P, padding_P11, real_T, index_P[real_T])

    def take(self, x_TXY: Tensor) -> Tensor:
        """The part of x, (N, X, L, Y); padding holds rows of x."""
        return self._pad(x_TXY.index_select(0, self.index_P))

    def take_filled(self, x_TXY: Tensor, padding: float) -> Tensor:
        """The part of x, (N, X, L, Y); padding holds this number."""
        x_PXY = x_TXY.index_select(0, self.index_P)
        return self._pad(x_PXY if self.padding_P11 is None else x_PXY.masked_fill_(self.padding_P11, padding))

    def put(self, part_NXLY: Tensor, x_TXY: Tensor) -> None:
        """Write the part of x."""
        x_TXY.index_copy_(0, self.row_T, self._real(part_NXLY))

    def add(self, part_NXLY: Tensor, x_TXY: Tensor) -> None:
        """Add to the part of x, no row of which stands in two places."""
        rows_TXY = self._real(part_NXLY).to(x_TXY.dtype) + x_TXY.index_select(0, self.row_T)
        x_TXY.index_copy_(0, self.row_T, rows_TXY)

    def _pad(self, x_PXY: Tensor) -> Tensor:
        return x_PXY.unflatten(0, (self.n, -1)).transpose(1, 2)

    def _real(self, part_NXLY: Tensor) -> Tensor:
        x_PXY = part_NXLY.transpose(1, 2).flatten(0, 1)
        return x_PXY if self.padding_P11 is None else x_PXY.index_select(0, self.real_T)


Rows = Run | Padded


def sequences(packing: Packing) -> Sequence[Rows]:
    """All non-empty sequences of a packing, in parts; kept on the packing, for all layers."""
    parts = packing.__dict__.get("_rows")
    if parts is None:
        parts = packing.__dict__["_rows"] = tuple(_sequences(packing))
    return parts


def _sequences(packing: Packing) -> list[Rows]:
    starts, parts = packing.cu_seqlens_S1.tolist(), []
    for bucket in packing.buckets:
        if bucket.regular:
            return [Run(0, starts[-1], bucket.sequences_N.numel())]
        long_N = packing.lengths_S[bucket.sequences_N] > ALONE
        parts += [Run(starts[i], starts[i + 1]) for i in bucket.sequences_N[long_N].tolist()]
        if not bool(long_N.all()):
            parts.append(padded(packing, bucket.sequences_N[~long_N]))
    return parts


def padded(packing: Packing, sequences_N: Tensor) -> Padded:
    """These sequences, padded to the longest of them."""
    lengths_N = packing.lengths_S[sequences_N]
    column_L = torch.arange(int(lengths_N.max()), device=lengths_N.device)
    real_NL = column_L < lengths_N[:, None]
    # Padding repeats the first row of its sequence: a finite value that belongs to nobody else.
    return Padded.build(packing.cu_seqlens_S1[sequences_N, None] + column_L * real_NL, real_NL)
