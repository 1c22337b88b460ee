"""What a call will take by each method, in microseconds, and the choice between them. Pure."""

import math
from dataclasses import dataclass

import numpy as np

from ringkern import tiles
from ringkern.plan import Plan
from ringkern.schedule import METHODS, make_spans, outline, visibility
from ringkern.types import Hardware, Problem


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


def block_bytes(kind: str, tokens: int, problem: Problem, partial_itemsize: int = 4) -> int:
    """Return the bytes of one block on the wire: "kv", "q" or "part" (out and a float32 lse)."""
    itemsize = 4 if problem.dtype == "float32" else 2
    per_token = {
        "kv": problem.nheads_k * (problem.headdim + problem.headdim_v) * itemsize,
        "q": problem.nheads * problem.headdim * itemsize,
        "part": problem.nheads * (problem.headdim_v * partial_itemsize + 4),
    }
    return problem.batch * tokens * per_token[kind]


def attend_us(
    spans: np.ndarray, problem: Problem, hardware: Hardware, alone: bool = False
) -> np.ndarray:
    """Return the time of each span, float64 [n]: with all ranks busy, or with this one alone.

    A fixed cost, and 2 * pairs * nheads * (headdim + headdim_v) FLOPs at the rate that was measured
    for so many query rows: few rows wait for K and V to be read.
    """
    table = hardware.alone_tflops if alone and hardware.alone_tflops else hardware.attend_tflops
    rows, rates = (np.array(x, dtype=float) for x in zip(*table, strict=True))
    rate = np.interp(np.log(spans[:, 1] - spans[:, 0]), np.log(rows), rates)
    flops = 2.0 * tiles.counts(spans) * problem.nheads * (problem.headdim + problem.headdim_v)
    return problem.batch * flops / rate / 1e6 + hardware.span_us


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
    ranks = _sample(plan.world_size)
    outlines = {
        method: [outline(method, rank, sees, order) for rank in ranks] for method in methods
    }
    works = _works_us(plan, outlines, sides, problem, hardware)
    sizes = _sizes(plan, problem, partial_itemsize)
    return {
        method: _together(
            [
                [_step_us(step, works, sizes, hardware) for step in together]
                for together in zip(*each, strict=True)
            ]
        )
        for method, each in outlines.items()
    }


def _works_us(plan, outlines, sides, problem, hardware):
    """Return (with all ranks busy, alone) of each outlined work."""
    works = dict.fromkeys(
        work for each in outlines.values() for steps in each for step in steps for work in step.work
    )
    if not works:
        return {}
    spans = make_spans(plan, works, sides, {})
    group = np.repeat(np.arange(len(spans)), [len(table) for table in spans])
    every = np.concatenate(spans)
    both = (attend_us(every, problem, hardware, alone) for alone in (False, True))
    sums = (np.bincount(group, us, len(spans)).tolist() for us in both)
    return dict(zip(works, zip(*sums, strict=True), strict=True))


def _together(steps):
    """Return [steps, ranks, (attend, exchange)], from what _step_us() says of each rank and step.

    A rank is slowed by another one for as long as that is busy as well.
    """
    crowded, alone, merge, exchange = np.moveaxis(np.array(steps), 2, 0)
    busy = np.minimum(1.0, alone[:, None, :] / np.maximum(alone, 1e-9)[:, :, None])
    share = (busy.sum(axis=2) - busy.diagonal(axis1=1, axis2=2)) / max(1, alone.shape[1] - 1)
    return np.stack([alone + share * (crowded - alone) + merge, exchange], axis=2)


def _sizes(plan, problem, partial_itemsize):
    """Return the bytes of each rank's block, by kind."""
    tokens = {"kv": plan.kv_tokens, "q": plan.num_tokens, "part": plan.num_tokens}
    return {
        kind: [
            block_bytes(kind, count(rank), problem, partial_itemsize)
            for rank in range(plan.world_size)
        ]
        for kind, count in tokens.items()
    }


def _step_us(step, works, sizes, hardware):
    """Return (attend in a crowd, attend alone, merge, exchange) of an outlined step on a rank."""
    crowded, alone = (sum(works[work][i] for work in step.work) for i in (0, 1))
    sent, received = (sum(sizes[k][r] for _, k, r in side) for side in (step.sends, step.recvs))
    exchange = 0.0
    if step.sends or step.recvs:
        exchange = hardware.latency_us + max(sent, received) / hardware.link_gb_s / 1e3
    merged = sum(sizes[kind][rank] for _, kind, rank in step.recvs if kind == "part")
    return crowded, alone, merged / hardware.merge_gb_s / 1e3, exchange


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
