"""The tile table says what its spans say: every visible pair once, each row in one tile."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import tiles
from ringkern.errors import ArgumentError
from ringkern.tile_table import MIN_BLOCKS, make_tiles


def pairs_of_spans(spans, shape):
    seen = np.zeros(shape, dtype=int)
    for q0, q1, k0, k1, lo, hi, q_stride, k_stride in spans:
        ahead = np.arange(k1 - k0) * k_stride - np.arange(q1 - q0)[:, None] * q_stride
        seen[q0:q1, k0:k1] += (ahead >= lo) & (ahead <= hi)
    return seen


def pairs_of_tiles(table, shape, block_q, block_k):
    seen, owners = np.zeros(shape, dtype=int), np.zeros(shape[0], dtype=int)
    for index, (q0, q1, begin, middle, end) in enumerate(table.tiles):
        assert 0 < q1 - q0 <= block_q
        owners[q0:q1] += index % table.splits == 0
        assert (table.tiles[index - index % table.splits, :2] == (q0, q1)).all()
        for piece, (k0, k1, lo, hi, q_stride, k_stride) in enumerate(table.pieces[begin:end]):
            ahead = np.arange(k1 - k0) * k_stride - np.arange(q1 - q0)[:, None] * q_stride
            visible = (ahead >= lo) & (ahead <= hi)
            if piece < middle - begin:
                assert visible.all() and (k1 - k0) % block_k == 0
            seen[q0:q1, k0:k1] += visible
    return seen, owners


@st.composite
def runs(draw, longest):
    """Runs of two sequences: rows follow one another, positions are strided and apart."""
    table, offset = [], 0
    for seq in range(2):
        start = 0
        for length in draw(st.lists(st.integers(1, longest), max_size=3)):
            stride = draw(st.sampled_from([1, 1, 2, 3]))
            start += draw(st.integers(0, 9))
            table.append((seq, offset, start, length, stride))
            offset, start = offset + length, start + length * stride
    return np.array(table, dtype=np.int64).reshape(-1, 5)


WINDOWS = st.tuples(st.integers(-1, 20), st.integers(-1, 20))


def in_pages(k_runs, order):
    """Return the runs with their rows in another order, as a cache has them."""
    table = k_runs.copy()
    table[order, 1] = np.cumsum(k_runs[order, 3]) - k_runs[order, 3]
    return table


def by_row(runs):
    """Return the sequence and the position of every row."""
    found = np.zeros((2, runs[:, 3].sum()), dtype=np.int64)
    for seq, offset, start, length, stride in runs:
        found[0, offset : offset + length] = seq
        found[1, offset : offset + length] = start + stride * np.arange(length)
    return found


def pairs_of_positions(q_runs, k_runs, left, right):
    (q_seq, q_at), (k_seq, k_at) = by_row(q_runs), by_row(k_runs)
    ahead = k_at - q_at[:, None]
    return (q_seq[:, None] == k_seq) & (-left <= ahead) & (ahead <= right)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(runs(12), runs(20)), min_size=1, max_size=3), WINDOWS, st.booleans(),
    st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_spans_see_what_positions_say(pairs, window, causal, paged, random):
    sides = tiles.bounds(causal, window)
    if paged:
        pairs = [(q, in_pages(k, random.sample(range(len(k)), len(k)))) for q, k in pairs]
    each = tiles.make_spans_each(pairs, *sides)
    for (q_runs, k_runs), spans in zip(pairs, each, strict=True):
        want = pairs_of_positions(q_runs, k_runs, *sides)
        np.testing.assert_array_equal(pairs_of_spans(spans, want.shape), want)
        assert (tiles.counts(spans) > 0).all()


def rows(*chunks, seq=0):
    """Return runs of chunks (start, length), with rows that follow one another."""
    lengths = [length for _, length in chunks]
    offsets = itertools.accumulate(lengths, initial=0)
    return np.array([(seq, at, *chunk, 1) for at, chunk in zip(offsets, chunks, strict=False)])


def test_full_spans_side_by_side_are_one():
    q, k = rows((100, 5), (200, 3)), rows((0, 10), (20, 10), (50, 7))
    paged = in_pages(k, [1, 2, 0])
    for keys in (k, paged):
        assert tiles.make_spans(q, keys, tiles.UNBOUNDED, 0).tolist() == [
            [0, 8, 0, 27, -7, 26, 1, 1]
        ]
    other = rows((300, 4), seq=1)
    both = tiles.make_spans_each([(q, k), (np.concatenate([q, other]), k)], tiles.UNBOUNDED, 0)
    assert [len(spans) for spans in both] == [1, 1], "not across sequences or tables"


def test_a_span_is_not_joined_to_one_that_is_cut_by_a_window():
    spans = tiles.make_spans(rows((100, 5)), rows((90, 2), (98, 2)), 10, 0)
    assert spans.tolist() == [[0, 5, 0, 2, 0, 1, 1, 1], [0, 5, 2, 4, -4, 1, 1, 1]]


@settings(max_examples=150)
@given(
    runs(40), runs(90), WINDOWS, st.booleans(), st.sampled_from([1, 3, 8]), st.sampled_from([1, 4]),
    st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_table_holds_every_pair_once(
    q_runs, k_runs, window, causal, block_q, block_k, splits, whole, random
):
    spans = tiles.make_spans(q_runs, k_runs, *tiles.bounds(causal, window))
    spans = spans[random.sample(range(len(spans)), len(spans))]
    shape = q_runs[:, 3].sum(), k_runs[:, 3].sum()
    table = make_tiles(spans, block_q, block_k, splits=splits, rows=int(shape[0]) * whole)
    want = pairs_of_spans(spans, shape)
    seen, owners = pairs_of_tiles(table, shape, block_q, block_k)
    np.testing.assert_array_equal(seen, want)
    assert owners.max(initial=0) <= 1
    assert owners.all() if whole else (owners >= want.any(axis=1)).all()
    if not whole:  # a tile that sees nothing is not in the table
        for q0, q1 in table.tiles[:, :2]:
            assert want[q0:q1].any() or not (spans[:, 6:] == 1).all()


@settings(max_examples=150)
@given(
    runs(40), runs(90), WINDOWS, st.booleans(), st.sampled_from([(1, 1), (60, 7), (1 << 14, 256)])
)
def test_halves_hold_every_pair_once(q_runs, k_runs, window, causal, cuts):
    spans = tiles.make_spans(q_runs, k_runs, *tiles.bounds(causal, window))
    shape = q_runs[:, 3].sum(), k_runs[:, 3].sum()
    with mock.patch.multiple(tiles, CUT_PAIRS=cuts[0], CUT_ROWS=cuts[1]):
        first, second = tiles.halve(spans)
    seen = [pairs_of_spans(half, shape) for half in (first, second)]
    np.testing.assert_array_equal(sum(seen), pairs_of_spans(spans, shape))
    assert (tiles.counts(np.concatenate([first, second])) > 0).all()
    # Clipped, so that what is full can be told from the numbers.
    for q0, q1, k0, k1, lo, hi, q_stride, k_stride in np.concatenate([first, second]):
        assert lo >= (q0 - q1 + 1) * q_stride and hi <= (k1 - k0 - 1) * k_stride


@given(st.lists(runs(20), max_size=3, min_size=1), runs(30), WINDOWS)
def test_spans_of_queries_one_behind_the_other(asking, k_runs, window):
    """Of any ranks, also of those without queries."""
    keys, rows = k_runs[:, 3].sum(), [int(table[:, 3].sum()) for table in asking]
    each = [tiles.make_spans(table, k_runs, *tiles.bounds(False, window)) for table in asking]
    found = pairs_of_spans(tiles.stack(each, rows), (sum(rows), keys))
    want = [pairs_of_spans(spans, (n, keys)) for spans, n in zip(each, rows, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(want))
    assert sum(map(len, each)) == len(tiles.stack(each, rows))


def test_halves_are_even_where_spans_are_large():
    one = span(64, 4096)
    first, second = tiles.halve(one)
    assert tiles.pairs(first) == tiles.pairs(second) == 64 * 2048
    small = span(1, 100)
    assert tiles.pairs(tiles.halve(small)[0]) == 100
    many = np.concatenate([small] * 4)
    assert [len(half) for half in tiles.halve(many)] == [2, 2]


def span(q_length, k_length, lo=None, hi=None):
    lo, hi = 1 - q_length if lo is None else lo, k_length - 1 if hi is None else hi
    return np.array([[0, q_length, 0, k_length, lo, hi, 1, 1]], dtype=np.int64)


def blocks(table, block_k):
    lengths = -(-(table.pieces[:, 1] - table.pieces[:, 0]) // block_k)
    return [int(lengths[begin:end].sum()) for _, _, begin, _, end in table.tiles]


def test_a_causal_table_is_longest_first_and_masks_only_the_diagonal():
    table = make_tiles(span(512, 512, hi=0), 64, 32)
    assert blocks(table, 32) == [16, 14, 12, 10, 8, 6, 4, 2]
    masked = [end - middle for _, _, _, middle, end in table.tiles]
    assert masked == [1] * 8
    assert [tuple(table.pieces[middle, :2]) for *_, middle, _ in table.tiles] == [
        (q0, q0 + 64) for q0 in range(448, -1, -64)
    ]


def test_a_full_table_masks_only_what_is_left_of_a_block():
    table = make_tiles(span(100, 70), 64, 32)
    assert table.pieces[:, :2].tolist() == [[0, 64], [64, 70]] * 2


@pytest.mark.parametrize("fill, keys, want", [
    (0, 4096, 1), (2, 4096, 1), (6, 4096, 3), (7, 4096, 3), (999, 4096, 32), (6, 32 * MIN_BLOCKS, 1),
    (999, 1 << 20, 64),
])  # fmt: skip
def test_few_tiles_are_split_to_fill_the_device(fill, keys, want):
    table = make_tiles(span(2, keys), 1, 32, fill=fill)
    assert table.splits == want and len(table.tiles) == 2 * want
    assert max(blocks(table, 32)) == -(-keys // 32 // want)


def test_scattered_tiles_are_not_split():
    """The parts of a step lie in a workspace from its first row to its last."""
    spans = np.concatenate([span(2, 4096), span(2, 4096) + [[1000, 1000, 0, 0, 0, 0, 0, 0]]])
    assert make_tiles(spans, 16, 32, fill=64).splits == 1


def test_nothing_to_do():
    none = np.zeros((0, 8), dtype=np.int64)
    table = make_tiles(none, 16, 32, fill=4)
    assert table.tiles.shape == (0, 5) and table.pieces.shape == (0, 6) and table.splits == 1
    assert make_tiles(none, 16, 32, rows=20).tiles[:, :2].tolist() == [[0, 16], [16, 20]]


def test_positions_beyond_the_kernel_are_refused():
    with pytest.raises(ArgumentError, match="positions below 2\\^31"):
        make_tiles(np.array([[0, 1, 0, 1 << 20, 0, 1 << 40, 1, 1 << 13]]), 16, 32)


def test_many_sequences_keep_to_their_own_rows():
    """64 sequences that decode: one tile each, whatever the tile could hold."""
    lengths = np.arange(1, 65) * 7
    ends = lengths.cumsum()
    one = [(seq, seq, lengths[seq], 1, 1) for seq in range(64)]
    cached = [(seq, ends[seq] - lengths[seq], 0, lengths[seq], 1) for seq in range(64)]
    spans = tiles.make_spans(np.array(one), np.array(cached), *tiles.bounds(True, (-1, -1)))
    table = make_tiles(spans, 16, 32)
    assert sorted(table.tiles[:, 0]) == list(range(64))
    for q0, q1, begin, _, end in table.tiles:
        pieces = table.pieces[begin:end]
        assert q1 == q0 + 1
        assert (pieces[0, 0], pieces[-1, 1]) == (ends[q0] - lengths[q0], ends[q0])
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
