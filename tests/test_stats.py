"""What ring.stats() and ring.events() say of calls: by hand, and of a ring."""

import time

import pytest
import ringkern
import torch
from ringkern.stats import NAMES, Stats
from threads import run_threads

METHODS = ("pass_kv", "pass_q", "gather_kv", "gather_q")


def test_times_and_bytes_by_method_and_step(monkeypatch):
    ticks = iter([0, 100, 200, 260, 300, 340])
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(ticks) * 10**6)
    stats = Stats()
    for method, events in (
        ("pass_kv", [("attend", 0, 30, 0), ("exchange", 0, 50, 7), ("wait", 0, 20, 0)]),
        ("pass_q", [("attend", 2, 9, 0), ("merge", 2, 1, 0), ("exchange", 1, 4, 5)]),
        ("pass_kv", [("attend", 0, 3, 0), ("wait", 1, 15, 0), ("exchange", 0, 1, 2)]),
    ):
        stats.begin(method)
        for name, step, ms, nbytes in events:
            stats.add(name, step, 10**6, (1 + ms) * 10**6, nbytes)
        stats.end()
    found = stats.to_dict()
    assert found["calls"] == 3 and found["call_ms"] == 200
    assert found["attend_ms"] == 42 and found["exposed"] == pytest.approx(35 / 200)
    kv, q = found["methods"]["pass_kv"], found["methods"]["pass_q"]
    assert kv["calls"] == 2 and kv["call_ms"] == 140 and kv["exposed"] == 0.25
    assert kv["bytes_sent"] == 9 and q["bytes_sent"] == 5
    assert kv["steps"] == [
        dict(bytes_sent=9, attend_ms=33, exchange_ms=51, wait_ms=20, merge_ms=0),
        dict(bytes_sent=0, attend_ms=0, exchange_ms=0, wait_ms=15, merge_ms=0),
    ]
    assert [step["bytes_sent"] for step in q["steps"]] == [0, 5, 0]
    assert q["steps"][2]["merge_ms"] == 1 and q["exposed"] == 0
    assert [event.method for event in stats.events] == ["pass_kv"] * 3 + ["pass_q"] * 3 + [
        "pass_kv"
    ] * 3
    assert [event.call for event in stats.events] == [0] * 3 + [1] * 3 + [2] * 3
    assert [(call.method, call.call) for call in stats.finished] == [
        ("pass_kv", 0),
        ("pass_q", 1),
        ("pass_kv", 2),
    ]


def test_the_latest_events_are_kept():
    stats = Stats()
    assert stats.to_dict()["exposed"] == 0 and stats.to_dict()["methods"] == {}
    stats.begin("pass_kv")
    for step in range(Stats.KEPT + 3):
        stats.add("attend", step % 4, step, step + 1)
    stats.end()
    events = stats.events
    assert len(events) == Stats.KEPT and events[0].start_ns == 3 and stats.dropped == 3
    total_ms = stats.to_dict()["methods"]["pass_kv"]["attend_ms"]
    assert total_ms == pytest.approx((Stats.KEPT + 3) / 1e6), "totals count what is dropped"


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_parts_add_up_to_the_ring(world_size):
    def attend(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 31, "b": 2})
        x = torch.zeros(plan.num_tokens(ring.rank), 2, 8)
        for _ in range(2):
            for method in METHODS:
                ring.attn(x, x, x, plan, method=method)
        return ring.stats(), ring.events()

    for stats, events in run_threads(attend, world_size):
        methods = stats["methods"]
        assert set(methods) == set(METHODS) and stats["calls"] == 8
        assert all(record["calls"] == 2 for record in methods.values())
        assert stats["bytes_sent"] == sum(record["bytes_sent"] for record in methods.values())
        for name in ("call", *NAMES):
            parts = sum(record[f"{name}_ms"] for record in methods.values())
            assert parts == pytest.approx(stats[f"{name}_ms"])
        for method, record in methods.items():
            mine = [event for event in events if event.method == method]
            assert 0 <= record["exposed"] <= 1
            assert record["exposed"] == pytest.approx(record["wait_ms"] / record["call_ms"])
            for name in NAMES:
                ns = sum(e.end_ns - e.start_ns for e in mine if e.name == name)
                assert record[f"{name}_ms"] == pytest.approx(ns / 1e6)
                by_step = sum(step[f"{name}_ms"] for step in record["steps"])
                assert by_step == pytest.approx(ns / 1e6)
            for number, step in enumerate(record["steps"]):
                assert step["bytes_sent"] == sum(e.nbytes for e in mine if e.step == number)
