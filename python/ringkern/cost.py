"""What a call will take by each method, in microseconds, and the choice between them. Pure."""

import math
from dataclasses import dataclass

import numpy as np

from ringkern import tiles
from ringkern.plan import Plan
from ringkern.schedule import METHODS, make_schedule
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


def attend_us(spans, problem: Problem, hardware: Hardware) -> float:
    """Return the time of one local computation.

    A span takes a fixed cost, and 2 * pairs * nheads * (headdim + headdim_v) FLOPs at the rate that
    was measured for so many query rows: few rows wait for K and V to be read.
    """
    if not len(spans):
        return 0.0
    rows, rates = (np.array(x, dtype=float) for x in zip(*hardware.attend_tflops, strict=True))
    rate = np.interp(np.log(spans[:, 1] - spans[:, 0]), np.log(rows), rates)
    flops = 2.0 * tiles.counts(spans) * problem.nheads * (problem.headdim + problem.headdim_v)
    return float((problem.batch * flops / rate).sum() / 1e6 + len(spans) * hardware.span_us)


def step_us(step, problem: Problem, hardware: Hardware, partial_itemsize: int = 4):
    """Return (attend, exchange) of one step on one rank."""
    attend = sum(attend_us(work.spans, problem, hardware) for work in step.work)
    sent, received = (
        sum(block_bytes(m.kind, m.tokens, problem, partial_itemsize) for m in moves)
        for moves in (step.sends, step.recvs)
    )
    messages = len(step.sends) + len(step.recvs)
    exchange = 0.0
    if messages:
        exchange = hardware.latency_us + max(sent, received) / hardware.link_gb_s / 1e3
    merged = sum(block_bytes("part", m.tokens, problem) for m in step.recvs if m.kind == "part")
    return attend + merged / hardware.merge_gb_s / 1e3, exchange


def predict_us(plan: Plan, method: str, problem: Problem, hardware: Hardware) -> float:
    """Return the time of one call by a method: the slowest rank of each step.

    A step's messages travel under its work, so it takes the longer of the two.
    """
    schedules = [
        make_schedule(plan, rank, method, problem.causal, problem.window_size)
        for rank in _sample(plan.world_size)
    ]
    total = 0.0
    for index in range(len(schedules[0])):
        costs = [step_us(steps[index], problem, hardware) for steps in schedules]
        total += max(max(attend, exchange) for attend, exchange in costs)
    return total


# A gather holds K and V, or partial outputs, of all ranks at once. It must be worth it.
GATHER_GAIN = 0.02


def choose(plan: Plan, problem: Problem, hardware: Hardware) -> Choice:
    """Return the method with the least predicted time.

    The ring methods need two buffers however many ranks there are, so a gather is chosen only where
    it is faster by more than GATHER_GAIN.
    """
    if plan.world_size == 1:
        return Choice("pass_kv", "one rank: nothing travels", dict.fromkeys(METHODS, 0.0))
    predicted = {method: predict_us(plan, method, problem, hardware) for method in METHODS}
    burden = {m: 1.0 + GATHER_GAIN * m.startswith("gather") for m in METHODS}
    best = min(METHODS, key=lambda method: predicted[method] * burden[method])
    others = ", ".join(f"{m} {us:.0f}" for m, us in predicted.items() if m != best)
    return Choice(best, f"{best} {predicted[best]:.0f} us predicted; {others}", predicted)


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
