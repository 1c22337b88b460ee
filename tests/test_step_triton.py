"""The Triton step is attention over the spans it is given: against the reference, in the
interpreter where there is no GPU, unchanged where there is one."""

import itertools
import math

import accelerator
import numpy as np
import pytest
import torch
from accelerator import DEVICE, EACH_DTYPE
from ringkern.kernels import step
from ringkern.kernels.cut import choose_cut, tiles_to_fill
from rounding import REORDERED, U, mean_error
from step_case import (
    INF,
    NO_WINDOW,
    add,
    attend,
    check,
    cut_of,
    draw,
    empty_state,
    make_spans,
    parts_of,
    poisoned,
    positions,
    run_of,
    table_of,
)

# headdim, headdim_v; nheads, nheads_k; packed; seqlen_q, seqlen_k; causal; window
CASES = [
    ((32, 32), (2, 2), False, 70, 70, True, NO_WINDOW),
    ((64, 64), (2, 1), False, 33, 100, True, NO_WINDOW),
    ((80, 80), (2, 1), True, 20, 45, True, NO_WINDOW),
    ((96, 96), (1, 1), False, 40, 40, True, (9, 0)),
    ((128, 128), (4, 1), True, 3, 95, True, NO_WINDOW),
    ((192, 192), (1, 1), False, 35, 33, False, NO_WINDOW),
    ((256, 256), (2, 1), True, 9, 40, False, (-1, 3)),
    ((192, 128), (2, 2), False, 20, 50, False, (20, 5)),
    ((24, 72), (6, 2), True, 21, 40, True, NO_WINDOW),
    ((8, 8), (5, 1), False, 17, 31, False, (-1, 0)),
    ((16, 32), (5, 1), True, 40, 31, False, (3, -1)),
]  # fmt: skip


@EACH_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_attention(case, dtype):
    dims, heads, packed, seqlen_q, seqlen_k, causal, window = case
    q, k, v = draw(seqlen_q, seqlen_k, heads, dims, dtype, batch=2)
    spans = make_spans(run_of(seqlen_q, seqlen_k - seqlen_q), run_of(seqlen_k), causal, window)
    got = attend(q, k, v, spans, packed=packed)
    check(got, q, k, v, str(case), causal=causal, window_size=window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_lengths_around_the_borders_of_tiles(packed, causal):
    """Sequences of any two of these lengths, in one call; a tile has 16 rows or 5 of 3 heads."""
    heads, seqlens_q = ((3, 1), [1, 4, 5, 6, 11]) if packed else ((1, 1), [1, 15, 16, 17, 33])
    lengths = list(itertools.product(seqlens_q, [1, 31, 32, 33, 64, 65]))
    cu_q, cu_k = (np.cumsum([0, *each]) for each in zip(*lengths, strict=True))
    q_runs, k_runs = [], []
    for seq, (m, n) in enumerate(lengths):
        q_runs.append(run_of(m, n - m, offset=cu_q[seq], seq=seq))
        k_runs.append(run_of(n, offset=cu_k[seq], seq=seq))
    q, k, v = draw(cu_q[-1], cu_k[-1], heads, (16, 16))
    spans = make_spans(np.concatenate(q_runs), np.concatenate(k_runs), causal)
    out, lse = attend(q, k, v, spans, cut=cut_of(q, k, packed, block_m=16))
    where = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)
    check((out[0], lse[0]), q[0], k[0], v[0], f"{packed=}", **where)


# Runs of queries and of keys, (offset, start, length, stride) each.
LAYOUTS = {
    "zigzag": ([(0, 0, 30, 1), (30, 90, 30, 1)], [(0, 30, 30, 1), (30, 60, 30, 1)]),
    "striped": ([(0, 1, 40, 3)], [(0, 2, 40, 3)]),
    "striped against contiguous": ([(0, 2, 25, 3)], [(0, 20, 40, 1)]),
    "decode's history": ([(0, 120, 1, 1)], [(0, 0, 50, 1), (50, 53, 17, 4)]),
    "new tokens on a decoded history": ([(0, 90, 20, 1)], [(0, 3, 25, 4), (25, 88, 12, 1)]),
}


