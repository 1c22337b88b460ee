"""Clocks that were made up: what the estimate says of them, and how far off it may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringkern.clock import Alignment, Offset, Ping, estimate

SECOND = 10**9


class MadeUp:
    """A clock that is `offset` ns and `drift` behind the reference, whose time is the true one."""

    def __init__(self, offset, drift):
        self.offset, self.drift = offset, drift

    def read(self, true_ns):
        return round((true_ns - self.offset) / (1 + self.drift))

    def ping(self, true_ns, there_ns, held_ns, back_ns):
        received = true_ns + there_ns
        returned = received + held_ns + back_ns
        return Ping(self.read(true_ns), received, received + held_ns, self.read(returned))

    def pings(self, true_ns, trips):
        trips = list(trips)
        return [self.ping(true_ns + i * 10**6, *trip) for i, trip in enumerate(trips)]


TRIPS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1
)


@given(st.integers(-(10**18), 10**18), st.floats(-5e-4, 5e-4), TRIPS)
def test_the_true_offset_is_within_the_uncertainty(offset, drift, trips):
    clock = MadeUp(offset // 10**9, drift)
    found = estimate(clock.pings(5 * SECOND, trips))
    true = clock.offset + found.at_ns * (1 + clock.drift) - found.at_ns
    assert abs(found.offset_ns - true) <= found.error_ns + 2000  # what drifts in a ping, and rounds
    assert found.error_ns <= min(there + back for there, _, back in trips) // 2 + 1000


def test_the_least_round_trip_counts():
    clock = MadeUp(3 * SECOND, 0.0)
    trips = [(900_000, 5, 100), (20_000, 7, 30_000), (100, 10**9, 800_000)]
    found = estimate(clock.pings(SECOND, trips))
    assert found.error_ns == 25_000
    assert found.offset_ns == 3 * SECOND - 5_000  # half of how unlike the two ways were


@pytest.mark.parametrize("offset, drift", [(7 * SECOND, 1e-4), (-SECOND, -2e-4), (0, 0.0)])
def test_between_two_measurements_the_drift_is_followed(offset, drift):
    clock = MadeUp(offset, drift)
    ends = [estimate(clock.pings(at, [(9000, 5, 20000)] * 3)) for at in (SECOND, 61 * SECOND)]
    alignment = Alignment(*ends)
    for true in range(SECOND, 61 * SECOND, 7 * SECOND):
        assert abs(alignment.to_reference(clock.read(true)) - true) <= ends[0].error_ns + 1000
    constant = Alignment(ends[0], ends[0]).to_reference(clock.read(60 * SECOND))
    assert abs(constant - 60 * SECOND) >= abs(drift) * 50 * SECOND, "no drift to follow"


def test_noise_over_a_short_time_is_no_drift():
    start, end = Offset(0, 400_000, 500_000), Offset(100_000, -100_000, 200_000)
    alignment = Alignment(start, end)
    assert alignment.to_reference(1000) == 1000 - 100_000, "the more exact of the two"


@given(
    st.integers(-(10**6), 10**6),
    st.integers(-(10**6), 10**6),
    st.integers(0, 10**10),
    st.lists(st.integers(0, 10**10), min_size=2),
)
def test_time_never_runs_backwards(first, last, elapsed, times):
    alignment = Alignment(Offset(0, first, 10), Offset(elapsed, last, 20))
    aligned = [alignment.to_reference(ns) for ns in sorted(times)]
    assert aligned == sorted(aligned)
