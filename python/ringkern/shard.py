"""Layouts: which rank holds which positions of a sequence. The only place where they differ."""

import itertools
from typing import NamedTuple

import numpy as np

from ringkern.errors import check
from ringkern.types import Chunk

# contiguous: chunk r of world_size. Causal work grows with the rank.
# zigzag: chunks r and 2 * world_size - 1 - r of 2 * world_size (paper.md section 3, Llama 3):
#   one early and one late chunk each, so causal work is even.
# striped: positions r, r + world_size, ... (Striped Attention, arXiv 2311.09431).
LAYOUTS = ("contiguous", "zigzag", "striped")


def check_layout(layout: str) -> None:
    check(layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}", repr(layout))


class Shares(NamedTuple):
    """What each rank gets of each sequence, in one or two chunks; empty ones have length 0."""

    start: np.ndarray  # int64 [ranks, sequences, chunks], as `length`
    length: np.ndarray
    stride: int

    @property
    def counts(self) -> np.ndarray:
        """How many positions each rank gets of each sequence, int64 [sequences, ranks]."""
        return self.length.sum(axis=2).T


def deal(layout: str, lengths, world_size: int, places) -> Shares:
    """Return the shares of a packed batch.

    Each sequence is sharded alone. Where a length does not divide, some ranks get one position
    more, so any two differ by at most one token per sequence.

    Args:
        lengths: positions per sequence, [sequences].
        places: which share of each sequence is each rank's, 0 .. world_size - 1: [sequences, ranks],
            or [1, ranks] where they are the same for every sequence. Where nothing else is said, a
            rank's place is its number.
    """
    lengths = np.asarray(lengths, dtype=np.int64)[:, None]
    places = np.asarray(places, dtype=np.int64).T[:, :, None]  # [ranks, sequences, 1]
    if layout == "striped":
        length = (lengths - places + world_size - 1) // world_size
        return Shares(np.broadcast_to(places, length.shape), length, world_size)
    if layout == "contiguous":
        return Shares(*_chunk(lengths, world_size, places), 1)
    both = np.concatenate([places, 2 * world_size - 1 - places], axis=2)
    start, length = _chunk(lengths, 2 * world_size, both)
    # The last place's two chunks are neighbours: one chunk.
    late = length[..., 1] * (places == world_size - 1)[..., 0]
    length[..., 0] += late
    length[..., 1] -= late
    return Shares(start, length, 1)


def runs(shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """Return whose each run is, int64 [n], and the runs of all ranks, int64 [n, 5], as in Run.

    By rank, and of one in packed order: by sequence, then by position. None is empty. Offsets are
    as pack() gives them.
    """
    ranks, sequences, chunks = shares.length.shape
    kept = shares.length.ravel().nonzero()[0]
    index = kept // chunks
    table = np.empty((len(kept), 5), dtype=np.int64)
    table[:, 0], table[:, 4] = index % sequences, shares.stride
    table[:, 2], table[:, 3] = shares.start.ravel()[kept], shares.length.ravel()[kept]
    whose = index // sequences
    _set_offsets(table, whose, ranks)
    return whose, table


def split(table: np.ndarray, whose: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return the rows of each rank, of a table that is ordered by rank."""
    edges = whose.searchsorted(np.arange(ranks + 1)).tolist()
    return [table[begin:end] for begin, end in itertools.pairwise(edges)]


def pack(ranks: int, *parts: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Return for each rank its runs of all parts, as they lie in one packed tensor.

    By sequence, and of one sequence those of the first part first, with offsets.

    Args:
        parts: whose each run is, int64 [n], and the runs, int64 [n, 5], by rank and sequence.
    """
    whose, table = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = (whose * (table[:, 0].max(initial=0) + 1) + table[:, 0]).argsort(kind="stable")
    table, whose = table.take(order, axis=0), whose[order]
    _set_offsets(table, whose, ranks)
    return split(table, whose, ranks)


def _set_offsets(table, whose, ranks) -> None:
    """Let each rank's runs, ordered by rank, follow one another in a tensor of its own."""
    ends = np.concatenate([[0], table[:, 3].cumsum()])
    before = ends[whose.searchsorted(np.arange(ranks))]
    table[:, 1] = ends[:-1] - before[whose]


def _chunk(lengths, count: int, index):
    """Return (start, length) of chunk `index` of `count`; the first ones take what is left over."""
    base, extra = np.divmod(lengths, count)
    return index * base + np.minimum(index, extra), base + (index < extra)


def chunks(layout: str, seqlen: int, world_size: int, rank: int) -> tuple[Chunk, ...]:
    """Return the chunks that a rank holds of one sequence, in the order it holds them."""
    check_layout(layout)
    _, table = runs(deal(layout, (seqlen,), world_size, [[rank]]))
    return tuple(Chunk(*row) for row in table[:, 2:].tolist())
