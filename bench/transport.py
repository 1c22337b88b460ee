"""Exchange: every rank sends a buffer to every other and receives one, all at once."""

from dataclasses import dataclass

import torch

from bench.operation import Operation, nothing

# impl -> the environment that its ring is made under
RINGS = {
    "ringkern": {},
    "ringkern+lanes2": {"RINGKERN_LANES": "2"},
    "ringkern+lanes4": {"RINGKERN_LANES": "4"},
    "ringkern+crc32c": {"RINGKERN_CHECKSUM": "1"},
}
SPOILED = -1  # in no pattern


@dataclass
class Buffers:
    """One row per call of a repetition, so that what each call received can be checked."""

    post: dict  # impl -> function of (sends, recvs) that returns when they are through
    send: dict[int, torch.Tensor]  # peer -> [calls, elements]
    recv: dict[int, torch.Tensor]
    want: dict[int, torch.Tensor]
    rows: list[tuple[list, list]]  # by call: (sends, recvs), lists of (peer, row)


def make_inputs(session, case) -> Buffers:
    """Return buffers whose every element says who sent it to whom, and where it stands."""
    shape = (case.calls, case.shape["nbytes"] // 8)
    peers = [peer for peer in range(session.world_size) if peer != session.rank]
    send = {peer: pattern(session.rank, peer, shape) for peer in peers}
    want = {peer: pattern(peer, session.rank, shape) for peer in peers}
    recv = {peer: torch.full_like(rows, SPOILED) for peer, rows in want.items()}
    rows = [
        tuple([(p, x[i]) for p, x in side.items()] for side in (send, recv))
        for i in range(case.calls)
    ]
    post = {impl: _make_post(session, impl) for impl in case.impls}
    return Buffers(post, send, recv, want, rows)


def call(state: Buffers, impl: str, index: int) -> None:
    state.post[impl](*state.rows[index])


def check(state: Buffers, impl: str) -> dict:
    """Compare every element of every timed buffer, then spoil it."""
    error = 0
    for peer, rows in state.recv.items():
        if not torch.equal(rows, state.want[peer]):
            error = max(error, int((rows - state.want[peer]).abs().max()))
        rows.fill_(SPOILED)
    return {"ok": error == 0, "max_err": float(error)}


def bytes_sent(case) -> int:
    return case.shape["nbytes"] * (case.world_size - 1)


def pattern(sender: int, receiver: int, shape) -> torch.Tensor:
    """Return what `sender` sends to `receiver`: every element says so, and where it stands."""
    place = torch.arange(shape[0] * shape[1]).view(shape)
    return place.mul_(131).add_(sender * 1_000_003 + receiver * 10_007)


def _make_post(session, impl: str):
    if impl == "gloo":
        dist = session.gloo()

        def post(sends, recvs):
            works = [dist.irecv(x, src=peer) for peer, x in recvs]
            works += [dist.isend(x, dst=peer) for peer, x in sends]
            for work in works:
                work.wait()

        return post
    link = session.ring(**RINGS[impl])._link  # the transport itself, as ring.py uses it

    def post(sends, recvs):
        link.exchange(sends, recvs).wait()

    return post


EXCHANGE = Operation("exchange", make_inputs, call, check, nothing, bytes_sent)
