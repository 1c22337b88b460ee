"""Writes a trace file: Chrome's JSON, for ui.perfetto.dev and chrome://tracing.

A process per rank. Its row "calls" is what the rank's thread did (calls of ring.attn(), and in them
attend, wait and merge), "exchange" the messages under way; where GPU memory goes over TCP, there are
rows of its copies, and of the pieces on the wire. What overlaps gets rows of its own. Times are rank
0's, from the making of the ring on.
"""

import json
import os
import pathlib
from collections.abc import Iterable

from ringkern.clock import Alignment
from ringkern.stats import Call, Event, Leg

# Leg kinds, in the order of their rows.
LEGS = {
    "to_host": "copies from the GPU",
    "out": "wire out",
    "in": "wire in",
    "to_device": "copies to the GPU",
}


def render(
    facts: dict,
    events: Iterable[Event],
    calls: Iterable[Call],
    legs: Iterable[Leg],
    alignment: Alignment,
    zero_ns: int,
) -> str:
    """Return one rank's part of a trace: JSON objects, a line each, with a comma between them.

    Args:
        facts: of the rank: "rank", "world_size", "host".
        events, calls: what Stats keeps, by the rank's own clock; legs by that too.
        alignment: from that clock to rank 0's.
        zero_ns: rank 0's time that the trace begins at.
    """
    in_calls, exchanges = [], []
    for call in calls:
        args = {"call": call.call, "method": call.method}
        in_calls.append((call.start_ns, -call.end_ns, call.method, "call", args))
    for event in events:
        args = {"call": event.call, "step": event.step, "method": event.method}
        args |= {"bytes": event.nbytes} if event.name == "exchange" else {}
        where = exchanges if event.name == "exchange" else in_calls
        where.append((event.start_ns, -event.end_ns, event.name, event.name, args))
    pieces = {kind: [] for kind in LEGS}
    for leg in legs:
        args = {"peer": leg.peer, "bytes": leg.nbytes}
        pieces[leg.kind].append((leg.start_ns, -leg.end_ns, leg.kind, "leg", args))
    rows = [("calls", in_calls), *_lanes("exchange", exchanges)]
    for kind, slices in pieces.items():
        rows += _lanes(LEGS[kind], slices) if slices else []
    lines = _names(facts, [name for name, _ in rows])
    for row, (_, slices) in enumerate(rows):
        # Begin first, end last: so what contains another comes before it.
        for start_ns, end_ns, name, category, args in sorted(slices, key=lambda s: s[:2]):
            start = alignment.to_reference(start_ns) - zero_ns
            took = alignment.to_reference(-end_ns) - zero_ns - start
            lines.append(
                f'{{"ph":"X","name":{json.dumps(name)},"cat":"{category}","pid":{facts["rank"]},'
                f'"tid":{row},"ts":{_us(start)},"dur":{_us(took)},"args":{json.dumps(args)}}}'
            )
    return ",\n".join(lines)


def _lanes(name: str, slices: list[tuple]) -> list[tuple[str, list[tuple]]]:
    """Return (name, slices) of as few rows as there are slices at once, none on another."""
    lanes: list[list[tuple]] = [[]]
    for item in sorted(slices, key=lambda s: s[:2]):
        free = (lane for lane in lanes if not lane or -lane[-1][1] <= item[0])
        lane = next(free, None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(item)
    return [(f"{name} {i + 1}" if i else name, lane) for i, lane in enumerate(lanes)]


def _names(facts: dict, rows: list[str]) -> list[str]:
    """Return the metadata: what the rank and its rows are called, and their order."""
    rank = facts["rank"]
    process = f"rank {rank} of {facts['world_size']} ({facts['host']})"
    metadata = [("process_name", 0, {"name": process})]
    metadata += [("process_sort_index", 0, {"sort_index": rank})]
    for row, name in enumerate(rows):
        metadata += [("thread_name", row, {"name": name})]
        metadata += [("thread_sort_index", row, {"sort_index": row})]
    return [
        json.dumps({"ph": "M", "name": name, "pid": rank, "tid": row, "args": args})
        for name, row, args in metadata
    ]


def _us(ns: int) -> str:
    """Return exact microseconds: floats of days would round nanoseconds, and nesting, away."""
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{ns // 1000}.{ns % 1000:03d}"


def write(path: str, parts: Iterable[str], about: dict, suffix: str = "") -> str:
    """Write rendered parts as one file and return its path: `path`, or a numbered one beside it.

    What is there is never overwritten: trace.json, then trace.2.json, trace.3.json and so on.

    Args:
        about: what the file says of itself, under "otherData".
        suffix: added behind the name, number and all.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    number, file = 1, None
    while file is None:
        name = _numbered(path, number) + suffix
        try:
            file = open(name, "x", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileExistsError:
            number += 1
    try:
        with file:
            file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(about))
            file.write(',"traceEvents":[\n')
            for count, part in enumerate(parts):
                file.write(",\n" * bool(count) + part)
            file.write("\n]}\n")
    except BaseException:
        os.unlink(name)
        raise
    return name


def _numbered(path: str, number: int) -> str:
    where = pathlib.Path(path)
    return path if number == 1 else str(where.with_name(f"{where.stem}.{number}{where.suffix}"))
