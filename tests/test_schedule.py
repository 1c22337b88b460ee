"""The schedule covers the mask exactly once, balances it, and moves no byte in vain."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import schedule, tiles
from ringkern.plan import Plan
from ringkern.schedule import make_schedule
from strategies import LAYOUTS, LENGTHS, WINDOWS, WORLD_SIZES


def visible_pairs(lengths, causal, window_size):
    """Return every (query, key) by packed global index, from the mask's definition."""
    left, right = window_size
    pairs, begin = set(), 0
    for length in lengths:
        for q, k in itertools.product(range(length), repeat=2):
            seen = (left < 0 or k >= q - left) and (right < 0 or k <= q + right)
            if seen and (not causal or k <= q):
                pairs.add((begin + q, begin + k))
        begin += length
    return pairs


def computed_pairs(plan, schedules):
    """Return every (query, key) that the spans hold; fail where one is held twice."""
    pairs = set()
    for rank, steps in enumerate(schedules):
        for step in steps:
            for q_rank, kv_rank, spans, _ in step.work:
                mine, theirs = (plan.indices(r).tolist() for r in (q_rank, kv_rank))
                for q0, q1, k0, k1, lo, hi, *_ in spans.tolist():
                    for i, j in itertools.product(range(q1 - q0), range(k1 - k0)):
                        if lo <= j - i <= hi:
                            pair = mine[q0 + i], theirs[k0 + j]
                            assert pair not in pairs, f"{pair} twice, again on rank {rank}"
                            pairs.add(pair)
    return pairs


def all_schedules(plan, causal, window_size):
    return [make_schedule(plan, r, "pass_kv", causal, window_size) for r in range(plan.world_size)]


def sent(step):
    return sum(move.tokens for move in step.sends)


@given(WORLD_SIZES, LAYOUTS, LENGTHS, st.booleans(), WINDOWS)
@settings(max_examples=150)
def test_every_visible_pair_is_computed_once(world_size, layout, lengths, causal, window_size):
    plan = Plan(world_size, lengths, layout)
    schedules = all_schedules(plan, causal, window_size)
    want = visible_pairs(lengths, causal, window_size)
    assert computed_pairs(plan, schedules) == want
    counted = sum(schedule.pairs(step) for steps in schedules for step in steps)
    assert counted == len(want)


@given(WORLD_SIZES, LAYOUTS, LENGTHS, st.booleans(), WINDOWS)
@settings(max_examples=150)
def test_kv_arrives_before_it_is_used_and_no_further(
    world_size, layout, lengths, causal, window_size
):
    plan = Plan(world_size, lengths, layout)
    schedules = all_schedules(plan, causal, window_size)
    for rank, steps in enumerate(schedules):
        sender = schedules[(rank - 1) % world_size]
        has = True  # its own K and V
        for step in steps:
            assert has or not step.work, f"rank {rank} uses K, V at step {step.index} unsent"
            assert has or not step.sends
            received = sum(move.tokens for move in step.recvs)
            assert received == sent(sender[step.index])
            has = received > 0
        assert not steps[-1].sends
    for kv_rank in range(world_size):
        # Where kv_rank's K and V stop, the last rank to get them has a use for them.
        trip = [schedules[(kv_rank + s) % world_size][s] for s in range(world_size)]
        last = max((s for s in range(1, world_size) if trip[s - 1].sends), default=0)
        assert last == 0 or trip[last].work, f"K, V of {kv_rank} go on to step {last} in vain"


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("chunk, extra", [(1, 0), (4, 0), (4, 1), (7, 3), (30, 5), (64, -1)])
def test_zigzag_balances_causal_work_at_every_step(world_size, chunk, extra):
    length = 2 * world_size * chunk + extra % (2 * world_size)
    plan = Plan(world_size, (length,), "zigzag")
    schedules = all_schedules(plan, True, (-1, -1))
    # An uneven length makes some chunks one row longer: a pair of ranks does at least
    # chunk * (2 * chunk + 1) pairs then, and at most (2 * chunk + 2) * (chunk + 1).
    allowed = 0 if extra == 0 else 3 * chunk + 2
    for index in range(world_size):
        loads = [schedule.pairs(steps[index]) for steps in schedules]
        assert max(loads) - min(loads) <= allowed, f"step {index}: {loads}"


def test_contiguous_does_not_balance():
    """The balance test can fail: the layout it must not pass is far out."""
    schedules = all_schedules(Plan(3, (24,), "contiguous"), True, (-1, -1))
    loads = [schedule.pairs(steps[1]) for steps in schedules]
    assert max(loads) - min(loads) > 3 * 4 + 2


def test_contiguous_causal_sends_only_onward():
    """No query is before rank 0's keys of the next lap: rank 2's K and V never move."""
    for rank, steps in enumerate(all_schedules(Plan(3, (24,), "contiguous"), True, (-1, -1))):
        assert [sent(step) for step in steps] == {
            0: [8, 0, 0],
            1: [8, 8, 0],
            2: [0, 0, 0],
        }[rank]


def test_a_window_that_reaches_one_chunk_back_is_one_step():
    steps = make_schedule(Plan(8, (8 * 16,), "contiguous"), 5, "pass_kv", True, (15, 0))
    assert [len(step.work) for step in steps] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert [sent(step) for step in steps] == [16, 0, 0, 0, 0, 0, 0, 0]


def test_steps_cannot_be_changed():
    step = make_schedule(Plan(2, (8,)), 0)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.sends = ()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-12, 12), st.integers(-12, 12))
def test_pairs_counts_a_band(q_length, k_length, a, b):
    lo, hi = max(min(a, b), 1 - q_length), min(max(a, b), k_length - 1)
    want = sum(lo <= j - i <= hi for i, j in itertools.product(range(q_length), range(k_length)))
    row = [[0, q_length, 0, k_length, lo, hi, 1, 1]] if lo <= hi else []
    spans = np.array(row, dtype=np.int64).reshape(-1, 8)
    assert tiles.pairs(spans) == want


def test_a_million_tokens_for_128_ranks_are_small_tables():
    steps = make_schedule(Plan(128, (1_000_000,)), 77, "pass_kv")
    assert len(steps) == 128 and max(len(step.work[0].spans) for step in steps) == 3


@pytest.mark.parametrize("method", ["pass_q", "gather_q"])
def test_the_last_return_travels_under_own_work(method):
    plan = Plan(5, (50000, 30000))
    for rank in range(5):
        steps = make_schedule(plan, rank, method, causal=False)
        own = [(step, work) for step in steps for work in step.work if work.q_rank == rank]
        assert [step.index for step, _ in own] == [0, steps[-1].index]
        assert {move.kind for move in steps[-1].recvs} == {"part"}
        first, second = (tiles.pairs(work.spans) for _, work in own)
        assert abs(first - second) <= 0.05 * (first + second)


def test_work_that_no_answer_hides_under_is_whole():
    plan = Plan(5, (3,))  # of whom three have a query, and see one another
    alone = make_schedule(plan, 0, "pass_q", causal=True, window_size=(0, 0))
    assert [len(step.work) for step in alone] == [1, 0, 0, 0, 0, 0]
