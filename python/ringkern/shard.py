"""Layouts: which rank holds which positions of a sequence. The only place where they differ."""

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


def runs(layout: str, lengths: tuple[int, ...], world_size: int, rank: int) -> np.ndarray:
    """Return the runs that a rank holds of a packed batch, int64 [n, 5], columns as in Run.

    Each sequence is sharded alone. Where a length does not divide, the first chunks are one
    position longer, so any two ranks differ by at most one token per sequence. Runs come in packed
    order: by sequence, then by position. Empty runs are left out.
    """
    lengths = np.asarray(lengths, dtype=np.int64)[:, None]  # [sequences, 1]
    if layout == "striped":
        start = np.full_like(lengths, rank)
        length = (lengths - rank + world_size - 1) // world_size
        stride = world_size
    else:
        last = 2 * world_size - 1
        count, mine = (
            (world_size, [rank]) if layout == "contiguous" else (last + 1, [rank, last - rank])
        )
        index = np.array(mine, dtype=np.int64)[None, :]  # [1, chunks per rank]
        base, extra = lengths // count, lengths % count
        start = index * base + np.minimum(index, extra)
        length = base + (index < extra)
        stride = 1
    table = np.empty((*length.shape, 5), dtype=np.int64)
    table[..., 0] = np.arange(len(lengths))[:, None]
    table[..., 2] = start
    table[..., 3] = length
    table[..., 4] = stride
    if layout == "zigzag" and rank == world_size - 1:  # its two chunks are neighbours: one run
        table = table[:, :1]
        table[..., 3] = length.sum(axis=1, keepdims=True)
    table = table[table[..., 3] > 0]
    table[:, 1] = np.cumsum(table[:, 3]) - table[:, 3]
    return table


def chunks(layout: str, seqlen: int, world_size: int, rank: int) -> tuple[Chunk, ...]:
    """Return the chunks that a rank holds of one sequence, in the order it holds them."""
    check_layout(layout)
    table = runs(layout, (seqlen,), world_size, rank)
    return tuple(Chunk(*row) for row in table[:, 2:].tolist())
