"""A ring step on a GPU: queries against keys and values, alone or on top of a running state."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from ringkern import tile_table, tiles
from ringkern.kernels import reference

from bench import gpu, gpu_peers
from bench.gpu import GpuOperation
from bench.gpu_sample import Attention, Rows, same_lse
from bench.operation import nothing

PHASES = {"ringkern": "only", "ringkern+first": "first", "ringkern+middle": "middle"}


@dataclass
class State:
    """One step's tensors and, in got, what the last call returned."""

    q: torch.Tensor  # [batch, seqlen_q, nheads, headdim]
    k: torch.Tensor  # [batch, seqlen_k, nheads_k, headdim]
    v: torch.Tensor
    causal: bool
    sample: Attention
    before: tuple  # (out, lse) of earlier keys, float32, that "middle" starts from; or empty
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    table: object = None
    count: int = 0  # calls since prepare()
    got: torch.Tensor | None = None
    calls: dict = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5


def make_inputs(session, case) -> State:
    """Return random inputs on the device."""
    shape, dtype = case.shape, gpu.dtype(case)
    source = torch.Generator(gpu.device()).manual_seed(0)
    draw = partial(torch.randn, generator=source, device=gpu.device())
    batch, headdim = shape["batch"], shape["headdim"]
    q = draw(batch, shape["seqlen_q"], shape["nheads"], headdim).to(dtype)
    k, v = (draw(batch, shape["seqlen_k"], shape["nheads_k"], headdim).to(dtype) for _ in range(2))
    before = ()
    if "ringkern+middle" in case.impls:
        # An lse of about as many keys again, so that neither side drowns the other.
        before = draw(q.shape), draw(batch, q.shape[2], q.shape[1]) + np.log(k.shape[1])
    causal = bool(shape["causal"])
    state = State(q, k, v, causal, Attention(q, k, v, causal), before)
    state.calls = {impl: partial(_attend, state, phase) for impl, phase in PHASES.items()}
    return state


def prepare(state: State, impl: str) -> None:
    """Poison what will be written, and make the table anew: configurations may have changed."""
    state.count, state.got = 0, None
    if impl not in PHASES:
        return
    alone = PHASES[impl] == "only"
    batch, seqlen, nheads, _ = state.q.shape
    dtype = state.q.dtype if alone else torch.float32
    state.out = torch.full_like(state.q, float("nan"), dtype=dtype)
    state.lse = state.q.new_full((batch, nheads, seqlen), float("nan"), dtype=torch.float32)
    if PHASES[impl] == "middle":
        state.out.copy_(state.before[0])
        state.lse.copy_(state.before[1])
    state.table = make_table(state, PHASES[impl])


def make_table(state: State, phase: str):
    """Return the work of the step in a phase, as its kernel reads it."""
    from ringkern.kernels import cut as cuts
    from ringkern.kernels.target import arch, dtype_name

    (batch, seqlen_q, nheads, headdim), (_, seqlen_k, nheads_k, _) = state.q.shape, state.k.shape
    on = state.q.device
    runs = [
        np.array([[0, 0, start, length, 1]], dtype=np.int64)
        for start, length in ((seqlen_k - seqlen_q, seqlen_q), (0, seqlen_k))
    ]
    spans = tiles.make_spans(*runs, *tiles.bounds(state.causal, (-1, -1)))
    heads = nheads, nheads_k, headdim, headdim
    cut = cuts.choose_cut(*heads, dtype_name(state.q), arch(on), seqlen_q, phase)
    fill = cuts.tiles_to_fill(cut, batch, nheads, gpu.multiprocessors())
    made = tile_table.make_tiles(spans, cut.block_q, cut.block_n, rows=seqlen_q, fill=fill)
    return cuts.make_table(made, cut, on)


def _attend(state: State, phase: str):
    from ringkern.kernels.step import step

    out, result = (None, state.out) if phase == "only" else (state.out, None)
    options = dict(softmax_scale=state.scale, phase=phase, result=result)
    step(state.q, state.k, state.v, out, state.lse, state.table, **options)
    return state.out


def call(state: State, impl: str, index: int) -> None:
    state.got = state.calls[impl]()
    state.count += 1


def check(state: State, impl: str) -> dict:
    """Compare some rows with float64, and see that every element was written."""
    sample = state.sample
    want, baseline, lse = sample.out, sample.baseline, sample.lse
    if PHASES.get(impl) == "middle":
        (want, lse), (baseline, _) = (_on_top(state, one) for one in (want, baseline.double()))
    # A float32 state has the error of products in q's dtype, so it is compared as one of these.
    dtype = state.q.dtype
    found = Rows(want, baseline.to(dtype)).compare(sample.rows(state.got).to(dtype))
    found["ok"] &= bool(torch.isfinite(state.got).all())
    if impl in PHASES:
        found["ok"] &= same_lse(sample.lses(state.lse), lse)
    return found


def _on_top(state: State, out):
    """Return (out, lse) of the state before and, once for each call, the sample's."""
    sample, (before, before_lse) = state.sample, state.before
    outs = torch.stack([sample.rows(before).double(), out])
    lses = [sample.lses(before_lse).double(), sample.lse + np.log(state.count)]
    return reference.merge(outs, torch.stack(lses))


def flops(case) -> int:
    """Return the model FLOPs of one call: what the mask hides is not counted."""
    shape = case.shape
    pairs, seqlen_q = shape["seqlen_q"] * shape["seqlen_k"], shape["seqlen_q"]
    if shape["causal"]:
        pairs -= seqlen_q * (seqlen_q - 1) // 2
    return 4 * shape["batch"] * pairs * shape["nheads"] * shape["headdim"]


def bytes_moved(case) -> int:
    """Return the bytes of q, k, v and out, once each."""
    shape, itemsize = case.shape, gpu.dtype(case).itemsize
    rows = 2 * shape["seqlen_q"] * shape["nheads"] + 2 * shape["seqlen_k"] * shape["nheads_k"]
    return shape["batch"] * rows * shape["headdim"] * itemsize


ATTN_STEP = GpuOperation(
    "attn_step",
    make_inputs,
    call,
    check,
    flops,
    nothing,
    prepare,
    bytes_moved=bytes_moved,
    peers=gpu_peers.STEP,
)
