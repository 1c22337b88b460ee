"""One Triton step on small random tensors: in the interpreter, or on a GPU where there is one."""

import itertools

import numpy as np
import torch
from close import assert_close, assert_lse_close
from ringkern import tile_table, tiles
from ringkern.kernels import reference, step
from ringkern.kernels.cut import Cut, make_table

INF, NAN = float("inf"), float("nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
DTYPES += [torch.bfloat16] if DEVICE == "cuda" else []  # the interpreter truncates to bfloat16
NO_WINDOW = (-1, -1)


def run_of(length, start=0, stride=1, offset=0):
    return np.array([[0, offset, start, length, stride]], dtype=np.int64)


def positions(runs):
    return torch.cat([start + stride * torch.arange(n) for _, _, start, n, stride in runs])


def make_spans(q_runs, k_runs, causal=False, window_size=NO_WINDOW):
    return tiles.make_spans(q_runs, k_runs, *tiles.bounds(causal, window_size))


def draw(seqlen_q, seqlen_k, heads=(2, 2), dims=(32, 32), dtype=torch.float32, batch=1, seed=0):
    """Return q, k and v on the device."""
    source = torch.Generator().manual_seed(seed)
    shapes = (
        (seqlen_q, heads[0], dims[0]),
        (seqlen_k, heads[1], dims[0]),
        (seqlen_k, heads[1], dims[1]),
    )
    return [torch.randn(batch, *s, generator=source).to(DEVICE, dtype) for s in shapes]


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
    out, lse = poisoned(q, headdim_v)
    return out.zero_(), lse.fill_(-INF)


def attend(q, k, v, spans, *, packed=False, splits=1, cut=None, phase="only", **options):
    """Return (out, lse) of one step that writes every row."""
    cut = cut or cut_of(q, k, packed)
    table = table_of(spans, cut, q.shape[1], splits)
    out, lse = poisoned(q, v.shape[3], q.dtype if phase == "only" else torch.float32)
    state, result = (None, out) if phase == "only" else (out, None)
    options = {"softmax_scale": q.shape[3] ** -0.5} | options
    step.step(q, k, v, state, lse, table, phase=phase, result=result, **options)
    return out, lse


def check(got, q, k, v, name, **options):
    """Compare with the reference in float64, and its error in q's dtype."""
    q, k, v = (x.cpu() for x in (q, k, v))
    want, want_lse = reference.attn(q, k, v, **options)
    baseline, _ = reference.attn(q, k, v, **options, dtype=q.dtype)
    out, lse = (x.cpu() for x in got)
    assert_close(out, want, baseline, name=name)
    assert_lse_close(lse, want_lse, name=name)


def parts_of(k, v, seqlen_q, edges):
    """Return (k, v, spans) of each part of the keys, for causal queries at their end."""
    seqlen_k = k.shape[1]
    for a, b in itertools.pairwise(edges):
        spans = make_spans(run_of(seqlen_q, seqlen_k - seqlen_q), run_of(b - a, a), True)
        yield k[:, a:b], v[:, a:b], spans


def guarded(q, headdim_v):
    """Return a state inside larger tensors, and those: rows, heads and columns around it."""
    batch, seqlen, nheads, _ = q.shape
    source = torch.Generator().manual_seed(9)
    out = torch.randn(batch + 1, seqlen + 9, nheads + 2, headdim_v + 3, generator=source)
    lse = torch.randn(batch + 1, nheads + 2, seqlen + 9, generator=source)
    out, lse = out.to(DEVICE), lse.to(DEVICE)
    inner = out[:-1, 4:-5, 1:-1, 1:-2], lse[:-1, 1:-1, 4:-5]
    return inner, (out, lse)
