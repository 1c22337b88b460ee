"""A ring step: attention beside the exchange of K and V, against each of them alone.

The sizes are such that attention takes longer: what the step takes beyond it is what the messages
cost. Both ends check that, and what came.
"""

from dataclasses import dataclass

import numpy as np
import ringkern
import torch
from ringkern import local, tiles
from ringkern.types import Problem

from bench import plain
from bench.operation import Operation, nothing

IMPLS = ("step", "compute", "transfer")
# On a CPU, the same step by torch's messages, and by sockets that nobody sees to
OTHERS = ("gloo_step", "sockets_step")


@dataclass
class State:
    """How one rank attends and posts, and what came."""

    ring: object
    moves: bool  # whether a message has where to go
    attend: object  # attends with the block that is here
    post: object  # (impl) -> what to wait for, in order
    coming: torch.Tensor  # the next block's K and V
    want: float  # each element of what comes
    finish: object  # waits for the device


def make_inputs(session, case) -> State:
    """Return this rank's inputs, on its GPU where the case is for one."""
    ring, finish = _open(session, case)
    shape = case.shape
    heads = shape["nheads"], shape["nheads_k"], shape["headdim"], shape["headdim"]
    problem = Problem(1, *heads, case.dtype, False, shape["headdim"] ** -0.5, (-1, -1), 0.0)
    here = dict(dtype=getattr(torch, case.dtype), device=ring.device)
    q = torch.randn(1, shape["rows"], shape["nheads"], shape["headdim"], **here)
    kv = torch.full((2, 1, shape["keys"], shape["nheads_k"], shape["headdim"]), ring.rank, **here)
    runs = (np.array([[0, 0, 0, n, 1]]) for n in (shape["rows"], shape["keys"]))
    spans = tiles.make_spans(*runs, tiles.UNBOUNDED, tiles.UNBOUNDED)
    work = local.prepare(spans, problem, ring.device, ring.backend(problem), rows=shape["rows"])
    out, lse = local.make_state(q, shape["headdim"])

    def attend():
        local.step(q, *kv, out, lse, work, problem)

    size = ring.world_size
    moves = size > 1 or ring.transport == "nccl"  # which also sends to itself
    to, source = (ring.rank + 1) % size, (ring.rank - 1) % size
    coming = torch.full_like(kv, -1)
    if OTHERS[0] in case.impls:
        gloo, line = session.gloo(), plain.Line(ring, kv, coming)

    def post(impl):
        if impl == "compute" or not moves:
            return []
        if impl == "sockets_step":
            return line.post()
        if impl == "gloo_step":
            return [gloo.irecv(coming, src=source), gloo.isend(kv, dst=to)]
        return [ring.post([(to, kv)], [(source, coming)])]

    return State(ring, moves, attend, post, coming, float(source), finish)


def _open(session, case):
    if case.on_gpu and torch.cuda.is_available():
        ring = ringkern.init_ring(transport=case.transport, device="cuda:0")
        return ring, torch.cuda.synchronize
    return session.ring(), lambda: None


def prepare(state: State, impl: str) -> None:
    state.finish()


def call(state: State, impl: str, index: int) -> None:
    posted = state.post(impl)
    if impl != "transfer":
        state.attend()
    for message in posted:
        message.wait()
    state.finish()


def check(state: State, impl: str) -> dict:
    """Compare what came, then spoil it."""
    came = state.coming
    error = 0.0
    if impl != "compute" and state.moves:
        error = float((came.float() - state.want).abs().max())
    came.fill_(-1)
    return {"ok": error == 0, "max_err": error}


def bytes_sent(case) -> int:
    shape = case.shape
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return 2 * shape["keys"] * shape["nheads_k"] * shape["headdim"] * itemsize


OVERLAP = Operation("overlap", make_inputs, call, check, nothing, bytes_sent, prepare)
