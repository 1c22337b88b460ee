"""attn_func and attn_varlen_func against the float64 oracle."""

import math

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern.kernels import reference, step_torch
from strategies import WINDOWS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")


def make_qkv(seqlen_q, seqlen_k, nheads=2, nheads_k=1, headdim=16, headdim_v=None, batch=1,
             dtype=torch.float32, seed=0):  # fmt: skip
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    headdim_v = headdim if headdim_v is None else headdim_v
    return (
        randn(batch, seqlen_q, nheads, headdim),
        randn(batch, seqlen_k, nheads_k, headdim),
        randn(batch, seqlen_k, nheads_k, headdim_v),
    )


def assert_attn(q, k, v, name, **options):
    out, lse = ringkern.attn_func(q, k, v, **options)
    want, want_lse = reference.attn(q, k, v, **options)
    base, _ = reference.attn(q, k, v, **options, dtype=q.dtype)
    assert out.dtype == q.dtype
    assert_close(out, want, base, name=name)
    assert_lse_close(lse, want_lse, name=name)


@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(0, 70)),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    headdims=st.sampled_from([(8, 8), (16, 24), (40, 8), (1, 1)]),
    batch=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window_size=WINDOWS,
    softcap=st.sampled_from([0.0, 3.0]),
    softmax_scale=st.sampled_from([None, 0.3, 0.0, -0.5]),
    sinks=st.booleans(),
)
@settings(max_examples=250)
def test_any_call_matches_the_oracle(sizes, heads, headdims, batch, dtype, sinks, **options):
    q, k, v = make_qkv(*sizes, *heads, *headdims, batch, dtype)
    options["sinks"] = torch.linspace(-2, 2, heads[0]) if sinks else None
    assert_attn(q, k, v, f"{sizes=} {heads=} {headdims=} {dtype=} {options}", **options)


LONG = [(1, 4100), (113, 2300), (2300, 113), (2049, 2047), (2500, 4200), (4100, 4099)]


