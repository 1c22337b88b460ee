"""From runs to the integer tables that a step reads: which rows see which rows, and how."""

import numpy as np

UNBOUNDED = 1 << 62  # a window side without a bound; far from overflow when positions are added


def bounds(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """Return (left, right): a query at position p sees keys in [p - left, p + right]."""
    left, right = (UNBOUNDED if side < 0 else side for side in window_size)
    return left, min(right, 0) if causal else right


def band(q_start, q_length, k_start, k_length, stride, left, right):
    """Return (lo, hi): row i sees row j iff lo <= j - i <= hi. Arrays broadcast.

    Row i of the queries is at q_start + i * stride, row j of the keys at k_start + j * stride.
    Nothing is visible where lo > hi. Both are clipped to what i and j can reach (see Span).
    """
    shift = k_start - q_start
    lo = -((left + shift) // stride)  # ceil((-left - shift) / stride)
    hi = (right - shift) // stride
    return np.maximum(lo, 1 - q_length), np.minimum(hi, k_length - 1)


def make_spans(q_runs: np.ndarray, k_runs: np.ndarray, left: int, right: int) -> np.ndarray:
    """Return the spans of every pair of runs with a visible (query, key), int64 [n, 6].

    Columns as in Span. Both tables are ordered by sequence; runs of different sequences never see
    each other. Runs of more than one position must agree in stride.
    """
    first = np.searchsorted(k_runs[:, 0], q_runs[:, 0], side="left")
    count = np.searchsorted(k_runs[:, 0], q_runs[:, 0], side="right") - first
    q_index = np.repeat(np.arange(len(q_runs)), count)
    skipped = np.cumsum(count) - count
    k_index = np.arange(len(q_index)) + np.repeat(first - skipped, count)
    q, k = q_runs[q_index], k_runs[k_index]
    alone = q[:, 3] == 1  # one position has any stride
    assert np.all(alone | (k[:, 3] == 1) | (q[:, 4] == k[:, 4])), "runs of different stride"
    stride = np.where(alone, k[:, 4], q[:, 4])
    lo, hi = band(q[:, 2], q[:, 3], k[:, 2], k[:, 3], stride, left, right)
    table = np.stack([q[:, 1], q[:, 1] + q[:, 3], k[:, 1], k[:, 1] + k[:, 3], lo, hi], axis=1)
    return table[lo <= hi]


def pairs(spans: np.ndarray) -> int:
    """Return how many visible (query, key) pairs the spans hold."""
    q_length, k_length = spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]

    def below(edge):
        # Pairs with j - i <= edge: rows from `first` on see at least one key, from `whole` on all.
        first = np.clip(-edge, 0, q_length)
        whole = np.clip(k_length - 1 - edge, first, q_length)
        growing = (whole - first) * (first + whole - 1) // 2 + (whole - first) * (edge + 1)
        return growing + (q_length - whole) * k_length

    return int((below(spans[:, 5]) - below(spans[:, 4] - 1)).sum())
