"""What a call will take by each method, in microseconds, and the choice between them. Pure."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ringkern import tiles
from ringkern.plan import Plan
from ringkern.schedule import METHODS, make_spans, outline, visibility
from ringkern.types import Hardware, Problem

KINDS = "kv", "q", "part"  # of blocks on the wire


@dataclass(frozen=True)
class Choice:
    """Which method a call takes, and why.

    Attributes:
        method: one of schedule.METHODS.
        reason: one line.
        predicted_us: by method.
    """

    method: str
    reason: str
    predicted_us: dict[str, float]


def block_bytes(kind: str, tokens, problem: Problem, partial_itemsize: int = 4):
    """Return the bytes of one block on the wire: "kv", "q" or "part" (out and a float32 lse).

    tokens: an int, or int64 of any shape for as many blocks.
    """
    itemsize = 4 if problem.dtype == "float32" else 2
    per_token = {
        "kv": problem.nheads_k * (problem.headdim + problem.headdim_v) * itemsize,
        "q": problem.nheads * problem.headdim * itemsize,
        "part": problem.nheads * (problem.headdim_v * partial_itemsize + 4),
    }
    return problem.batch * tokens * per_token[kind]


def attend_us(spans: np.ndarray, problem: Problem, hardware: Hardware) -> np.ndarray:
    """Return the time of each span, float64 [2, n]: with all ranks busy, and with this one alone.

    A fixed cost, and 2 * pairs * nheads * (headdim + headdim_v) FLOPs at the rate that was measured
    for so many query rows: few rows wait for K and V to be read.
    """
    asked = np.log(spans[:, 1] - spans[:, 0])
    heads = problem.nheads * (problem.headdim + problem.headdim_v)
    flops = 2.0 * tiles.counts(spans) * heads * problem.batch
    found = []
    for table in (hardware.attend_tflops, hardware.alone_tflops or hardware.attend_tflops):
        rows, rates = (np.array(x, dtype=float) for x in zip(*table, strict=True))
        rate = np.interp(asked, np.log(rows), rates)
        found.append(flops / rate / 1e6 + hardware.span_us)
    return np.array(found)


def steps_us(
    plan: Plan,
    problem: Problem,
    hardware: Hardware,
    methods: tuple[str, ...] = METHODS,
    partial_itemsize: int = 4,
    order: tuple[int, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Return what each step takes by each method, float64 [steps, ranks, 2]: (attend, exchange).

    attend holds the merges too. Of a large ring, some ranks are looked at. order as
    schedule.make_schedule() takes it.
    """
    sides = tiles.bounds(problem.causal, problem.window_size)
    sees = visibility(plan, *sides)
    layout = _layout(methods, plan.world_size, sees.tobytes(), order)
    works = _works_us(make_spans(plan, layout.works, sides, {}), problem, hardware)
    crowded, alone = (layout.attended.add(us) for us in works)
    sizes = _sizes(plan, problem, partial_itemsize).ravel()
    moved = layout.sent, layout.received, layout.parts
    sent, received, parts = (entries.add(sizes) for entries in moved)
    exchange = np.maximum(sent, received) / hardware.link_gb_s / 1e3
    exchange += hardware.latency_us * layout.talks
    merge = parts / hardware.merge_gb_s / 1e3
    each = np.stack([crowded, alone, merge, exchange])
    edges = np.cumsum(layout.steps)[:-1]
    return dict(zip(methods, map(_together, np.split(each, edges, axis=1)), strict=True))


class _Entries(NamedTuple):
    """Which amounts come together in which cell: a step of a method on a rank."""

    cells: np.ndarray  # int64 [n]
    index: np.ndarray  # int64 [n], of the amounts
    shape: tuple[int, int]  # steps of all methods, one method's after another's; ranks

    def add(self, amounts: np.ndarray) -> np.ndarray:
        """Return the sum of each cell's amounts, float64 [steps, ranks]."""
        found = np.bincount(self.cells, amounts[self.index], self.shape[0] * self.shape[1])
        return found.reshape(self.shape)


