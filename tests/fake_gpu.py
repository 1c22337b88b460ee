"""A GPU whose tensors have no data: what the host does for it, on a machine that has none.

Tensors on DEVICE are torch's fake ones, of any size, and kernels do nothing. An operation for which
the host would wait fails: to ask what is in a tensor, or to copy other than from and to pinned
memory behind the stream.
"""

import contextlib
import ctypes
import itertools
import pathlib
import types

import pytest
import torch
from ringkern import backend, local
from ringkern.link import DeviceLink
from ringkern.ring import Ring
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
FACTS = types.SimpleNamespace(multi_processor_count=132)
COPIES = torch.ops.aten.copy_, torch.ops.aten._to_copy
CUDA, META = 1, 14  # of c10::DeviceType


class HostWaits(AssertionError):
    """The host would wait for the GPU."""


class FakeEvent:
    """An event that is passed when the clock stands at its time."""

    clock_ms, waits = 0.0, 0
    ticks = itertools.count()

    def __init__(self, enable_timing=False):
        self.at_ms = None

    def record(self, stream):
        self.at_ms = float(next(FakeEvent.ticks)) * stream.tick_ms

    def query(self):
        return FakeEvent.clock_ms >= self.at_ms

    def synchronize(self):
        FakeEvent.waits += 1
        FakeEvent.clock_ms = max(FakeEvent.clock_ms, self.at_ms)

    def elapsed_time(self, other):
        return other.at_ms - self.at_ms


class FakeStream:
    tick_ms, cuda_stream = 1.0, 7

    def __init__(self, device=None):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)


def pretend_cuda(monkeypatch) -> FakeStream:
    """Have torch.cuda with such streams and events; return the current stream."""
    current = FakeStream()
    FakeEvent.ticks, FakeEvent.clock_ms, FakeEvent.waits = itertools.count(), 0.0, 0
    for name, value in dict(
        Event=FakeEvent,
        Stream=FakeStream,
        current_stream=lambda device=None: current,
        device=lambda device: contextlib.nullcontext(),
        stream=lambda stream: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
        synchronize=lambda device=None: None,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return current


class FakeCore:
    """A rank's end of a ring over NCCL, of which the others are not there. All goes well."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self.posted = []  # (sends, recvs) of each exchange
        self.runs = 0  # of graphs

    def host(self):
        return self

    def exchange(self, sends, recvs, stream):
        self.posted.append((sends, recvs))
        return len(self.posted)

    def wait(self, number, stream):
        return 0, 0

    def settled(self):
        return len(self.posted)

    def begin_run(self, stream):
        self.runs += 1
        return self.runs

    def end_run(self, number, stream):
        assert number == self.runs

    def legs(self):
        return []

    def stats(self):
        return {}

    def abort(self, reason):
        pass

    def close(self):
        pass


def make_ring(rank: int, world_size: int, hardware) -> Ring:
    """Return a rank of a ring, the only one there."""
    link = DeviceLink(FakeCore(rank, world_size), "nccl", [""] * world_size, DEVICE)
    return Ring(link, DEVICE, hardware)


class _Watch(TorchDispatchMode):
    """Refuses operations for which the host would wait."""

    def __init__(self):
        super().__init__()
        self._pinned = []

    def pin(self, x):
        self._pinned.append(x.clone())
        return self._pinned[-1]

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        every = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        on_host = [x for x in every if x.device.type == "cpu" and x.dim()]
        if on_host and any(x.device.type == "cuda" for x in every):
            behind = kwargs.get("non_blocking") or args[2:] == (True,)
            pinned = all(any(x is y for y in self._pinned) for x in on_host)
            if not (func.overloadpacket in COPIES and behind and pinned):
                raise HostWaits(f"{func} between the host and the GPU")
        return result


@contextlib.contextmanager
def fake_gpu():
    """Have a GPU as DEVICE; return the names of kernels, to which each launch adds its own."""
    from ringkern.kernels import target
    from triton.runtime import interpreter

    launched: list[str] = []
    watch = _Watch()
    _lend_guard()
    with pytest.MonkeyPatch.context() as patch:
        pretend_cuda(patch)
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: FACTS)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: watch.pin(x))
        patch.setattr(target, "INTERPRET", False)  # so that calls are those of a GPU
        run = interpreter.InterpretedFunction
        patch.setattr(run, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
        with _nothing_known(), FakeTensorMode(allow_non_fake_inputs=True), watch:
            yield launched


@contextlib.contextmanager
def _nothing_known():
    """Forget before and after what is known of devices."""
    from ringkern.kernels import target

    known = backend.why_not_triton, target.arch, local._num_sms
    for cached in known:
        cached.cache_clear()
    yield
    for cached in known:
        cached.cache_clear()


def _lend_guard() -> None:
    """Let a torch without CUDA take it for a device: its guard is that of "meta", which does nothing."""
    library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, name)
    guards[CUDA] = guards[CUDA] or guards[META]
