"""Rings over the stub NCCL and the stub driver, whose device memory is this process's memory."""

import atexit
import ctypes
import functools
import os
import pathlib
import subprocess
import tempfile
import threading
import time
import traceback
from typing import NamedTuple

import torch
from ringkern import _C
from ringkern.link import DeviceLink
from ringkern.ring import Ring
from threads import HARDWARE

SOURCES = pathlib.Path(__file__).parent / "cpp"
LIMIT_S = 20.0


class Stubs(NamedTuple):
    """The stubs as one library, and the file that it was loaded from."""

    call: ctypes.CDLL
    path: str


@functools.cache
def stubs() -> Stubs:
    """Return the stubs, compiled once for the process."""
    folder = tempfile.TemporaryDirectory(prefix="ringkern-stubs-")
    atexit.register(folder.cleanup)
    path = os.path.join(folder.name, "stub_gpu.so")
    names = ("stub_cuda.cpp", "stub_nccl.cpp", "stub_python.cpp")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", "-pthread", "-o", path]
    subprocess.run([*command, *(str(SOURCES / name) for name in names)], check=True)
    call = ctypes.CDLL(path)
    for name in ("stub_destroy_stream", "stub_drained"):
        getattr(call, name).argtypes = [ctypes.c_size_t]
    call.stub_make_stream.restype = ctypes.c_size_t
    return Stubs(call, path)


class StubLink(DeviceLink):
    """A DeviceLink on a stream of the stub driver. Tensors of the CPU stand for a GPU's."""

    device_type = "cpu"

    def __init__(self, core, addresses):
        super().__init__(core, "nccl", addresses, torch.device("cpu"))
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


def run_stub_nccl(fn, world_size: int, *args, timeout_s: float = 20.0) -> list:
    """Return fn(ring, *args) of each rank, or raise what the first rank to fail raised."""
    call, path = stubs()
    call.stub_reset()
    listeners = [_C.Listener("127.0.0.1") for _ in range(world_size)]
    addresses = [listener.address for listener in listeners]
    values, errors = [None] * world_size, []

    def main(rank):
        try:
            wire = _C.join_tcp(
                listeners[rank], rank, addresses, b"r" * 16, b"s" * 32, timeout_s=timeout_s
            )
            half = dict(timeout_s=timeout_s / 2, control_timeout_s=timeout_s / 2)
            core = _C.join_nccl(wire, 0, path, path, **half)
            link = StubLink(core, addresses)
            with Ring(link, torch.device("cpu"), HARDWARE) as ring:
                values[rank] = fn(ring, *args)
        except BaseException as error:
            errors.append((rank, error, traceback.format_exc()))

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error, text = errors[0]
        raise AssertionError(f"rank {rank} of {world_size}:\n{text}") from error
    assert call.stub_violations() == 0
    return values
