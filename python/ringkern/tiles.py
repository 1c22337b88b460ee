"""From runs to the integer tables that a step reads: which rows see which rows, and how."""

import itertools
import math

import numpy as np

MANY = 1 << 14  # runs that are looked at together: more take memory and save no time
CUT_PAIRS = 1 << 14  # a span of fewer is not cut in two: what a span costs at least is no gain
CUT_ROWS = 256  # and where, in key rows: with whole pages of a cache on either side
UNBOUNDED = 1 << 62  # a window side without a bound; far from overflow when positions are added


def bounds(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """Return (left, right): a query at position p sees keys in [p - left, p + right]."""
    left, right = (UNBOUNDED if side < 0 else side for side in window_size)
    return left, min(right, 0) if causal else right


def make_spans(q_runs: np.ndarray, k_runs: np.ndarray, left: int, right: int) -> np.ndarray:
    """Return the spans of every pair of runs with a visible (query, key), int64 [n, 8].

    Columns as in types.Span. Both tables are ordered by sequence; runs of different sequences
    never see each other.
    """
    return make_spans_each([(q_runs, k_runs)], left, right)[0]


def make_spans_each(tables, left: int, right: int) -> list[np.ndarray]:
    """Return make_spans() of each (q_runs, k_runs): many at once, as calls of numpy cost time."""
    if not tables:
        return []
    q_lengths, k_lengths = ([len(runs) for runs in side] for side in zip(*tables, strict=True))
    if len(tables) > 1 and sum(q_lengths) + sum(k_lengths) > MANY:
        half = len(tables) // 2
        return [
            spans
            for part in (tables[:half], tables[half:])
            for spans in make_spans_each(part, left, right)
        ]
    q_runs, k_runs = (np.concatenate(side) for side in zip(*tables, strict=True))
    groups = np.arange(len(tables))
    q_group, k_group = groups.repeat(q_lengths), groups.repeat(k_lengths)
    # A number for each sequence of each group, in the order of the rows.
    sequences = 1 + max(int(runs[:, 0].max(initial=0)) for runs in (q_runs, k_runs))
    q_key, k_key = q_group * sequences + q_runs[:, 0], k_group * sequences + k_runs[:, 0]
    first = k_key.searchsorted(q_key)
    count = k_key.searchsorted(q_key, side="right") - first
    q_index = np.arange(len(q_runs)).repeat(count)
    skipped = count.cumsum() - count
    k_index = np.arange(len(q_index)) + (first - skipped).repeat(count)
    q, k = q_runs.take(q_index, axis=0).T, k_runs.take(k_index, axis=0).T
    table, kept = _pair(q, k, left, right)
    q_index = q_index[kept]
    table, group = _join(table, q_index, q_group[q_index])
    edges = group.searchsorted(np.arange(len(tables) + 1)).tolist()
    return [table[begin:end] for begin, end in itertools.pairwise(edges)]


def _join(table, run, group):
    """Join full spans that lie side by side, in keys or in queries, within a group.

    What is cached is visible to all new queries of its sequence: one span, however many runs the
    two are cut into. Return the table, by group, and the group of each span.

    Args:
        run: which run of queries each span is of; ascending.
        group: of each span; ascending.
    """
    full = (table[:, 4] == 1 - table[:, 1] + table[:, 0]) & (
        table[:, 5] == table[:, 3] - table[:, 2] - 1
    )
    full &= (table[:, 6:] == 1).all(axis=1)
    if np.count_nonzero(full) < 2:
        return table, group
    same = run[1:] == run[:-1]
    if (same & (table[1:, 2] < table[:-1, 2])).any():  # keys that lie in pages come in any order
        order = _order(run, table[:, 2])
        table, full = table[order], full[order]
    follows = same & full[1:] & full[:-1] & (table[1:, 2] == table[:-1, 3])
    table, (full, group) = _merge(table, follows, 2, full, group)
    same = group[1:] == group[:-1]
    if not (same & (table[1:, 2] <= table[:-1, 2])).any():  # no two see the same keys
        return table, group
    order = _order(group, table[:, 2], table[:, 0])
    table, full, group = table[order], full[order], group[order]
    follows = (group[1:] == group[:-1]) & full[1:] & full[:-1]
    follows &= (table[1:, 2:4] == table[:-1, 2:4]).all(axis=1) & (table[1:, 0] == table[:-1, 1])
    table, (group,) = _merge(table, follows, 0, group)
    order = _order(group, table[:, 0], table[:, 2])
    return table[order], group[order]


def _merge(table, follows, begin, *others):
    """Make one of each full span and those that follow it in columns begin, begin + 1.

    follows: bool [n - 1], does a span follow the one before it? others: more columns. Return the
    table and the other columns.
    """
    if not follows.any():
        return table, others
    kept = (~follows).nonzero()[0]
    first, last = np.concatenate([[0], kept + 1]), np.concatenate([kept, [len(follows)]])
    end = begin + 1
    joined = table.take(first, axis=0)
    grown = table[last, end] - joined[:, end]
    joined[:, end] += grown
    if begin == 0:
        joined[:, 4] -= grown
    else:
        joined[:, 5] += grown
    return joined, [column[first] for column in others]


def _order(*columns):
    """Return the order by the first column, then the second, and so on; none below 0."""
    widths = [int(column.max()) + 1 for column in columns]
    if math.prod(widths) >= 1 << 62:
        return np.lexsort(columns[::-1])
    key = columns[0]
    for column, width in zip(columns[1:], widths[1:], strict=True):
        key = key * width + column
    return np.argsort(key, kind="stable")  # of one key: several times faster


def visible(q_runs: np.ndarray, k_runs: np.ndarray, left: int, right: int) -> np.ndarray:
    """Return bool [q run, k run]: may a query of the one see a key of the other?

    All runs of one sequence. Exact where strides agree; else a pair that sees nothing may pass.
    """
    band = _band(q_runs.T[:, :, None], k_runs.T[:, None, :], left, right)
    return band[0] <= band[1]


def _band(q, k, left, right):
    """Return (lo, hi, q_stride, k_stride) of paired runs, given by column; see types.Span."""
    _, _, q_start, q_length, q_stride = q
    _, _, k_start, k_length, k_stride = k
    if (q_stride == 1).all() and (k_stride == 1).all():  # as nearly always
        shift = k_start - q_start
        lo = np.maximum(-left - shift, 1 - q_length)
        return lo, np.minimum(right - shift, k_length - 1), q_stride, k_stride
    # A single row has any stride: the other side's, so that most pairs agree in it.
    q_stride = np.where(q_length == 1, k_stride, q_stride)
    k_stride = np.where(k_length == 1, q_stride, k_stride)
    shift = k_start - q_start
    lo, hi = -left - shift, right - shift  # bounds on j * k_stride - i * q_stride
    full = (lo <= (1 - q_length) * q_stride) & (hi >= (k_length - 1) * k_stride)
    shared = full | (q_stride == k_stride)
    unit = np.where(shared & ~full, q_stride, 1)
    q_stride, k_stride = np.where(shared, 1, q_stride), np.where(shared, 1, k_stride)
    lo = np.maximum(-(-lo // unit), (1 - q_length) * q_stride)
    hi = np.minimum(hi // unit, (k_length - 1) * k_stride)
    return lo, hi, q_stride, k_stride


def _pair(q, k, left, right):
    """Return the spans of paired runs, given by column, and which pairs they are of."""
    lo, hi, q_stride, k_stride = _band(q, k, left, right)
    kept = np.flatnonzero(lo <= hi)
    columns = q[1], q[1] + q[3], k[1], k[1] + k[3], lo, hi, q_stride, k_stride
    table = np.concatenate(columns).reshape(len(columns), -1).T.take(kept, axis=0)
    if not (table[:, 6:] == 1).all():  # a hull may hold no pair where strides differ
        some = counts(table) > 0
        table, kept = table[some], kept[some]
    return table, kept


def pairs(spans: np.ndarray) -> int:
    """Return how many visible (query, key) pairs the spans hold."""
    return int(counts(spans).sum())


def counts(spans: np.ndarray) -> np.ndarray:
    """Return how many visible (query, key) pairs each span holds, int64 [n]."""
    plain = (spans[:, 6:] == 1).all(axis=1)
    if plain.all():
        return _below(spans, 5, 0) - _below(spans, 4, -1)
    found = np.zeros(len(spans), dtype=np.int64)
    found[plain] = _below(spans[plain], 5, 0) - _below(spans[plain], 4, -1)
    for index in np.flatnonzero(~plain):
        q0, q1, k0, k1, lo, hi, q_stride, k_stride = spans[index]
        at = np.arange(q1 - q0) * q_stride
        last = np.minimum((hi + at) // k_stride, k1 - k0 - 1)
        begin = np.maximum(-((-lo - at) // k_stride), 0)
        found[index] = np.maximum(last - begin + 1, 0).sum()
    return found


def halve(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the spans in two tables of about as many visible pairs each.

    Between two spans, or through the keys of one that is large; a small one alone is all first.
    """
    count = counts(spans)
    half = count.sum() / 2
    at = int(np.searchsorted(count.cumsum(), half))
    if not len(spans):
        return spans, spans
    missing = half - count[:at].sum()
    q0, q1, k0, k1, lo, hi, q_stride, k_stride = spans[at].tolist()
    cut = (k0 + round(missing / count[at] * (k1 - k0))) // CUT_ROWS * CUT_ROWS
    if count[at] < CUT_PAIRS or not k0 < cut < k1:
        at += bool(missing >= count[at] / 2)
        return spans[:at], spans[at:]
    parts = np.array([spans[at], spans[at]])
    ahead = (cut - k0) * k_stride  # of the second part's corner
    parts[0, 3], parts[0, 5] = cut, min(hi, ahead - k_stride)
    parts[1, 2] = cut
    parts[1, 4:6] = max(lo - ahead, (q0 - q1 + 1) * q_stride), hi - ahead
    first, second = (part[counts(part) > 0] for part in (parts[:1], parts[1:]))
    return np.concatenate([spans[:at], first]), np.concatenate([second, spans[at + 1 :]])


def stack(tables: list[np.ndarray], rows: list[int]) -> np.ndarray:
    """Return the spans of tables as of one query tensor, in which theirs lie one behind the other.

    rows: of the query tensor of each table.
    """
    if len(tables) == 1:
        return tables[0]
    first = np.cumsum([0, *rows[:-1]])
    spans = np.concatenate(tables)
    spans[:, :2] += np.repeat(first, [len(table) for table in tables])[:, None]
    return spans


def _below(spans, column, more):
    """Count the pairs with j - i <= spans[column] + more."""
    q_length, k_length = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
    edge = spans[:, column] + more
    # Rows from `first` on see at least one key, from `whole` on all.
    first = np.minimum(np.maximum(-edge, 0), q_length)
    whole = np.minimum(np.maximum(k_length - 1 - edge, first), q_length)
    growing = (whole - first) * (first + whole - 1) // 2 + (whole - first) * (edge + 1)
    return growing + (q_length - whole) * k_length
