"""Rings over the stub NCCL and the stub driver, whose device memory is this process's memory."""

import ctypes
import functools
import hashlib
import os
import pathlib
import subprocess
import time
from typing import NamedTuple

import torch
from ringkern import _C
from ringkern.link import DeviceLink
from ringkern.ring import Ring

SOURCES = pathlib.Path(__file__).parent / "cpp"
BUILD = pathlib.Path(__file__).parents[1] / "build"
LIMIT_S = 20.0


class Stubs(NamedTuple):
    """The stubs as one library, and the file that it was loaded from."""

    call: ctypes.CDLL
    path: str


@functools.cache
def stubs() -> Stubs:
    """Return the stubs, compiled once for their sources: processes find what another compiled."""
    names = ("stub_cuda.cpp", "stub_nccl.cpp", "stub_python.cpp")
    names += ("stub_gpu.h", "stub_driver.h", "stub_comm.h")
    text = b"".join((SOURCES / name).read_bytes() for name in names)
    path = BUILD / f"stubs-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared"]
        command += ["-fvisibility=hidden", "-pthread", "-o", str(made)]
        command += [str(SOURCES / name) for name in names if name.endswith(".cpp")]
        subprocess.run(command, check=True)
        made.replace(path)
    call = ctypes.CDLL(str(path))
    for name in ("stub_destroy_stream", "stub_drained"):
        getattr(call, name).argtypes = [ctypes.c_size_t]
    call.stub_make_stream.restype = ctypes.c_size_t
    return Stubs(call, str(path))


def why_no_stubs() -> str:
    """Return why the stub NCCL cannot be used: a real one is loaded, and comes first."""
    with open("/proc/self/maps") as maps:
        return "a real NCCL is loaded" if "libnccl.so" in maps.read() else ""


class StubLink(DeviceLink):
    """A DeviceLink on a stream of the stub driver. Tensors of the CPU stand for a GPU's."""

    def __init__(self, core, name, addresses):
        super().__init__(core, name, addresses, torch.device("cpu"))
        self._stream = stubs().call.stub_make_stream()

    def stream(self) -> int:
        return self._stream

    def wait(self, number: int) -> tuple:
        times = super().wait(number)
        self.drain()
        return times

    def drain(self) -> None:
        """Return when the stream is empty, as computing by the host needs its data."""
        end = time.monotonic() + LIMIT_S
        while not stubs().call.stub_drained(self._stream):
            assert time.monotonic() < end, "the stream never ended"


def listen(world_size: int) -> list:
    """Return a listener for each rank, over fresh stubs."""
    stubs().call.stub_reset()
    return [_C.Listener("127.0.0.1") for _ in range(world_size)]


def join_stub(listeners: list, rank: int, transport: str, timeout_s: float) -> StubLink:
    """Return a rank's link, once all ranks have come; transport as run_stub() takes it."""
    addresses, path = [listener.address for listener in listeners], stubs().path
    wire = _C.join_tcp(listeners[rank], rank, addresses, b"r" * 16, b"s" * 32, timeout_s=timeout_s)
    if transport == "nccl":
        half = dict(timeout_s=timeout_s / 2, control_timeout_s=timeout_s / 2)
        core = _C.join_nccl(wire, 0, path, path, **half)
    else:
        core = _C.join_staged(wire, 0, path)
    return StubLink(core, transport, addresses)


def run_stub(fn, world_size: int, *args, transport="nccl", timeout_s: float = 20.0) -> list:
    """Return fn(ring, *args) of each rank, or raise what the first rank to fail raised.

    transport: "nccl", or "tcp" for device memory that goes through pinned memory.
    """
    # Here, as benchmarks use the stubs too, from outside of tests.
    from threads import HARDWARE, each_in_a_thread

    listeners = listen(world_size)

    def main(rank):
        link = join_stub(listeners, rank, transport, timeout_s)
        with Ring(link, torch.device("cpu"), HARDWARE) as ring:
            return fn(ring, *args)

    values = each_in_a_thread(main, world_size)
    assert stubs().call.stub_violations() == 0
    return values
