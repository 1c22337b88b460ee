"""Layouts, plans and placement: every position has one rank. No torch, no processes."""

import numpy as np
import pytest
import ringkern
from hypothesis import given
from ringkern import shard
from ringkern.plan import Plan
from ringkern.types import Chunk
from strategies import LAYOUTS, LENGTHS, WORLD_SIZES


@given(WORLD_SIZES, LAYOUTS, LENGTHS)
def test_every_position_has_one_rank(world_size, layout, lengths):
    plan = Plan(world_size, lengths, layout)
    everywhere = np.concatenate([plan.indices(rank) for rank in range(world_size)])
    assert sorted(everywhere.tolist()) == list(range(sum(lengths)))


@given(WORLD_SIZES, LAYOUTS, LENGTHS)
def test_ranks_differ_by_at_most_one_token_per_sequence(world_size, layout, lengths):
    for length in lengths:
        plan = Plan(world_size, (length,), layout)
        counts = [plan.num_tokens(rank) for rank in range(world_size)]
        assert max(counts) - min(counts) <= 1, counts


@given(WORLD_SIZES, LAYOUTS, LENGTHS)
def test_positions_follow_the_indices(world_size, layout, lengths):
    plan = Plan(world_size, lengths, layout)
    position_of = np.concatenate([np.arange(length) for length in lengths])
    for rank in range(world_size):
        assert (plan.positions(rank) == position_of[plan.indices(rank)]).all()
        assert plan.positions(rank).dtype == plan.indices(rank).dtype == np.int64


@given(WORLD_SIZES, LENGTHS)
def test_shard_takes_the_rank_s_rows(world_size, lengths):
    plan = ringkern.Placement(world_size).prefill(dict(enumerate(lengths)))
    x = np.arange(3 * plan.total).reshape(plan.total, 3)
    for rank in range(world_size):
        assert (plan.shard(x, rank) == x[plan.indices(rank)]).all()


@pytest.mark.parametrize(
    "layout, want",
    [
        ("contiguous", [(Chunk(0, 5),), (Chunk(5, 5),), (Chunk(10, 4),)]),
        (
            "zigzag",
            [
                (Chunk(0, 3), Chunk(12, 2)),
                (Chunk(3, 3), Chunk(10, 2)),
                (Chunk(6, 4),),  # its two chunks are neighbours
            ],
        ),
        ("striped", [(Chunk(0, 5, 3),), (Chunk(1, 5, 3),), (Chunk(2, 4, 3),)]),
    ],
)
def test_chunks_by_hand(layout, want):
    assert [shard.chunks(layout, 14, 3, rank) for rank in range(3)] == want


def test_fewer_positions_than_ranks():
    plan = Plan(5, (2, 1))
    assert [plan.num_tokens(rank) for rank in range(5)] == [2, 1, 0, 0, 0]
    assert plan.positions(4).tolist() == []


def test_plans_of_one_history_are_alike():
    one, other = (ringkern.Placement(4).prefill({"a": 5000, "b": 37}) for _ in range(2))
    assert repr(one) == repr(other) and one.sequences == ("a", "b")
    for rank in range(4):
        assert (one.runs(rank) == other.runs(rank)).all()
        assert (one.runs(rank) == Plan(4, (5000, 37)).runs(rank)).all()


def test_a_plan_refuses_what_it_cannot_be():
    with pytest.raises(ringkern.ArgumentError, match="layout: want one of.*spiral"):
        Plan(2, (3,), "spiral")
    with pytest.raises(ringkern.ArgumentError, match="rank: want 0 to 1, got 2"):
        Plan(2, (3,)).positions(2)
    with pytest.raises(ringkern.ArgumentError, match="starts: want None"):
        Plan(2, (3,), starts=np.array([4]))
    for plan in (Plan(2, (3,)), ringkern.Placement(2).prefill({"a": 3})):
        for tell in (plan.runs, plan.kv_runs, plan.num_tokens, plan.kv_tokens, plan.indices):
            tell(1)  # so that what is kept does not answer for it
            for rank in (2, -1, 1.0, [1], None):
                with pytest.raises(ringkern.ArgumentError, match="rank: want 0 to 1, got"):
                    tell(rank)
    with pytest.raises(ringkern.ArgumentError, match="x: want 3 rows"):
        Plan(2, (3,)).shard(np.zeros(4), 0)
    for lengths in ((0, -3), (), (1.5,), 7):
        with pytest.raises(ringkern.ArgumentError, match="lengths: want a tuple of ints"):
            Plan(2, lengths)
    assert Plan(2, [8, 1]).lengths == (8, 1)
    with pytest.raises(ringkern.ArgumentError, match="lengths: want a dict"):
        ringkern.Placement(2).prefill([5, 3])
    for size in (0, -1, 1.5):
        with pytest.raises(ringkern.ArgumentError, match="world_size"):
            ringkern.Placement(size)
