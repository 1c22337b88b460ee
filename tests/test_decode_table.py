"""The decode kernel's tables say what their spans say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringkern import tiles
from ringkern.decode_table import Rows, make_decode_table


def full(q0, q1, k0, k1):
    return q0, q1, k0, k1, 1 - (q1 - q0), k1 - k0 - 1, 1, 1


def slots_of(table, seq):
    """Return the slots of a sequence's keys, in order."""
    size, length = table.page_size, table.seqused_k[seq]
    pages = table.page_table[seq, : -(-length // size)].astype(np.int64)
    return (pages[:, None] * size + np.arange(size)).ravel()[:length]


@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_tables_hold_every_key_of_every_query(data, sequences, page_size):
    free = iter(data.draw(st.permutations(range(40))))
    spans, want, row = [], {}, 0
    for _ in range(sequences):
        row += data.draw(st.integers(0, 2))  # queries that see no key
        q1 = row + data.draw(st.integers(1, 3))
        pages = [next(free) for _ in range(data.draw(st.integers(1, 4)))]
        length = data.draw(st.integers(1, len(pages) * page_size))
        slots = [p * page_size + i for p in pages for i in range(page_size)][:length]
        edges = [i for i in range(1, length) if slots[i] != slots[i - 1] + 1]
        for a, b in zip([0, *edges], [*edges, length], strict=True):
            spans.append(full(row, q1, slots[a], slots[b - 1] + 1))
        want |= dict.fromkeys(range(row, q1), slots)
        row = q1
    rows = row + data.draw(st.integers(0, 2))
    table = make_decode_table(np.array(spans, dtype=np.int64), rows, page_size)
    edges, has_keys = table.cu_seqlens_q, table.seqused_k > 0
    assert np.diff(edges).max() == np.diff(edges)[has_keys].max(), "what max_seqlen_q bounds"
    assert edges[0] == 0 and edges[-1] == rows and (np.diff(edges) > 0).all()
    assert table.page_table.dtype == table.seqused_k.dtype == edges.dtype == np.int32
    for seq, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        for query in range(a, b):
            assert slots_of(table, seq).tolist() == want.get(query, [])


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 2, 0, 8, 0, 5, 1, 1)],  # a mask
        [full(0, 17, 0, 8)],  # many queries
        [full(0, 1, 2, 8)],  # not from a page's first slot on
        [full(0, 1, 0, 6), full(0, 1, 8, 12)],  # a gap
        [full(0, 2, 0, 4), full(0, 1, 4, 8)],  # one query sees more
        [full(0, 2, 0, 4), full(1, 2, 4, 8)],
        [],
    ],
)
def test_what_is_no_decode_has_no_tables(spans):
    assert make_decode_table(np.array(spans, dtype=np.int64).reshape(-1, 8), 20, 4) is None


LONG = st.integers(0, 3 * tiles.CUT_PAIRS)


@given(st.lists(st.one_of(st.integers(0, 300), LONG), max_size=6), st.sampled_from([1, 16, 256]))
def test_rows_are_halved_as_their_spans_are(keys, page_size):
    pages = [-(-n // page_size) for n in keys]
    # Each row's pages lie next to each other: one span, from where one could be cut.
    first = np.cumsum([0, *(tiles.CUT_ROWS // page_size * (1 + n // tiles.CUT_ROWS) for n in keys)])
    table = np.zeros((len(keys), max(pages, default=1)), dtype=np.int32)
    for row, count, page in zip(table, pages, first[:-1], strict=True):
        row[:count] = np.arange(page, page + count)
    rows = Rows(table, np.array(keys, dtype=np.int32))
    begins = first[:-1] * page_size
    spans = [
        full(i, i + 1, k, k + n) for i, (k, n) in enumerate(zip(begins, keys, strict=True)) if n
    ]
    halves = tiles.halve(np.array(spans, dtype=np.int64).reshape(-1, 8))
    for half, want in zip(rows.halve(page_size), halves, strict=True):
        assert half.seqused_k.sum() == want[:, 3].sum() - want[:, 2].sum()
        for q0, _, k0, k1, *_ in want.tolist():
            assert half.seqused_k[q0] == k1 - k0
            count = -(-(k1 - k0) // page_size)
            assert half.page_table[q0, :count].tolist() == list(
                range(k0 // page_size, k0 // page_size + count)
            )
    assert rows.seqused_k.tolist() == keys, "left as it was"


@given(st.data(), st.lists(st.integers(0, 30), max_size=6), st.integers(1, 9))
def test_packed_rows_have_the_same_keys(data, keys, page_size):
    pages = [-(-n // page_size) for n in keys]
    numbers = iter(data.draw(st.permutations(range(sum(pages) + 3))))
    table = np.full((len(keys), max(pages, default=0) + 2), 99, dtype=np.int32)  # 99: not there
    for row, count in zip(table, pages, strict=True):
        row[:count] = [next(numbers) for _ in range(count)]
    rows = Rows(table, np.array(keys, dtype=np.int32))
    slots, packed = rows.slots(page_size), rows.pack(page_size)
    assert slots.dtype == np.int64 and len(slots) == sum(pages) * page_size
    for i, n in enumerate(keys):
        places = [
            packed.page_table[i, key // page_size] * page_size + key % page_size for key in range(n)
        ]
        want = [table[i, key // page_size] * page_size + key % page_size for key in range(n)]
        assert slots[places].tolist() == want
    assert packed.seqused_k.tolist() == keys and packed.page_table.dtype == np.int32
