"""What each rank does, step by step, by each method. Pure: the same answer on every rank."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from ringkern import tiles
from ringkern.errors import check
from ringkern.plan import Plan
from ringkern.types import FIRST_HALF, SECOND_HALF, WHOLE, Move, Step, Work

METHODS = ("pass_kv", "pass_q", "gather_kv", "gather_q")
MOVE_KV = ("pass_kv", "gather_kv")  # those by which K and V travel, and not queries


def check_method(method: str) -> None:
    want = f"auto or one of {', '.join(METHODS)}"
    check(method == "auto" or method in OUTLINES, "method", want, repr(method))


def make_schedule(
    plan: Plan,
    rank: int,
    method: str = "pass_kv",
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    own_kv: np.ndarray | None = None,
    fixed: bool = False,
    order: tuple[int, ...] | None = None,
) -> tuple[Step, ...]:
    """Return the steps of one rank. What no rank can see is neither sent nor computed.

    Args:
        fixed: keep halves of work that have nothing to do, so that plans in which the same ranks
            see each other have the same steps.
        own_kv: where this rank's K and V lie, if not packed: a table like plan.kv_runs(rank), such
            as KVCache.runs() gives.
        order: the ranks as the ring goes round, the same on every rank; None: by number.
    """
    sides = tiles.bounds(causal, window_size)
    steps = outline(method, rank, visibility(plan, *sides), order)
    return fill(plan, rank, steps, sides, own_kv, fixed)


class Outline(NamedTuple):
    """A step without sizes and spans: what follows from the method and who sees whom."""

    sends: tuple[tuple[int, str, int], ...]  # (peer, kind, rank), as in types.Move
    recvs: tuple[tuple[int, str, int], ...]
    work: tuple[tuple[int, int, int], ...]  # (q_rank, kv_rank, WHOLE or which half of it)
    drops: tuple[tuple[str, int], ...]


def outline(
    method: str, rank: int, sees: np.ndarray, order: tuple[int, ...] | None = None
) -> tuple[Outline, ...]:
    """Return the steps of one rank in outline.

    sees as visibility() returns it, order as make_schedule() takes it.
    """
    return _outline(method, rank, len(sees), sees.tobytes(), order)


# Plans of a batch that decodes mostly differ in sizes alone. Few entries, as those of large rings
# are large.
@functools.lru_cache(maxsize=64)
def _outline(method, rank, size, sees, order):
    order = tuple(range(size)) if order is None else order
    each_once = sorted(order) == list(range(size))
    check(each_once, "order", f"each of the {size} ranks once", order)
    return _with_drops(OUTLINES[method](_View(rank, size, sees, order)), rank)


def fill(plan: Plan, rank: int, steps, sides, own_kv=None, fixed=False) -> tuple[Step, ...]:
    """Return outlined steps with the sizes and spans of a plan; sides as tiles.bounds() gives."""

    def moves(some):
        return tuple(
            Move(*move, (plan.kv_tokens if move[1] == "kv" else plan.num_tokens)(move[2]))
            for move in some
        )

    work = [work for step in steps for work in step.work]
    spans = iter(make_spans(plan, work, sides, {} if own_kv is None else {rank: own_kv}))

    def works(some):
        each = [(*work, next(spans)) for work in some]
        # Work that is too little for halves is all in one of them.
        keep = [len(table) or not half or fixed for _, _, half, table in each]
        kept = itertools.compress(each, keep)
        return tuple(Work(q_rank, kv_rank, table, half) for q_rank, kv_rank, half, table in kept)

    return tuple(
        Step(index, moves(step.sends), moves(step.recvs), works(step.work), step.drops)
        for index, step in enumerate(steps)
    )


def make_spans(plan: Plan, work, sides, own: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Return the spans of each outlined work. own: K and V that do not lie packed, by rank."""
    pairs = list(dict.fromkeys((q_rank, kv_rank) for q_rank, kv_rank, _ in work))
    ranks = [rank for rank in dict.fromkeys(kv_rank for _, kv_rank in pairs) if rank not in own]
    if sides[0] >= tiles.UNBOUNDED:
        packed = plan.kv_blocks(ranks)
    else:
        packed = [plan.kv_runs(rank) for rank in ranks]
    k_runs = own | dict(zip(ranks, packed, strict=True))
    tables = [(plan.runs(q_rank), k_runs[kv_rank]) for q_rank, kv_rank in pairs]
    whole = dict(zip(pairs, tiles.make_spans_each(tables, *sides), strict=True))
    halves = {(q, k): tiles.halve(whole[q, k]) for q, k, half in work if half == FIRST_HALF}
    return [halves[q, k][half - 1] if half else whole[q, k] for q, k, half in work]


def pairs(step: Step) -> int:
    """Return how many visible (query, key) pairs the step computes."""
    return sum(tiles.pairs(work.spans) for work in step.work)


