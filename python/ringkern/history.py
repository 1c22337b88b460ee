"""The history of sequences: the chunks of positions that each rank holds of each."""

from typing import NamedTuple

import numpy as np

from ringkern.types import Chunk


class Held(NamedTuple):
    """What the ranks held of some sequences at one time."""

    before: list[tuple[tuple[Chunk, ...], ...]]  # [sequence][rank], by position
    last: np.ndarray  # and behind them one chunk more: as in History

    def runs(self, rank: int) -> np.ndarray:
        """Return the rank's runs, int64 [n, 5], columns as in types.Run, offsets not filled in.

        By sequence, and within one by position.
        """
        rows = [(seq, 0, *chunk) for seq, ranks in enumerate(self.before) for chunk in ranks[rank]]
        before = np.array(rows, dtype=np.int64).reshape(-1, 5)
        seqs = np.flatnonzero(self.last[:, rank, 1])
        table = np.zeros((len(before) + len(seqs), 5), dtype=np.int64)
        table[: len(before)] = before
        table[len(before) :, 0], table[len(before) :, 2:] = seqs, self.last[seqs, rank]
        return table[table[:, 0].argsort(kind="stable")]


class History:
    """The chunks of every sequence on every rank, by position. A sequence is a row.

    The last chunks are in one table, int64 [rows, ranks, 3], columns as in types.Chunk and the
    length 0 where there is none: a decode step, which makes one of them longer for each sequence,
    is a few calls of numpy.
    """

    def __init__(self, rows: int, world_size: int):
        self._none = ((),) * world_size
        self._before = [self._none] * rows
        self._last = np.zeros((rows, world_size, 3), dtype=np.int64)

    def grow(self) -> None:
        """Double the rows."""
        self._before += [self._none] * len(self._before)
        self._last = np.concatenate([self._last, np.zeros_like(self._last)])

    def at(self, rows: np.ndarray) -> Held:
        """Return what the ranks hold now of the sequences in `rows`."""
        return Held([self._before[row] for row in rows.tolist()], self._last[rows])

    def chunks(self, row: int, rank: int) -> tuple[Chunk, ...]:
        """Return what the rank holds of the sequence."""
        last = Chunk(*self._last[row, rank].tolist())
        return (*self._before[row][rank], *((last,) if last.length else ()))

    def clear(self, row: int) -> None:
        self._before[row], self._last[row] = self._none, 0

    def copy(self, row: int, to: int) -> None:
        self._before[to], self._last[to] = self._before[row], self._last[row]

    def append(self, rows: np.ndarray, ranks: np.ndarray, chunks: np.ndarray) -> None:
        """Add chunks, int64 [n, 3], each behind what the rank holds of the row, by position.

        Those of one row and rank follow one another. One that continues the last chunk is joined to
        it. Decoded tokens of one rank are world_size apart: one chunk, however many they are.
        """
        more = (rows[1:] == rows[:-1]) & (ranks[1:] == ranks[:-1])
        if more.any():
            for some in (np.append(True, ~more), np.append(False, more)):
                self.append(rows[some], ranks[some], chunks[some])
            return
        last = self._last[rows, ranks]
        start, length, stride = chunks.T
        held = last[:, 1]
        gap = start - last[:, 0] - (held - 1) * last[:, 2]
        # Two single tokens may have any stride.
        apart = np.where((held == 1) & (length == 1), gap, last[:, 2])
        joins = (gap == apart) & ((length == 1) | (stride == apart)) & (held > 0)
        if not joins.all():
            ended = np.flatnonzero(~joins & (held > 0))
            self._put_before(rows[ended].tolist(), ranks[ended].tolist(), last[ended].tolist())
            last[~joins], apart = chunks[~joins], np.where(joins, apart, stride)
        last[:, 1], last[:, 2] = length + joins * held, apart
        self._last[rows, ranks] = last

    def _put_before(self, rows, ranks, chunks) -> None:
        opened: dict[int, list] = {}
        for row, rank, chunk in zip(rows, ranks, chunks, strict=True):
            before = opened.get(row)
            if before is None:
                before = opened[row] = list(self._before[row])
            before[rank] = (*before[rank], Chunk(*chunk))
        for row, ranks_before in opened.items():
            self._before[row] = tuple(ranks_before)

    def truncate(self, row: int, length: int) -> list[int]:
        """Forget what does not lie before position `length`. Return how many each rank lost."""
        lost, before = [], []
        for rank in range(len(self._none)):
            chunks = self.chunks(row, rank)
            kept = _truncated(chunks, length)
            lost.append(sum(c.length for c in chunks) - sum(c.length for c in kept))
            before.append(kept[:-1])
            self._last[row, rank] = kept[-1] if kept else 0
        self._before[row] = tuple(before)
        return lost


def _truncated(chunks: tuple[Chunk, ...], length: int) -> tuple[Chunk, ...]:
    """Return what lies before position `length`."""
    kept = []
    for chunk in chunks:
        count = min(chunk.length, max(0, -((chunk.start - length) // chunk.stride)))
        if count:
            kept.append(Chunk(chunk.start, count, chunk.stride if count > 1 else 1))
    return tuple(kept)
