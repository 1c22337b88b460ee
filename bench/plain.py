"""Messages to the next rank by blocking sockets: what the kernel takes of a step, and no more.

A thread only sends, another only receives, each by as few calls as it can.
"""

import os
import queue
import select
import socket
import threading

import torch

LOW_WATER = 256 << 10  # bytes to wake for


class Line:
    """From this rank to the next and from the one before, in messages of one size.

    Args:
        ring: to tell each other where to connect.
        here: sent, contiguous.
        coming: received into, contiguous.
    """

    def __init__(self, ring, here: torch.Tensor, coming: torch.Tensor):
        with socket.create_server((os.environ.get("RINGKERN_HOST", "127.0.0.1"), 0)) as server:
            self._to = socket.create_connection(_next_address(ring, server.getsockname()))
            self._source, _ = server.accept()
        self._to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        here, coming = (x.view(torch.uint8).numpy().data.cast("B") for x in (here, coming))
        self._jobs = [Job(lambda: self._to.sendall(here)), Job(lambda: self._receive(coming))]

    def _receive(self, room: memoryview) -> None:
        while room:
            self._source.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(len(room), LOW_WATER)
            )
            select.select([self._source], [], [])  # recv itself would wait for as much once more
            room = room[self._source.recv_into(room) :]

    def post(self) -> list["Job"]:
        """Begin a message each way; return what to wait for."""
        for job in self._jobs:
            job.begin()
        return self._jobs


class Job:
    """A function that a thread of its own runs whenever it is told to, while the process lives."""

    def __init__(self, work):
        self._work, self._begun, self._done = work, queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._begun.get()
            self._work()
            self._done.put(None)

    def begin(self) -> None:
        self._begun.put(None)

    def wait(self) -> None:
        self._done.get()


def _next_address(ring, mine: tuple[str, int]) -> tuple[str, int]:
    """Return where the next rank listens, as it told."""
    host = socket.inet_aton(mine[0])
    here = torch.tensor([*host, mine[1]])
    there = torch.zeros_like(here)
    size = ring.world_size
    next_one, before = (ring.rank + 1) % size, (ring.rank - 1) % size
    ring.post([(before, here)], [(next_one, there)]).wait()
    *host, port = there.tolist()
    return socket.inet_ntoa(bytes(host)), port
