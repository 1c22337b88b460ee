"""merge() is exact and total: finite, -inf and +inf in any mix; NaN stays NaN."""

import itertools

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from ringkern.kernels import reference, step_torch

INF = float("inf")


def parts_of(parts, total, nheads, headdim, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    outs = torch.randn(parts, total, nheads, headdim, generator=draw).to(dtype)
    return outs, torch.randn(parts, nheads, total, generator=draw) * 4


def oracle(outs, lses):
    """Weigh by exp(lse), in float64, from the definition."""
    lse = torch.logsumexp(lses.double(), 0)
    weights = torch.exp(lses.double() - lse).nan_to_num(0.0).transpose(-1, -2)[..., None]
    return (outs.double() * weights).sum(0), lse


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 17, 133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_is_the_weighted_mean(parts, dtype):
    outs, lses = parts_of(parts, 113, 3, 24, dtype)
    lses[: parts // 2, :, ::3] = -INF
    out, lse = ringkern.merge(outs, lses)
    want, want_lse = oracle(outs, lses)
    assert out.dtype == dtype
    assert_close(out, want, want.to(dtype), name=f"{parts} parts, {dtype}", floor=2e-6)
    assert_lse_close(lse, want_lse, name=f"{parts} parts")


def test_merge_with_a_batch():
    outs, lses = parts_of(4, 2 * 9, 2, 8, torch.float32)
    dense = outs.view(4, 2, 9, 2, 8), lses.view(4, 2, 2, 9)
    out, lse = ringkern.merge(*dense)
    for b in range(2):
        want, want_lse = ringkern.merge(dense[0][:, b], dense[1][:, b])
        assert torch.equal(out[b], want) and torch.equal(lse[b], want_lse)


SPECIAL = [-INF, -3e38, -100.0, 0.0, 2.0, 3e38, INF]


@pytest.mark.parametrize("lses", list(itertools.product(SPECIAL, repeat=3)))
def test_merge_is_total(lses):
    outs = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    out, lse = ringkern.merge(outs, torch.tensor(lses).view(3, 1, 1))
    top = max(lses)
    weights = torch.tensor([1.0 if x == top else 0.0 for x in lses], dtype=torch.float64)
    if abs(top) < INF:
        weights = torch.exp(torch.tensor(lses, dtype=torch.float64) - top)
    want = 0.0 if top == -INF else ((weights * outs.flatten()).sum() / weights.sum()).item()
    assert out.item() == pytest.approx(want, rel=1e-6)
    want_lse = top if abs(top) == INF else top + torch.log(weights.sum()).item()
    assert lse.item() == pytest.approx(want_lse, rel=1e-6)


def test_an_empty_part_is_not_looked_at():
    outs = torch.tensor([float("nan"), 5.0]).view(2, 1, 1, 1)
    out, lse = ringkern.merge(outs, torch.tensor([-INF, 1.0]).view(2, 1, 1))
    assert out.item() == 5.0 and lse.item() == 1.0


@pytest.mark.parametrize("other", [-INF, 0.0, INF])
def test_nan_stays_nan(other):
    outs = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    out, lse = ringkern.merge(outs, torch.tensor([float("nan"), other]).view(2, 1, 1))
    assert out.isnan() and lse.isnan()
    out, lse = ringkern.merge(outs * float("nan"), torch.zeros(2, 1, 1))
    assert out.isnan() and not lse.isnan()


@pytest.mark.parametrize("first", [-INF, 1.0])
@pytest.mark.parametrize("second", [-INF, 2.0])
def test_merge_in_place_agrees(first, second):
    """The merge of a ring step, also with an empty side first: peers get NaN there."""
    outs, _ = parts_of(2, 5, 2, 4, torch.float32)
    lses = torch.tensor([first, second])[:, None, None].expand(2, 2, 5).clone()
    outs[lses.transpose(1, 2) == -INF] = 0.0
    want, want_lse = reference.merge(outs.double(), lses.double())
    out, lse = outs[:1].clone(), lses[:1].clone()
    step_torch.merge_(out, lse, outs[1:], lses[1:])
    torch.testing.assert_close(out[0].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0].double(), want_lse, rtol=1e-6, atol=1e-6)


def test_one_percent_off_is_caught():
    """The tolerance can fail: weights 1 % too large pass the worst-element rule in bfloat16."""
    outs, lses = parts_of(3, 512, 4, 64, torch.bfloat16)
    want, _ = oracle(outs, lses)
    with pytest.raises(AssertionError, match="drift|error"):
        assert_close((want * 1.01).to(torch.bfloat16), want, want.to(torch.bfloat16), name="x1.01")


@pytest.mark.parametrize(
    "outs, lses, match",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), r"outs: want \[parts, total"),
        (torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 3), "at least one part"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), r"lses: want \(2, 4, 3\)"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.int32), torch.zeros(2, 4, 3), "outs: want a floating"),
        ([], torch.zeros(2, 4, 3), "outs: want one or more tensors of one shape, got 0"),
        ([torch.zeros(3, 4, 5), torch.zeros(2, 4, 5)], torch.zeros(2, 4, 3), "of one shape, got 2"),
        ("x", torch.zeros(2, 4, 3), "outs: want a floating tensor, got str"),
    ],
)
def test_merge_refuses(outs, lses, match):
    with pytest.raises(ringkern.ArgumentError, match=match):
        ringkern.merge(outs, lses)
