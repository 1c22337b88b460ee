"""What each rank does, step by step, by each method. Pure: the same answer on every rank."""

import numpy as np

from ringkern import tiles
from ringkern.errors import check
from ringkern.plan import Plan
from ringkern.types import Move, Step, Work

METHODS = ("pass_kv", "pass_q", "gather_kv", "gather_q")


def check_method(method: str) -> None:
    want = f"auto or one of {', '.join(METHODS)}"
    check(method in ("auto", *METHODS), "method", want, repr(method))


def make_schedule(
    plan: Plan,
    rank: int,
    method: str = "pass_kv",
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    own_kv: np.ndarray | None = None,
) -> tuple[Step, ...]:
    """Return the steps of one rank. What no rank can see is neither sent nor computed.

    Args:
        own_kv: where this rank's K and V lie, if not packed: a table like plan.kv_runs(rank), such
            as KVCache.runs() gives.
    """
    make = {"pass_kv": _pass_kv, "pass_q": _pass_q, "gather_kv": _gather_kv, "gather_q": _gather_q}
    steps = make[method](_View(plan, rank, tiles.bounds(causal, window_size), own_kv))
    return _with_drops(steps, rank)


def pairs(step: Step) -> int:
    """Return how many visible (query, key) pairs the step computes."""
    return sum(tiles.pairs(work.spans) for work in step.work)


class _View:
    """A plan as one rank sees it under one mask."""

    def __init__(self, plan, rank, sides, own_kv):
        self.plan, self.rank, self.size = plan, rank, plan.world_size
        self._sides, self._own_kv = sides, own_kv
        self.sees = visibility(plan, *sides)  # [q_rank, kv_rank]

    def work(self, q_rank, kv_rank):
        """Return a tuple of the Work there is, if any."""
        if not self.sees[q_rank, kv_rank]:
            return ()
        own = kv_rank == self.rank and self._own_kv is not None
        k_runs = self._own_kv if own else self.plan.kv_runs(kv_rank)
        spans = tiles.make_spans(self.plan.runs(q_rank), k_runs, *self._sides)
        return (Work(q_rank, kv_rank, spans),)

    def kv(self, peer, rank):
        return Move(peer, "kv", rank, self.plan.kv_tokens(rank))

    def q(self, peer, rank):
        return Move(peer, "q", rank, self.plan.num_tokens(rank))

    def part(self, peer, rank):
        return Move(peer, "part", rank, self.plan.num_tokens(rank))

    def others(self):
        """Return the other ranks, in the order of their distance round the ring."""
        return [(self.rank + way) % self.size for way in range(1, self.size)]


def _pass_kv(view):
    """K and V go round (paper.md, Algorithm 2): at step s those of rank - s are at hand."""
    size, rank = view.size, view.rank
    goes_on = _goes_on(view.sees.T)  # [kv_rank, step]
    steps = []
    for index in range(size):
        here, coming = (rank - index) % size, (rank - index - 1) % size
        sends = [view.kv((rank + 1) % size, here)] if goes_on[here, index] else []
        recvs = [view.kv((rank - 1) % size, coming)] if goes_on[coming, index] else []
        steps.append((sends, recvs, view.work(rank, here)))
    return steps


def _pass_q(view):
    """Q goes round (paper.md, Algorithm 3): at step s the queries of rank - s are at hand.

    Their (out, lse) against this rank's keys goes straight to its owner in the next step, under
    that step's work; only the last return has nothing to hide under.
    """
    size, rank = view.size, view.rank
    goes_on = _goes_on(view.sees)  # [q_rank, step]
    steps = []
    for index in range(size + 1):
        here, coming = (rank - index) % size, (rank - index - 1) % size
        sends, recvs = [], []
        if index < size and goes_on[here, index]:
            sends.append(view.q((rank + 1) % size, here))
        if index < size and goes_on[coming, index]:
            recvs.append(view.q((rank - 1) % size, coming))
        done, helper = (rank - index + 1) % size, (rank + index - 1) % size
        if index > 1 and view.sees[done, rank]:
            sends.append(view.part(done, done))
        if index > 1 and view.sees[rank, helper]:
            recvs.append(view.part(helper, rank))
        steps.append((sends, recvs, view.work(here, rank) if index < size else ()))
    return steps


