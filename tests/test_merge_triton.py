"""The merge kernel against its definition: exact and total, in one pass, in place, any strides."""

import itertools

import pytest
import torch
from accelerator import DEVICE, DTYPES, EACH_DTYPE
from close import assert_close, assert_lse_close
from maximum import drop_nan
from ringkern.kernels import merge, reference, step_torch
from rounding import FEW, REORDERED, U

INF, NAN = float("inf"), float("nan")


def parts_of(parts, total, nheads, headdim, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    outs = torch.randn(parts, total, nheads, headdim, generator=draw).to(dtype)
    return outs.to(DEVICE), (torch.randn(parts, nheads, total, generator=draw) * 4).to(DEVICE)


def empty_some(outs, lses, share=0, seed=0):
    """Empty half of the parts for every third row, all for every seventh; +inf in one of share."""
    lses[::2, :, ::3] = -INF
    lses[:, :, ::7] = -INF
    if share:
        draw = torch.Generator().manual_seed(seed)
        lses[(torch.rand(lses.shape, generator=draw) < 1 / share).to(DEVICE)] = INF
    outs[(lses == -INF).transpose(1, 2)] = NAN  # not to be looked at
    return outs, lses


def assert_merged(out, lse, outs, lses, name):
    want, want_lse = reference.merge(outs.cpu().double(), lses.cpu().double())
    assert_close(out.cpu(), want, want.to(out.dtype), name=name, floor=32 * U)
    assert_lse_close(lse.cpu(), want_lse, name=name)
    torch.testing.assert_close(lse.cpu(), want_lse.float(), **REORDERED)


# parts, total, nheads, headdim: around the blocks of parts and rows, and headdims in between.
SHAPES = [
    (1, 33, 2, 64), (2, 17, 2, 128), (2, 1, 3, 48), (3, 9, 1, 96), (5, 5, 2, 256), (8, 9, 1, 1),
    (16, 4, 2, 80), (17, 8, 2, 24), (55, 3, 2, 192), (133, 3, 1, 64), (32, 1, 1, 128),
]  # fmt: skip


@pytest.mark.parametrize("parts, total, nheads, headdim", SHAPES)
@pytest.mark.parametrize("share", [0, 10])
@EACH_DTYPE
def test_merge_is_the_weighted_mean(parts, total, nheads, headdim, share, dtype):
    outs, lses = empty_some(*parts_of(parts, total, nheads, headdim, dtype), share)
    out, lse = merge.merge(outs, lses)
    assert out.dtype == dtype
    assert_merged(out, lse, outs, lses, f"{parts} parts of {total}, {share=}")
    assert (out[(lse == -INF).T] == 0).all()


@pytest.mark.parametrize("headdim", [1, 20, 72, 128])
def test_rows_of_new_parts_begin_at_vectors(headdim):
    like = torch.empty(2, dtype=torch.bfloat16, device=DEVICE)
    for where in ((3, 7), (3, 2, 7)):
        outs, lses = merge.empty_parts(like, *where, 5, headdim)
        assert (outs.shape, outs.dtype) == ((*where, 5, headdim), torch.float32)
        assert (lses.shape, lses.dtype) == ((*where[:-1], 5, 7), torch.float32)
        assert outs.device == lses.device == like.device
        assert all(stride % 16 == 0 for stride in outs.stride()[:-1]) and outs.stride(-1) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_bits(dtype):
    outs, lses = empty_some(*parts_of(18, 5, 3, 40, dtype))
    want, want_lse = merge.merge(outs, lses)
    wide = outs.new_full((5, 18, 4, 48), NAN)
    wide[:, :, 1:, 4:44] = outs.transpose(0, 1)
    out, lse = merge.merge(wide.transpose(0, 1)[:, :, 1:, 4:44], lses.mT.contiguous().mT)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert out.is_contiguous() and lse.is_contiguous()


def test_a_batch_is_its_entries():
    outs, lses = parts_of(4, 2 * 9, 2, 8, torch.float32)
    dense = outs.view(4, 2, 9, 2, 8), lses.view(4, 2, 2, 9)
    out, lse = merge.merge(*dense)
    for b in range(2):
        want, want_lse = merge.merge(dense[0][:, b], dense[1][:, b])
        assert torch.equal(out[b], want) and torch.equal(lse[b], want_lse)


def test_bits_of_a_row_do_not_depend_on_the_others():
    outs, lses = empty_some(*parts_of(37, 9, 2, 64, torch.float32))
    out, lse = merge.merge(outs, lses)
    again, lse_again = merge.merge(outs, lses)
    some, lse_some = merge.merge(outs[:, 4:6], lses[:, :, 4:6])
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    assert torch.equal(some, out[4:6]) and torch.equal(lse_some, lse[:, 4:6])


def test_out_in_the_dtype_asked_for():
    outs, lses = parts_of(3, 20, 2, 16, torch.float32)
    out, _ = merge.merge(outs, lses, dtype=torch.float16)
    assert torch.equal(out, merge.merge(outs, lses)[0].half())


def every(values, parts):
    """Return lses of every combination of values, one per token: [parts, 1, combinations]."""
    return torch.tensor(list(itertools.product(values, repeat=parts))).T[:, None].to(DEVICE)


def test_merge_is_total():
    lses = every([-INF, -3e38, -100.0, 0.0, 2.0, 3e38, INF], 3)
    outs = torch.tensor([1.0, 10.0, 100.0], device=DEVICE)[:, None, None, None]
    outs = outs.expand(3, lses.shape[2], 1, 1)
    out, lse = merge.merge(outs, lses)
    want, want_lse = reference.merge(outs.cpu().double(), lses.cpu().double())
    torch.testing.assert_close(out.cpu(), want.float(), rtol=FEW["rtol"], atol=0)
    torch.testing.assert_close(lse.cpu(), want_lse.float(), rtol=FEW["rtol"], atol=0)


@pytest.mark.parametrize("seeded", [False, True])
def test_nan_stays_nan(seeded, monkeypatch):
    drop_nan(monkeypatch)
    lses = every([NAN, -INF, 0.0, INF], 3)
    outs = torch.ones(3, lses.shape[2], 1, 4, device=DEVICE)
    if seeded:
        out, lse = outs[0].clone(), lses[0].clone()
        merge.merge_into(outs[1:], lses[1:], out, lse, seeded=True)
    else:
        out, lse = merge.merge(outs, lses)
    want = lses.isnan().any(0)
    assert torch.equal(lse.isnan(), want) and want.any()
    assert torch.equal(out.isnan(), want.T[:, :, None].expand(out.shape))
    out, lse = merge.merge(
        torch.full((2, 1, 1, 4), NAN).to(DEVICE), torch.zeros(2, 1, 1).to(DEVICE)
    )
    assert out.isnan().all() and not lse.isnan().any()


def test_a_sole_part_keeps_its_bits():
    for dtype in DTYPES:
        outs, lses = parts_of(3, 40, 2, 64, dtype)
        lses[::2], outs[::2] = -INF, NAN
        out, lse = merge.merge(outs, lses)
        assert torch.equal(out, outs[1]) and torch.equal(lse, lses[1])


@pytest.mark.parametrize("base", [1e6, -1e6, 3e7])
def test_a_large_lse_costs_no_weight(base):
    outs, lses = parts_of(3, 30, 2, 16, torch.float32)
    lses += base
    out, lse = merge.merge(outs, lses)
    want, want_lse = reference.merge(outs.cpu().double(), lses.cpu().double())
    assert_close(out.cpu(), want, want.float(), name=f"{base}")
    # One rounding, where the log of the mass is added; of the log itself much less.
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=U, atol=16 * U)


