"""Placement, plan and schedule of a prefill, in a fresh process that has no torch.

Of sequences that begin, or of one that has had many turns.

As a program, `python -m bench.planning`: reads one JSON object of sizes, prints what it measured.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

from ringkern.placement import Placement
from ringkern.schedule import make_schedule, pairs

from bench import machine, operation, rss
from bench.measurement import Measurement

DECODED = 32  # tokens in a turn


def make_inputs(session, case):
    """Return a state: lengths by sequence, what was before, and which ranks' schedules to make."""
    shape = case.shape
    names = [f"sequence {i}" for i in range(shape["batch"])]
    lengths = dict.fromkeys(names, shape["seqlen"])
    placement = Placement(case.world_size)
    for _ in range(shape.get("turns", 0)):
        decoded = min(DECODED, shape["cached"] // shape["turns"] - 1)
        placement.prefill(dict.fromkeys(names, shape["cached"] // shape["turns"] - decoded))
        for _ in range(decoded):
            placement.decode(names)
    return SimpleNamespace(lengths=lengths, placement=placement, ranks=case.ranks)


def call(state, impl: str, index: int) -> None:
    state.plan = state.placement.prefill(state.lengths)
    state.schedules = [make_schedule(state.plan, rank) for rank in state.ranks]


def check(state, impl: str) -> dict:
    """Compare the (query, key) pairs that each rank computes with what its positions see."""
    error = 0
    for rank, steps in zip(state.ranks, state.schedules, strict=True):
        want = int((state.plan.positions(rank) + 1).sum())
        error = max(error, abs(want - sum(pairs(step) for step in steps)))
    error += abs(state.plan.total - sum(state.lengths.values()))
    return {"ok": error == 0 and "torch" not in sys.modules, "max_err": float(error)}


PLAN = operation.Operation("plan", make_inputs, call, check, operation.nothing, operation.nothing)


def measure(session, case) -> dict[str, Measurement]:
    """Return one call in each of `repetitions` fresh processes, no rank's twice in a row."""
    found = Measurement([], peak_mem_bytes=0)
    for repetition in range(case.repetitions):
        every = case.shape["ranks_planned"] > 1
        ranks = range(case.world_size) if every else [repetition * 37 % case.world_size]
        sizes = {"shape": case.shape, "world_size": case.world_size, "ranks": list(ranks)}
        answer = _run_fresh(sizes)
        found.times_s.append([answer["time_s"]])
        found.peak_mem_bytes = max(found.peak_mem_bytes, answer["peak_bytes"])
        found.add(answer["finding"])
    return {"ringkern": found}


def _run_fresh(sizes: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "bench.planning"],
        cwd=machine.ROOT,
        input=json.dumps(sizes),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"bench.planning failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    case = SimpleNamespace(**json.load(sys.stdin))
    state = make_inputs(None, case)
    before = rss.reset_peak()
    time_s = operation.timed(call, state, "ringkern", 0)
    peak = rss.peak_bytes()
    finding = check(state, "ringkern") | {"rss_growth_bytes": peak - before}
    print(json.dumps({"time_s": time_s, "peak_bytes": peak, "finding": finding}))


if __name__ == "__main__":
    main()
