"""RINGKERN_TRACE: one file for all ranks, on one clock."""

import json
import os
import threading
import time

import pytest
import ringkern
import torch
from ringkern import trace, tracer
from ringkern.clock import Alignment, Offset
from ringkern.launch import launch
from ringkern.stats import NAMES, Event, Stats
from ringkern.tracer import Tracer
from ringkern.transport_local import LocalTransport
from stub_gpu import run_stub, why_no_stubs
from threads import HARDWARE, run_threads
from traces import US, assert_nested, assert_whole, attend, slices_of


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the rings of a test write their trace."""
    monkeypatch.setenv("RINGKERN_TRACE", str(tmp_path / "trace.json"))
    return tmp_path / "trace.json"


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_a_trace_has_all_events_of_all_ranks(path, world_size):
    found = run_threads(attend, world_size)
    assert_whole(path.read_text(), found)
    assert os.listdir(path.parent) == ["trace.json"]


def attend_by_process(worker):
    with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
        return attend(ring)


def test_processes_on_one_host_have_one_clock(path):
    found = launch(attend_by_process, 3, threads=1, timeout_s=60)
    assert_whole(path.read_text(), found)
    for facts in json.loads(path.read_text())["otherData"]["ranks"]:
        offsets, errors = facts["clock_offset_us"], facts["clock_error_us"]
        assert all(abs(x) <= y for x, y in zip(offsets, errors, strict=True)), facts
        assert all(x < 1000 for x in errors), facts


def test_off_sends_nothing_and_on_changes_no_count(path, monkeypatch):
    def count(ring):
        before = ring.stats()["transport"]["bytes_sent"]
        return before, attend(ring)

    traced = run_threads(count, 3)
    monkeypatch.setenv("RINGKERN_TRACE", "")
    plain = run_threads(count, 3)
    assert [before for before, _ in plain] == [0, 0, 0]
    assert all(before > 0 for before, _ in traced)
    for (_, (one, events)), (_, (other, others)) in zip(traced, plain, strict=True):
        for name in ("calls", "steps", "bytes_sent", "bytes_planned"):
            assert one[name] == other[name]
        assert [e[:3] + e[5:] for e in events] == [e[:3] + e[5:] for e in others]


def test_no_file_is_overwritten(path):
    path.write_text("mine")
    for _ in range(2):
        run_threads(attend, 2)
    assert path.read_text() == "mine"
    assert sorted(os.listdir(path.parent)) == ["trace.2.json", "trace.3.json", "trace.json"]
    rings = {
        json.loads((path.parent / f"trace.{n}.json").read_text())["otherData"]["ring"]
        for n in (2, 3)
    }
    assert len(rings) == 2


def test_what_is_dropped_is_counted(path, monkeypatch):
    monkeypatch.setattr(tracer, "KEPT", 5)
    monkeypatch.setattr(tracer, "PART_BYTES", 1 << 20)
    found = run_threads(attend, 2)
    rows = slices_of(path.read_text())
    for rank, facts in enumerate(json.loads(path.read_text())["otherData"]["ranks"]):
        recorded = sum(
            1
            for _, record in found[rank][0]["methods"].items()
            for step in record["steps"]
            for name in NAMES
            if step[f"{name}_ms"]
        )
        assert facts["events"] == 5 and facts["dropped"] >= recorded - 5 > 0
        kept = [e for (r, _), row in rows.items() if r == rank for *_, e in row]
        assert len([e for e in kept if e["cat"] != "call"]) == 5
        assert max(e["args"]["call"] for e in kept) == 3, "the latest are kept"


# ---- clocks


def test_clocks_that_differ_are_aligned(path):
    """A receive never ends before its send began: by clocks that are days and a drift apart."""
    world_size, rounds = 3, 20
    shifts = [0, 2 * 86400 * 10**9, -5 * 10**9]
    drifts = [0.0, 3e-4, -2e-4]
    group = ringkern.LocalGroup(world_size)
    origin = time.monotonic_ns()

    def main(rank):
        def clock():
            now = time.monotonic_ns()
            return now + shifts[rank] + int(drifts[rank] * (now - origin))

        link, stats = LocalTransport(group[rank], 30.0), Stats()
        mine = Tracer(str(path), link, stats, clock)
        x, y = torch.zeros(2, 1000)
        stats.begin("relay")
        for step in range(rounds):  # one rank after the other: what is received is sent on
            for kind in ("recv", "send") if rank else ("send", "recv"):
                start = clock()
                peer = (rank + (1 if kind == "send" else -1)) % world_size
                message = [(peer, x if kind == "send" else y)]
                link.exchange(*(message, []) if kind == "send" else ([], message)).wait()
                stats.add("exchange", 2 * step + (kind == "recv"), start, clock(), 4000)
        mine.finish()
        link.close()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = slices_of(path.read_text())
    about = json.loads(path.read_text())["otherData"]["ranks"]
    for facts, shift in zip(about, shifts, strict=True):
        assert abs(facts["clock_offset_us"][0] + shift / US) < 1e4
    error = [round(max(facts["clock_error_us"]) * US) for facts in about]
    for rank in range(world_size):
        sender = (rank - 1) % world_size
        slack = error[rank] + error[sender] + 2
        times = {r: {e["args"]["step"]: (s, t) for s, t, e in rows[r, 1]} for r in (rank, sender)}
        for step in range(rounds):
            sent, received = times[sender][2 * step], times[rank][2 * step + 1]
            assert received[1] >= sent[0] - slack, f"step {step}, rank {sender} to {rank}"


def test_exchanges_that_overlap_get_rows_of_their_own():
    facts = {"rank": 2, "world_size": 3, "host": "h"}
    times = [(0, 50), (10, 20), (20, 60), (50, 50), (55, 70), (60, 80)]
    events = [Event("exchange", 0, i, *t, 1, "pass_q") for i, t in enumerate(times)]
    events += [Event("attend", 0, 0, 5, 30, 0, "pass_q"), Event("wait", 0, 0, 30, 30, 0, "pass_q")]
    nowhere = Offset(0, 0, 0)
    text = trace.render(facts, events, [], [], Alignment(nowhere, nowhere), 3)
    rows = slices_of(f'{{"traceEvents":[{text}]}}')
    assert_nested(rows)
    found = {row: [(s + 3, e + 3) for s, e, _ in slices] for (_, row), slices in rows.items()}
    assert found[1] == [(0, 50), (50, 50), (55, 70)]
    assert found[2] == [(10, 20), (20, 60), (60, 80)]
    assert found[0] == [(5, 30), (30, 30)]
    assert '"name": "exchange 2"' in text


def traced_over_tcp(ring):
    plan = ringkern.Placement(ring.world_size).prefill({"a": 700})
    x = torch.zeros(plan.num_tokens(ring.rank), 2, 16)
    for method in ("pass_kv", "gather_q"):
        ring.attn(x, x, x, plan, method=method)
    stats = ring.stats()["transport"]
    return stats["bytes_sent_by_peer"], stats["bytes_received_by_peer"]


@pytest.mark.skipif(bool(why_no_stubs()), reason=why_no_stubs() or "none")
def test_pieces_of_gpu_memory_over_tcp_have_rows(path):
    ranks = run_stub(traced_over_tcp, 3, transport="tcp")
    events = json.loads(path.read_text())["traceEvents"]
    for rank, (sent, received) in enumerate(ranks):
        mine = [event for event in events if event["pid"] == rank]
        names = {e["tid"]: e["args"]["name"] for e in mine if e["name"] == "thread_name"}
        legs = [event for event in mine if event.get("cat") == "leg"]
        assert legs and all(event["dur"] >= 0 for event in legs)
        for kind, by_peer in (("to_host", sent), ("out", sent), ("in", received)):
            for peer, want in enumerate(by_peer):
                some = [e for e in legs if e["name"] == kind and e["args"]["peer"] == peer]
                assert sum(e["args"]["bytes"] for e in some) == want, (kind, peer)
        for event in legs:
            assert names[event["tid"]].startswith(trace.LEGS[event["name"]])
        ends = {}  # of what is in a row: nothing lies on another
        for event in sorted(legs, key=lambda e: e["ts"]):
            assert event["ts"] >= ends.get(event["tid"], 0.0)
            ends[event["tid"]] = event["ts"] + event["dur"] - 0.002