@pytest.mark.parametrize("part_dtype", DTYPES)
def test_a_ring_merges_part_by_part(part_dtype):
    """In place from the empty state, whose out is garbage; a part without keys brings garbage."""
    outs, lses = empty_some(*parts_of(6, 2 * 13, 3, 40, part_dtype))
    outs, lses = outs.view(6, 2, 13, 3, 40), lses.view(6, 2, 3, 13)
    outs[(lses == -INF).transpose(2, 3)] = NAN
    out = torch.full(outs.shape[1:], NAN, device=DEVICE)
    lse = torch.full(lses.shape[1:], -INF, device=DEVICE)
    for part in range(6):
        merge.merge_(out, lse, outs[part], lses[part])
    for b in range(2):
        assert_merged(out[b], lse[b], outs[:, b], lses[:, b], f"{part_dtype}, {b}")


def test_in_place_as_on_the_cpu():
    outs, lses = parts_of(2, 21, 2, 48, torch.float32)
    out, lse = outs[:1].clone(), lses[:1].clone()
    merge.merge_(out, lse, outs[1:], lses[1:])
    want, want_lse = outs[:1].cpu(), lses[:1].cpu()
    step_torch.merge_(want, want_lse, outs[1:].cpu(), lses[1:].cpu())
    torch.testing.assert_close((out.cpu(), lse.cpu()), (want, want_lse), **FEW)