class _Layout(NamedTuple):
    """The outlines of all methods as indices: what is alike in plans with the same visibility."""

    works: list[tuple[int, int, int]]  # as in schedule.Outline, each once
    attended: _Entries  # of the works
    sent: _Entries  # of the blocks as _sizes() has them, as the next two
    received: _Entries
    parts: _Entries  # that are received, and merged
    talks: np.ndarray  # bool [steps, ranks]: does any message travel?
    steps: list[int]  # of each method


# A batch smaller than the ring has as many visibilities as there are ranks, by turns. An entry has
# 70 KB for 16 ranks, 1.2 MB for 256.
@functools.lru_cache(maxsize=64)
def _layout(methods, size, sees, order):
    sees = np.frombuffer(sees, dtype=bool).reshape(size, size)
    ranks = _sample(size)
    works: dict[tuple[int, int, int], int] = {}
    work, sent, received, parts, steps = [], [], [], [], []
    for method in methods:
        each = [outline(method, rank, sees, order) for rank in ranks]
        before = sum(steps) * len(ranks)
        steps.append(len(each[0]))
        for cell, step in enumerate(itertools.chain(*zip(*each, strict=True)), before):
            work += [(cell, works.setdefault(some, len(works))) for some in step.work]
            sent += [(cell, KINDS.index(kind) * size + rank) for _, kind, rank in step.sends]
            for _, kind, rank in step.recvs:
                received.append((cell, KINDS.index(kind) * size + rank))
                if kind == "part":
                    parts.append(received[-1])
    shape = sum(steps), len(ranks)
    talks = np.zeros(shape, dtype=bool)
    talks.ravel()[[cell for cell, _ in (*sent, *received)]] = True
    entries = (
        _Entries(*np.array(pairs, dtype=np.int64).reshape(-1, 2).T, shape)
        for pairs in (work, sent, received, parts)
    )
    return _Layout(list(works), *entries, talks, steps)


def _works_us(spans, problem, hardware):
    """Return the time of each work, given by its spans, float64 [2, works], as attend_us()."""
    if not spans:
        return np.zeros((2, 0))
    of = np.arange(len(spans)).repeat([len(table) for table in spans])
    each = attend_us(np.concatenate(spans), problem, hardware)
    return np.array([np.bincount(of, us, len(spans)) for us in each])


def _together(us):
    """Return [steps, ranks, (attend, exchange)] of [(crowded, alone, merge, exchange), steps, ranks].

    A rank is slowed by another one for as long as that is busy as well.
    """
    crowded, alone, merge, exchange = us
    busy = np.minimum(1.0, alone[:, None, :] / np.maximum(alone, 1e-9)[:, :, None])
    share = (busy.sum(axis=2) - busy.diagonal(axis1=1, axis2=2)) / max(1, alone.shape[1] - 1)
    return np.stack([alone + share * (crowded - alone) + merge, exchange], axis=2)


def _sizes(plan, problem, partial_itemsize):
    """Return the bytes of each rank's block, int64 [kinds, ranks]."""
    ranks = range(plan.world_size)
    kv, q = (
        np.array([count(rank) for rank in ranks]) for count in (plan.kv_tokens, plan.num_tokens)
    )
    each = zip(KINDS, (kv, q, q), strict=True)
    return np.array([block_bytes(kind, tokens, problem, partial_itemsize) for kind, tokens in each])


def predict_us(
    plan: Plan,
    problem: Problem,
    hardware: Hardware,
    methods: tuple[str, ...] = METHODS,
    order: tuple[int, ...] | None = None,
    partial_itemsize: int = 4,
) -> dict[str, float]:
    """Return the time of one call by each method: the slowest rank of each step.

    A step's messages travel under its work, from which they take a share of their time: contention.
    After work, ranks wait for one another: step_us, and no longer than they worked.
    """

    def total(us):
        attend, exchange = us[..., 0], us[..., 1]
        late = hardware.contention * exchange + np.minimum(hardware.step_us, attend)
        return float(np.maximum(exchange, attend + late).max(axis=1).sum())

    steps = steps_us(plan, problem, hardware, methods, partial_itemsize, order)
    return {method: total(us) for method, us in steps.items()}


