"""Times by a GPU's clock, with events that a test lets the GPU pass."""

import contextlib

import pytest
import torch
from fake_gpu import FakeEvent, pretend_cuda
from ringkern.device_stats import DeviceStats


@pytest.fixture
def gpu(monkeypatch):
    return pretend_cuda(monkeypatch)


def call(stats, steps=2):
    stats.begin("pass_kv")
    for step in range(steps):
        began = stats.now()
        stats.add("attend", step, began, stats.now())
        stats.add("exchange", step, began, stats.now(), 10)
    stats.end()


def test_marks_become_times_when_the_gpu_has_passed_them(gpu):
    stats = DeviceStats(torch.device("cuda", 0))
    waits = FakeEvent.waits
    call(stats)
    assert FakeEvent.waits == waits, "recording waited for the GPU"
    found = stats.to_dict()
    assert FakeEvent.waits > waits
    one = found["methods"]["pass_kv"]
    # begin, then three marks for each step, then end: one millisecond from mark to mark.
    assert found["calls"] == 1 and found["call_ms"] == pytest.approx(7.0)
    assert [step["attend_ms"] for step in one["steps"]] == pytest.approx([1.0, 1.0])
    assert [step["exchange_ms"] for step in one["steps"]] == pytest.approx([2.0, 2.0])
    events = stats.events
    assert [event.name for event in events] == ["attend", "exchange"] * 2
    assert events[0].start_ns + 10**6 == events[0].end_ns and events[1].nbytes == 10
    assert [done.method for done in stats.finished] == ["pass_kv"] and stats.dropped == 0


def test_a_long_run_keeps_its_precision(gpu):
    """elapsed_time() is a float32: marks far from the zero become the new one."""
    stats = DeviceStats(torch.device("cuda", 0))
    gpu.tick_ms = 700.0
    for _ in range(3):
        call(stats, 1)
    starts = [event.start_ns for event in stats.events if event.name == "attend"]
    assert starts[1] - starts[0] == starts[2] - starts[1] == 5 * 700 * 10**6
    assert abs(stats._zero.at_ms - FakeEvent.clock_ms) <= 2100


def test_only_what_was_passed_is_settled_on_the_way(gpu):
    stats = DeviceStats(torch.device("cuda", 0))
    call(stats, 1)
    waits, FakeEvent.clock_ms = FakeEvent.waits, 11.0  # begin and attend, and not the exchange
    stats._settle(wait=False)
    assert FakeEvent.waits == waits
    left = [method for method, _, _ in stats._waiting]
    assert left and left[-1] == "end" and len(left) < 4
    assert stats.to_dict()["calls"] == 1


def test_nothing_is_asked_during_a_capture(gpu, monkeypatch):
    """Of marks before it, as asking would end it: also where so many wait that some are entered."""
    stats = DeviceStats(torch.device("cuda", 0))
    call(stats, 1)
    monkeypatch.setattr(FakeEvent, "query", lambda self: pytest.fail("asked during a capture"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(400):
        call(stats, 2)
    assert len(stats._waiting) > 2000


def test_a_graph_has_no_marks(gpu, monkeypatch):
    stats = DeviceStats(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(stats)
    with stats.aside() as stream:
        assert stream == gpu.cuda_stream
    assert not gpu.waited
    assert stats.to_dict()["calls"] == 1
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with stats.aside():
        pass
    assert len(gpu.waited) == 1
