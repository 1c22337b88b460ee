"""Where a ring's time and bytes went."""

import collections
import time
from typing import NamedTuple


class Event(NamedTuple):
    """One thing that a rank did. Times by time.monotonic_ns(): comparable on one host."""

    name: str  # attend | exchange | wait | merge
    call: int  # which call of the ring
    step: int
    start_ns: int
    end_ns: int
    nbytes: int = 0


class Stats:
    """Totals since the ring was made, and the latest events."""

    KEPT = 4096  # events; a call of pass_kv makes three per step

    def __init__(self):
        self.calls = self.steps = self.bytes_planned = self.bytes_sent = 0
        self.time_ns = collections.Counter(attend=0, exchange=0, wait=0, merge=0)
        self.events = collections.deque(maxlen=self.KEPT)

    def add(self, name: str, step: int, start_ns: int, end_ns: int, nbytes: int = 0) -> None:
        self.time_ns[name] += end_ns - start_ns
        self.events.append(Event(name, self.calls, step, start_ns, end_ns, nbytes))

    def timed(self, name: str, step: int) -> "_Timed":
        """Return a context manager that adds an event around its body."""
        return _Timed(self, name, step)

    def to_dict(self) -> dict:
        """Return the totals: counts, bytes, and milliseconds by name.

        exchange_ms is how long messages were under way, wait_ms how much of that the rank stood
        still for; the rest was hidden under attend_ms.
        """
        times = {f"{name}_ms": ns / 1e6 for name, ns in self.time_ns.items()}
        return {
            "calls": self.calls,
            "steps": self.steps,
            "bytes_planned": self.bytes_planned,
            "bytes_sent": self.bytes_sent,
            **times,
        }


class _Timed:
    def __init__(self, stats: Stats, name: str, step: int):
        self._stats, self._name, self._step = stats, name, step

    def __enter__(self):
        self._start_ns = time.monotonic_ns()

    def __exit__(self, *_):
        self._stats.add(self._name, self._step, self._start_ns, time.monotonic_ns())