# A gather holds K and V, or queries and their parts, of all ranks at once, where the ring methods
# need two buffers however many ranks there are. From so many bytes on it must be faster by so much,
# and by as much again for each doubling.
GATHER_BYTES = 1 << 20
GATHER_GAIN = 0.02


def choose(
    plan: Plan,
    problem: Problem,
    hardware: Hardware,
    order: tuple[int, ...] | None = None,
    partial_itemsize: int = 4,
) -> Choice:
    """Return the method with the least predicted time; a gather must be worth what it holds."""
    if plan.world_size == 1:
        return Choice("pass_kv", "one rank: nothing travels", dict.fromkeys(METHODS, 0.0))
    predicted = predict_us(plan, problem, hardware, METHODS, order, partial_itemsize)
    kv_tokens = sum(plan.kv_tokens(rank) for rank in range(plan.world_size))
    both = (block_bytes(kind, plan.total, problem, partial_itemsize) for kind in ("q", "part"))
    queries = sum(both)
    held = {"gather_kv": block_bytes("kv", kv_tokens, problem), "gather_q": queries}
    gain = {m: GATHER_GAIN * (held.get(m, 0) // GATHER_BYTES).bit_length() for m in METHODS}
    best = min(METHODS, key=lambda method: predicted[method] * (1 + gain[method]))
    others = ", ".join(f"{m} {us:.0f}" for m, us in predicted.items() if m != best)
    reason = f"{best} {predicted[best]:.0f} us predicted; {others}"
    fastest = min(METHODS, key=predicted.__getitem__)
    if gain[fastest] > gain[best]:
        mib = held[fastest] / (1 << 20)
        reason += f"; {fastest} holds {mib:.1f} MiB, and is to save {gain[fastest]:.0%} for it"
    return Choice(best, reason, predicted)


# ---- the paper's rules, for comparison. paper.md section 2; C, BW and e as there.


def algorithm_1(plan: Plan, problem: Problem, hardware: Hardware) -> str:
    """Return pass_kv or pass_q as the paper's Algorithm 1 chooses."""
    new, rate, least = _terms(plan, problem, hardware)
    enough = new >= plan.world_size * least
    return "pass_kv" if enough or rate >= 2 * problem.nheads_k / problem.nheads else "pass_q"


def algorithm_5(plan: Plan, problem: Problem, hardware: Hardware) -> str:
    """Return pass_kv or pass_q as the paper's Algorithm 5 chooses: it counts the All2All."""
    new, rate, least = _terms(plan, problem, hardware)
    enough = new >= plan.world_size * least
    itemsize = 4 if problem.dtype == "float32" else 2
    compute, link = _peak(hardware), hardware.link_gb_s * 1e9
    return_cost = 4 * new * link / (plan.world_size * compute * itemsize)
    threshold = 2 * problem.nheads_k / problem.nheads - return_cost
    return "pass_kv" if enough or rate >= threshold else "pass_q"


def fitted_rule(plan: Plan, problem: Problem, hardware: Hardware) -> str:
    """Return pass_kv or pass_q by the rule that the paper fitted (Appendix D)."""
    new, rate, _ = _terms(plan, problem, hardware)
    score = -1.059 * math.log(new) + 1.145 * math.log(rate) + 12.112
    return "pass_kv" if score > 0 else "pass_q"


RULES = {"algorithm_1": algorithm_1, "algorithm_5": algorithm_5, "fitted_rule": fitted_rule}


def _peak(hardware):
    return hardware.attend_tflops[-1][1] * 1e12


def _terms(plan, problem, hardware):
    """Return new tokens, their share of all, and equation (2)'s least T per rank."""
    cached = 0 if plan.starts is None else int(plan.starts.sum())
    new = plan.total
    itemsize = 4 if problem.dtype == "float32" else 2
    compute, link = _peak(hardware), hardware.link_gb_s * 1e9
    least = compute * problem.nheads_k * itemsize / (2 * problem.nheads * link)
    return new, new / (new + cached), least


def _sample(world_size):
    """Return the ranks whose steps are looked at: all of a small ring, some of a large one.

    The same on every rank, so that all choose alike.
    """
    if world_size <= 16:
        return list(range(world_size))
    return sorted({rank * (world_size - 1) // 15 for rank in range(16)})
