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


def runs(layout: str, lengths, world_size: int, place) -> np.ndarray:
    """Return the runs that one rank holds of a packed batch, int64 [n, 5], columns as in Run.

    Each sequence is sharded alone. Where a length does not divide, some ranks hold one position
    more, so any two differ by at most one token per sequence. Runs come in packed order: by
    sequence, then by position. Empty runs are left out.

    Args:
        lengths: positions per sequence, [sequences].
        place: which share of a sequence is this rank's, 0 .. world_size - 1: an int, or one for
            each sequence. Where nothing else is said, a rank's place is its number.
    """
    return runs_each(layout, lengths, world_size, np.asarray(place).reshape(-1, 1))[0]


def runs_each(layout: str, lengths, world_size: int, places) -> list[np.ndarray]:
    """Return runs() of several ranks: all at once, as calls of numpy cost time.

    places: [sequences, ranks], or [1, ranks] where they are the same for every sequence.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    places = np.asarray(places, dtype=np.int64).T  # [ranks, sequences]
    shape = len(places), len(lengths)
    chunks = 2 if layout == "zigzag" else 1
    table = np.empty((*shape, chunks, 5), dtype=np.int64)
    table[..., 0] = np.arange(len(lengths))[None, :, None]
    table[..., 4] = 1
    start, length = table[..., 2], table[..., 3]
    if layout == "striped":
        start[..., 0], table[..., 4] = places, world_size
        length[..., 0] = (lengths - places + world_size - 1) // world_size
    elif layout == "contiguous":
        start[..., 0], length[..., 0] = _chunk(lengths, world_size, places)
    else:
        start[..., 0], length[..., 0] = _chunk(lengths, 2 * world_size, places)
        late = 2 * world_size - 1 - places
        start[..., 1], length[..., 1] = _chunk(lengths, 2 * world_size, late)
        # The last place's two chunks are neighbours: one run.
        last = np.broadcast_to(places == world_size - 1, shape)
        length[..., 0] += np.where(last, length[..., 1], 0)
        length[..., 1] = np.where(last, 0, length[..., 1])
    kept = length > 0
    edges = np.cumsum(kept.sum(axis=(1, 2)))[:-1]
    each = np.split(table[kept], edges) if len(edges) else [table[kept]]
    for rows in each:
        rows[:, 1] = np.cumsum(rows[:, 3]) - rows[:, 3]
    return each


def _chunk(lengths, count: int, index):
    """Return (start, length) of chunk `index` of `count`; the first ones take what is left over."""
    base, extra = lengths // count, lengths % count
    return index * base + np.minimum(index, extra), base + (index < extra)


def counts(layout: str, lengths, world_size: int, place) -> np.ndarray:
    """Return how many positions of each sequence are at a place; [sequences, 1] or more places."""
    lengths = np.asarray(lengths, dtype=np.int64)[:, None]
    if layout != "zigzag":  # one chunk each, or one stripe: the first places take what is left over
        return _chunk(lengths, world_size, place)[1]
    late = 2 * world_size - 1 - place
    return _chunk(lengths, 2 * world_size, place)[1] + _chunk(lengths, 2 * world_size, late)[1]


def chunks(layout: str, seqlen: int, world_size: int, rank: int) -> tuple[Chunk, ...]:
    """Return the chunks that a rank holds of one sequence, in the order it holds them."""
    check_layout(layout)
    table = runs(layout, (seqlen,), world_size, rank)
    return tuple(Chunk(*row) for row in table[:, 2:].tolist())
