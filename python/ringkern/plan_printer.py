"""ringkern plan: a plan and its schedules as text or JSON."""

import json

from ringkern.cost import block_bytes
from ringkern.errors import check
from ringkern.plan import Plan
from ringkern.schedule import METHODS, make_schedule, pairs
from ringkern.types import Problem, Run, Span


def lines(args):
    """Yield the lines that the command prints; args as cli.make_parser() gives them."""
    for name in ("world_size", "nheads", "nheads_k", "headdim", "itemsize"):
        check(getattr(args, name) >= 1, name, "at least 1", getattr(args, name))
    check(min(args.lengths) >= 1, "lengths", "ints above 0", list(args.lengths))
    check(min(args.window) >= -1, "window", "-1 or more on both sides", list(args.window))
    check(args.method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(args.method))
    check(args.itemsize in (2, 4), "itemsize", "2 or 4", args.itemsize)
    ok = args.nheads % args.nheads_k == 0
    check(ok, "nheads", f"a multiple of nheads_k = {args.nheads_k}", args.nheads)
    plan = Plan(args.world_size, args.lengths, args.layout)
    yield from (_all_ranks if args.rank is None else _one_rank)(plan, args)


def _nbytes(args, moves) -> int:
    dtype = "float32" if args.itemsize == 4 else "bfloat16"
    problem = Problem(
        1,
        args.nheads,
        args.nheads_k,
        args.headdim,
        args.headdim,
        dtype,
        args.causal,
        1.0,
        tuple(args.window),
        0.0,
    )
    return sum(block_bytes(move.kind, move.tokens, problem) for move in moves)


def _steps(plan, rank, args):
    return make_schedule(plan, rank, args.method, args.causal, tuple(args.window))


def _all_ranks(plan, args):
    """Yield a line per rank: its share of tokens, bytes, and visible pairs at each step."""
    schedules = [_steps(plan, rank, args) for rank in range(plan.world_size)]
    work = [[pairs(step) for step in steps] for steps in schedules]
    if not args.json:
        yield (
            f"{plan.total} tokens in {len(plan.lengths)} sequences over {plan.world_size} ranks, "
            f"{plan.layout}; {args.method}"
        )
        yield f"{'rank':>5} {'tokens':>9} {'bytes sent':>13}   visible pairs at each step"
    for rank, steps in enumerate(schedules):
        sent = _nbytes(args, [move for step in steps for move in step.sends])
        if args.json:
            row = {"rank": rank, "tokens": plan.num_tokens(rank), "bytes_sent": sent}
            yield json.dumps(row | {"pairs": work[rank]})
        else:
            shown = " ".join(f"{count:>11}" for count in work[rank][:8])
            more = f" ... {len(steps) - 8} more" if len(steps) > 8 else ""
            yield f"{rank:>5} {plan.num_tokens(rank):>9} {sent:>13}   {shown}{more}"
    if not args.json:
        total = sum(map(sum, work))
        slowest = sum(max(row[index] for row in work) for index in range(len(work[0])))
        even = total / (plan.world_size * slowest) if slowest else 1.0
        yield (
            f"balance {even:.1%}: visible pairs on average over the most on any rank, "
            "step by step. --rank R prints one rank's spans."
        )


def _one_rank(plan, args):
    """Yield everything that one rank holds and does."""
    runs = [Run(*row) for row in plan.runs(args.rank).tolist()]
    if args.json:
        yield json.dumps({"rank": args.rank, "runs": [run._asdict() for run in runs]})
    else:
        yield f"rank {args.rank} of {plan.world_size} holds {plan.num_tokens(args.rank)} tokens"
        for run in runs:
            last = run.start + (run.length - 1) * run.stride
            by = f" by {run.stride}" if run.stride > 1 else ""
            yield (
                f"  rows {run.offset}..{run.offset + run.length - 1}: sequence {run.seq}, "
                f"positions {run.start}..{last}{by}"
            )
    for step in _steps(plan, args.rank, args):
        if args.json:
            yield json.dumps(_as_json(step, args))
            continue
        yield f"step {step.index}"
        for way, moves in (("sends", step.sends), ("receives", step.recvs)):
            for move in moves:
                yield (
                    f"  {way} {move.kind} of rank {move.rank}, peer {move.peer}: "
                    f"{_nbytes(args, [move])} bytes"
                )
        for work in step.work:
            yield f"  q of rank {work.q_rank} x K,V of rank {work.kv_rank}"
            for row in work.spans.tolist():
                yield f"    {_describe(Span(*row))}"


def _as_json(step, args):
    return {
        "step": step.index,
        "sends": [move._asdict() | {"bytes": _nbytes(args, [move])} for move in step.sends],
        "receives": [move._asdict() | {"bytes": _nbytes(args, [move])} for move in step.recvs],
        "work": [
            {
                "q_rank": w.q_rank,
                "kv_rank": w.kv_rank,
                "spans": [Span(*row)._asdict() for row in w.spans.tolist()],
            }
            for w in step.work
        ],
    }


def _describe(span: Span) -> str:
    q_length, k_length = span.q1 - span.q0, span.k1 - span.k0
    rows = f"q {span.q0}..{span.q1 - 1} x k {span.k0}..{span.k1 - 1}"
    sides = []
    if span.lo > 1 - q_length:
        sides.append(f"{span.lo} <= j - i")
    if span.hi < k_length - 1:
        sides.append(f"j - i <= {span.hi}")
    return f"{rows}: {' and '.join(sides) or 'all'}"
