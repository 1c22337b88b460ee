"""From runs to the integer tables that a step reads: which rows see which rows, and how."""

import numpy as np

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
    first = np.searchsorted(k_runs[:, 0], q_runs[:, 0], side="left")
    count = np.searchsorted(k_runs[:, 0], q_runs[:, 0], side="right") - first
    q_index = np.repeat(np.arange(len(q_runs)), count)
    skipped = np.cumsum(count) - count
    k_index = np.arange(len(q_index)) + np.repeat(first - skipped, count)
    return _pair(q_runs[q_index].T, k_runs[k_index].T, left, right)


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
    """Return the spans of paired runs, given by column."""
    lo, hi, q_stride, k_stride = _band(q, k, left, right)
    columns = q[1], q[1] + q[3], k[1], k[1] + k[3], lo, hi, q_stride, k_stride
    table = np.empty((len(lo), len(columns)), dtype=np.int64)
    for index, column in enumerate(columns):
        table[:, index] = column
    table = table[lo <= hi]
    if not (table[:, 6:] == 1).all():  # a hull may hold no pair where strides differ
        table = table[counts(table) > 0]
    return table


def pairs(spans: np.ndarray) -> int:
    """Return how many visible (query, key) pairs the spans hold."""
    return int(counts(spans).sum())


def counts(spans: np.ndarray) -> np.ndarray:
    """Return how many visible (query, key) pairs each span holds, int64 [n]."""
    plain = (spans[:, 6:] == 1).all(axis=1)
    found = np.zeros(len(spans), dtype=np.int64)
    found[plain] = _below(spans[plain], 5, 0) - _below(spans[plain], 4, -1)
    for index in np.flatnonzero(~plain):
        q0, q1, k0, k1, lo, hi, q_stride, k_stride = spans[index]
        at = np.arange(q1 - q0) * q_stride
        last = np.minimum((hi + at) // k_stride, k1 - k0 - 1)
        begin = np.maximum(-((-lo - at) // k_stride), 0)
        found[index] = np.maximum(last - begin + 1, 0).sum()
    return found


def _below(spans, column, more):
    """Count the pairs with j - i <= spans[column] + more."""
    q_length, k_length = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]
    edge = spans[:, column] + more
    # Rows from `first` on see at least one key, from `whole` on all.
    first = np.clip(-edge, 0, q_length)
    whole = np.clip(k_length - 1 - edge, first, q_length)
    growing = (whole - first) * (first + whole - 1) // 2 + (whole - first) * (edge + 1)
    return growing + (q_length - whole) * k_length
