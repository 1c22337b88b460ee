"""The tables of the decode kernel: of spans over a paged cache, and of the pages of rows. Pure."""

from typing import NamedTuple

import numpy as np

from ringkern.tiles import CUT_PAIRS, CUT_ROWS

MOST_ROWS = 16  # queries of a sequence; beyond, tiles of the step kernel are as good


class DecodeTable(NamedTuple):
    """Which pages hold the keys of which queries. int32 all.

    page_table: [sequences, pages], pages in order; those past a sequence's keys are 0.
    seqused_k: [sequences], keys. 0: queries that see none.
    cu_seqlens_q: [sequences + 1], from 0 to the rows of the query tensor. No sequence has more
        queries than the longest that has keys.
    """

    page_table: np.ndarray
    seqused_k: np.ndarray
    cu_seqlens_q: np.ndarray
    page_size: int


def make_decode_table(spans: np.ndarray, rows: int, page_size: int) -> DecodeTable | None:
    """Return the tables of a span table, int64 [n, 8]; None where spans are no decode.

    That is: a mask, many queries of a sequence, queries that see different keys, or keys that do
    not fill page after page from its first slot on.

    Args:
        spans: of keys in slots page * page_size + offset; columns as in types.Span.
        rows: of the query tensor.
        page_size: slots of a page.
    """
    if not len(spans):
        return None
    spans = spans[np.lexsort((np.arange(len(spans)), spans[:, 0]))]
    q0, q1, k0, k1, lo, hi, q_stride, k_stride = spans.T
    full = (lo == (q0 - q1 + 1) * q_stride) & (hi == (k1 - k0 - 1) * k_stride)
    begins, of = np.unique(q0, return_inverse=True)
    ends = np.zeros(len(begins), dtype=np.int64)
    ends[of] = q1
    # Of a sequence, every stretch but the last ends with its page.
    last = np.append(of[1:] != of[:-1], True)
    whole = (k0 % page_size == 0) & (last | (k1 % page_size == 0))
    alike = (ends[of] == q1).all() and (begins[1:] >= ends[:-1]).all()
    few = (ends - begins).max(initial=0) <= MOST_ROWS
    if not (full.all() and whole.all() and alike and few):
        return None
    edges = _cut(
        np.unique(np.concatenate([[0, rows], begins, ends])), (ends - begins).max(initial=1)
    )
    seq = np.searchsorted(edges, begins)[of]  # rows between are sequences without keys
    pages = -(-k1 // page_size) - k0 // page_size
    count = np.bincount(seq, pages, len(edges) - 1).astype(np.int64)
    page_table = np.zeros((len(count), count.max(initial=1)), dtype=np.int32)
    within = np.arange(pages.sum()) - np.repeat(np.cumsum(pages) - pages, pages)
    numbers = np.repeat(k0 // page_size, pages) + within
    owner = np.repeat(seq, pages)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    page_table[owner, place] = numbers
    seqused_k = np.bincount(seq, k1 - k0, len(count))
    return DecodeTable(
        page_table, seqused_k.astype(np.int32), edges.astype(np.int32), int(page_size)
    )


class Rows(NamedTuple):
    """The pages of rows that see all keys in theirs: a row is a query, or a sequence.

    page_table: int32 [rows, pages], in order; what is past a row's keys says nothing.
    seqused_k: int32 [rows], keys.
    """

    page_table: np.ndarray
    seqused_k: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        """Return some rows, by number."""
        return Rows(self.page_table[rows], self.seqused_k[rows])

    def slots(self, page_size: int) -> np.ndarray:
        """Return the slots of all pages, row after row, int64: what pack() packs."""
        inside = np.arange(self.page_table.shape[1]) < self._counts(page_size)[:, None]
        pages = self.page_table[inside].astype(np.int64)
        return (pages[:, None] * page_size + np.arange(page_size)).ravel()

    def pack(self, page_size: int) -> "Rows":
        """Return the rows as they are where these slots lie packed."""
        counts = self._counts(page_size)
        first = np.cumsum(counts) - counts
        page_table = first[:, None] + np.arange(max(counts.max(initial=0), 1))
        return Rows(page_table.astype(np.int32), self.seqused_k)

    def _counts(self, page_size):
        """Return how many pages each row has keys in."""
        return -(-self.seqused_k.astype(np.int64) // page_size)

    def halve(self, page_size: int) -> tuple["Rows", "Rows"]:
        """Return two that have about half of the keys each: tiles.halve() of such rows' spans."""
        keys = self.seqused_k.astype(np.int64)
        half = keys.sum() / 2
        at = int(np.searchsorted(keys.cumsum(), half))
        first, second = self.seqused_k.copy(), self.seqused_k.copy()
        first[at + 1 :] = second[:at] = 0
        if not keys.any():
            return Rows(self.page_table, first), Rows(self.page_table, second)
        missing = half - keys[:at].sum()
        cut = round(missing) // CUT_ROWS * CUT_ROWS
        if keys[at] < CUT_PAIRS or not 0 < cut < keys[at]:
            cut = keys[at] if missing >= keys[at] / 2 else 0
        first[at], second[at] = cut, keys[at] - cut
        later = self.page_table.copy()
        pages = later.shape[1] - cut // page_size
        later[at, :pages] = self.page_table[at, cut // page_size :]
        return Rows(self.page_table, first), Rows(later, second)


def _cut(edges, most):
    """Return edges with more between them, so that no two that follow are more than most apart."""
    counts = -(-np.diff(edges) // most)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.append(np.repeat(edges[:-1], counts) + most * within, edges[-1])