@pytest.mark.parametrize("seqlen_q, seqlen_k", LONG)
@pytest.mark.parametrize("window_size", [(-1, -1), (300, 0), (2100, 700), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_blocks(seqlen_q, seqlen_k, window_size, causal):
    """Where blocks, the diagonal and the window's edges meet, checked on rows at each border."""
    q, k, v = make_qkv(seqlen_q, seqlen_k)
    options = dict(causal=causal, window_size=window_size)
    out, lse = ringkern.attn_func(q, k, v, **options)
    edges = (0, 1, 112, 1023, 2047, 2048, 2049, 4095, 4096, seqlen_q - 1)
    rows = torch.tensor(sorted({row for row in edges if row < seqlen_q}))
    q_pos = rows + seqlen_k - seqlen_q
    want, want_lse = reference.attn(q[:, rows], k, v, q_pos=q_pos, **options)
    assert_close(out[:, rows], want, want.float(), name=f"{seqlen_q=} {seqlen_k=} {options}")
    assert_lse_close(lse[:, :, rows], want_lse, name=f"{seqlen_q=} {seqlen_k=} {options}")
    assert torch.equal(out.isnan(), torch.zeros_like(out, dtype=torch.bool))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_answer_known_by_hand(dtype):
    """k = 0: out is the mean of the visible v, lse the log of their number."""
    q, k, v = make_qkv(7, 7, 2, 2, 8, dtype=dtype)
    out, lse = ringkern.attn_func(q, torch.zeros_like(k), v, causal=True)
    for row in range(7):
        mean = v[0, : row + 1].double().mean(0)
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(out[0, row].double(), mean, rtol=ulp, atol=1e-6)
        torch.testing.assert_close(lse[0, :, row], torch.full((2,), math.log(row + 1)))


def test_rows_without_keys():
    q, k, v = make_qkv(9, 4)
    out, lse = ringkern.attn_func(q, k, v, causal=True)  # bottom-right: 5 queries before any key
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == -INF).all()
    assert lse[:, :, 5:].isfinite().all()
    out, lse = ringkern.attn_func(q, k[:, :0], v[:, :0])
    assert (out == 0).all() and (lse == -INF).all()


def test_a_row_without_keys_and_a_sink():
    q, k, v = make_qkv(3, 1)
    sinks = torch.tensor([0.5, -1.0])
    out, lse = ringkern.attn_func(q, k, v, causal=True, sinks=sinks)
    assert (out[:, :2] == 0).all()
    assert torch.equal(lse[0, :, 0], sinks)


def test_the_oracle_computes_where_its_inputs_are():
    on_meta = [x.to("meta") for x in make_qkv(5, 7)]
    for result in reference.attn(*on_meta, causal=True, window_size=(3, 0)):
        assert result.device.type == "meta"


def test_views_give_the_same_bits():
    draw = torch.Generator().manual_seed(3)
    packed = torch.randn(2, 50, 3 * 4, 32, generator=draw)[:, 3:47, :, 5:21]
    q, k, v = packed.chunk(3, dim=2)
    assert not q.is_contiguous()
    got = ringkern.attn_func(q, k, v, causal=True)
    want = ringkern.attn_func(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_nan_stays_nan(softcap):
    q, k, v = make_qkv(6, 6)
    k[0, 3, 0, 0] = float("nan")
    out, lse = ringkern.attn_func(q, k, v, causal=True, softcap=softcap)
    assert out[:, 3:].isnan().all() and lse[:, :, 3:].isnan().all()
    assert out[:, :3].isfinite().all() and lse[:, :, :3].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_nan_stay_nan(causal):
    """The fused op answers lse = 0 to a row whose scores are all NaN, or all overflow."""
    q, k, v = make_qkv(6, 6)
    q[0, 2] = float("nan")
    out, lse = ringkern.attn_func(q, k, v, causal=causal)
    want, want_lse = reference.attn(q, k, v, causal=causal)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan())
    out, lse = ringkern.attn_func(q, k * float("nan"), v, causal=causal)
    assert out.isnan().all() and lse.isnan().all()
    out, lse = ringkern.attn_func(*(x * 1e25 for x in make_qkv(6, 6)), causal=causal)
    assert not (lse == 0).any()


def test_infinite_values_stay_infinite():
    q, k, v = make_qkv(2, 5000)
    v[0, 3] = float("inf")
    out, _ = ringkern.attn_func(q, k, v)
    assert (out == float("inf")).all()


def test_large_magnitudes():
    q, k, v = make_qkv(40, 40)
    assert_attn(q * 60, k * 60, v, "scores in the thousands", causal=True)


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 147), (113, 203), (128, 217), (108, 256), (1, 1)],
        [(0, 5), (7, 0), (3, 3), (0, 0), (12, 2)],
        [(1534, 1534), (161, 161), (353, 353)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen(lengths, dtype):
    total_q, total_k = (sum(pair[i] for pair in lengths) for i in (0, 1))
    q, k, v = (x[0] for x in make_qkv(total_q, total_k, 4, 2, dtype=dtype))
    edges = [torch.tensor([0] + [pair[i] for pair in lengths]).cumsum(0).int() for i in (0, 1)]
    for options in ({}, dict(causal=True), dict(causal=True, window_size=(20, 0), softcap=4.0)):
        out, lse = ringkern.attn_varlen_func(q, k, v, *edges, **options)
        want, want_lse = reference.attn_varlen(q, k, v, *edges, **options)
        base, _ = reference.attn_varlen(q, k, v, *edges, **options, dtype=dtype)
        assert_close(out, want, base, name=f"{lengths} {options}")
        assert_lse_close(lse, want_lse, name=f"{lengths} {options}")


def test_scores_are_never_larger_than_a_block(monkeypatch):
    """Neither path materialises more than PLAIN_Q x PLAIN_K scores, whatever the length."""
    sizes = []
    plain = step_torch._plain
    monkeypatch.setattr(
        step_torch,
        "_plain",
        lambda q, k, *rest: sizes.append((q.shape[2], k.shape[2])) or plain(q, k, *rest),
    )
    q, k, v = make_qkv(3000, 3000)
    ringkern.attn_func(q, k, v, causal=True, softcap=5.0)
    ringkern.attn_func(q, k, v, window_size=(50, 50))
    assert sizes
    assert max(a for a, _ in sizes) <= step_torch.PLAIN_Q
    assert max(b for _, b in sizes) <= step_torch.PLAIN_K
