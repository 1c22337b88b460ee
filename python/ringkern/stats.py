"""Where a ring's time and bytes went."""

import collections
import time
from typing import NamedTuple

NAMES = ("attend", "exchange", "wait", "merge")
_COLUMN = {name: number for number, name in enumerate(NAMES)}
_BYTES = len(NAMES)


class Event(NamedTuple):
    """One thing that a rank did. Times by time.monotonic_ns(): comparable on one host."""

    name: str  # attend | exchange | wait | merge
    call: int  # which call of the ring
    step: int
    start_ns: int
    end_ns: int
    nbytes: int = 0  # sent, by an exchange
    method: str = ""


class Leg(NamedTuple):
    """What a piece of a message between a GPU and a rank went through. Times as an Event's."""

    kind: str  # to_host | out | in | to_device
    peer: int
    nbytes: int
    start_ns: int
    end_ns: int


class Call(NamedTuple):
    """One finished call of ring.attn(), from its choice of method to its result."""

    method: str
    call: int
    start_ns: int
    end_ns: int


class _Method:
    """What the calls of one method add up to."""

    def __init__(self):
        self.calls = self.call_ns = 0
        self.steps: list[list[int]] = []  # by step: ns in the order of NAMES, then bytes sent


class Stats:
    """Totals since the ring was made, by method and step, and the latest events."""

    KEPT = 4096  # events; a call of pass_kv makes three per step

    def __init__(self):
        self.calls = self.steps = self.bytes_planned = self.bytes_sent = 0
        self._methods: dict[str, _Method] = {}
        self.recorded = 0  # events, kept or not
        self.now = time.monotonic_ns  # what add() takes as a time
        self.keep(self.KEPT)

    def keep(self, count: int) -> None:
        """Keep the latest `count` events from now on. Forgets the ones so far."""
        self._events = collections.deque(maxlen=count)
        self._finished = collections.deque(maxlen=count)

    # ---- in a call: called at every step, so tuples and ints only

    def begin(self, method: str) -> None:
        """Count what follows as a call of this method, until end()."""
        record = self._methods.get(method)
        if record is None:
            record = self._methods[method] = _Method()
        self._method, self._record, self._totals = method, record, record.steps
        self._start = self.now()

    def count(self, nbytes: int, planned: int) -> None:
        """Count a step that sends so many bytes, where the plan said `planned`."""
        self.steps += 1
        self.bytes_sent += nbytes
        self.bytes_planned += planned

    def add(self, name: str, step: int, start: int, end: int, nbytes: int = 0) -> None:
        """Record an event of the call that begin() began; times as now() gives them."""
        try:
            row = self._totals[step]
        except IndexError:
            more = step + 1 - len(self._totals)
            self._totals += ([0] * (_BYTES + 1) for _ in range(more))
            row = self._totals[step]
        row[_COLUMN[name]] += end - start
        if nbytes:
            row[_BYTES] += nbytes
        self.recorded += 1
        self._events.append((name, self.calls, step, start, end, nbytes, self._method))

    def end(self) -> None:
        """Count the call as finished."""
        end, record = self.now(), self._record
        self._finished.append((self._method, self.calls, self._start, end))
        record.call_ns += end - self._start
        record.calls += 1
        self.calls += 1

    # ---- afterwards

    @property
    def events(self) -> list[Event]:
        """The latest events, oldest first."""
        return [Event._make(event) for event in self._events]

    @property
    def finished(self) -> list[Call]:
        """The latest finished calls, oldest first."""
        return [Call._make(call) for call in self._finished]

    @property
    def dropped(self) -> int:
        """How many events were recorded and are not kept any more."""
        return self.recorded - len(self._events)

    def to_dict(self) -> dict:
        """Return the totals: counts, bytes, and milliseconds by name, in all and by method.

        call_ms is the time in finished calls, attend_ms and merge_ms the computing in it.
        exchange_ms is how long messages were under way, wait_ms how much of that the rank stood
        still for; the rest was hidden under attend_ms. exposed is wait_ms / call_ms, from 0 to 1.

        "methods" has the same by method, and its "steps" by step: what all calls of the method
        spent in step 0, 1, ...; bytes_sent there counts exchanges that are over.
        """
        methods = {name: _to_dict(record) for name, record in self._methods.items()}
        rows = [row for record in self._methods.values() for row in record.steps]
        call_ns = sum(record.call_ns for record in self._methods.values())
        return {
            "calls": self.calls,
            "steps": self.steps,
            "bytes_planned": self.bytes_planned,
            "bytes_sent": self.bytes_sent,
            **_times(_sum(rows), call_ns),
            "methods": methods,
        }


def _to_dict(record: _Method) -> dict:
    total = _sum(record.steps)
    return {
        "calls": record.calls,
        "bytes_sent": total[_BYTES],
        **_times(total, record.call_ns),
        "steps": [{"bytes_sent": row[_BYTES], **_milliseconds(row)} for row in record.steps],
    }


def _sum(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)] or [0] * (_BYTES + 1)


def _milliseconds(row: list[int]) -> dict:
    return {f"{name}_ms": row[_COLUMN[name]] / 1e6 for name in NAMES}


def _times(row: list[int], call_ns: int) -> dict:
    wait_ns = row[_COLUMN["wait"]]  # a call that failed counts here and not in call_ns
    exposed = min(1.0, wait_ns / call_ns) if call_ns else 0.0
    return {"call_ms": call_ns / 1e6, **_milliseconds(row), "exposed": exposed}
