"""Ring attention of one causal sequence, held against torch's attention in one process."""

from dataclasses import dataclass, field

import ringkern
import torch
import torch.nn.functional as F

from bench.operation import Operation
from bench.oracle import Sample

ROWS = 16  # of the answer that each rank checks
SINGLE = "torch_sdpa"  # one process: rank 0 with the threads of all ranks, the others asleep


@dataclass
class State:
    """One rank's share, and on rank 0 the whole for the single process."""

    ring: ringkern.Ring
    plan: ringkern.Plan
    local: list[torch.Tensor]  # q, k, v: [n_local, heads, headdim]
    rows: torch.Tensor  # of out, that are checked
    sample: Sample
    single: list[torch.Tensor] | None = None  # [1, heads, seqlen, headdim], as sdpa likes it
    single_sample: Sample | None = None
    out: dict = field(default_factory=dict)
    before: dict = field(default_factory=dict)  # ring.stats() at the last look


def make_inputs(session, case) -> State:
    """Return this rank's share of inputs that every rank draws alike."""
    shape, dtype = case.shape, getattr(torch, case.dtype)
    torch.manual_seed(0)
    sizes = [(shape["seqlen"], shape[heads], shape["headdim"]) for heads in ("nheads", "nheads_k")]
    q, k, v = (torch.randn(sizes[min(i, 1)]).to(dtype) for i in range(3))
    ring = session.ring()
    plan = ringkern.Placement(ring.world_size).prefill({"sequence": shape["seqlen"]})
    rows = _spread(plan.num_tokens(ring.rank))
    sample = Sample(q, k, v, torch.from_numpy(plan.positions(ring.rank))[rows])
    local = [plan.shard(x, ring.rank) for x in (q, k, v)]
    state = State(ring, plan, local, rows, sample, before=ring.stats())
    if SINGLE in case.impls and ring.rank == 0:
        state.single = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        state.single_sample = Sample(q, k, v, _spread(shape["seqlen"]))
    return state


def call(state: State, impl: str, index: int) -> None:
    ring = state.ring
    if impl == "ringkern":
        state.out[impl] = ring.attn(*state.local, state.plan)
    elif impl == "ringkern_func":
        dense = (x[None] for x in state.local)
        state.out[impl] = ringkern.ring_attn_func(*dense, causal=True, ring=ring)[0]
    elif ring.rank == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * ring.world_size)
        state.out[impl] = F.scaled_dot_product_attention(*state.single, is_causal=True)
        torch.set_num_threads(threads)


def check(state: State, impl: str) -> dict:
    """Compare a sample of rows of the timed call, drop it, and say where a call's time went."""
    out = state.out.pop(impl, None)
    if impl == SINGLE:  # ranks that stand by must do nothing here: rank 0 may be computing still
        rows = None if out is None else out[0].transpose(0, 1)[_spread(out.shape[2])]
        return {} if out is None else state.single_sample.compare(rows)
    before, after = state.before, state.ring.stats()
    state.before = after
    calls = after["calls"] - before["calls"]
    spent = {key: (after[key] - before[key]) / calls for key in after if key.endswith("_ms")}
    moved = (after["bytes_sent"] - before["bytes_sent"]) // calls
    return state.sample.compare(out[state.rows]) | spent | {"bytes_sent": moved}


def flops(case) -> int:
    """Two products of 2 * headdim FLOPs per visible pair and head."""
    shape = case.shape
    pairs = shape["seqlen"] * (shape["seqlen"] + 1) // 2
    return 4 * shape["headdim"] * shape["nheads"] * pairs


def bytes_sent(case) -> int:
    """K and V of all other ranks pass through a rank, less the last one's."""
    shape = case.shape
    tokens = -(-shape["seqlen"] // case.world_size)
    itemsize = getattr(torch, case.dtype).itemsize
    return (case.world_size - 1) * tokens * shape["nheads_k"] * 2 * shape["headdim"] * itemsize


def _spread(length: int) -> torch.Tensor:
    """Return up to ROWS indices below length, the first and the last among them."""
    return torch.linspace(0, length - 1, min(ROWS, length)).round().long()


RING_ATTN_FWD = Operation("ring_attn_fwd", make_inputs, call, check, flops, bytes_sent)
