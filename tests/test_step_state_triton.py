"""What the Triton step does to the running state: what it reads, writes and leaves alone."""

import numpy as np
import pytest
import torch
from accelerator import DEVICE
from ringkern.kernels import reference, step, step_torch
from ringkern.kernels.cut import Cut
from rounding import REORDERED
from step_case import (
    INF,
    add,
    attend,
    check,
    cut_of,
    draw,
    empty_state,
    guarded,
    inside,
    make_spans,
    run_of,
    table_of,
)


def some_rows(rows):
    """Return a mask [80] of them."""
    mask = torch.zeros(80, dtype=torch.bool)
    for a, b in rows:
        mask[a:b] = True
    return mask


@pytest.mark.parametrize("packed, splits", [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_a_step_adds_to_its_rows_and_nothing_else(packed, splits):
    """Two runs of rows with others before, between and after; and all around the state."""
    rows = (20, 30), (40, 70)
    q, k, v = draw(80, 60, (4, 2), (32, 24), batch=2)
    q_runs = np.concatenate([run_of(b - a, a, offset=a) for a, b in rows])
    spans = make_spans(q_runs, run_of(60), True)
    (out, lse), around = guarded(q, 24)
    before = [x.clone() for x in around]
    old, old_lse = inside(before)
    add(q, k, v, out, lse, spans, packed=packed, splits=splits, softmax_scale=0.2)
    where = dict(softmax_scale=0.2, causal=True, q_pos=torch.arange(80), k_pos=torch.arange(60))
    part, part_lse = reference.attn(*(x.cpu() for x in (q, k, v)), **where)
    mine = some_rows(rows)
    part_lse[:, :, ~mine] = -INF
    outs, lses = torch.stack([old.cpu().double(), part]), torch.stack([old_lse.cpu(), part_lse])
    want, want_lse = reference.merge(outs, lses.double())
    torch.testing.assert_close(out.cpu(), want.float(), **REORDERED)
    torch.testing.assert_close(lse.cpu(), want_lse.float(), **REORDERED)
    assert torch.equal(out[:, ~mine], old[:, ~mine])
    assert torch.equal(lse[:, :, ~mine], old_lse[:, :, ~mine])
    out.copy_(old)
    lse.copy_(old_lse)
    assert all(map(torch.equal, around, before))


@pytest.mark.parametrize("packed, splits", [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("phase", step.PHASES)
def test_each_phase_writes_its_rows_and_nothing_else(phase, packed, splits):
    """Over a state that saw nothing; whose out, garbage, stays where no tile is."""
    rows = (20, 30), (40, 45)
    q, k, v = draw(80, 60, (2, 1), (16, 24), torch.float16)
    spans = make_spans(np.concatenate([run_of(b - a, a, offset=a) for a, b in rows]), run_of(60))
    _, (out, lse) = guarded(q, 24)
    _, (result, _) = guarded(q, 24, torch.float16)
    out.fill_(7.0)
    lse.fill_(-INF)
    result.fill_(7.0)
    views = dict(out=inside((out, lse))[0], lse=inside((out, lse))[1])
    state = dict(views, out=None) if phase == "only" else views
    assert table_of(spans, cut_of(q, k, packed), splits=splits).rows == (20, 30, 40, 45)
    add(q, k, v, **state, spans=spans, packed=packed, splits=splits, phase=phase,
        result=inside((result, lse))[0])  # fmt: skip
    want_out, want_lse = (torch.zeros_like(x, dtype=torch.bool) for x in (out, lse))
    written = inside((want_out, want_lse))
    written[0][:, some_rows(rows)], written[1][:, :, some_rows(rows)] = True, True
    assert torch.equal(lse != -INF, want_lse)
    written, other = (out, result) if phase in ("first", "middle") else (result, out)
    assert torch.equal(written != 7.0, want_out) and (other == 7.0).all()


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
    add(q, k, v, out, lse, spans, splits=splits)
    assert torch.equal(out[:, :17], before[0][:, :17])
    assert torch.equal(lse[:, :, :17], before[1][:, :, :17])
    assert not torch.equal(lse[:, :, 17:], before[1][:, :, 17:])


@pytest.mark.parametrize("packed, splits", [(False, 1), (True, 2)])
def test_no_keys_at_all(packed, splits):
    """(0, -inf), or what the sinks make of it; a state stays; without tiles nothing is written."""
    q, k, v = draw(30, 40, (4, 2))
    none = make_spans(run_of(30), run_of(40, 50), True)
    options = dict(packed=packed, splits=splits)
    for keys in (k, k[:, :0]):
        out, lse = attend(q, keys, v[:, : keys.shape[1]], none, **options)
        assert (out == 0).all() and (lse == -INF).all()
    sinks = torch.tensor([0.5, -INF, 3.0, 1e6], device=DEVICE)
    out, lse = attend(q, k, v, none, sinks=sinks, **options)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(lse.shape), **REORDERED)
    (out, lse), around = guarded(q, 32)
    before = [x.clone() for x in around]
    add(q, k, v, out, lse, none, rows=30, **options)
    add(q, k, v, out, lse, none, **options)
    assert len(table_of(none, cut_of(q, k)).tiles) == 0
    assert all(map(torch.equal, around, before))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_state_that_saw_nothing_is_not_looked_at(splits):
    q, k, v = draw(30, 60)
    spans = make_spans(run_of(30, 10), run_of(60), True)
    want = attend(q, k, v, spans, phase="first")
    out, lse = empty_state(q, 32)
    add(q, k, v, out, lse, spans, splits=splits)
    torch.testing.assert_close((out, lse), want, **REORDERED)


def test_as_on_the_cpu():
    """The contract is that of step_torch: the same spans, the same state."""
    q, k, v = draw(40, 90, (4, 2), (32, 16))
    spans = make_spans(run_of(40, 30, stride=2), run_of(90, 3), True, (50, -1))
    (out, lse), _ = guarded(q, 16)
    lse[:, :, :7], out[:, :7] = -INF, 0.0
    want, want_lse = out.cpu().clone(), lse.cpu().clone()
    options = dict(softmax_scale=0.3, softcap=2.0)
    add(q, k, v, out, lse, spans, packed=True, **options)
    step_torch.step(*(x.cpu() for x in (q, k, v)), want, want_lse, spans, **options)
    torch.testing.assert_close(out.cpu(), want, **REORDERED)
    torch.testing.assert_close(lse.cpu(), want_lse, **REORDERED)


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
        step.step(**made, **given)
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
    tiles = far.tiles[:, :1].expand(-1, 5).clone()
    for match, changed in {
        "table: want \\(1, 5\\), got \\(1, 4\\)": tiles[:, :4],
        "table: want at most": tiles.expand(1 << 29, 5),
        "table: want contiguous, got strides": torch.cat([tiles, tiles], 1).repeat(2, 1)[:, :5],
    }.items():
        refuse(match, dict(table=far._replace(tiles=changed, rows=(0, 8))))
