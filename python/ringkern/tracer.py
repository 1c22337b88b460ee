"""RINGKERN_TRACE: keeps a ring's events, and has rank 0 write those of all ranks when it closes."""

import atexit
import contextlib
import json
import os
import socket
import sys
import time
import warnings

import torch

import ringkern
from ringkern import env, trace
from ringkern.clock import Alignment, Offset, Ping, estimate
from ringkern.errors import ProtocolError, RingkernError
from ringkern.stats import Leg, Stats

KEPT = 200_000  # events per rank; viewers choke on a few million
PINGS = 16
MAGIC = 0x72696E67_74726163  # so that no other message is taken for the tracer's
LEGS = 1 << 17  # that a link keeps
PART_BYTES = 4096 + 256 * (2 * KEPT + LEGS)  # the most that a rank's part of the file may take


def make_tracer(link, stats: Stats, legs=list) -> "Tracer | None":
    """Return the tracer of a new ring, None where RINGKERN_TRACE is not set.

    Raises:
        ArgumentError: the file cannot be written; nothing was sent.
        TransportError: a rank is gone or late.
    """
    path = env.trace()
    return Tracer(path, link, stats, legs=legs) if path else None


class Tracer:
    """One rank's part of a trace. Every rank makes one, then calls finish().

    Args:
        path: what rank 0 writes; absolute.
        link: the ring's transport, for host memory.
        stats: whose events these are; keeps more of them from now on.
        clock: what the events' times were taken from, ns.
        legs: returns those of a ring of GPUs over TCP since it was asked last, as DeviceLink.legs().
    """

    def __init__(self, path: str, link, stats: Stats, clock=time.monotonic_ns, legs=list):
        self._path, self._link, self._stats, self._clock = path, link, stats, clock
        self._take_legs, self._legs = legs, []
        self._pid, self._finished = os.getpid(), False
        self._zero_ns, self._ring = clock(), int.from_bytes(os.urandom(7), "little")
        stats.keep(KEPT)
        legs()  # recorded from now on
        self._start = self._end = self._measure_offset()
        atexit.register(self._at_exit)

    def finish(self) -> None:
        """Write the trace: rank 0 the file, once every rank is here. Never raises.

        Where the ring failed, or a rank does not come within the ring's timeout, each rank writes
        its own part beside the file instead, with ".rankN" behind the name, and warns.
        """
        if self._finished or os.getpid() != self._pid:  # a forked child has no part in it
            return
        self._finished = True
        atexit.unregister(self._at_exit)
        parts, failure, suffix = [], None, ""
        try:
            parts = self._gather()
        except Exception as error:  # of whatever kind: close() goes on
            failure = f"{type(error).__name__}: {error}"
            suffix = f".rank{self._link.rank}"
            with contextlib.suppress(Exception):  # the others need not wait for this rank
                self._link.abort(f"its trace could not be put together: {failure}"[:500])
        try:
            if failure:
                parts = [self._part()]
            if parts:
                self._write(parts, failure, suffix)
        except Exception as error:
            self._warn(f"no trace written to {self._path}{suffix}: {error}")

    def _write(self, parts, failure, suffix) -> None:
        about = {
            "version": ringkern.__version__,
            "world_size": self._link.world_size,
            "ring": f"{self._ring:014x}",
            "failure": failure,
            "ranks": [facts for facts, _ in parts],
        }
        name = trace.write(self._path, (text for _, text in parts), about, suffix)
        if failure:
            self._warn(f"this rank's part alone is in {name}, as not all came together: {failure}")

    def _warn(self, text: str) -> None:
        warnings.warn(
            f"RINGKERN_TRACE, rank {self._link.rank}: {text}", RuntimeWarning, stacklevel=4
        )

    def _at_exit(self) -> None:
        """Finish for a program that ends without close()."""
        if os.getpid() != self._pid:
            return
        error = getattr(sys, "last_value", None)  # what the interpreter ends with, if not well
        if error is not None:  # then the others are still in a call: they are told, not asked
            self._link.abort(
                f"rank {self._link.rank} ended with {type(error).__name__}: {error}"[:500]
            )
        elif self._link.name == "local" and self._link.world_size > 1:
            self._link.abort("the program ended and left its rings open")  # no threads any more
        self.finish()

    def _part(self) -> tuple[dict, str]:
        """Return this rank's facts, and its events as text."""
        offsets = self._start, self._end
        self._legs += [Leg(*leg) for leg in self._take_legs()]  # kept, as a part may be made again
        events, legs = self._stats.events, self._legs
        facts = {
            "rank": self._link.rank,
            "world_size": self._link.world_size,
            "host": socket.gethostname(),
            "pid": self._pid,
            "events": len(events),
            "dropped": self._stats.dropped,
            "clock_offset_us": [offset.offset_ns / 1e3 for offset in offsets],
            "clock_error_us": [offset.error_ns / 1e3 for offset in offsets],
        }
        alignment = Alignment(*offsets)
        kept = events, self._stats.finished, legs
        text = trace.render(facts, *kept, alignment, self._zero_ns)
        return facts, text

    # ---- between the ranks. Rank 0 has the clock that counts, and the others turn to it in order.

    def _measure_offset(self) -> Offset:
        """Return what to add to this rank's clock to have rank 0's. Every rank must call it."""
        self._meet()
        pings = []
        for rank in self._others if self._link.rank == 0 else [0]:
            for _ in range(PINGS):
                message = self._message(MAGIC, 0, 0)
                if self._link.rank == 0:
                    self._exchange([], [(rank, message)])
                    self._check(rank, message)
                    message[1] = self._clock()
                    message[2] = self._clock()
                    self._exchange([(rank, message)], [])
                else:
                    answer = self._message(0, 0, 0)
                    sent_ns = self._clock()
                    self._exchange([(rank, message)], [(rank, answer)])
                    returned_ns = self._clock()
                    self._check(rank, answer)
                    pings.append(Ping(sent_ns, int(answer[1]), int(answer[2]), returned_ns))
        return estimate(pings) if pings else Offset(self._clock(), 0, 0)

    def _meet(self) -> None:
        """Return when every rank is here; all take rank 0's zero of time, and name of the ring."""
        mine = self._message(MAGIC, self._zero_ns, self._ring)
        if self._link.rank == 0:
            theirs = [(rank, self._message(0, 0, 0)) for rank in self._others]
            self._exchange([], theirs)
            self._exchange([(rank, mine) for rank in self._others], [])
        else:
            theirs = [(0, self._message(0, 0, 0))]
            self._exchange([(0, mine)], theirs)
        for rank, message in theirs:
            self._check(rank, message)
        if self._link.rank:
            self._zero_ns, self._ring = (int(x) for x in theirs[0][1][1:])

    def _gather(self) -> list[tuple[dict, str]]:
        """Return all ranks' parts on rank 0; none on the others, once rank 0 has theirs."""
        self._end = self._measure_offset()
        if self._link.rank:
            facts, text = self._part()
            data = f"{json.dumps(facts)}\n{text}".encode()
            part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._exchange([(0, self._message(MAGIC, len(data), 0)), (0, part)], [])
            taken = self._message(0, 0, 0)
            self._exchange([], [(0, taken)])
            self._check(0, taken)
            return []
        sizes = [(rank, self._message(0, 0, 0)) for rank in self._others]
        self._exchange([], sizes)
        parts = []
        for rank, size in sizes:
            self._check(rank, size, 1, PART_BYTES)
            room = torch.empty(int(size[1]), dtype=torch.uint8, device="cpu")
            parts.append((rank, room))
        self._exchange([], parts)
        found = [_split(part) for _, part in parts]
        with contextlib.suppress(RingkernError):  # a rank that is not told keeps its part as well
            self._exchange([(rank, self._message(MAGIC, 0, 0)) for rank in self._others], [])
        return [self._part(), *found]

    @property
    def _others(self) -> range:
        return range(1, self._link.world_size)

    def _message(self, *words: int) -> torch.Tensor:
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    def _exchange(self, sends, recvs) -> None:
        if sends or recvs:
            self._link.exchange(sends, recvs).wait()

    def _check(self, rank, message, low=-(2**63), high=2**63) -> None:
        if int(message[0]) != MAGIC or not low <= int(message[1]) <= high:
            raise ProtocolError(
                f"rank {rank} sent what is no message of a trace: {message.tolist()}. Do all ranks "
                "close their rings at the same point?"
            )


def _split(part: torch.Tensor) -> tuple[dict, str]:
    facts, _, text = part.numpy().tobytes().decode().partition("\n")
    return json.loads(facts), text