class _View:
    """Who sees whom, as one rank sees it.

    Ranks here are places in the ring's order: + 1 is the next one. What the methods return for an
    outline has the ranks' own numbers.
    """

    def __init__(self, rank, size, sees, order):
        self.rank, self.size, self._order = order.index(rank), size, order
        sees = np.frombuffer(sees, dtype=bool).reshape(size, size)
        self.sees = sees[np.ix_(order, order)]  # [q_rank, kv_rank]

    def work(self, q_rank, kv_rank, share=WHOLE):
        """Return a tuple of the work there is, if any."""
        some = self.sees[q_rank, kv_rank]
        return ((self._order[q_rank], self._order[kv_rank], share),) if some else ()

    def own_work(self):
        """Return this rank's own work, before others' queries come and while their answers do.

        In halves, so that both transfers have work to hide under. All at first if no answer comes.
        """
        if any(self.sees[self.rank, peer] for peer in self.others()):
            halves = FIRST_HALF, SECOND_HALF
            return tuple(self.work(self.rank, self.rank, half) for half in halves)
        return self.work(self.rank, self.rank), ()

    def kv(self, peer, rank):
        return self._order[peer], "kv", self._order[rank]

    def q(self, peer, rank):
        return self._order[peer], "q", self._order[rank]

    def part(self, peer, rank):
        return self._order[peer], "part", self._order[rank]

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
    that step's work; the last return under a half of the owner's work that was left for it.
    """
    size, rank = view.size, view.rank
    goes_on = _goes_on(view.sees)  # [q_rank, step]
    first, second = view.own_work()
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
        work = first if index == 0 else second if index == size else view.work(here, rank)
        steps.append((sends, recvs, work))
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
    first, second = view.own_work()
    return [
        ([view.q(p, rank) for p in askers], [view.q(p, p) for p in asked], first),
        ([], [], [work for peer in asked for work in view.work(peer, rank)]),
        ([view.part(p, p) for p in asked], [view.part(p, rank) for p in askers], second),
    ]


# method -> a function of a _View that returns the steps of its rank, (sends, recvs, work) each.
OUTLINES = dict(zip(METHODS, (_pass_kv, _pass_q, _gather_kv, _gather_q), strict=True))


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
    """Return the Outlines, each with the visiting blocks that are not needed after it."""
    last = {}
    for index, (sends, recvs, work) in enumerate(steps):
        used = [(kind, whose) for _, kind, whose in (*sends, *recvs)]
        used += [("kv", kv_rank) for _, kv_rank, _ in work]
        used += [("q", q_rank) for q_rank, _, _ in work]
        last |= dict.fromkeys(used, index)
    drops = [[] for _ in steps]
    for block, index in last.items():
        if block not in (("q", rank), ("part", rank)):
            drops[index].append(block)
    return tuple(
        Outline(tuple(sends), tuple(recvs), tuple(work), tuple(drops[index]))
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
    asks = plan.counts(np.arange(size), unlike) > 0  # [sequences, ranks]
    cached = np.zeros_like(asks) if plan.cached is None else plan.cached[unlike] > 0
    sees = np.diag(asks.any(axis=0))  # a query sees its own key
    if left >= tiles.UNBOUNDED:
        sees |= asks.T @ cached  # and whatever is cached
    if sees.all():
        return sees
    most = asks.T @ (asks | cached)
    if (sees == most).all():
        return sees
    lengths = np.asarray(plan.lengths)[unlike]
    for seq in unlike[np.argsort(-lengths, kind="stable")].tolist():  # the longest first
        q_runs, q_owner = _rows_of(plan.runs, size, seq)
        k_runs, k_owner = _rows_of(plan.kv_runs, size, seq)
        q, k = np.nonzero(tiles.visible(q_runs, k_runs, left, right))
        sees[q_owner[q], k_owner[k]] = True
        if (sees == most).all():
            break
    return sees


def _unlike(plan):
    """Return the sequences that differ in how they are sharded, int64.

    New sequences of one length are sharded alike where the ranks have the same places, which they
    have by turns: one of each will do.
    """
    lengths = np.asarray(plan.lengths)
    new = np.ones(len(lengths), dtype=bool) if plan.starts is None else plan.starts == 0
    of_new = np.flatnonzero(new)
    if not len(of_new):
        return np.arange(len(lengths))
    kinds = lengths[of_new, None]
    if plan.places is not None:
        kinds = np.concatenate([kinds, plan.places[of_new]], axis=1)
    _, first = np.unique(kinds, axis=0, return_index=True)
    return np.concatenate([of_new[first], np.flatnonzero(~new)])


def _rows_of(runs, world_size, seq):
    """Return all ranks' runs of one sequence, and whose each is."""
    tables = [runs(rank) for rank in range(world_size)]
    edges = [np.searchsorted(table[:, 0], [seq, seq + 1]) for table in tables]
    rows = [table[a:b] for table, (a, b) in zip(tables, edges, strict=True)]
    return np.concatenate(rows), np.repeat(np.arange(world_size), [len(row) for row in rows])
