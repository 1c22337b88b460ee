"""A ring's connections with a tensor's face: the extension's pointers and sizes, and who owns them."""

import atexit
import contextlib
import itertools
import time
import weakref

import torch

from ringkern.errors import check


class Ticket:
    """A posted exchange. Its tensors stay alive until it is done, also if the ticket is dropped."""

    def __init__(self, link, number: int):
        self._link, self._number = link, number

    def wait(self) -> tuple[int, int]:
        """Return when every message is through: (posted, done), time.monotonic_ns() both.

        On a ring of GPUs the current stream waits instead, over TCP after the host has waited for
        what comes and goes. The times are when the host asked, or, for a trace, marks of
        DeviceStats.

        Raises:
            TransportError: the ring failed; the same first error on every call from then on.
        """
        return self._link.wait(self._number)


class Link:
    """Ranks as processes, for host memory. Wraps a _C.Link; the contract is csrc/transport.h.

    Attributes:
        name: "tcp" or "nccl".
        addresses: of the ranks' listeners, "host:port".
        order: the ranks as the ring goes round; None: by number.
        device: where the memory is that it moves.
        host: the same ring for host memory: itself, or beside a ring of GPUs.
    """

    device = torch.device("cpu")
    order: tuple[int, ...] | None = None

    def __init__(self, core, name: str, addresses: list[str]):
        self._core, self.name, self.addresses = core, name, addresses
        self.rank, self.world_size = core.rank, core.world_size
        self._kept: dict[int, object] = {}  # by ticket: what its messages lie in

    @property
    def host(self) -> "Link":
        return self

    def exchange(self, sends, recvs) -> Ticket:
        """Post messages: lists of (peer, contiguous tensor). All progress together."""
        for _, x in (*sends, *recvs):
            check(x.device == self.device, "tensor", f"on {self.device}, as the ring", x.device)
            check(x.is_contiguous(), "tensor", "contiguous", f"strides {x.stride()}")
        raw = [
            [(peer, x.data_ptr(), x.numel() * x.element_size()) for peer, x in side]
            for side in (sends, recvs)
        ]
        return self.post(*raw, (sends, recvs))

    def post(self, sends, recvs, keep) -> Ticket:
        """Post messages: lists of (peer, pointer, nbytes), into what `keep` keeps alive."""
        number = self._core.exchange(sends, recvs)
        self._kept[number] = keep
        return Ticket(self, number)

    def wait(self, number: int) -> tuple[int, int]:
        try:
            return self._core.wait(number)
        except KeyboardInterrupt:
            self.abort(f"rank {self.rank} was interrupted")
            raise
        finally:
            # Done, or failed: then no thread touches the buffers any more.
            self._kept.pop(number, None)

    def abort(self, reason: str) -> None:
        """Fail every pending and later call, on every rank, with this reason."""
        self._core.abort(reason)

    def close(self) -> None:
        self._core.close()
        self._kept.clear()

    def stats(self) -> dict:
        return self._core.stats()


class DeviceLink(Link):
    """Ranks as processes, for the memory of each one's GPU: on the caller's current stream.

    Buffers stay alive until the GPU has done with them, which is noticed at the next call.
    """

    def __init__(self, core, name: str, addresses: list[str], device: torch.device):
        super().__init__(core, name, addresses)
        self.device, self._host = device, Link(core.host(), name, addresses)
        self._posted: dict[int, object] = {}
        self._clock = None

    @property
    def host(self) -> Link:
        return self._host

    def legs(self) -> list[tuple[str, int, int, int, int]]:
        """Return (kind, peer, nbytes, begun_ns, ended_ns) of pieces since the last call, for traces.

        Kinds: copies "to_host" and "to_device", and "out" and "in" on the wire. Recorded from the
        first call on; none over NCCL.
        """
        return self._core.legs()

    def time_by(self, clock) -> None:
        """Have exchanges timed by the GPU from now on, with what DeviceStats offers for it."""
        self._clock = clock

    def stream(self) -> int:
        """Return the handle of the stream that calls are made on."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def post(self, sends, recvs, keep) -> Ticket:
        self._let_go()
        if self._clock:
            posted = self._clock.now()
        number = self._core.exchange(sends, recvs, self.stream())
        if self._clock:
            self._posted[number] = posted
        self._kept[number] = keep
        return Ticket(self, number)

    def wait(self, number: int) -> tuple:
        try:
            if not self._clock:
                posted_ns, done_ns = self._core.wait(number, self.stream())
                return posted_ns, done_ns or time.monotonic_ns()  # the GPU comes to it later
            with self._clock.aside() as stream:
                self._core.wait(number, stream)
                return self._posted.pop(number), self._clock.now()
        except KeyboardInterrupt:
            self.abort(f"rank {self.rank} was interrupted")
            raise

    @contextlib.contextmanager
    def run_of_graph(self):
        """Have a graph's run watched that is put on the current stream: by the ring's deadline."""
        self._let_go()
        stream = self.stream()
        run = self._core.begin_run(stream)
        try:
            yield
        finally:
            self._core.end_run(run, stream)

    def close(self) -> None:
        self._core.close()
        self._let_go()
        # Where the GPU did not even end what a failed ring left there, nobody may have its memory.
        _lost.extend(self._kept.values())
        self._kept.clear()

    def _let_go(self) -> None:
        """Forget the buffers of exchanges that are over on the GPU."""
        settled = self._core.settled()
        for number in list(itertools.takewhile(lambda n: n <= settled, self._kept)):
            del self._kept[number]


_lost: list = []
_open: weakref.WeakSet = weakref.WeakSet()


def close_at_exit(link: Link) -> None:
    """Have the link closed when the program ends, if nobody does before."""
    _open.add(link)


@atexit.register
def _close_all():
    for link in list(_open):
        link.close()
