"""The Triton step is attention over the spans it is given: against the reference, in the
interpreter where there is no GPU, unchanged where there is one."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
from close import assert_lse_close
from ringkern.kernels import reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ringkern.kernels import step as step_module
from ringkern.kernels.cut import Cut, choose_cut, tiles_to_fill
from step_case import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    NO_WINDOW,
    attend,
    check,
    cut_of,
    draw,
    empty_state,
    guarded,
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_attention(case, dtype):
    dims, heads, packed, seqlen_q, seqlen_k, causal, window = case
    q, k, v = draw(seqlen_q, seqlen_k, heads, dims, dtype, batch=2)
    spans = make_spans(run_of(seqlen_q, seqlen_k - seqlen_q), run_of(seqlen_k), causal, window)
    got = attend(q, k, v, spans, packed=packed)
    check(got, q, k, v, str(case), causal=causal, window_size=window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [1, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("seqlen_q", [1, 15, 16, 17, 33])
def test_lengths_around_the_borders_of_tiles(seqlen_q, seqlen_k, causal):
    q, k, v = draw(seqlen_q, seqlen_k, (1, 1), (16, 16))
    spans = make_spans(run_of(seqlen_q, seqlen_k - seqlen_q), run_of(seqlen_k), causal)
    got = attend(q, k, v, spans, cut=cut_of(q, k, block_m=16))
    check(got, q, k, v, f"{seqlen_q} x {seqlen_k}", causal=causal)


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
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [None, (0.7, -INF, 3.0, 90.0)])
def test_scale_softcap_and_sinks(softmax_scale, softcap, sinks):
    q, k, v = draw(20, 50, (4, 2))
    spans = make_spans(run_of(20, 30), run_of(50), True)
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
    step_module.step(q, k, v, out, lse, table_of(spans, cut_of(q, k)), softmax_scale=32**-0.5)
    torch.testing.assert_close((out, lse), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_first_middle_last_is_only(dtype, splits):
    q, k, v = draw(40, 110, (2, 1), (32, 16), dtype)
    result = torch.full((1, 40, 2, 16), NAN, dtype=dtype, device=DEVICE)
    out, lse = poisoned(q, 16)
    phases = "first", "middle", "last"
    parts = list(parts_of(k, v, 40, (0, 37, 80, 110)))
    for phase, (k_part, v_part, spans) in zip(phases, parts, strict=True):
        rows = 0 if phase == "middle" else 40
        table = table_of(spans, cut_of(q, k), rows, splits)
        args = q, k_part, v_part, out, lse, table
        step_module.step(*args, softmax_scale=0.2, phase=phase, result=result)
    spans = make_spans(run_of(40, 70), run_of(110), True)
    want, want_lse = attend(q, k, v, spans, softmax_scale=0.2)
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result, want, atol=rounding, rtol=rounding)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-6)
    check((result, lse), q, k, v, "three steps", causal=True, softmax_scale=0.2)


def test_steps_agree_in_any_order():
    q, k, v = draw(24, 90, (2, 2), (16, 16))
    parts = list(parts_of(k, v, 24, (0, 20, 70, 90)))
    results = []
    for order in itertools.permutations(parts):
        out, lse = empty_state(q, 16)
        for k_part, v_part, spans in order:
            table = table_of(spans, cut_of(q, k))
            step_module.step(q, k_part, v_part, out, lse, table, softmax_scale=0.25)
        results.append((out, lse))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-6, rtol=2e-6)
    check(results[0], q, k, v, "three steps", causal=True, softmax_scale=0.25)


def test_the_order_of_spans_and_of_tiles_does_not_matter():
    q_runs = np.concatenate([run_of(30), run_of(30, 60, offset=30)])
    k_runs = np.concatenate([run_of(40), run_of(50, 40, offset=40)])
    q, k, v = draw(60, 90, (2, 2), (16, 16))
    spans = make_spans(q_runs, k_runs, True)
    assert len(spans) > 2
    want = attend(q, k, v, spans)
    torch.testing.assert_close(attend(q, k, v, spans[::-1]), want, atol=2e-6, rtol=2e-6)
    table = table_of(spans, cut_of(q, k), 60)
    table = table._replace(tiles=table.tiles.flip(0).contiguous())
    out, lse = poisoned(q, 16)
    step_module.step(q, k, v, None, lse, table, softmax_scale=0.25, phase="only", result=out)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("splits", [2, 7, 12])
def test_splits_agree(splits, packed):
    q, k, v = draw(5, 230, (4, 2), (32, 16))
    spans = make_spans(run_of(5, 225), run_of(230), True)
    want = attend(q, k, v, spans, packed=packed)
    got = attend(q, k, v, spans, packed=packed, splits=splits)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    check(got, q, k, v, f"{splits=}", causal=True)
    again = attend(q, k, v, spans, packed=packed, splits=splits)
    assert all(map(torch.equal, got, again))


def test_packed_or_apart_is_the_same():
    q, k, v = draw(11, 60, (6, 2), (32, 32))
    spans = make_spans(run_of(11, 49), run_of(60), True)
    apart, packed = (attend(q, k, v, spans, packed=packed) for packed in (False, True))
    torch.testing.assert_close(packed, apart, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_outside_the_table_and_all_around_stay(packed, splits):
    q, k, v = draw(80, 60, (4, 2), (32, 24), batch=2)
    spans = make_spans(run_of(30, 20, offset=40), run_of(60), True)
    (out, lse), around = guarded(q, 24)
    before = [x.clone() for x in around]
    out_before, lse_before = out.clone(), lse.clone()
    table = table_of(spans, cut_of(q, k, packed), splits=splits)
    step_module.step(q, k, v, out, lse, table, softmax_scale=0.2)
    part, part_lse = attend(q, k, v, spans, softmax_scale=0.2, phase="first")
    lses = torch.stack([lse_before, part_lse]).cpu()
    want, want_lse = reference.merge(torch.stack([out_before, part]).cpu(), lses)
    torch.testing.assert_close(out.cpu(), want, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=3e-6, rtol=3e-6)
    untouched = torch.ones(80, dtype=torch.bool)
    untouched[40:70] = False
    assert torch.equal(out[:, untouched], out_before[:, untouched])
    assert torch.equal(lse[:, :, untouched], lse_before[:, :, untouched])
    for x, inner, old in zip(around, (out_before, lse_before), before, strict=True):
        view = x[:-1, 4:-5, 1:-1, 1:-2] if x.dim() == 4 else x[:-1, 1:-1, 4:-5]
        view.copy_(inner)
        assert torch.equal(x, old)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_without_keys(splits):
    """The first rows of a tile see none of its keys: (0, -inf), and a state of theirs stays."""
    q, k, v = draw(30, 40, (2, 2), (16, 16))
    spans = make_spans(run_of(30, 0), run_of(40, 17), True)
    got = attend(q, k, v, spans, splits=splits)
    where = dict(q_pos=torch.arange(30), k_pos=torch.arange(40) + 17, causal=True)
    check(got, q, k, v, "no keys", **where)
    assert (got[0][:, :17] == 0).all() and (got[1][:, :, :17] == -INF).all()
    (out, lse), _ = guarded(q, 16)
    lse *= 1000  # of which no two to base 2 and back are the same
    lse[:, :, 3:6], out[:, 3:6] = -INF, 0.0
    before = out.clone(), lse.clone()
    table = table_of(spans, cut_of(q, k), splits=splits)
    step_module.step(q, k, v, out, lse, table, softmax_scale=0.25)
    assert torch.equal(out[:, :17], before[0][:, :17])
    assert torch.equal(lse[:, :, :17], before[1][:, :, :17])
    assert not torch.equal(lse[:, :, 17:], before[1][:, :, 17:])


def test_no_table_no_change():
    q, k, v = draw(30, 40)
    (out, lse), around = guarded(q, 32)
    before = [x.clone() for x in around]
    table = table_of(make_spans(run_of(30), run_of(40, 50), True), cut_of(q, k))
    step_module.step(q, k, v, out, lse, table, softmax_scale=0.25)
    assert len(table.tiles) == 0 and all(map(torch.equal, around, before))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_state_that_saw_nothing_is_not_looked_at(splits):
    q, k, v = draw(30, 60)
    spans = make_spans(run_of(30, 10), run_of(60), True)
    want = attend(q, k, v, spans, phase="first", softmax_scale=0.25)
    out, lse = poisoned(q, 32)
    table = table_of(spans, cut_of(q, k), splits=splits)
    step_module.step(q, k, v, out, lse.fill_(-INF), table, softmax_scale=0.25)
    torch.testing.assert_close((out, lse), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("where", ["q", "k", "v", "out", "lse"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_nan_stays_nan_where_it_is_seen(where, splits):
    """A NaN in row 20 of q or of the state, or in key 50; rows from 20 on see it, of one head."""
    q, k, v = draw(40, 70)
    spans = make_spans(run_of(40, 30), run_of(70), True)
    out, lse = attend(q, k, v, spans, phase="first", softmax_scale=0.25)
    damaged = dict(q=q, k=k, v=v, out=out, lse=lse)[where]
    row = slice(20, 21) if where in ("q", "out", "lse") else slice(20, 40)
    at = 50 if where in "kv" else 20
    damaged[(0, 0, at) if where == "lse" else (0, at, 0)] = NAN
    table = table_of(spans, cut_of(q, k), splits=splits)
    step_module.step(q, k, v, out, lse, table, softmax_scale=0.25)
    want = torch.zeros(40, 2, dtype=torch.bool)
    want[row, 0] = True
    bad = out.isnan().any(dim=-1)[0].cpu()
    if where == "v":  # 0 * NaN: the rows of a tile that do not see a key weigh it 0
        assert bad[want].all() and not bad[:, 1].any()
    else:
        assert torch.equal(bad, want)
    bad_lse = lse.isnan()[0].T.cpu()
    assert torch.equal(bad_lse, want if where in ("q", "k", "lse") else torch.zeros_like(want))


def test_large_lse():
    """Scores near 1e6: a ring of a million tokens has smaller ones."""
    q, k, v = draw(20, 60)
    q[..., 0], k[..., 0] = 1e3, 1e3 + torch.arange(60, device=DEVICE)[:, None] * 1e-2
    out, lse = empty_state(q, 32)
    for k_part, v_part, spans in parts_of(k, v, 20, (0, 25, 60)):
        table = table_of(spans, cut_of(q, k))
        step_module.step(q, k_part, v_part, out, lse, table, softmax_scale=1.0)
    assert lse.min() > 9e5 and lse.max() < 1.1e6
    # A score's own rounding is 0.06 here: out is as good as float32's, and no better.
    options = dict(causal=True, softmax_scale=1.0)
    q, k, v = (x.cpu() for x in (q, k, v))
    want, want_lse = reference.attn(q, k, v, **options)
    baseline, _ = reference.attn(q, k, v, **options, dtype=torch.float32)
    assert_lse_close(lse.cpu(), want_lse, name="large")
    assert (out.cpu() - want).abs().max() <= 2 * (baseline - want).abs().max() + 1e-2


def test_strides_are_free():
    """Heads before rows, a view of fused projections, a batch that is broadcast."""
    q, k, v = draw(30, 50, (4, 2), (16, 16), batch=2)
    spans = make_spans(run_of(30, 20), run_of(50), True)
    want = attend(q, k, v, spans)
    fused = torch.cat([k, v], dim=2)
    other = q.transpose(1, 2).contiguous().transpose(1, 2), fused[:, :, :2], fused[:, :, 2:]
    assert not any(x.is_contiguous() for x in other)
    for packed in (False, True):
        got = attend(*other, spans, packed=packed)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    one = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    got = attend(q, *one, spans)
    assert all(map(torch.equal, got, attend(q, *(x.contiguous() for x in one), spans)))


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


GOOD = dict(q=(1, 8, 4, 32), k=(1, 9, 2, 32), v=(1, 9, 2, 16), out=(1, 8, 4, 16), lse=(1, 4, 8))
FAULTS = {
    "k: want \\(1, 9, 2, 32\\), got \\(1, 9, 2, 16\\)": dict(k=(1, 9, 2, 16)),
    "v: want": dict(v=(1, 7, 2, 16)),
    "nheads: want a multiple of 3, got 4": dict(k=(1, 9, 3, 32), v=(1, 9, 3, 16)),
    "headdim: want 1 to 256": dict(q=(1, 8, 4, 288), k=(1, 9, 2, 288)),
    "out: want": dict(out=(1, 8, 4, 32)),
    "lse: want": dict(lse=(1, 8, 4)),
    "q: want \\[batch": dict(q=(8, 4, 32)),
}


def refuse(match, options=None, **changed):
    made = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()} | changed
    before = made["out"].clone()
    spans = make_spans(run_of(8), run_of(9), False)
    given = {"softmax_scale": 1.0, "table": table_of(spans, Cut(16, 16, 1, 4, 2))} | (options or {})
    with pytest.raises(ValueError, match=match):
        step_module.step(**made, **given)
    assert torch.equal(made["out"], before)


def test_what_does_not_fit_is_refused():
    for match, shapes in FAULTS.items():
        refuse(match, **{name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()})
    zeros = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    refuse("q: want .*float16.*, got torch.float64", q=zeros["q"].double())
    refuse("k: want torch.float32, got torch.float16", k=zeros["k"].half())
    refuse("out: want torch.float32, got torch.float16", out=zeros["out"].half())
    refuse("q: want a last stride of 1", q=torch.zeros(1, 8, 4, 64, device=DEVICE)[..., ::2])
    refuse("k: want a tensor on", k=zeros["k"].to("meta"))
    refuse("phase: want one of first, middle", dict(phase="second"))
    refuse("result: want a tensor, got None", dict(phase="last"))
    refuse("softcap: want 0 or more, got -1", dict(softcap=-1.0))
    refuse("sinks: want phase first or only", dict(sinks=torch.zeros(4, device=DEVICE)))
    sinks = dict(sinks=torch.zeros(3, device=DEVICE), phase="first")
    refuse("sinks: want \\(4,\\), got \\(3,\\)", sinks)
    far = table_of(make_spans(run_of(9), run_of(9)), Cut(16, 16, 1, 4, 2))
    refuse("table: want query rows up to 8, got 9", dict(table=far))
    packed = table_of(make_spans(run_of(8), run_of(9)), Cut(16, 16, 4, 4, 2))
    refuse("table: want 1 or 2 heads packed, got 4", dict(table=packed))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 9 GB of GPU memory")
def test_more_than_2_to_the_31_elements():
    heads, seqlen = 16, (1 << 31) // (16 * 128) + 512
    k = torch.zeros(1, seqlen, heads, 128, dtype=torch.float16, device=DEVICE)
    q = torch.ones(1, 16, heads, 128, dtype=torch.float16, device=DEVICE)
    k[:, -5:], v = 1.0, k
    spans = make_spans(run_of(16), run_of(16, offset=seqlen - 16))
    out, lse = attend(q, k, v, spans, softmax_scale=1.0)
    assert (out == 1).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 128 + math.log(5)))
