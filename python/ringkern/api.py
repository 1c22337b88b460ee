"""The public functions of a ring: check, plan, run."""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ringkern import shard
from ringkern.agreement import agree
from ringkern.errors import check
from ringkern.packed import check_edges
from ringkern.plan import Plan
from ringkern.problem import check_dims, make_problem
from ringkern.ring import Ring
from ringkern.schedule import check_method
from ringkern.transport import open_transport

_rings: list[Ring] = []  # open rings of this process, latest last; ring=None means the latest


def init_ring(
    group=None,
    *,
    transport: str = "auto",
    device=None,
    timeout_s: float = 60.0,
    secret: bytes | str | None = None,
    profile=None,
) -> Ring:
    """Return this rank's end of a new ring. Every rank must call it.

        with ringkern.init_ring() as ring:  # under torchrun
            out = ringkern.ring_attn_func(q, k, v, causal=True, ring=ring)

    Args:
        group: a torch.distributed ProcessGroup, a 1-D DeviceMesh, or a LocalGroup's member; None
            means the default process group if there is one, else torchrun's environment (RANK,
            WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
        transport: "nccl" (for GPUs), "tcp" (for GPUs by way of host memory), "local" (ranks are
            threads of this process), or "auto": "local" for a LocalGroup, else "nccl" on GPUs where
            every rank has it, and "tcp".
        device: where tensors lie: "cpu", "cuda", "cuda:1"; None: the GPU that
            torch.cuda.set_device() chose, or number LOCAL_RANK where it chose none, and the CPU
            where there is none, or what RINGKERN_DEVICE says.
        timeout_s: seconds within which every exchange, and the making of the ring, must be over.
            Over NCCL a rank may be late by half of it; the rest is for finding out which one is.
        secret: at least 32 bytes that every rank knows; None means RINGKERN_SECRET or
            RINGKERN_SECRET_FILE, else one that rank 0 draws and shares over the rendezvous.
        profile: for the choice of method: a file that `ringkern calibrate` wrote, or a
            types.Hardware, the same on every rank; None means RINGKERN_PROFILE, else the ring
            measures itself in some tenths of a second when it first has to choose.

    With RINGKERN_TRACE=FILE on every rank, the ring's close() has rank 0 write a trace.

    Raises:
        ArgumentError: no environment, or ranks disagree in world size or options.
        AuthenticationError: ranks have different secrets.
        TransportError: a rank or port cannot be reached, or not in time.
        UnsupportedError: what was asked for needs CUDA or NCCL, and a rank has none that will do.
    """
    ring = Ring(*open_transport(group, transport, device, timeout_s, secret, profile))
    if ring.transport != "local":  # threads share this list; they name their rings
        _rings[:] = [old for old in _rings if not old.closed] + [ring]
    return ring


def shard_sequence(x: torch.Tensor, ring: Ring, dim: int = 1, layout: str = "zigzag"):
    """Return this rank's shard of x along dim, as a contiguous copy.

    Any length: where it does not divide, shards differ in length by one, and may be empty.

    Args:
        x: the whole tensor, the same on every rank.
        dim: the sequence dimension.
        layout: "contiguous", "zigzag" (balanced for causal) or "striped".
    """
    check(isinstance(ring, Ring), "ring", "what init_ring() returned", type(ring).__name__)
    dim = _check_dim(x, "x", dim)
    chunks = shard.chunks(layout, x.shape[dim], ring.world_size, ring.rank)
    pieces = [_slice(x, dim, chunk) for chunk in chunks]
    return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0).contiguous()


def unshard_sequence(
    x_local: torch.Tensor,
    ring: Ring,
    dim: int = 1,
    layout: str = "zigzag",
    seqlen: int | None = None,
):
    """Return the whole tensor on every rank: the inverse of shard_sequence().

    Args:
        x_local: this rank's shard.
        seqlen: the whole length; None asks the other ranks, for one small exchange more.
    """
    check(isinstance(ring, Ring), "ring", "what init_ring() returned", type(ring).__name__)
    dim = _check_dim(x_local, "x_local", dim)
    shard.check_layout(layout)
    plan = _plan_of_shards(ring, x_local.shape[dim], layout, "x_local", seqlen)
    return ring.unshard(x_local.movedim(dim, 0), plan).movedim(0, dim).contiguous()