@pytest.mark.parametrize("window", [NO_WINDOW, (37, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_by_position(layout, window, packed):
    q_runs, k_runs = ([(0, *run) for run in runs] for runs in LAYOUTS[layout])
    q_pos, k_pos = positions(q_runs), positions(k_runs)
    q, k, v = draw(len(q_pos), len(k_pos), (2, 1), (16, 16))
    spans = make_spans(np.array(q_runs), np.array(k_runs), True, window)
    got = attend(q, k, v, spans, packed=packed)
    where = dict(q_pos=q_pos, k_pos=k_pos, causal=True, window_size=window)
    check(got, q, k, v, layout, **where)


@pytest.mark.parametrize("softmax_scale", [0.3, 0.0, -0.2])
@pytest.mark.parametrize("softcap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("sinks", [None, (0.7, -INF, 3.0, 90.0)])
def test_scale_softcap_and_sinks(softmax_scale, softcap, sinks):
    """Over a whole block of keys and a masked one; a sink counts once, however many splits."""
    q, k, v = draw(7, 50, (4, 1))
    spans = make_spans(run_of(7, 43), run_of(50), True)
    options = dict(softmax_scale=softmax_scale, softcap=softcap)
    sinks = sinks and torch.tensor(sinks)
    there = sinks if sinks is None else sinks.to(DEVICE)
    for packed, splits in ((False, 1), (True, 2)):
        got = attend(q, k, v, spans, packed=packed, splits=splits, sinks=there, **options)
        check(got, q, k, v, f"{packed=}", causal=True, sinks=sinks, **options)


def test_sinks_may_be_the_state():
    """local.make_state() puts sinks into the lse of a state whose out is 0."""
    q, k, v = draw(20, 50, (2, 2))
    spans, sinks = make_spans(run_of(20, 30), run_of(50), True), torch.tensor([0.4, -1.0])
    want = attend(q, k, v, spans, phase="first", sinks=sinks.to(DEVICE))
    out, lse = empty_state(q, 32)
    lse.copy_(sinks[None, :, None].expand(lse.shape))
    add(q, k, v, out.zero_(), lse, spans)
    torch.testing.assert_close((out, lse), want, **REORDERED)


@EACH_DTYPE
@pytest.mark.parametrize("packed, splits", [(False, 1), (False, 3), (True, 2)])
def test_first_middle_last_is_only(dtype, packed, splits):
    q, k, v = draw(17, 110, (2, 1), (32, 16), dtype)
    cut = cut_of(q, k, packed, block_m=32 if splits > 1 else 16)  # one tile, or two
    options = dict(cut=cut, softmax_scale=0.2)
    result, _ = poisoned(q, 16, dtype)
    out, lse = poisoned(q, 16)
    parts = list(parts_of(k, v, 17, (0, 37, 80, 110)))
    for phase, part in zip(("first", "middle", "last"), parts, strict=True):
        rows = 0 if phase == "middle" else 17
        add(q, *part[:2], out, lse, part[2], splits=splits, rows=rows, phase=phase, result=result,
            **options)  # fmt: skip
    spans = make_spans(run_of(17, 93), run_of(110), True)
    want, want_lse = attend(q, k, v, spans, **options)
    torch.testing.assert_close(lse, want_lse, **REORDERED)
    # Weights are rounded to the dtype, and then out; in both of the two.
    near = 2 * torch.finfo(dtype).eps * float(v.abs().max()) + 32 * U
    torch.testing.assert_close(result, want, atol=near, rtol=0)
    check((result, lse), q, k, v, "three steps", causal=True, softmax_scale=0.2)


def test_steps_agree_in_any_order():
    q, k, v = draw(24, 90, (1, 1), (16, 16))
    whole = attend(q, k, v, make_spans(run_of(24, 66), run_of(90), True), phase="first")
    for order in itertools.permutations(parts_of(k, v, 24, (0, 20, 70, 90))):
        out, lse = empty_state(q, 16)
        for k_part, v_part, spans in order:
            add(q, k_part, v_part, out, lse, spans)
        torch.testing.assert_close((out, lse), whole, **REORDERED)
    check((out, lse), q, k, v, "three steps", causal=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_order_of_spans_and_of_tiles_does_not_matter(splits):
    q_runs = np.concatenate([run_of(30), run_of(30, 60, offset=30)])
    k_runs = np.concatenate([run_of(40), run_of(50, 40, offset=40)])
    q, k, v = draw(60, 90, (2, 1), (16, 16))
    spans = make_spans(q_runs, k_runs, True)
    assert len(spans) > 2
    cut = cut_of(q, k, packed=True)
    want = attend(q, k, v, spans, splits=splits, cut=cut)
    other = attend(q, k, v, spans[::-1], splits=splits, cut=cut)
    torch.testing.assert_close(other, want, **REORDERED)
    table = table_of(spans, cut, 60, splits)
    tiles = table.tiles.view(-1, splits, 5)
    assert len(tiles) == 4
    for order in (torch.arange(len(tiles)).flip(0), torch.arange(len(tiles)).roll(1)):
        out, lse = poisoned(q, 16)
        other = table._replace(tiles=tiles[order.to(DEVICE)].view(-1, 5))
        step.step(q, k, v, None, lse, other, softmax_scale=0.25, phase="only", result=out)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("packed", [False, True])
def test_splits_agree(packed):
    """Fewer than blocks of keys, and more; the same bits each time."""
    q, k, v = draw(3, 230, (2, 1), (32, 16))
    spans = make_spans(run_of(3, 227), run_of(230), True)
    whole = attend(q, k, v, spans, packed=packed)
    for splits in (2, 7, 12):
        got = attend(q, k, v, spans, packed=packed, splits=splits)
        torch.testing.assert_close(got, whole, **REORDERED)
    check(got, q, k, v, "splits", causal=True)
    again = attend(q, k, v, spans, packed=packed, splits=splits)
    assert all(map(torch.equal, got, again))


def test_packed_or_apart_is_the_same():
    q, k, v = draw(11, 60, (6, 2), (32, 32))
    spans = make_spans(run_of(11, 49), run_of(60), True)
    apart, packed = (attend(q, k, v, spans, packed=packed) for packed in (False, True))
    torch.testing.assert_close(packed, apart, **REORDERED)


def test_strides_are_free():
    """Whole tensors, heads before rows, a view of fused projections, a batch that is broadcast."""
    q, k, v = draw(20, 50, (4, 2), (16, 16), batch=2)
    spans = make_spans(run_of(20, 30), run_of(50), True)
    whole = [x.contiguous() for x in (q, k, v)]
    want = attend(*whole, spans)
    fused = torch.cat([k, v], dim=2)
    other = q.transpose(1, 2).contiguous().transpose(1, 2), fused[:, :, :2], fused[:, :, 2:]
    assert not any(x.is_contiguous() for x in other)
    assert all(map(torch.equal, attend(*other, spans), want))
    torch.testing.assert_close(attend(*other, spans, packed=True), want, **REORDERED)
    for x in (whole[1:], other[1:]):
        one = [y[:1].expand(2, -1, -1, -1) for y in x]
        got = attend(q, *one, spans)
        assert all(map(torch.equal, got, attend(q, *(y.contiguous() for y in one), spans)))


def test_the_cut_of_the_table_is_what_runs():
    """What choose_cut() says for a few shapes, run as it is."""
    for seqlen_q, heads, group in (
        (1, (8, 2), 4),
        (3, (4, 1), 4),
        (100, (8, 2), 1),
        (5, (3, 3), 1),
    ):
        cut = choose_cut(*heads, 64, 64, "float16", 80, seqlen_q)
        assert cut.group == group and 16 <= cut.block_m <= 128
        q, k, v = draw(seqlen_q, 150, heads, (64, 64), torch.float16)
        spans = make_spans(run_of(seqlen_q, 150 - seqlen_q), run_of(150), True)
        check(attend(q, k, v, spans, cut=cut), q, k, v, str(cut), causal=True)
    assert choose_cut(64, 8, 128, 128, "bfloat16", 90, 1).block_m == 16
    assert choose_cut(64, 8, 128, 128, "bfloat16", 90, 1 << 20).block_m == 128
    assert tiles_to_fill(cut, 2, 3, 132) == 44 and tiles_to_fill(cut, 1000, 3, 132) == 1
    assert choose_cut(71, 1, 64, 64, "float32", 80, 1).group == 1  # more heads than a tile has rows


def test_tf32_only_when_asked():
    """float32 products of 10 bits, on a GPU; the interpreter has no less than all."""
    q, k, v = draw(20, 60)
    spans = make_spans(run_of(20, 40), run_of(60), True)
    want, want_lse = attend(q, k, v, spans)
    check((want, want_lse), q, k, v, "ieee", causal=True)
    out, _ = attend(q, k, v, spans, allow_tf32=True)
    # Both sides of both products lose up to 2 ** -10.
    sizes = torch.einsum("bqhd,bkhd->bhqk", q.abs(), k.abs())
    nats = 2.0**-9 * 32**-0.5 * float(sizes.max())
    assert (out - want).abs().max() <= mean_error(nats, v) + 2.0**-9 * v.abs().max()
    assert torch.equal(out, want) != accelerator.ON_GPU


@pytest.mark.parametrize("splits", [1, 2])
def test_the_kernel_is_told_of_tf32(splits, monkeypatch):
    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, PRECISION, **options: told.append(PRECISION)

    monkeypatch.setattr(step, "_step", Kernel())
    q, k, v = draw(20, 60)
    spans = make_spans(run_of(20, 40), run_of(60), True)
    for options in ({}, dict(allow_tf32=True), dict(allow_tf32=False)):
        attend(q, k, v, spans, splits=splits, **options)
    assert told == ["ieee", "tf32", "ieee"]


@pytest.mark.skipif(not accelerator.ON_GPU, reason="takes 9 GB of GPU memory")
def test_more_than_2_to_the_31_elements():
    heads, seqlen = 16, (1 << 31) // (16 * 128) + 512
    k = torch.zeros(1, seqlen, heads, 128, dtype=torch.float16, device=DEVICE)
    q = torch.ones(1, 16, heads, 128, dtype=torch.float16, device=DEVICE)
    k[:, -5:], v = 1.0, k
    spans = make_spans(run_of(16), run_of(16, offset=seqlen - 16))
    out, lse = attend(q, k, v, spans, softmax_scale=1.0)
    assert (out == 1).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 128 + math.log(5)))
