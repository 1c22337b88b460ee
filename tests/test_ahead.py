"""The host launches ahead of a GPU: nothing in a layer's call waits for it, or looks at each token.

On a GPU test_ring_gpu.py sees the same by torch.cuda.set_sync_debug_mode().
"""

import collections
import contextlib
import functools
import itertools
import pathlib
import sys
import types

import accelerator
import numpy as np
import pytest
import ringkern
import torch
from fake_gpu import DEVICE, FakeEvent, HostWaits, fake_gpu, make_ring
from ringkern.errors import ArgumentError
from ringkern.schedule import METHODS
from ringkern.upload import upload
from threads import HARDWARE
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

pytestmark = pytest.mark.skipif(accelerator.ON_GPU, reason="there is a GPU, which shows it itself")

SOURCES = str(pathlib.Path(ringkern.__file__).parent)
EACH_METHOD = pytest.mark.parametrize("method", [*METHODS, "auto"])
LENGTHS = {"a": 1021, "b": 3, "c": 130}


class Session:
    """A cache of two layers on the GPU, and calls in each of them."""

    def __init__(self, ring, dtype=torch.bfloat16, num_pages=64):
        self.ring, self.dtype = ring, dtype
        self.placement = ringkern.Placement(ring.world_size)
        self.cache = ringkern.KVCache(
            ring, self.placement, num_layers=2, nheads_k=2, headdim=128, dtype=dtype,
            num_pages=num_pages, page_size=64,
        )  # fmt: skip

    def draw(self, count):
        here = dict(dtype=self.dtype, device=DEVICE)
        return [torch.empty(count, heads, 128, **here) for heads in (8, 2, 2)]

    def step(self, plan, method, layers=(0, 1)):
        rows = plan.num_tokens(self.ring.rank)
        for layer in layers:
            given = dict(cache=self.cache, layer=layer, method=method, return_lse=True)
            out, lse = self.ring.attn(*self.draw(rows), plan, **given)
            assert out.shape == (rows, 8, 128) and out.dtype == self.dtype
            assert lse.shape == (8, rows) and out.device == lse.device == DEVICE
        return out


@EACH_METHOD
@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_no_call_waits_for_the_gpu(world_size, method):
    """Nor the first one of a plan, whose tables go to the GPU."""
    dtypes = {3: [torch.float32, torch.bfloat16]}.get(world_size, [torch.bfloat16])
    for rank, dtype in itertools.product(range(world_size), dtypes):
        with fake_gpu() as launched, make_ring(rank, world_size, HARDWARE) as ring:
            session = Session(ring, dtype)
            session.step(session.placement.prefill(LENGTHS), method)
            session.step(session.placement.prefill({"b": 77, "d": 1}), method)
            session.placement.fork("a", "e")
            session.placement.truncate("a", 1000)
            for _ in range(2):
                plan = session.placement.decode([*LENGTHS, "e"])
                out = session.step(plan, method)
            assert {"_step", "_copy_rows"} <= set(launched)
            assert ring.unshard(out, plan).shape == (4, 8, 128)
            x = torch.empty(plan.total, 3, device=DEVICE)
            assert plan.shard(x, rank).shape == (plan.num_tokens(rank), 3)
            assert ring._link._core.posted or world_size == 1
            assert ring.stats()["bytes_sent"] == ring.stats()["bytes_planned"]


