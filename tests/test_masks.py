"""Which keys a row sees, key by key: where all scores are equal, one-hot values show the mask.

A name in a table says whose mask it is.
"""

import itertools
import sys

import pytest
import ringkern
import torch
from ringkern.schedule import METHODS
from test_peer_cases import prefilled
from threads import run_threads

# ---- one device

WINDOWS = [
    # seqlen_q, seqlen_k, causal, window_size, rows of the mask
    (2, 5, False, (1, 0), "..11. ...11"),
    (2, 5, False, (0, 1), "...11 ....1"),
    (2, 5, True, (2, 2), ".111. ..111"),
    (5, 2, True, (-1, -1), ".. .. .. 1. 11"),
    (5, 2, False, (1, 0), ".. .. .. 1. 11"),
    (5, 2, False, (0, 2), ".. 1. 11 11 .1"),
    (4, 4, False, (0, 0), "1... .1.. ..1. ...1"),
]


@pytest.mark.parametrize("seqlen_q, seqlen_k, causal, window_size, mask", WINDOWS)
def test_windows_are_aligned_bottom_right(seqlen_q, seqlen_k, causal, window_size, mask):
    """As yunchang and Transformer Engine construct them, construct_local_mask."""
    q, k = torch.ones(1, seqlen_q, 1, seqlen_k), torch.zeros(1, seqlen_k, 1, seqlen_k)
    v = torch.eye(seqlen_k)[None, :, None]
    out, lse = ringkern.attn_func(q, k, v, causal=causal, window_size=window_size)
    want = torch.tensor([[x == "1" for x in row] for row in mask.split()])
    assert torch.equal(out[0, :, 0] > 0, want)
    assert torch.equal(lse[0, 0].isneginf(), ~want.any(dim=1))


# ---- the ring

# PyTorch's per-document balancer: lengths and the rows of each of two ranks, as its tables have
# them (torch/distributed/tensor/experimental/_context_parallel/_load_balancer.py).
BALANCED = [
    ([8], [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ([4, 8, 4], [[0, 3, 4, 5, 10, 11, 12, 15], [1, 2, 6, 7, 8, 9, 13, 14]]),
]


@pytest.mark.parametrize("lengths, rows", BALANCED)
def test_balanced_documents(lengths, rows):
    plan = ringkern.Placement(2).prefill(dict(enumerate(lengths)))
    assert [plan.indices(rank).tolist() for rank in range(2)] == rows
    keys = [int((plan.positions(rank) + 1).sum()) for rank in range(2)]
    assert keys[0] == keys[1] == sum(n * (n + 1) // 2 for n in lengths) // 2


CAUSAL = dict(causal=True)
RINGS = [
    # whose, world_size, lengths, options, which keys a query sees by their positions
    ("PyTorch, one document", 2, [8], CAUSAL, lambda q, k: k <= q),
    ("PyTorch, documents", 2, [4, 8, 4], CAUSAL, lambda q, k: k <= q),
    ("flash-attention cute, identity", 3, [113], dict(causal=False), lambda q, k: k == k),
    ("flash-attention cute, causal", 5, [203], CAUSAL, lambda q, k: k <= q),
    ("flash-attention cute, block diagonal", 5, [64] * 4, dict(causal=False), lambda q, k: k == k),
    ("flash-attention cute, document", 3, [31, 1, 97, 2], CAUSAL, lambda q, k: k <= q),
    (
        "flash-attention cute, sliding window", 3, [251],
        dict(window_size=(16, 16), causal=False), lambda q, k: abs(q - k) <= 16,
    ),
    (
        "flash-attention cute, sliding window of documents", 5, [128, 37, 3, 85],
        dict(window_size=(20, 9), causal=False), lambda q, k: (q - k <= 20) & (k - q <= 9),
    ),
    (
        "Transformer Engine, causal window", 7, [200, 1, 12],
        dict(window_size=(32, 0), causal=True), lambda q, k: (k <= q) & (q - k <= 32),
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("whose, world_size, lengths, options, sees", RINGS)
def test_every_row_of_a_ring_sees_its_keys(whose, world_size, lengths, options, sees, dtype):
    total = sum(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.cat([torch.arange(n) for n in lengths])
    want = (document[:, None] == document) & sees(at[:, None], at[None])
    q, k = torch.ones(total, 2, 8, dtype=dtype), torch.zeros(total, 1, 8, dtype=dtype)
    v = torch.eye(total, dtype=dtype)[:, None]
    for found in run_threads(prefilled, world_size, lengths, (q, k, v), options):
        for method, (rows, out, lse) in zip(METHODS, found, strict=True):
            for head in range(2):
                assert torch.equal(out[:, head] > 0, want[rows]), f"{whose}: {method}"
            count = want[rows].sum(1).float().log().expand_as(lse)
            torch.testing.assert_close(lse, count, rtol=0, atol=1e-5, msg=f"{whose}: {method}")


@pytest.mark.parametrize("side", [1 << 48, (1 << 62) + 5, sys.maxsize - 5, sys.maxsize, 1 << 70])
def test_a_window_beyond_every_position_is_none(side):
    q, k = torch.randn(1, 40, 2, 8), torch.randn(1, 5, 2, 8)
    for (a, b), causal in itertools.product(((q, k), (k, q)), (False, True)):
        out, lse = ringkern.attn_func(a, b, b, causal=causal)
        for window_size in ((side, -1), (-1, side), (side, side)):
            got = ringkern.attn_func(a, b, b, causal=causal, window_size=window_size)
            assert torch.equal(got[0], out) and torch.equal(got[1], lse)
