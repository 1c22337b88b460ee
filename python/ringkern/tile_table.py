"""Spans cut for a kernel: which query rows one program owns, and which keys it goes through."""

from typing import NamedTuple

import numpy as np

from ringkern.errors import check

INT32 = 1 << 31
# A tile is split along K into parts of at least so many blocks, and into at most so many parts:
# each part writes and reads a float32 tile of its own.
MIN_BLOCKS = 4
MAX_SPLITS = 64


class TileTable(NamedTuple):
    """The work of one step. A program takes a row of `tiles` and, for some head, all its keys.

    tiles: int32 [n * splits, 5], columns (q0, q1, begin, middle, end): query rows [q0, q1), at most
        block_q of them, of no other tile; its pieces are [begin, middle), whole blocks of keys that
        all its rows see, and [middle, end), under a mask. The parts of a tile follow one another.
        Longest first, which balances causal work over the SMs of a GPU.
    pieces: int32 [m, 6], columns (k0, k1, lo, hi, q_stride, k_stride): key rows [k0, k1). The tile's
        row t sees key k0 + j iff lo <= j * k_stride - t * q_stride <= hi.
    """

    tiles: np.ndarray
    pieces: np.ndarray
    splits: int


def make_tiles(
    spans: np.ndarray,
    block_q: int,
    block_k: int,
    *,
    rows: int = 0,
    fill: int = 0,
    splits: int = 0,
) -> TileTable:
    """Return the tiles of a span table, int64 [n, 8], columns as in types.Span.

    Spans may overlap in query rows and come in any order. A tile lies between two neighbouring
    edges of spans, so each of its pieces is for all its rows. Rows that see no key are in no tile
    unless others of their tile see one.

    Args:
        spans: may be empty.
        block_q, block_k: the kernel's tile of queries, in tokens, and its block of keys.
        rows: of the query tensor, if rows without keys need tiles too: for a kernel that writes
            every row. 0: they need none.
        fill: so many tiles fill the GPU: fewer long ones are split along K.
        splits: parts of each tile; 0: as `fill` asks.

    Raises:
        ArgumentError: positions of 2^31 and more.
    """
    begin, end, at_edge, edges = _cut_rows(spans, block_q, rows)
    first = at_edge[np.searchsorted(edges, spans[:, 0])]
    count = at_edge[np.searchsorted(edges, spans[:, 1])] - first
    tile = _ranges(first, count)
    reach = _reach(np.repeat(spans, count, axis=0).T, begin[tile], end[tile])
    tile, masked, pieces = _pieces(tile, *reach, block_k)
    blocks = -(-(pieces[:, 1] - pieces[:, 0]) // block_k)
    total = np.bincount(tile, blocks, minlength=len(begin)).astype(np.int64)
    # Tiles by work; those without any go last, or out.
    order = np.argsort(-total, kind="stable")
    if not rows:
        order = order[: np.count_nonzero(total)]
    place = np.empty(len(begin), dtype=np.int64)
    place[order] = np.arange(len(order))
    if not splits:
        splits = _count_splits(begin[order], end[order], total, fill)
    key = np.argsort(place[tile] * 2 + masked, kind="stable")
    part, masked, pieces = _split(
        place[tile[key]], masked[key], pieces[key], blocks[key], total[order], block_k, splits
    )
    tiles = np.empty((len(order) * splits, 5), dtype=np.int64)
    tiles[:, 0], tiles[:, 1] = np.repeat(begin[order], splits), np.repeat(end[order], splits)
    ends = np.bincount(part * 2 + masked, minlength=2 * len(tiles)).cumsum().reshape(-1, 2)
    tiles[1:, 2], tiles[:, 3:] = ends[:-1, 1], ends
    tiles[:1, 2] = 0
    check(
        max(int(abs(x).max(initial=0)) for x in (tiles, pieces)) < INT32,
        "spans",
        "positions below 2^31",
        "larger ones",
    )
    return TileTable(tiles.astype(np.int32), pieces.astype(np.int32), splits)


def _count_splits(begin, end, total, fill):
    """Return into how many parts to split tiles of `total` blocks, so that `fill` parts work."""
    owned = int((end - begin).sum())
    # The parts are merged from the first row to the last, with the rows in between.
    if not owned or 2 * owned < int(end.max()) - int(begin.min()):
        return 1
    return max(min(fill // len(begin), int(total.max()) // MIN_BLOCKS, MAX_SPLITS), 1)


def _ranges(first, count):
    """Return first[0], first[0] + 1, ... count[0] of them, then the same for each other entry."""
    skipped = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(first - skipped, count)


def _cut_rows(spans, block_q, rows):
    """Return the rows [begin, end) of each tile, the first tile at each edge, and the edges."""
    whole = np.array([0, rows] if rows else [], dtype=np.int64)
    edges = np.unique(np.concatenate([spans[:, 0], spans[:, 1], whole]))
    if rows:
        covered = np.ones(max(len(edges) - 1, 0), dtype=bool)
    else:
        depth = np.zeros(len(edges), dtype=np.int64)
        np.add.at(depth, np.searchsorted(edges, spans[:, 0]), 1)
        np.subtract.at(depth, np.searchsorted(edges, spans[:, 1]), 1)
        covered = depth.cumsum()[:-1] > 0
    length = np.diff(edges)
    count = np.where(covered, -(-length // block_q), 0)
    at_edge = np.concatenate([[0], np.cumsum(count)])
    begin = _ranges(edges[:-1] * 0, count) * block_q + np.repeat(edges[:-1], count)
    end = np.minimum(begin + block_q, np.repeat(edges[1:], count))
    return begin, end, at_edge, edges


def _reach(spans, begin, end):
    """Return what rows [begin, end) meet in spans, given by column: keys and the band.

    (k0, outer, inner, lo, hi, below, q_stride, k_stride): from k0 on, no row sees a key outside of
    the range `outer`, and every row sees those in `inner`. lo and hi count from k0 and from the
    first row; `below` is the last row on the same scale.
    """
    q0, _, k0, k1, lo, hi, q_stride, k_stride = spans
    top = (begin - q0) * q_stride
    lo, hi = lo + top, hi + top
    below = (end - begin - 1) * q_stride
    outer0 = np.maximum(-(-lo // k_stride), 0)
    outer1 = np.maximum(np.minimum((hi + below) // k_stride + 1, k1 - k0), outer0)
    inner0 = np.minimum(np.maximum(-(-(lo + below) // k_stride), outer0), outer1)
    inner1 = np.minimum(np.maximum(hi // k_stride + 1, inner0), outer1)
    return k0, (outer0, outer1), (inner0, inner1), lo, hi, below, q_stride, k_stride


def _pieces(tile, k0, outer, inner, lo, hi, below, q_stride, k_stride, block_k):
    """Return (tile, masked, pieces [n, 6] int64): up to three of each meeting.

    Masked keys on the left, in whole blocks; whole blocks that all rows see; masked keys on the
    right with what is left over. Where no whole block is seen by all, it is one masked piece.
    """
    (outer0, outer1), (inner0, inner1) = outer, inner
    left = outer0 - (outer0 - inner0) // block_k * block_k
    whole = np.maximum(inner1 - left, 0) // block_k * block_k
    left = np.where(whole > 0, left, outer0)
    edges = np.concatenate([outer0, left, left + whole, outer1])
    count = len(tile)
    a, b = edges[:-count], edges[count:]
    some = np.flatnonzero(b > a)
    a, b, at = a[some], b[some], some % count
    stride = k_stride[at]
    pieces = np.empty((len(some), 6), dtype=np.int64)
    pieces[:, 0], pieces[:, 1] = k0[at] + a, k0[at] + b
    pieces[:, 2] = np.maximum(lo[at] - a * stride, -below[at])
    pieces[:, 3] = np.minimum(hi[at] - a * stride, (b - a - 1) * stride)
    pieces[:, 4], pieces[:, 5] = q_stride[at], stride
    return tile[at], (some // count != 1).astype(np.int64), pieces


def _split(tile, masked, pieces, blocks, total, block_k, splits):
    """Return (part, masked, pieces) with each tile's blocks in `splits` parts, even to one block.

    tile, masked, pieces and blocks are ordered; total is the blocks of each tile. Part p of tile t
    is number t * splits + p; the pieces are in the order of (part, masked).
    """
    if splits == 1:
        return tile, masked, pieces
    share = np.maximum(-(-total // splits), 1)[tile]
    before = np.cumsum(blocks) - blocks - (np.cumsum(total) - total)[tile]  # in the tile
    first = before // share
    count = (before + blocks - 1) // share - first + 1
    index = np.repeat(np.arange(len(tile)), count)
    part = _ranges(first, count)
    share, skipped = share[index], before[index]
    a = np.maximum(part * share - skipped, 0) * block_k
    b = np.minimum((part + 1) * share - skipped, blocks[index]) * block_k
    pieces = pieces[index]
    length, stride = pieces[:, 1] - pieces[:, 0], pieces[:, 5]
    b = np.minimum(b, length)
    pieces[:, 1] = pieces[:, 0] + b
    pieces[:, 0] += a
    pieces[:, 2] -= a * stride
    pieces[:, 3] -= a * stride
    return tile[index] * splits + part, masked[index], pieces