@pytest.mark.parametrize("seeded", [False, True])
def test_only_the_result_is_written(seeded):
    """All of it, over poison, and nothing around it."""
    outs, lses = empty_some(*parts_of(5, 19, 2, 24, torch.float32))
    around, around_lse = (torch.full(s, 7.0, device=DEVICE) for s in ((25, 4, 40), (6, 25)))
    out, lse = around[3:22, 1:3, 8:32], around_lse[2:4, 3:22]
    out.fill_(NAN)
    lse.fill_(-INF if seeded else NAN)
    merge.merge_into(outs, lses, out, lse, seeded=seeded)
    assert_merged(out, lse, outs, lses, f"{seeded=}")
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (around == 7.0).all() and (around_lse == 7.0).all()


def test_the_result_may_be_one_of_the_parts():
    outs, lses = empty_some(*parts_of(5, 11, 2, 128, torch.float32))
    want, want_lse = merge.merge(outs, lses)
    merge.merge_into(outs, lses, outs[3], lses[3])
    assert torch.equal(outs[3], want) and torch.equal(lses[3], want_lse)


def test_nothing_to_merge_is_no_launch():
    out, lse = merge.merge(torch.zeros(2, 0, 3, 8, device=DEVICE), torch.zeros(2, 3, 0).to(DEVICE))
    assert out.shape == (0, 3, 8) and lse.shape == (3, 0)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    "outs, lses, match",
    [
        (zeros(2, 3, 4), zeros(2, 4, 3), r"outs: want \[parts, total"),
        (zeros(2, 3, 4, 300), zeros(2, 4, 3), "headdim: want 1 to 256, got 300"),
        (zeros(2, 3, 4, 5), zeros(2, 3, 4), r"lses: want \(2, 4, 3\), got \(2, 3, 4\)"),
        (zeros(2, 3, 4, 5, dtype=torch.float64), zeros(2, 4, 3), "outs: want .*float32, got .*64"),
        (zeros(2, 3, 4, 5), zeros(2, 4, 3, dtype=torch.float16), "lses: want torch.float32"),
        (zeros(2, 3, 5, 4).mT, zeros(2, 4, 3), "outs: want a last stride of 1"),
        (zeros(2, 3, 4, 5), torch.zeros(2, 4, 3, device="meta"), "lses: want a tensor on"),
    ],
)
def test_merge_refuses(outs, lses, match):
    with pytest.raises(ValueError, match=match):
        merge.merge(outs, lses)


def test_no_parts_and_a_state_that_does_not_fit_are_refused():
    outs, lses = parts_of(2, 3, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="at least one part, got 0"):
        merge.merge_into(outs[:0], lses[:0], outs[0], lses[0])
    with pytest.raises(ValueError, match=r"out: want \(3, 4, 8\), got \(2, 4, 8\)"):
        merge.merge_into(outs, lses, outs[0, :2], lses[0])
    with pytest.raises(ValueError, match=r"lse: want \(4, 3\)"):
        merge.merge_into(outs, lses, outs[0].clone(), lses[0, :2])
    with pytest.raises(ValueError, match="out: want torch.float32, got torch.float16"):
        merge.merge_into(outs, lses, outs[0].half(), lses[0], seeded=True)


def test_tokens_beyond_int32_are_refused():
    outs, lses = zeros(8).expand(1, 1 << 31, 1, 8), zeros(1).expand(1, 1, 1 << 31)
    with pytest.raises(ValueError, match="outs: want at most 2147418112 tokens, got 2147483648"):
        merge.merge_into(outs, lses, outs[0], lses[0])
