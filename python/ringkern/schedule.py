"""What each rank does, step by step. Pure: the same answer on every rank."""

import functools

import numpy as np

from ringkern import tiles
from ringkern.plan import Plan
from ringkern.types import Step


@functools.lru_cache(maxsize=256)
def make_schedule(
    plan: Plan, rank: int, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> tuple[Step, ...]:
    """Return the steps of one rank for pass-KV (paper.md, Algorithm 2), in order.

    At step s a rank has the K and V of rank - s at hand and passes them on to rank + 1. K and V
    that no further rank can see are not passed on, and nothing waits for them.
    """
    world_size = plan.world_size
    left, right = tiles.bounds(causal, window_size)
    needed = _needed(plan, left, right)
    mine = plan.runs(rank)
    steps = []
    for index in range(world_size):
        kv_rank = (rank - index) % world_size
        next_kv_rank = (kv_rank - 1) % world_size
        steps.append(
            Step(
                index,
                kv_rank,
                tiles.make_spans(mine, plan.runs(kv_rank), left, right),
                send_tokens=plan.num_tokens(kv_rank) if needed[kv_rank, index] else 0,
                recv_tokens=plan.num_tokens(next_kv_rank) if needed[next_kv_rank, index] else 0,
            )
        )
    return tuple(steps)


@functools.lru_cache(maxsize=64)
def _needed(plan: Plan, left: int, right: int) -> np.ndarray:
    """Return bool [kv_rank, index]: does a rank more than `index` steps on see kv_rank's keys?"""
    size = plan.world_size
    sees = _sees(plan, left, right)  # [q_rank, kv_rank]
    ranks = np.arange(size)
    # after[kv_rank, s]: the rank that has kv_rank's K and V at hand at step s, does it see any?
    after = sees[(ranks[:, None] + ranks[None, :]) % size, ranks[:, None]]
    needed = np.zeros((size, size), dtype=bool)
    needed[:, :-1] = np.logical_or.accumulate(after[:, :0:-1], axis=1)[:, ::-1]
    return needed


def _sees(plan: Plan, left: int, right: int) -> np.ndarray:
    """Return bool [q_rank, kv_rank]: is any of kv_rank's keys visible to a query of q_rank?

    Sequences of one length are sharded alike, so each length is looked at once: at most about
    sqrt(2 * total) of them, however many sequences there are.
    """
    sees = np.zeros((plan.world_size, plan.world_size), dtype=bool)
    for length in sorted(set(plan.lengths), reverse=True):
        alone = Plan(plan.world_size, (length,), plan.layout)
        tables = [alone.runs(rank) for rank in range(plan.world_size)]
        owner = np.repeat(np.arange(plan.world_size), [len(table) for table in tables])
        _, _, start, count, stride = np.concatenate(tables).T
        lo, hi = tiles.band(
            start[:, None], count[:, None], start[None], count[None], stride[None], left, right
        )
        q, k = np.nonzero(lo <= hi)
        sees[owner[q], owner[k]] = True
        if sees.all():
            break
    return sees
