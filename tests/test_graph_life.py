"""What a capture takes, what it refuses, and what is left when graphs end. Without a GPU, as there."""

import atexit
import contextlib
import types
import weakref

import accelerator
import pytest
import ringkern
import torch
from close import assert_close
from ringkern import local
from ringkern.errors import ArgumentError, UnsupportedError
from ringkern.graphs import DecodeGraphs, _Shape
from stub_gpu import run_stub, why_no_stubs
from test_graphs import HEADDIM, HEADS, LENGTHS, Again, Session

pytestmark = pytest.mark.skipif(bool(why_no_stubs()), reason=why_no_stubs() or "none")


def forget(ring):
    """Closing the ring ends its graphs, which NCCL would wait for."""
    session = Session(ring)
    graphs = Again(ring, session.cache, session.step)
    for _ in range(2 * ring.world_size):
        plan = session.placement.decode(list(LENGTHS))
        session.feed(plan)
        graphs.run(plan)
    assert graphs._shapes
    ring.barrier()
    ring.close()
    assert not graphs._shapes


def test_a_closed_ring_has_no_graphs(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    run_stub(forget, 3)


def drop(ring):
    """What is dropped is not kept for the exit; what is alive then is cleared before links close."""
    session, at_exit = Session(ring), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, "register", lambda *call: at_exit.append(call))
        kept, dropped = (Again(ring, session.cache, session.step) for _ in range(2))
    session.feed(plan := session.placement.decode(list(LENGTHS)))
    kept.run(plan)
    seen = weakref.ref(dropped)
    del dropped
    assert seen() is None and kept._shapes
    for clear, *args in at_exit:
        clear(*args)
    return len(at_exit), len(kept._shapes)


def test_graphs_end_at_exit(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    assert set(run_stub(drop, 1)) == {(2, 0)}


def capture_by_hand(ring):
    """Refused before anything is stored; plans that ran just before have their programs."""
    session = Session(ring)
    session.feed(plan := session.placement.decode(["a"]))
    held, books = session.cache.stats(), ring.stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringkern.ring, "captures", lambda device: True)
        with pytest.raises(
            UnsupportedError, match="a call with a cache.*Use ringkern.DecodeGraphs"
        ):
            session.step(plan)
    assert session.cache.stats() == held and ring.stats() == books
    got, want = ring.unshard(session.step(plan)[0], plan), session.want(plan)
    assert_close(got, want, want.float(), name="after the capture")
    plans = [ringkern.Placement(1).prefill({"x": 3 + n}) for n in range(3)]
    given = [[torch.ones(3 + n, heads, HEADDIM) for heads in HEADS] for n in range(3)]
    for qkv, plan in zip(given, plans, strict=True):
        ring.attn(*qkv, plan, method="pass_kv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringkern.ring, "captures", lambda device: True)
        with pytest.raises(ArgumentError, match="with this plan just before the capture"):
            ring.attn(*given[0], plans[0], method="pass_kv")
        for number in (1, 2, 1):
            ring.attn(*given[number], plans[number], method="pass_kv")


def test_a_capture_by_hand():
    run_stub(capture_by_hand, 1)


def test_graphs_get_new_memory_when_all_have_ended(monkeypatch):
    """torch ends a pool with its last graph, and takes its handle for no new one."""
    handles = iter("abc")
    used = []

    @contextlib.contextmanager
    def graph(graph, pool, **options):
        used.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=print))
    monkeypatch.setattr(torch.cuda, "Stream", lambda on: "a stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._ring, graphs._stream = types.SimpleNamespace(device=torch.device("cuda", 3)), None
    graphs._shapes = {name: _Shape() for name in "xy"}
    for name in "xyx":
        graphs._shapes[name].replay = graphs.capture(lambda: None)[1]
    for shape in graphs._shapes.values():
        shape.begin(pages=2, wire_pages=2)
    graphs.capture(lambda: None)
    assert used == ["a", "a", "a", "b"]


def test_capture_is_on_the_ring_s_device(monkeypatch):
    """Whichever device is the current one, or captured a graph before."""
    used, device = [], torch.device("cuda", 3)
    note = lambda name: lambda *args, **options: used.append((name, args, options))  # noqa: E731

    @contextlib.contextmanager
    def context(name, *args, **options):
        used.append((name, args, options))
        yield
        used.append((f"end of {name}", (), {}))

    graph = types.SimpleNamespace(replay=note("replay"))
    monkeypatch.setattr(torch.cuda, "device", lambda *args: context("device", *args))
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **options: context("graph", *a, **options))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda on: f"a stream of {on}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._ring, graphs._stream, graphs._shapes = types.SimpleNamespace(device=device), None, {}
    result, replay = graphs.capture(lambda: note("step")() or "done")
    assert result == "done" and replay is graph.replay
    options = dict(pool="a pool", stream="a stream of cuda:3", capture_error_mode="thread_local")
    assert used == [
        ("device", (device,), {}),
        ("graph", (graph,), options),
        ("step", (), {}),
        ("end of graph", (), {}),
        ("end of device", (), {}),
    ]


def test_attention_on_its_own_is_refused_in_a_capture(monkeypatch):
    """Its tables would be read by replays when they are gone."""
    x = torch.zeros(1, 5, 2, 16, device=accelerator.DEVICE)
    monkeypatch.setattr(local, "captures", lambda device: True)
    with pytest.raises(UnsupportedError, match="Use ringkern.DecodeGraphs"):
        ringkern.attn_func(x, x, x, backend="triton")