def ring_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    layout: str = "zigzag",
    method: str = "auto",
    ring: Ring | None = None,
    return_lse: bool = False,
):
    """Return attention of this rank's queries to the keys of every rank.

    The result is exact: the same as attention over the whole sequence on one device, up to
    rounding. Every rank of the ring must call it. The length of the whole sequence is asked of the
    other ranks, one small exchange per call; Ring.attn() with a plan needs none.

        q, k, v = (ringkern.shard_sequence(x, ring) for x in (q, k, v))
        out = ringkern.ring_attn_func(q, k, v, causal=True, ring=ring)

    Args:
        q: [batch, seqlen_local, nheads, headdim], float16, bfloat16 or float32: this rank's shard
            as shard_sequence() cuts it; seqlen_local may be 0.
        k: [batch, seqlen_local, nheads_k, headdim], nheads % nheads_k == 0.
        v: [batch, seqlen_local, nheads_k, headdim_v].
        causal: a query sees the keys at its position and before, in the whole sequence:

                k0 k1 k2 k3
            q0   1  .  .  .
            q1   1  1  .  .
            q2   1  1  1  .
            q3   1  1  1  1

        softmax_scale: None means headdim ** -0.5.
        window_size: (left, right): how many positions before and after a query it sees, in the
            whole sequence; -1 means no bound.
        softcap: 0.0 is off; else scores become softcap * tanh(scores / softcap).
        layout: how the sequence was cut: "contiguous", "zigzag" or "striped". Must match
            shard_sequence().
        method: "pass_kv", "pass_q", "gather_kv", "gather_q", or "auto": the fastest by prediction.
        ring: None means the latest that init_ring() made and is open; where there is none, a new
            one by init_ring(). Rings of threads do not count: name them.
        return_lse: also return lse.

    Returns:
        out: [batch, seqlen_local, nheads, headdim_v] in q's dtype, accumulated in float32.
        lse: only with return_lse. [batch, nheads, seqlen_local] float32, natural log.

    Raises:
        ArgumentError: shapes or dtypes do not fit together; no q, k or v was sent.
        TransportError: a rank is gone or late; the ring must be made anew.
    """
    ring = _current(ring, getattr(q, "device", None))
    asked = dict(
        causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap
    )

    def accept():
        shard.check_layout(layout)
        check_method(method)
        check_dims(q, k, v, 4, "[batch, seqlen_local, heads, headdim]")
        problem = make_problem(q, k, v, **asked, device=ring.device)
        ring.backend(problem)
        want = f"seqlen_local {q.shape[1]}, as q"
        check(k.shape[1] == q.shape[1], "k", want, tuple(k.shape))
        return problem

    problem = agree(ring, accept, layout=layout, method=method)
    plan = _plan_of_shards(ring, q.shape[1], layout, "q", None)
    out, lse = ring.run(q, k, v, plan, problem, method=method)
    return (out, lse) if return_lse else out


def ring_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Sequence[int],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    layout: str = "zigzag",
    method: str = "auto",
    ring: Ring | None = None,
    return_lse: bool = False,
):
    """Return attention of this rank's queries to the keys of every rank, for a packed batch.

    Each sequence is sharded alone, and a rank's shards follow each other in the order of the
    batch: what a new Placement's first prefill() plans, or shard_sequence() of each in turn.

    Args:
        q: [total_local, nheads, headdim]; k and v likewise with nheads_k.
        cu_seqlens: int32 [batch + 1], global: where each whole sequence begins. Best a list or on
            the CPU: of a GPU's tensor each call waits for that GPU.
        The rest: see ring_attn_func().

    Returns:
        out: [total_local, nheads, headdim_v] in q's dtype.
        lse: only with return_lse. [nheads, total_local] float32, natural log.
    """
    ring = _current(ring, getattr(q, "device", None))
    edges = check_edges("cu_seqlens", cu_seqlens, None)
    plan = _make_plan(ring.world_size, tuple(np.diff(edges).tolist()), layout)
    return ring.attn(
        q,
        k,
        v,
        plan,
        method=method,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        return_lse=return_lse,
    )


# One plan per shape, so that its tables are made once and not once per layer.
_make_plan = functools.lru_cache(maxsize=16)(Plan)


def _current(ring: Ring | None, device: torch.device | None) -> Ring:
    if ring is None:
        alive = [old for old in _rings if not old.closed]
        return alive[-1] if alive else init_ring(device=device)
    check(isinstance(ring, Ring), "ring", "what init_ring() returned", type(ring).__name__)
    return ring


def _plan_of_shards(ring: Ring, mine: int, layout: str, what: str, seqlen: int | None) -> Plan:
    """Return the plan of one sequence of which this rank holds `mine` positions."""
    if seqlen is None:
        lengths = ring.gather_int(mine)
        seqlen = sum(lengths)
        check(seqlen > 0, what, "at least one position on some rank", "none on any")
        plan = _make_plan(ring.world_size, (seqlen,), layout)
        want = [plan.num_tokens(rank) for rank in range(ring.world_size)]
        hint = "Cut it with shard_sequence()."
        check(
            lengths == want,
            what,
            f"shards of {want} positions, {layout} of {seqlen}",
            lengths,
            hint,
        )
        return plan
    check(isinstance(seqlen, int) and seqlen > 0, "seqlen", "an int above 0", repr(seqlen))
    plan = _make_plan(ring.world_size, (seqlen,), layout)
    want = plan.num_tokens(ring.rank)
    check(
        mine == want, what, f"{want} positions, rank {ring.rank}'s {layout} shard of {seqlen}", mine
    )
    return plan


def _check_dim(x, name: str, dim: int) -> int:
    check(isinstance(x, torch.Tensor), name, "a torch.Tensor", type(x).__name__)
    ok = isinstance(dim, int) and -x.dim() <= dim < x.dim()
    check(ok, "dim", f"a dimension of {name}, {tuple(x.shape)}", repr(dim))
    return dim % x.dim()


def _slice(x, dim: int, chunk):
    index = [slice(None)] * x.dim()
    index[dim] = slice(chunk.start, chunk.start + chunk.length * chunk.stride, chunk.stride)
    return x[tuple(index)]