@EACH_METHOD
def test_graphs_do_not_wait(monkeypatch, method):
    """Neither while they are captured nor when they run, with the tables of another plan."""
    replays = []

    @contextlib.contextmanager
    def capture(graph, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    new = lambda: types.SimpleNamespace(replay=lambda: replays.append(1))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    for rank in range(3):
        with fake_gpu() as launched, make_ring(rank, 3, HARDWARE) as ring:
            session = Session(ring)
            session.step(session.placement.prefill(LENGTHS), method)
            graphs = ringkern.DecodeGraphs(
                ring, session.cache, functools.partial(session.step, method=method)
            )
            for number in range(12):
                launched.clear()
                graphs.run(session.placement.decode(list(LENGTHS)))
                assert bool(launched) == (number < 2), "a replay launches nothing by itself"
            assert ring._link._core.runs == 11
    assert len(replays) == 33


def test_calls_on_one_gpu_do_not_wait():
    with fake_gpu() as launched:
        q, k, v = (
            torch.empty(1, 130, n, 64, dtype=torch.bfloat16, device=DEVICE) for n in (4, 2, 2)
        )
        out, lse = ringkern.attn_func(q, k, v, causal=True)
        ringkern.attn_varlen_func(q[0], k[0], v[0], [0, 30, 130], [0, 7, 130], window_size=(64, 0))
        ringkern.merge(torch.stack([out, out]), torch.stack([lse, lse]))
        assert {"_step", "_merge"} <= set(launched)


def test_a_trace_does_not_wait(monkeypatch, tmp_path):
    """It marks what the GPU passes; who reads the times waits for the marks."""
    monkeypatch.setenv("RINGKERN_TRACE", str(tmp_path / "trace.json"))
    monkeypatch.setattr("ringkern.ring.make_tracer", lambda *_: None)  # it meets the other ranks
    with fake_gpu():
        ring = make_ring(1, 3, HARDWARE)
        session, waits = Session(ring), FakeEvent.waits
        session.step(session.placement.prefill(LENGTHS), "pass_kv")
        assert FakeEvent.waits == waits
        steps = ring.stats()["methods"]["pass_kv"]["steps"]
        assert len(steps) == 3 and all(step["exchange_ms"] > 0 for step in steps[:2])
        assert FakeEvent.waits > waits


def lines_of(call) -> int:
    """Return how many lines of ringkern a call runs."""
    count = collections.Counter()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        count[event] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    assert count["line"] > 50
    return count["line"]


@EACH_METHOD
def test_python_s_work_does_not_grow_with_tokens(method):
    """Of a layer whose plan has its tables: a prefill, more on top of it, decode of a batch."""

    def work(scale, batch):
        found, lengths = [], {n: scale * (500 + n) for n in range(batch)}
        with fake_gpu(), make_ring(1, 3, HARDWARE) as ring:
            session = Session(ring, num_pages=1 << 15)
            placement = session.placement
            for make, what in (
                (placement.prefill, lengths),
                (placement.prefill, lengths),
                (placement.decode, list(lengths)),
            ):
                plan = make(what)
                session.step(plan, method, layers=[0])
                found.append(lines_of(lambda plan=plan: session.step(plan, method, layers=[1])))
        return np.array(found)

    few = work(1, 6)
    for more in (work(50, 6), work(1, 60)):  # split keys are a merge more
        assert (more < 1.5 * few).all(), (few, more)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_tensors_of_several_devices_are_refused(name):
    with fake_gpu() as launched, make_ring(0, 3, HARDWARE) as ring:
        plan = ringkern.Placement(3).prefill(LENGTHS)
        here = dict(device=DEVICE)
        q, k, v = (torch.empty(plan.num_tokens(0), n, 64, **here) for n in (4, 2, 2))
        given = dict(q=q, k=k, v=v, sinks=torch.empty(4, **here))
        for where in ("cpu", "cuda:1"):
            moved = given | {name: torch.empty(given[name].shape, device=where)}
            with pytest.raises(ArgumentError, match=f"{name}: want .*cuda:0.*{where}"):
                ring.attn(*(moved[n] for n in "qkv"), plan, sinks=moved["sinks"])
        assert not launched and not ring._link._core.posted


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x[torch.tensor([1])],
        lambda x: x[np.array([1])],
        lambda x: torch.tensor([1, 2]).to(DEVICE),
        lambda x: torch.tensor([1, 2]).to(DEVICE, non_blocking=True),
        lambda x: torch.tensor([1, 2]).pin_memory().to(DEVICE),
        lambda x: x.copy_(torch.ones(3).pin_memory()),
        lambda x: torch.tensor([1, 2], device=DEVICE),
    ],
)
def test_what_waits_is_seen(fault):
    with fake_gpu():
        x = torch.empty(3, device=DEVICE)
        upload(np.arange(3), DEVICE)
        x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
        with pytest.raises((HostWaits, DataDependentOutputException, DynamicOutputShapeException)):
            fault(x)
