"""Ranks as threads of one process: the transport contract without sockets, for fast tests."""

import collections
import ctypes
import threading
import time

from ringkern.errors import ArgumentError, ProtocolError, TransportError, TransportTimeoutError
from ringkern.errors import check as check_argument


class LocalGroup:
    """A world of threads. Hand group[rank] to init_ring() in the thread that is that rank.

    group = ringkern.LocalGroup(3)
    # in each of 3 threads:
    ring = ringkern.init_ring(group[rank], transport="local")
    """

    class Member:
        """One rank's place in a LocalGroup."""

        def __init__(self, world: "LocalGroup", rank: int):
            self.world, self.rank = world, rank

    def __init__(self, world_size: int):
        check_argument(world_size >= 1, "world_size", "at least 1", world_size)
        self.world_size = world_size
        self.changed = threading.Condition()
        self.posted = collections.defaultdict(collections.deque)  # (src, dst, is_send) -> messages
        self.closed = set()  # ranks that left
        self.failure = None  # (error class, origin, text): the first one, for everyone

    def __getitem__(self, rank: int) -> Member:
        check_argument(0 <= rank < self.world_size, "rank", f"0 to {self.world_size - 1}", rank)
        return LocalGroup.Member(self, rank)


class _Message:
    """One side of one message: where its bytes are, and the ticket it belongs to."""

    def __init__(self, pointer, nbytes, keep, ticket):
        self.pointer, self.nbytes, self.keep, self.ticket = pointer, nbytes, keep, ticket


class LocalTicket:
    """A posted exchange between threads."""

    def __init__(self, transport, peers):
        self._transport = transport
        self.pending = collections.Counter(peers)
        self.posted_ns = self.done_ns = time.monotonic_ns()

    def done(self, peer: int) -> None:
        self.pending[peer] -= 1
        self.done_ns = time.monotonic_ns()

    def wait(self) -> tuple[int, int]:
        """Return when every message is through: (posted, done), time.monotonic_ns() both."""
        return self._transport.wait(self)


class LocalTransport:
    """One rank's end of a LocalGroup."""

    name = "local"
    order = None

    def __init__(self, member, timeout_s: float):
        member = LocalGroup(1)[0] if member is None else member
        want = "a LocalGroup's member, as LocalGroup(world_size)[rank]"
        ok = isinstance(member, LocalGroup.Member)
        check_argument(ok, "group", want, type(member).__name__)
        self._world, self.rank = member.world, member.rank
        self.world_size = self._world.world_size
        self._timeout_s = timeout_s
        self._moved = collections.Counter(
            bytes_sent=0, bytes_received=0, messages_sent=0, messages_received=0
        )
        self._closed = False

    @property
    def host(self) -> "LocalTransport":
        """The ring for host memory: this one."""
        return self

    def exchange(self, sends, recvs) -> LocalTicket:
        """Post messages: lists of (peer, contiguous tensor). See Link.exchange()."""
        for _, tensor in (*sends, *recvs):
            check_argument(tensor.is_contiguous(), "tensor", "contiguous", "strided")
        raw = [
            [(peer, x.data_ptr(), x.numel() * x.element_size()) for peer, x in side]
            for side in (sends, recvs)
        ]
        return self.post(*raw, (sends, recvs))

    def post(self, sends, recvs, keep) -> LocalTicket:
        """Post messages: lists of (peer, pointer, nbytes), into what `keep` keeps alive."""
        peers = [peer for peer, _, _ in (*sends, *recvs)]
        for peer in peers:
            ok = 0 <= peer < self.world_size and peer != self.rank
            check_argument(ok, "peer", f"another rank of {self.world_size}", peer)
        ticket = LocalTicket(self, peers)
        with self._world.changed:
            self._raise_if_failed()
            for gone in sorted(self._world.closed & set(peers)):
                self._fail(TransportError, gone, "it closed its ring before this exchange")
                self._raise_if_failed()
            for way, messages in (("sent", sends), ("received", recvs)):
                for peer, pointer, nbytes in messages:
                    sends_it = way == "sent"
                    edge = (self.rank, peer) if sends_it else (peer, self.rank)
                    self._post(edge, sends_it, _Message(pointer, nbytes, keep, ticket))
                    self._moved[f"bytes_{way}"] += nbytes
                    self._moved[f"messages_{way}"] += 1
            self._world.changed.notify_all()
        return ticket

    def _post(self, edge, is_send: bool, message: _Message) -> None:
        waiting = self._world.posted[(*edge, not is_send)]
        if not waiting:
            self._world.posted[(*edge, is_send)].append(message)
            return
        other = waiting.popleft()
        send, recv = (message, other) if is_send else (other, message)
        if send.nbytes != recv.nbytes:
            src, dst = edge
            self._fail(
                ProtocolError,
                src if is_send else dst,
                f"rank {src} sends {send.nbytes} bytes and rank {dst} expects "
                f"{recv.nbytes}. Do all ranks call with the same arguments?",
            )
            return
        ctypes.memmove(recv.pointer, send.pointer, send.nbytes)
        send.ticket.done(edge[1])
        recv.ticket.done(edge[0])

    def wait(self, ticket: LocalTicket) -> tuple[int, int]:
        with self._world.changed:
            deadline = ticket.posted_ns + self._timeout_s * 1e9
            while +ticket.pending:
                self._raise_if_failed()
                left_s = (deadline - time.monotonic_ns()) / 1e9
                if left_s <= 0:
                    late = min(+ticket.pending)
                    self._fail(
                        TransportTimeoutError,
                        late,
                        f"rank {self.rank} of {self.world_size}: rank {late} has not posted its "
                        f"side of an exchange in {self._timeout_s:g} s",
                    )
                else:
                    self._world.changed.wait(left_s)
        return ticket.posted_ns, ticket.done_ns

    def abort(self, reason: str) -> None:
        """Fail every pending and later call, on every rank, with this reason."""
        with self._world.changed:
            self._fail(TransportError, self.rank, reason)

    def close(self) -> None:
        """Leave. Another rank's wait for this one fails."""
        with self._world.changed:
            if self._closed:
                return
            self._closed = True
            self._world.closed.add(self.rank)
            pending = any(
                queue and self.rank in edge[:2] for edge, queue in self._world.posted.items()
            )
            if pending:
                self._fail(TransportError, self.rank, "it closed its ring with messages pending")

    def stats(self) -> dict:
        return dict(self._moved)

    def _fail(self, kind, origin: int, text: str) -> None:
        if self._world.failure is None:
            self._world.failure = (kind, origin, f"rank {origin} failed: {text}")
        self._world.changed.notify_all()

    def _raise_if_failed(self) -> None:
        if self._closed:
            raise ArgumentError("ring: want an open ring, got a closed one. Make a new ring.")
        if self._world.failure is not None:
            kind, origin, text = self._world.failure
            error = kind(text)
            error.origin = origin
            raise error
