"""What a graph's program has place for, and its tables, which other plans overwrite."""

from typing import NamedTuple

import numpy as np
import torch

from ringkern.decode_table import Rows
from ringkern.upload import upload

ALIGNED = 4  # elements of int32 in 16 bytes, at which kernels take their tables to begin


class Room(NamedTuple):
    """How large the plans may be, in pages of the cache."""

    pages: int  # of a sequence on a rank
    wire_pages: int  # of a rank's keys of all sequences of a plan, where they travel

    @classmethod
    def over(cls, pages: int, wire_pages: int) -> "Room":
        """Return powers of two: on the wire the next one, as each page costs time there."""
        pages = max(pages, ALIGNED // 2)
        return cls(1 << (2 * pages - 1).bit_length(), 1 << (wire_pages - 1).bit_length())


class Share(NamedTuple):
    """One work's rows of the tables: one query each, of a sequence of its own."""

    host: Rows
    page_table: torch.Tensor  # int32 [rows, pages]
    seqused_k: torch.Tensor  # int32 [rows]

    def fill(self, rows: Rows) -> None:
        """Take over the pages of as many rows, on the host: Tables.send() sends them."""
        self.host.page_table[:, : rows.page_table.shape[1]] = rows.page_table
        self.host.seqused_k[:] = rows.seqused_k


class Tables:
    """The tables of all work of a program, in one tensor, which one copy fills.

    A copy to a GPU costs the host a piece of pinned memory and several calls, however little it
    moves. No row has a key until it is told of some.

    Args:
        rows: of each work; several whose queries lie together take() one share.
        pages: of a row at most; a multiple of ALIGNED.
    """

    def __init__(self, rows: list[int], pages: int, device: torch.device):
        self._pages, self._device, self._taken = pages, device, 0
        total = sum(map(_padded, rows))
        self._host = np.zeros(total * (pages + 1), dtype=np.int32)
        self._all = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        self._seqused_from = total * pages

    def take(self, rows: int) -> Share:
        """Return the share of the next work."""
        first, self._taken = self._taken, self._taken + _padded(rows)
        page_tables = slice(first * self._pages, (first + rows) * self._pages)
        begin = self._seqused_from + first
        seqused = slice(begin, begin + rows)
        return Share(
            Rows(self._host[page_tables].reshape(rows, self._pages), self._host[seqused]),
            self._all[page_tables].view(rows, self._pages),
            self._all[seqused],
        )

    def send(self) -> None:
        """Have the device's tables say what the shares were told."""
        if len(self._host):
            upload(self._host, self._device, self._all)


def _padded(rows: int) -> int:
    return -(-rows // ALIGNED) * ALIGNED
