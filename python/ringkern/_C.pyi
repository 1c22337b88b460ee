"""The C++ core: a ring of ranks that exchange bytes over TCP or NCCL.

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
        """Stop listening. Not needed once a ring has taken it."""

class Link:
    """One rank of a ring, as join_tcp() and join_nccl() make it."""

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
        Zero bytes is a size like any other. A peer is any other rank; over NCCL also this one.

        Args:
            stream: a CUDA stream, behind whose work device memory is read and written; for host
                memory it is ignored.
        """

    def wait(self, ticket: int, stream: int = 0) -> tuple[int, int]:
        """Return (posted_ns, done_ns) of time.monotonic_ns() when the exchange is done.

        Over NCCL: make the stream wait for it and return at once; done_ns is 0 if it is not done.
        A ticket is waited for once. Ctrl-C interrupts it; the exchange goes on then.
        """

    def settled(self) -> int:
        """Return the newest ticket up to which no exchange touches device memory any more."""

    def begin_run(self, stream: int) -> int:
        """Have what is put on the stream up to end_run() watched, as exchanges are.

        For runs of a CUDA graph with exchanges in it. Returns what end_run() takes.

        Raises:
            UnsupportedError: this ring's exchanges cannot be part of graphs.
        """

    def end_run(self, run: int, stream: int) -> None:
        """End what begin_run() began."""

    def host(self) -> Link:
        """Return the same ring for host memory. Only of a ring of GPUs; lives as long as that."""

    def abort(self, reason: str) -> None:
        """Fail the ring on every rank, with this one as the origin. Any thread may call it."""

    def close(self) -> None:
        """Leave the ring. Again is fine, and so is after a failure; any thread may call it."""

    def legs(self) -> list[tuple[str, int, int, int, int]]:
        """Return what pieces of device memory went through since the last call, oldest first.

        Each (kind, peer, nbytes, begun_ns, ended_ns), of time.monotonic_ns(); kind is "to_host" or
        "to_device", a copy, or "out" or "in", the wire. Recorded from the first call on, no more
        than the latest 131072. None over NCCL.
        """

    def stats(self) -> dict[str, int | list[int]]:
        """Return what has moved, payload only.

        bytes_sent, bytes_received, messages_sent, messages_received, rejected_connections;
        bytes_sent_by_peer and bytes_received_by_peer: lists by rank.
        """

def join_tcp(
    listener: Listener,
    rank: int,
    addresses: Sequence[str],
    ring_id: bytes,
    secret: bytes,
    timeout_s: float,
    lanes: int = 1,
    checksum: bool = False,
) -> Link:
    """Join a ring over TCP; return when the links to both neighbours are up.

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

def join_nccl(
    control: Link,
    device: int,
    nccl_path: str = "",
    cuda_path: str = "libcuda.so.1",
    *,
    timeout_s: float,
    control_timeout_s: float,
    min_ctas: int = 0,
    max_ctas: int = 0,
    channels_per_net_peer: int = 0,
) -> Link:
    """Join a ring over NCCL, for device memory; return when all ranks have.

    Args:
        control: a ring of the same ranks over TCP, taken over.
        device: number of the GPU, as CUDA counts those that this process sees.
        nccl_path, cuda_path: as nccl_library() and cuda_driver() take them.
        timeout_s: of connecting, and of each exchange from when the GPU could begin it.
        control_timeout_s: that of `control`; what finding the rank at fault takes on top.
        min_ctas, max_ctas: thread blocks that NCCL takes from the GPU, up to 64; 0: NCCL's choice.
        channels_per_net_peer: channels for a peer on another host, up to 64; 0: NCCL's choice.
            Needs NCCL 2.28.3.

    Raises:
        ArgumentError: a value is not as above; nothing was sent.
        UnsupportedError: no NCCL or driver, or one that is too old.
        TransportError: a rank is gone, late, or cannot.
    """

def join_staged(wire: Link, device: int, cuda_path: str = "libcuda.so.1") -> Link:
    """Return a ring for device memory over one for host memory, through pinned buffers.

    Args:
        wire: taken over.
        device, cuda_path: as join_nccl() takes them.

    Raises:
        UnsupportedError: no driver, or a GPU that cannot be used.
    """

def nccl_library(path: str = "") -> tuple[str, int]:
    """Return NCCL's (path, version), 22809 for 2.28.9: the copy that this process has loaded.

    Args:
        path: a library to load where there is none.

    Raises:
        UnsupportedError: there is none, it is too old, or it lacks a function.
    """

def cuda_driver(path: str = "libcuda.so.1") -> tuple[str, int]:
    """Return the CUDA driver's (path, version), 13000 for CUDA 13.0.

    Raises:
        UnsupportedError: there is no driver, no GPU, or it lacks a function.
    """

def interfaces() -> list[tuple[str, str, bool, bool]]:
    """Return (name, numeric address, is_up, is_loopback), one for each address of this machine."""

def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of the bytes."""

def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """Return the HMAC-SHA256 of the bytes, 32 bytes."""
