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
    """Weigh by exp(lse), in float64, from the definition; parts of +inf share the weight evenly."""
    lses = lses.double()
    lse, top = torch.logsumexp(lses, 0), (lses == INF).double()
    weights = torch.where(lse == INF, top / top.sum(0), torch.exp(lses - lse)).nan_to_num(0.0)
    return (outs.double() * weights.transpose(-1, -2)[..., None]).sum(0), lse


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


# flash-attention 3's combine and vLLM's merge of attention states: parts, total, nheads, headdim.
PEERS = [
    (1, 640, 2, 64), (2, 613, 4, 128), (2, 1536, 2, 32), (2, 1, 64, 48), (3, 256, 8, 96),
    (5, 1024, 1, 256), (17, 113, 3, 192), (32, 108, 2, 64), (55, 64, 2, 256), (97, 32, 2, 128),
    (133, 2, 3, 512), (133, 113, 1, 64), (2, 256, 48, 32), (2, 512, 16, 96), (2, 1024, 8, 256),
    (2, 4096, 4, 48),
]  # fmt: skip


def empty_some(outs, lses, share=10, seed=0):
    """Inject -inf in half of the parts for a third of the rows, +inf in one of `share` lse."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.randperm(len(lses), generator=draw)[: len(lses) // 2]
    rows = torch.randperm(lses.shape[2], generator=draw)[: lses.shape[2] // 3]
    lses[half[:, None], :, rows] = -INF
    lses[:, :, ::7] = -INF  # and rows that no part has keys for
    if share:
        lses[torch.rand(lses.shape, generator=draw) < 1 / share] = INF
    outs[(lses == -INF).transpose(1, 2)] = float("nan")  # not to be looked at
    return outs, lses


@pytest.mark.parametrize("parts, total, nheads, headdim", PEERS)
@pytest.mark.parametrize("share", [0, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_infinities_among_many_parts(parts, total, nheads, headdim, share, dtype):
    outs, lses = empty_some(*parts_of(parts, total, nheads, headdim, dtype), share)
    out, lse = ringkern.merge(outs, lses)
    want, want_lse = oracle(outs.nan_to_num(0.0), lses)
    name = f"{parts} parts of {total}, {share=}"
    assert_close(out, want, want.to(dtype), name=name, floor=2e-6)
    assert_lse_close(lse, want_lse, name=name)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)
    assert (out[(lse == -INF).T] == 0).all()
    strided = outs.transpose(0, 1).contiguous().transpose(0, 1), lses.mT.contiguous().mT
    assert min(parts, total) == 1 or not strided[0].is_contiguous()
    again, lse_again = ringkern.merge(*strided)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("parts, total, nheads, headdim", PEERS)
def test_a_ring_merges_as_many_parts(parts, total, nheads, headdim):
    """One by one in place from the empty state, as a ring does, also where the first is empty."""
    outs, lses = empty_some(*parts_of(parts, total, nheads, headdim, torch.float32), share=0)
    outs = outs.nan_to_num(0.0)  # a step leaves zeros there
    want, want_lse = oracle(outs, lses)
    out, lse = torch.zeros_like(outs[:1]), torch.full_like(lses[:1], -INF)
    for part in range(parts):
        step_torch.merge_(out, lse, outs[part, None], lses[part, None])
    assert_close(out[0], want, want.float(), name=f"{parts} parts")
    assert_lse_close(lse[0], want_lse, name=f"{parts} parts")


def test_requests_without_a_prefix_keep_their_bits():
    """vLLM's masked context: a prefix that was not there changes no bit of the rest."""
    outs, lses = parts_of(2, 613, 4, 32, torch.bfloat16)
    lses[0, :, 100:300], outs[0, 100:300] = -INF, float("nan")
    out, lse = ringkern.merge(outs, lses)
    assert torch.equal(out[100:300], outs[1, 100:300])
    assert torch.equal(lse[:, 100:300], lses[1, :, 100:300])
    assert not torch.equal(out[:100], outs[1, :100])


@pytest.mark.parametrize("sizes", [(0, 17), (17, 0), (0, 0, 1, 16), (5, 0, 12), (1,) * 17, (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_pieces_merge_to_the_whole(sizes, dtype):
    """Also where the first shard is empty and a later one is not: natural logs all through."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=draw).to(dtype) for n in (9, *[sum(sizes)] * 2))
    pieces = zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    parts = [ringkern.attn_func(q, *piece) for piece in pieces]
    out, lse = ringkern.merge([out.float() for out, _ in parts], [lse for _, lse in parts])
    want, want_lse = reference.attn(q, k, v)
    base, _ = reference.attn(q, k, v, dtype=dtype)
    assert_close(out.to(dtype), want, base, name=f"{sizes}")
    assert_lse_close(lse, want_lse, name=f"{sizes}")


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
