"""What the host pays to post an exchange of a GPU's memory over NCCL: groups of messages to itself.

NCCL's calls do not block, so that they can be aborted; from 2.28 on each group then costs a thread
inside of NCCL, which only a GPU's machine can show. Where the case is not for one, the stub NCCL of
the tests stands in: what is left is ringkern's own part.
"""

from dataclasses import dataclass, field

import ringkern
import torch

from bench.operation import Operation, nothing


@dataclass
class State:
    """Messages of a rank to itself: row by row of `out` into `into`."""

    link: object
    finish: object  # waits for the device
    out: torch.Tensor
    into: torch.Tensor
    tickets: list = field(default_factory=list)


def why_not(case) -> str | None:
    """Return why the stub NCCL cannot stand in where it must; None where it can."""
    from tests.stub_gpu import why_no_stubs

    return None if _is_real(case) else why_no_stubs() or None


def _is_real(case) -> bool:
    return case.on_gpu and torch.cuda.is_available()


def make_inputs(session, case) -> State:
    """Return the rank's messages and a link over NCCL."""
    link, finish = _open_gpu() if _is_real(case) else _open_stub()
    shape = case.shape["messages"], case.shape["nbytes"] // 8
    out = torch.arange(shape[0] * shape[1], device=link.device).view(shape)
    return State(link, finish, out, torch.full_like(out, -1))


def _open_gpu():
    ring = ringkern.init_ring(transport="nccl", device="cuda:0")
    return ring._link, torch.cuda.synchronize


def _open_stub():
    from tests.stub_gpu import join_stub, listen

    link = join_stub(listen(1), 0, "nccl", 60.0)
    return link, link.drain


def prepare(state: State, impl: str) -> None:
    while state.tickets:
        state.tickets.pop().wait()
    state.finish()


def call(state: State, impl: str, index: int) -> None:
    sends, recvs = ([(0, row) for row in rows] for rows in (state.out, state.into))
    state.tickets.append(state.link.exchange(sends, recvs))


def check(state: State, impl: str) -> dict:
    """Compare what came, then spoil it."""
    prepare(state, impl)
    error = int((state.into - state.out).abs().max())
    state.into.fill_(-1)
    return {"ok": error == 0, "max_err": float(error)}


def bytes_sent(case) -> int:
    return case.shape["messages"] * case.shape["nbytes"]


POST = Operation("post", make_inputs, call, check, nothing, bytes_sent, prepare)
