"""Where a ring of GPUs spent its time, by the GPU's own clock."""

import contextlib
import time

import torch

from ringkern.stats import Call, Event, Stats

_CROWD = 1024  # events that may wait for the GPU before it is asked which it has passed


class DeviceStats(Stats):
    """Stats whose times are when the GPU came to something, not when the host asked for it.

    now() puts a mark on the current stream, which costs some microseconds: for traces. Marks become
    times once the GPU has passed them; who reads figures waits for that.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._waiting: list[tuple] = []  # (method to be called, record, tuple), oldest first
        self._beside = torch.cuda.Stream(device)
        self._zero, self._zero_ns = self._synchronize()

    def now(self):
        """Return a mark on the current stream, which add() takes as a time.

        A graph has no marks: while one is captured, the time of the host.
        """
        if torch.cuda.is_current_stream_capturing():
            return time.monotonic_ns()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    @contextlib.contextmanager
    def aside(self):
        """Give a stream for what the current one is to wait for; now() marks its end there."""
        current = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            yield current.cuda_stream
            return
        with torch.cuda.stream(self._beside):
            yield self._beside.cuda_stream
            done = torch.cuda.Event()
            done.record(self._beside)
        current.wait_event(done)

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

    # ---- what Stats does at once

    def _enter(self, record, event: tuple) -> None:
        self._waiting.append((super()._enter, record, event))

    def _finish(self, record, call: tuple) -> None:
        self._waiting.append((super()._finish, record, call))
        if len(self._waiting) >= _CROWD:
            self._settle(wait=False)

    def _settle(self, wait: bool = True) -> None:
        """Turn marks into times: all, or those that the GPU has passed."""
        done = 0
        for then, record, entry in self._waiting:
            marks = [x for x in entry if isinstance(x, torch.cuda.Event)]
            if wait:
                for mark in marks:
                    mark.synchronize()
            elif not all(mark.query() for mark in marks):
                break
            times = [self._ns(x) if isinstance(x, torch.cuda.Event) else x for x in entry]
            then(record, tuple(times))
            done += 1
        del self._waiting[:done]

    def _ns(self, mark: torch.cuda.Event) -> int:
        since_ms = self._zero.elapsed_time(mark)
        when_ns = self._zero_ns + int(1e6 * since_ms)
        if since_ms > 1e3:  # it is a float32: count from nearby
            self._zero, self._zero_ns = mark, when_ns
        return when_ns

    # ---- afterwards

    @property
    def events(self) -> list[Event]:
        self._settle()
        return super().events

    @property
    def finished(self) -> list[Call]:
        self._settle()
        return super().finished

    @property
    def dropped(self) -> int:
        self._settle()
        return super().dropped

    def to_dict(self) -> dict:
        """Return the totals, as Stats does."""
        self._settle()
        return super().to_dict()
