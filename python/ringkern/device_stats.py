"""Where a ring of GPUs spent its time, by the GPU's own clock."""

import contextlib
import time

import torch

from ringkern.capture import captures
from ringkern.stats import Call, Event, Stats

_CROWD = 1024  # entries that may wait for the GPU before it is asked which it has passed


class DeviceStats:
    """Stats whose times are when the GPU came to something, not when the host asked for it.

    now() puts a mark on the current stream, which costs some microseconds: for traces. What is
    recorded waits until the GPU has passed its marks; who reads figures waits for that as well.
    """

    def __init__(self, device: torch.device):
        self.steps = self.bytes_planned = self.bytes_sent = 0
        self._device, self._stats = device, Stats()
        self._when_ns = 0  # of what is being entered into the stats
        self._stats.now = lambda: self._when_ns
        self._waiting: list[tuple] = []  # (method of Stats, marks, other arguments), in order
        self._beside = torch.cuda.Stream(device)
        self._zero, self._zero_ns = self._synchronize()

    def now(self):
        """Return a mark on the current stream, which add() takes as a time.

        A graph has no marks: while one is captured, the time of the host.
        """
        if captures(self._device):
            return time.monotonic_ns()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    @contextlib.contextmanager
    def aside(self):
        """Give a stream for what the current one is to wait for; now() marks its end there."""
        current = torch.cuda.current_stream(self._device)
        if captures(self._device):
            yield current.cuda_stream
            return
        with torch.cuda.stream(self._beside):
            yield self._beside.cuda_stream
            done = torch.cuda.Event()
            done.record(self._beside)
        current.wait_event(done)

    # ---- in a call, as Stats has them

    def begin(self, method: str) -> None:
        self._waiting.append(("begin", [self.now()], (method,)))

    def add(self, name: str, step: int, start, end, nbytes: int = 0) -> None:
        self._waiting.append(("add", [start, end], (name, step, nbytes)))

    def end(self) -> None:
        self._waiting.append(("end", [self.now()], ()))
        # To ask for an event would end a capture, for another stream's as well.
        if len(self._waiting) >= _CROWD and not captures(self._device):
            self._settle(wait=False)

    # ---- afterwards, as Stats has them

    def keep(self, count: int) -> None:
        self._stats.keep(count)

    @property
    def events(self) -> list[Event]:
        self._settle()
        return self._stats.events

    @property
    def finished(self) -> list[Call]:
        self._settle()
        return self._stats.finished

    @property
    def dropped(self) -> int:
        self._settle()
        return self._stats.dropped

    def to_dict(self) -> dict:
        self._settle()
        counts = dict(
            steps=self.steps, bytes_planned=self.bytes_planned, bytes_sent=self.bytes_sent
        )
        return self._stats.to_dict() | counts

    # ---- marks

    def _settle(self, wait: bool = True) -> None:
        """Enter what waits into the stats: all, or as far as the GPU has come."""
        done = 0
        for method, marks, others in self._waiting:
            marked = [mark for mark in marks if not isinstance(mark, int)]
            if wait:
                for mark in marked:
                    mark.synchronize()
            elif not all(mark.query() for mark in marked):
                break
            times = [self._ns(mark) for mark in marks]
            if method == "add":
                name, step, nbytes = others
                self._stats.add(name, step, *times, nbytes)
            else:
                self._when_ns = times[0]
                getattr(self._stats, method)(*others)
            done += 1
        del self._waiting[:done]

    def _ns(self, mark) -> int:
        if isinstance(mark, int):
            return mark
        since_ms = self._zero.elapsed_time(mark)
        when_ns = self._zero_ns + int(1e6 * since_ms)
        if since_ms > 1e3:  # it is a float32: count from nearby
            self._zero, self._zero_ns = mark, when_ns
        return when_ns

    def _synchronize(self) -> tuple[torch.cuda.Event, int]:
        """Return a mark and the host's time of it: of several, the one that took least to see."""
        found = []
        for _ in range(8):
            torch.cuda.synchronize(self._device)
            before_ns = time.monotonic_ns()
            mark = self.now()
            mark.synchronize()
            after_ns = time.monotonic_ns()
            found.append((after_ns - before_ns, mark, (before_ns + after_ns) // 2))
        _, mark, when_ns = min(found, key=lambda each: each[0])
        return mark, when_ns
