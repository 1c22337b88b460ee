"""How far one rank's clock is from another's: clocks of different hosts have nothing in common."""

from collections.abc import Iterable
from typing import NamedTuple

MAX_DRIFT = 1e-3  # no clock is that far off: what looks like more is the noise of a short time


class Ping(NamedTuple):
    """A message to the reference and its answer, ns: the outer times by the own clock."""

    sent_ns: int
    received_ns: int  # by the reference's clock,
    replied_ns: int  # as is this
    returned_ns: int

    @property
    def trip_ns(self) -> int:
        """How long the messages were under way, both together."""
        return (self.returned_ns - self.sent_ns) - (self.replied_ns - self.received_ns)


class Offset(NamedTuple):
    """What to add to a clock's time at_ns to have the reference's, and how far off that may be."""

    at_ns: int
    offset_ns: int
    error_ns: int


def estimate(pings: Iterable[Ping]) -> Offset:
    """Return the offset by the ping of the least round trip.

    The true one is at most half that round trip away, however unlike the two ways were.
    """
    best = min(pings, key=lambda ping: ping.trip_ns)
    there, back = best.received_ns - best.sent_ns, best.returned_ns - best.replied_ns
    middle = (best.sent_ns + best.returned_ns) // 2
    return Offset(middle, (there - back) // 2, (best.trip_ns + 1) // 2)


class Alignment(NamedTuple):
    """Offsets measured early and late: in between, the offset changes evenly."""

    start: Offset
    end: Offset

    def to_reference(self, ns: int) -> int:
        """Return the reference's time at `ns` of the own clock. Never runs backwards."""
        elapsed = self.end.at_ns - self.start.at_ns
        drift = self.end.offset_ns - self.start.offset_ns
        if elapsed <= 0 or abs(drift) > MAX_DRIFT * elapsed:
            return ns + min(self.start, self.end, key=lambda offset: offset.error_ns).offset_ns
        return ns + self.start.offset_ns + drift * (ns - self.start.at_ns) // elapsed
