"""Exchange of a GPU's memory over TCP: through pinned slots, and the ways to compare that with.

Where the case is not for a GPU the stub driver of the tests stands in: device memory is memory of
the process, and its copies are the CPU's, which costs cores that a copy engine would leave alone.
"""

from dataclasses import dataclass

import ringkern
import torch

from bench import transport
from bench.operation import Operation, nothing

# impl -> what it is
IMPLS = {
    "ringkern": "device memory through pinned slots, copies and wire at once",
    "host": "the same bytes between host memory: what the wire does",
    "copies": "as many bytes to the host and to the device, and nothing on the wire",
    "synchronous": "device memory by slices: copy, send and receive, copy, one after another",
}
SLICE = 64 << 10  # of Mooncake's TCP transport (notes on transports, section 1.1)


@dataclass
class State:
    """Buffers as in bench.transport, [calls, elements] each, on the device and on the host."""

    peers: tuple[int, int]  # the next rank, which gets, and the one before, which sends
    wire: object  # the link for host memory
    link: object  # the link for device memory
    finish: object  # waits for the device
    send: torch.Tensor
    recv: torch.Tensor
    host_send: torch.Tensor
    host_recv: torch.Tensor
    want: torch.Tensor
    stands_in: bool  # the stub driver does


def make_inputs(session, case) -> State:
    """Return this rank's buffers and its links."""
    rank, size = session.rank, session.world_size
    peers = (rank + 1) % size, (rank - 1) % size
    shape = (case.calls, case.shape["nbytes"] // 8)
    send, want = transport.pattern(rank, peers[0], shape), transport.pattern(peers[1], rank, shape)
    recv = torch.full_like(want, transport.SPOILED)
    wire = session.ring()
    on_gpu = case.on_gpu and torch.cuda.is_available()
    link, device, finish = _open_gpu() if on_gpu else _open_stub(wire)
    on_device = send.to(device), recv.to(device, copy=True)
    return State(peers, wire._link, link, finish, *on_device, send, recv, want, not on_gpu)


def _open_gpu():
    ring = ringkern.init_ring(transport="tcp", device="cuda:0")
    return ring._link, ring.device, torch.cuda.synchronize


def _open_stub(wire):
    from ringkern import _C

    from tests.stub_gpu import StubLink, stubs

    listener = _C.Listener("127.0.0.1")
    addresses = [each.decode() for each in wire.gather_bytes(listener.address.encode())]
    ring_id, secret = b"staged exchange ", b"only between two ranks of a bench"
    core = _C.join_tcp(listener, wire.rank, addresses, ring_id, secret, timeout_s=60.0)
    link = StubLink(_C.join_staged(core, 0, stubs().path), "tcp", addresses)
    return link, torch.device("cpu"), link.drain


def call(state: State, impl: str, index: int) -> None:
    if impl == "host":
        pair = state.host_send[index], state.host_recv[index]
        return _exchange(state.wire, state.peers, *pair)
    if impl == "copies":
        state.host_recv[index].copy_(state.send[index])
        state.recv[index].copy_(state.host_send[index])
        return state.finish()
    if impl == "ringkern":
        _exchange(state.link, state.peers, state.send[index], state.recv[index])
        return state.finish()
    step = SLICE // state.send.element_size()
    slices = zip(state.send[index].split(step), state.recv[index].split(step), strict=True)
    for out, into in slices:
        sent = out.to("cpu", copy=True)
        received = torch.empty_like(sent)
        _exchange(state.wire, state.peers, sent, received)
        into.copy_(received)
        state.finish()


def _exchange(link, peers, out: torch.Tensor, into: torch.Tensor) -> None:
    link.exchange([(peers[0], out)], [(peers[1], into)]).wait()


def check(state: State, impl: str) -> dict:
    """Compare every element of every timed buffer, then spoil it; stub_driver: 1 without a GPU."""
    recv = state.host_recv if impl == "host" else state.recv
    want = state.host_send if impl == "copies" else state.want
    state.finish()
    error = int((recv.cpu() - want).abs().max())
    recv.fill_(transport.SPOILED)
    return {"ok": error == 0, "max_err": float(error), "stub_driver": float(state.stands_in)}


def bytes_sent(case) -> int:
    return case.shape["nbytes"]


EXCHANGE_DEVICE = Operation("exchange_device", make_inputs, call, check, nothing, bytes_sent)
