"""One Triton step on small random tensors: in the interpreter, or on a GPU where there is one.

Inputs lie in NaN: rows, heads and columns of it, so what is read beyond them shows.
"""

import itertools

import numpy as np
import torch
from accelerator import DEVICE, poisoned_memory
from close import assert_close, assert_lse_close
from ringkern import tile_table, tiles
from ringkern.kernels import reference, step
from ringkern.kernels.cut import Cut, make_table

INF, NAN = float("inf"), float("nan")
NO_WINDOW = (-1, -1)
ROOM = 32  # rows of NaN on either side: a block of keys


def run_of(length, start=0, stride=1, offset=0, seq=0):
    return np.array([[seq, offset, start, length, stride]], dtype=np.int64)


def positions(runs):
    return torch.cat([start + stride * torch.arange(n) for _, _, start, n, stride in runs])


def make_spans(q_runs, k_runs, causal=False, window_size=NO_WINDOW):
    return tiles.make_spans(q_runs, k_runs, *tiles.bounds(causal, window_size))


def in_nan(x):
    """Return x [batch, rows, heads, columns] on the device as a part of a larger tensor of NaN."""
    batch, rows, heads, columns = x.shape
    shape = batch, rows + 2 * ROOM, heads + 2, columns + 16
    inner = torch.full(shape, NAN, dtype=x.dtype, device=DEVICE)[:, ROOM:-ROOM, 1:-1, :-16]
    return inner.copy_(x)


def draw(seqlen_q, seqlen_k, heads=(2, 2), dims=(32, 32), dtype=torch.float32, batch=1, seed=0):
    """Return q, k and v on the device."""
    source = torch.Generator().manual_seed(seed)
    shapes = (
        (seqlen_q, heads[0], dims[0]),
        (seqlen_k, heads[1], dims[0]),
        (seqlen_k, heads[1], dims[1]),
    )
    return [in_nan(torch.randn(batch, *s, generator=source).to(dtype)) for s in shapes]


def cut_of(q, k, packed=False, block_m=32, block_n=32):
    return Cut(block_m, block_n, q.shape[2] // k.shape[2] if packed else 1, 4, 2)


def table_of(spans, cut, rows=0, splits=1):
    made = tile_table.make_tiles(spans, cut.block_q, cut.block_n, rows=rows, splits=splits)
    return make_table(made, cut, DEVICE)


def poisoned(q, headdim_v, dtype=torch.float32):
    """Return (out, lse) that hold NaN: what must be written."""
    batch, seqlen, nheads, _ = q.shape
    out = torch.full((batch, seqlen, nheads, headdim_v), NAN, dtype=dtype, device=DEVICE)
    return out, torch.full((batch, nheads, seqlen), NAN, device=DEVICE)


def empty_state(q, headdim_v):
    """Return (out, lse) of nothing seen, whose out must not be looked at."""
    out, lse = poisoned(q, headdim_v)
    return out, lse.fill_(-INF)


@poisoned_memory()
def add(q, k, v, out, lse, spans, *, packed=False, splits=1, cut=None, rows=0, **options):
    """Add the keys of spans to the state (out, lse), or what else `phase` says."""
    table = table_of(spans, cut or cut_of(q, k, packed), rows, splits)
    options = {"softmax_scale": q.shape[3] ** -0.5} | options
    step.step(q, k, v, out, lse, table, **options)


def attend(q, k, v, spans, *, phase="only", **options):
    """Return (out, lse) of one step that writes every row."""
    out, lse = poisoned(q, v.shape[3], q.dtype if phase == "only" else torch.float32)
    state, result = (None, out) if phase == "only" else (out, None)
    add(q, k, v, state, lse, spans, phase=phase, result=result, rows=q.shape[1], **options)
    return out, lse


def check(got, q, k, v, name, **options):
    """Compare with the reference in float64, and its error in q's dtype."""
    q, k, v = (x.cpu() for x in (q, k, v))
    attention = reference.attn_varlen if "cu_seqlens_q" in options else reference.attn
    want, want_lse = attention(q, k, v, **options)
    baseline, _ = attention(q, k, v, **options, dtype=q.dtype)
    out, lse = (x.cpu() for x in got)
    assert_close(out, want, baseline, name=name)
    assert_lse_close(lse, want_lse, name=name)


def parts_of(k, v, seqlen_q, edges):
    """Return (k, v, spans) of each part of the keys, for causal queries at their end."""
    seqlen_k = k.shape[1]
    for a, b in itertools.pairwise(edges):
        spans = make_spans(run_of(seqlen_q, seqlen_k - seqlen_q), run_of(b - a, a), True)
        yield k[:, a:b], v[:, a:b], spans


def guarded(q, headdim_v, dtype=torch.float32):
    """Return (out, lse) of noise inside larger tensors, and those."""
    batch, seqlen, nheads, _ = q.shape
    source = torch.Generator().manual_seed(9)
    out = torch.randn(batch + 1, seqlen + 9, nheads + 2, headdim_v + 3, generator=source)
    lse = torch.randn(batch + 1, nheads + 2, seqlen + 9, generator=source)
    around = out.to(DEVICE, dtype), lse.to(DEVICE)
    return inside(around), around


def inside(around):
    """Return the views that guarded() gives of what is around them."""
    out, lse = around
    return out[:-1, 4:-5, 1:-1, 1:-2], lse[:-1, 1:-1, 4:-5]
