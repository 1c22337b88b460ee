"""The C++ core: a ring of ranks that exchange bytes over TCP.

It knows ranks, bytes and pointers, not tensors: ringkern.transport is the layer above. Memory that a
pointer names belongs to the caller and must stay as it is until wait() returns or raises. Errors are
the classes of ringkern.errors; those below TransportError have `origin`, the rank where it began.
"""

from collections.abc import Sequence

__file__: str

class Listener:
    """Accepts connections on one numeric address and an ephemeral port, from now on.

    Args:
        host: a numeric IPv4 or IPv6 address of this machine; not 0.0.0.0 or ::.
    """

    def __init__(self, host: str) -> None: ...
    @property
    def address(self) -> str:
        """host:port, or [host]:port for IPv6: what the other ranks dial."""

    def close(self) -> None:
        """Stop listening. Not needed once a Tcp has taken it."""

class Tcp:
    """One rank of a ring over TCP. The links to both neighbours are up when it exists.

    Args:
        listener: taken over; listener.address is addresses[rank] as the other ranks see it.
        rank: 0 to len(addresses) - 1.
        addresses: of all ranks' listeners, by rank.
        ring_id: 16 bytes, the same on all ranks; tells this ring from others.
        secret: 32 bytes or more, the same on all ranks; proves that a peer belongs to the ring.
        timeout_s: of connecting, and of each exchange after it was posted.
        lanes: data sockets between two ranks, 1 to 16; the same on all ranks.
        checksum: check every payload by CRC-32C; the same on all ranks.

    Raises:
        ArgumentError: a value is not as above; nothing was sent.
        AuthenticationError: a peer does not know the secret.
        TransportTimeoutError: a neighbour was not there in time.
    """

    def __init__(
        self,
        listener: Listener,
        rank: int,
        addresses: Sequence[str],
        ring_id: bytes,
        secret: bytes,
        timeout_s: float,
        lanes: int = 1,
        checksum: bool = False,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def exchange(
        self,
        sends: Sequence[tuple[int, int, int]],
        recvs: Sequence[tuple[int, int, int]],
        stream: int = 0,
    ) -> int:
        """Post messages, each (peer, pointer, nbytes), and return a ticket for all of them.

        Between two ranks messages match in the order posted, and sizes must be equal on both ends.
        Zero bytes is a size like any other. A peer is any other rank.
        """

    def wait(self, ticket: int, stream: int = 0) -> tuple[int, int]:
        """Return (posted_ns, done_ns) of time.monotonic_ns() when the exchange is done.

        A ticket is waited for once. Ctrl-C interrupts it; the exchange goes on then.
        """

    def abort(self, reason: str) -> None:
        """Fail the ring on every rank, with this one as the origin. Any thread may call it."""

    def close(self) -> None:
        """Leave the ring. Again is fine, and so is after a failure; any thread may call it."""

    def stats(self) -> dict[str, int | list[int]]:
        """Return what has moved, payload only.

        bytes_sent, bytes_received, messages_sent, messages_received, rejected_connections;
        bytes_sent_by_peer and bytes_received_by_peer: lists by rank.
        """

def interfaces() -> list[tuple[str, str, bool, bool]]:
    """Return (name, numeric address, is_up, is_loopback), one for each address of this machine."""

def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of the bytes."""

def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """Return the HMAC-SHA256 of the bytes, 32 bytes."""
