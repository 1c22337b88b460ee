"""The Triton step over the range of its numbers: NaN, infinities, large inputs and a large lse."""

import pytest
import torch
from accelerator import EACH_DTYPE
from maximum import drop_nan
from ringkern.kernels import reference
from rounding import U, lse_error, mean_error
from step_case import (
    INF,
    NAN,
    add,
    attend,
    draw,
    empty_state,
    guarded,
    make_spans,
    parts_of,
    run_of,
)

QUIET = pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN", "ignore:overflow")
# Row 10 of q or of the state; a key of a whole block, that all rows see, or of a masked one.
DAMAGES = [("q", 10), ("out", 10), ("lse", 10), ("k", 5), ("k", 60), ("v", 5), ("v", 60)]


@QUIET
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("where, at", DAMAGES)
def test_nan_stays_nan_where_it_is_seen(where, at, splits, monkeypatch):
    drop_nan(monkeypatch)
    q, k, v = draw(20, 70)
    spans = make_spans(run_of(20, 50), run_of(70), True)
    for softcap in (0.0, 2.0) if splits == 1 else (0.0,):
        (out, lse), _ = guarded(q, 32)
        damaged = dict(q=q, k=k, v=v, out=out, lse=lse)[where].clone()
        damaged[(0, 0, at) if where == "lse" else (0, at, 0, 7)] = NAN
        call = dict(q=q, k=k, v=v, out=out, lse=lse) | {where: damaged}
        add(**call, spans=spans, splits=splits, softcap=softcap)
        want = torch.zeros(20, 2, dtype=torch.bool)
        want[slice(10, 11) if where in ("q", "out", "lse") else slice(max(0, at - 50), 20), 0] = (
            True
        )
        bad = call["out"].isnan()[0].cpu()
        if where in "outv":  # of one column
            assert not bad[..., :7].any() and not bad[..., 8:].any()
        bad = bad.any(-1)
        if where == "v":  # 0 * NaN: the rows of a tile that do not see a key weigh it 0
            assert bad[want].all() and not bad[:, 1].any()
        else:
            assert torch.equal(bad, want)
        bad_lse = call["lse"].isnan()[0].T.cpu()
        assert torch.equal(bad_lse, want & (where in ("q", "k", "lse")))


@QUIET
@pytest.mark.parametrize("at", [5, 60])
def test_an_infinite_key(at):
    """A score of -inf is a key unseen; one of +inf has no weight to give: NaN, not a number."""
    q, k, v = draw(20, 70)
    spans = make_spans(run_of(20, 50), run_of(70), True)
    k[0, at, 0, 3] = INF
    out, lse = (x[0].cpu() for x in attend(q, k, v, spans))
    sees = torch.arange(20) >= at - 50
    up, down = ((q[0, :, 0, 3] * sign > 0).cpu() & sees for sign in (1, -1))
    assert up.any() and down.any()
    assert out[up, 0].isnan().all() and not lse[0, up].isfinite().any()
    want, want_lse = reference.attn(
        q[:, down].cpu(), k.cpu(), v.cpu(), q_pos=torch.arange(50, 70)[down],
        k_pos=torch.arange(70), causal=True,
    )  # fmt: skip
    torch.testing.assert_close(out[down, 0].double(), want[0, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse[0, down].double(), want_lse[0, 0], atol=1e-5, rtol=0)
    assert not out[:, 1].isnan().any()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("size", [14.0, 1024.0, 2.0**20, -(2.0**20)])
def test_large_lse(size, splits):
    """Of a million tokens, ln(10 ** 6) = 14, and of scores up to a million.

    Scores are made of powers of two and eighths, so exact in float32, and what is off is what the
    lse's own rounding explains: 0.1 nats and more at a million, which is why out may be off there.
    """
    q, k, v = draw(20, 60, (1, 1), (16, 16))
    eighths = torch.randint(-24, 25, (60,), generator=torch.Generator().manual_seed(3))
    q.zero_()[..., :2] = 1.0
    k.zero_()[..., 0], k[0, :, 0, 1] = size, (eighths / 8).to(k)
    want, want_lse = reference.attn(*(x.cpu() for x in (q, k, v)), causal=True, softmax_scale=1.0)
    whole = make_spans(run_of(20, 40), run_of(60), True)
    got = attend(q, k, v, whole, splits=splits, softmax_scale=1.0, phase="first")
    out, lse = empty_state(q, 16)
    for k_part, v_part, spans in parts_of(k, v, 20, (0, 25, 60)):
        add(q, k_part, v_part, out, lse, spans, splits=splits, softmax_scale=1.0)
    for steps, result in ((1, got), (2, (out, lse))):
        nats = lse_error(float(want_lse.abs().max()), 60, steps)
        assert (result[1].cpu() - want_lse).abs().max() <= nats
        assert (result[0].cpu() - want).abs().max() <= mean_error(nats, v)


@EACH_DTYPE
@pytest.mark.parametrize("packed, splits", [(False, 1), (True, 2)])
def test_large_inputs(dtype, packed, splits):
    """Of a size at which a score's last bit is a nat, and V up to half of the dtype's largest.

    The largest key takes all: out is its value, in one step and in two. On a GPU its weight is a
    power of two of that last bit, rounded to the dtype where it meets V.
    """
    q, k, v = draw(12, 70, (2, 1), (16, 16))
    q, k, v = (x.to(dtype) for x in (q * 1e3, k * 1e3, v.clamp(-1, 1) * torch.finfo(dtype).max / 2))
    spans = make_spans(run_of(12, 58), run_of(70), True)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double()).cpu()
    hidden = torch.arange(70)[None, :] > torch.arange(58, 70)[:, None]
    best, first = scores.masked_fill(hidden, -INF).max(-1)
    assert 2**23 < best.max() < 2**26
    want = v[0, :, 0].cpu()[first[0]].transpose(0, 1)[None].double()  # [1, 12, 2, 16]
    near = dict(rtol=torch.finfo(dtype).eps, atol=0)
    options = dict(packed=packed, splits=splits, softmax_scale=0.5)
    got, lse = attend(q, k, v, spans, **options)
    torch.testing.assert_close(got.cpu().double(), want, **near)
    sizes = torch.einsum("bqhd,bkd->bhqk", q.double().abs(), k[:, :, 0].double().abs())
    size = 0.5 * float(sizes.max())
    nats = lse_error(size, 70) + 16 * U * size  # a sum of 16 products rounds 16 times
    assert (lse.cpu() - 0.5 * best).abs().max() <= nats
    out, lse = empty_state(q, 16)
    for k_part, v_part, part in parts_of(k, v, 12, (0, 33, 70)):
        add(q, k_part, v_part, out, lse, part, **options)
    torch.testing.assert_close(out.cpu().double(), want, **near)
