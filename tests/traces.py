"""Traces as tests read them: whole, nested, and with all that the ranks recorded."""

import collections
import json
import socket

import pytest
import ringkern
import torch
from ringkern.stats import NAMES

METHODS = ("pass_kv", "pass_q", "gather_kv", "gather_q")
US = 1000


def attend(ring, methods=METHODS):
    """Make a call by each method; return what the ring says of them."""
    plan = ringkern.Placement(ring.world_size).prefill({"a": 30, "b": 3})
    x = torch.zeros(plan.num_tokens(ring.rank), 2, 8)
    for method in methods:
        ring.attn(x, x, x, plan, method=method)
    return ring.stats(), ring.events()


def slices_of(text):
    """Return the slices of a trace by (rank, row), ns: (start, end, event)."""
    rows = collections.defaultdict(list)
    for event in json.loads(text)["traceEvents"]:
        if event["ph"] == "X":
            start, took = round(event["ts"] * US), round(event["dur"] * US)
            assert took >= 0, event
            rows[event["pid"], event["tid"]].append((start, start + took, event))
    return rows


def assert_nested(rows):
    """Viewers want slices of a row one after the other, or one in the other, outer ones first."""
    for row, slices in rows.items():
        around = []
        for start, end, event in slices:
            while around and around[-1] <= start:
                around.pop()
            assert not around or end <= around[-1], f"row {row}: {event} sticks out of another"
            around.append(end)
        assert [s[0] for s in slices] == sorted(s[0] for s in slices)


def assert_whole(text, found):
    """The trace has what every rank recorded, by name, step, method and byte."""
    whole = json.loads(text)
    about, rows = whole["otherData"], slices_of(text)
    world_size = len(found)
    assert_nested(rows)
    assert about["failure"] is None and about["world_size"] == world_size
    assert about["version"] == ringkern.__version__
    assert [rank["rank"] for rank in about["ranks"]] == list(range(world_size))
    names = {
        (e["pid"], e["tid"], e["name"]): e["args"] for e in whole["traceEvents"] if e["ph"] == "M"
    }
    for rank, (stats, events) in enumerate(found):
        facts = about["ranks"][rank]
        assert facts["events"] == len(events) and facts["dropped"] == 0
        host = socket.gethostname()
        assert names[rank, 0, "process_name"]["name"] == f"rank {rank} of {world_size} ({host})"
        assert names[rank, 0, "thread_name"] == {"name": "calls"}
        assert names[rank, 1, "thread_name"] == {"name": "exchange"}
        mine = [e for (r, _), slices in rows.items() if r == rank for _, _, e in slices]
        traced = collections.Counter(
            (e["name"], e["args"]["call"], e["args"]["step"], e["args"]["method"])
            for e in mine
            if e["cat"] != "call"
        )
        assert traced == collections.Counter((e.name, e.call, e.step, e.method) for e in events)
        assert sum(e["args"].get("bytes", 0) for e in mine) == stats["bytes_sent"]
        calls = [e for e in mine if e["cat"] == "call"]
        assert [e["name"] for e in calls] == list(METHODS)
        assert [e["args"]["call"] for e in calls] == list(range(len(METHODS)))
        assert_inside(rows[rank, 0])
        took = [sum(e["dur"] for e in mine if e["name"] == name) / 1e3 for name in NAMES]
        want = [stats[f"{name}_ms"] for name in NAMES]
        assert took == pytest.approx(want, rel=1e-3), "but for the drift of the clock"


def assert_inside(slices):
    """What a rank does for a call lies in the slice of that call."""
    calls = {e["args"]["call"]: (s, t) for s, t, e in slices if e["cat"] == "call"}
    for start, end, event in slices:
        first, last = calls[event["args"]["call"]]
        assert first <= start and end <= last, event