def _gather_kv(view):
    """Every rank gets all K and V that it sees, by one exchange under its own work."""
    rank, others = view.rank, view.others()
    sends = [view.kv(peer, rank) for peer in others if view.sees[peer, rank]]
    recvs = [view.kv(peer, peer) for peer in others if view.sees[rank, peer]]
    rest = [work for peer in others for work in view.work(rank, peer)]
    return [(sends, recvs, view.work(rank, rank)), ([], [], rest)]


def _gather_q(view):
    """Every rank gets the queries that see its keys, and returns (out, lse): one exchange each."""
    rank, others = view.rank, view.others()
    asked = [peer for peer in others if view.sees[peer, rank]]
    askers = [peer for peer in others if view.sees[rank, peer]]
    return [
        ([view.q(p, rank) for p in askers], [view.q(p, p) for p in asked], view.work(rank, rank)),
        ([], [], [work for peer in asked for work in view.work(peer, rank)]),
        ([view.part(p, p) for p in asked], [view.part(p, rank) for p in askers], ()),
    ]


def _goes_on(seen_by):
    """Return bool [owner, step]: does a rank more than `step` steps on need the owner's block?

    seen_by[owner, rank]: does that rank need it?
    """
    size = len(seen_by)
    ranks = np.arange(size)
    at_step = np.take_along_axis(seen_by, (ranks[:, None] + ranks[None, :]) % size, axis=1)
    goes_on = np.zeros((size, size), dtype=bool)
    goes_on[:, :-1] = np.logical_or.accumulate(at_step[:, :0:-1], axis=1)[:, ::-1]
    return goes_on


def _with_drops(steps, rank):
    """Return the Steps, each with the visiting blocks that are not needed after it."""
    last = {}
    for index, (sends, recvs, work) in enumerate(steps):
        used = [(move.kind, move.rank) for move in (*sends, *recvs)]
        used += [("kv", w.kv_rank) for w in work] + [("q", w.q_rank) for w in work]
        last |= dict.fromkeys(used, index)
    drops = [[] for _ in steps]
    for block, index in last.items():
        if block not in (("q", rank), ("part", rank)):
            drops[index].append(block)
    return tuple(
        Step(index, tuple(sends), tuple(recvs), tuple(work), tuple(drops[index]))
        for index, (sends, recvs, work) in enumerate(steps)
    )


def visibility(plan: Plan, left: int, right: int) -> np.ndarray:
    """Return bool [q_rank, kv_rank]: does any of q_rank's queries see any of kv_rank's keys?"""
    key = "visibility", left, right
    if key not in plan.memo:
        plan.memo[key] = _sees(plan, left, right)
    return plan.memo[key]


def _sees(plan, left, right):
    size = plan.world_size
    unlike = _unlike(plan)
    asks = plan.counts(range(size), unlike) > 0  # [sequences, ranks]
    cached = np.zeros_like(asks) if plan.cached is None else plan.cached[unlike] > 0
    sees = np.diag(asks.any(axis=0))  # a query sees its own key
    if left >= tiles.UNBOUNDED:
        sees |= asks.T @ cached  # and whatever is cached
    most = asks.T @ (asks | cached)
    for seq in unlike:
        if (sees == most).all():
            break
        q_runs, q_owner = _rows_of(plan.runs, size, seq)
        k_runs, k_owner = _rows_of(plan.kv_runs, size, seq)
        q, k = np.nonzero(tiles.visible(q_runs, k_runs, left, right))
        sees[q_owner[q], k_owner[k]] = True
    return sees


def _unlike(plan):
    """Return the sequences that differ in how they are sharded, the longest first.

    New sequences of one length are sharded alike, so one of each length will do: at most about
    sqrt(2 * total) of them, however many there are.
    """
    starts = [0] * len(plan.lengths) if plan.starts is None else plan.starts.tolist()
    first = {}
    for seq, (length, start) in enumerate(zip(plan.lengths, starts, strict=True)):
        first.setdefault((length, seq if start else None), seq)
    return sorted(first.values(), key=lambda seq: -plan.lengths[seq])


def _rows_of(runs, world_size, seq):
    """Return all ranks' runs of one sequence, and whose each is."""
    tables = [runs(rank) for rank in range(world_size)]
    edges = [np.searchsorted(table[:, 0], [seq, seq + 1]) for table in tables]
    rows = [table[a:b] for table, (a, b) in zip(tables, edges, strict=True)]
    return np.concatenate(rows), np.repeat(np.arange(world_size), [len(row) for row in rows])
