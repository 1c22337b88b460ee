"""Chunks that are joined, cut and copied hold the positions that went in, in any order of calls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern.history import History
from ringkern.types import Chunk

ROWS, RANKS = 3, 2
CHUNK = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))  # gap, length, stride
APPEND = st.tuples(
    st.just("append"),
    st.dictionaries(
        st.tuples(st.integers(0, ROWS - 1), st.integers(0, RANKS - 1)),
        st.lists(CHUNK, min_size=1, max_size=3),
        min_size=1,
    ),
)
ROW = st.integers(0, ROWS - 1)
CHANGE = st.one_of(
    APPEND,
    st.tuples(st.just("truncate"), ROW, st.integers(0, 40)),
    st.tuples(st.just("copy"), ROW, ROW),
    st.tuples(st.just("clear"), ROW),
    st.tuples(st.just("at")),
)


def positions(chunks):
    return [start + i * stride for start, length, stride in chunks for i in range(length)]


def append(history, model, chunks):
    rows, ranks, table = [], [], []
    for (row, rank), some in chunks.items():
        end = max([-1, *model[row][rank]])
        for gap, length, stride in some:
            chunk = Chunk(end + gap, length, stride)
            end = chunk.start + (length - 1) * stride
            rows.append(row)
            ranks.append(rank)
            table.append(chunk)
            model[row][rank] += positions([chunk])
    history.append(np.array(rows), np.array(ranks), np.array(table))


def truncate(history, model, row, length):
    kept = [[p for p in mine if p < length] for mine in model[row]]
    lost = [len(mine) - len(left) for mine, left in zip(model[row], kept, strict=True)]
    model[row] = kept
    assert history.truncate(row, length) == lost


def held(model):
    return [[mine[:] for mine in ranks] for ranks in model]


def check_held(snapshot, want):
    """What was held once must be told alike however much has changed since."""
    for rank in range(RANKS):
        table = snapshot.runs(rank)
        assert (np.diff(table[:, 0]) >= 0).all()
        for row in range(ROWS):
            assert positions(table[table[:, 0] == row, 2:].tolist()) == want[row][rank]


@settings(max_examples=200, deadline=None)
@given(st.lists(CHANGE, max_size=12))
def test_any_changes(changes):
    history, model, snapshots = History(2, RANKS), [[[], []] for _ in range(ROWS)], []
    history.grow()
    for what, *args in changes:
        if what == "append":
            append(history, model, *args)
        elif what == "truncate":
            truncate(history, model, *args)
        elif what == "copy":
            history.copy(*args)
            model[args[1]] = held(model)[args[0]]
        elif what == "clear":
            history.clear(args[0])
            model[args[0]] = [[], []]
        else:
            snapshots.append((history.at(np.arange(ROWS)), held(model)))
        for row in range(ROWS):
            told = [positions(history.chunks(row, rank)) for rank in range(RANKS)]
            assert told == model[row]
    for snapshot, want in snapshots:
        check_held(snapshot, want)


@pytest.mark.parametrize("stride", [1, 3])
def test_decoded_tokens_are_one_chunk(stride):
    history, zero = History(1, 1), np.zeros(1, dtype=np.int64)
    history.append(zero, zero, np.array([[0, 100, 1]]))
    for index in range(50):
        history.append(zero, zero, np.array([[200 + index * stride, 1, 1]]))
    assert history.chunks(0, 0) == (Chunk(0, 100, 1), Chunk(200, 50, stride))
    history.append(zero, zero, np.array([[200 + 50 * stride, 1, 1]]))
    assert history.truncate(0, 201) == [50]
    assert history.chunks(0, 0) == (Chunk(0, 100, 1), Chunk(200, 1, 1))
