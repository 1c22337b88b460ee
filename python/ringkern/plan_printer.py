"""ringkern plan: a plan and its schedules as text or JSON."""

import json

from ringkern import tiles
from ringkern.errors import check
from ringkern.plan import Plan
from ringkern.schedule import make_schedule
from ringkern.types import Run, Span


def lines(args):
    """Yield the lines that the command prints; args as cli.make_parser() gives them."""
    for name in ("world_size", "nheads_k", "headdim", "itemsize"):
        check(getattr(args, name) >= 1, name, "at least 1", getattr(args, name))
    check(min(args.lengths) >= 1, "lengths", "ints above 0", list(args.lengths))
    check(min(args.window) >= -1, "window", "-1 or more on both sides", list(args.window))
    plan = Plan(args.world_size, args.lengths, args.layout)
    token_bytes = 2 * args.nheads_k * args.headdim * args.itemsize
    if args.rank is not None:
        yield from _one_rank(plan, args, token_bytes)
    else:
        yield from _all_ranks(plan, args, token_bytes)


def _steps(plan, rank, args):
    return make_schedule(plan, rank, args.causal, tuple(args.window))


def _all_ranks(plan, args, token_bytes):
    """Yield a line per rank: its share of tokens, bytes, and visible pairs at each step."""
    schedules = [_steps(plan, rank, args) for rank in range(plan.world_size)]
    work = [[tiles.pairs(step.spans) for step in steps] for steps in schedules]
    if not args.json:
        yield (
            f"{plan.total} tokens in {len(plan.lengths)} sequences over {plan.world_size} ranks, "
            f"{plan.layout}; pass_kv, {token_bytes} bytes per token"
        )
        yield f"{'rank':>5} {'tokens':>9} {'bytes sent':>13}   visible pairs at each step"
    for rank, steps in enumerate(schedules):
        sent = token_bytes * sum(step.send_tokens for step in steps)
        if args.json:
            row = {"rank": rank, "tokens": plan.num_tokens(rank), "bytes_sent": sent}
            yield json.dumps(row | {"pairs": work[rank]})
        else:
            shown = " ".join(f"{pairs:>11}" for pairs in work[rank][:8])
            more = f" ... {len(steps) - 8} more" if len(steps) > 8 else ""
            yield f"{rank:>5} {plan.num_tokens(rank):>9} {sent:>13}   {shown}{more}"
    if not args.json:
        total = sum(map(sum, work))
        slowest = sum(max(row[index] for row in work) for index in range(plan.world_size))
        even = total / (plan.world_size * slowest) if slowest else 1.0
        yield (
            f"balance {even:.1%}: visible pairs on average over the most on any rank, "
            "step by step. --rank R prints one rank's spans."
        )


def _one_rank(plan, args, token_bytes):
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
        spans = [Span(*row) for row in step.spans.tolist()]
        send, recv = (token_bytes * n for n in (step.send_tokens, step.recv_tokens))
        if args.json:
            row = {"step": step.index, "kv_rank": step.kv_rank, "send_bytes": send}
            yield json.dumps(row | {"recv_bytes": recv, "spans": [s._asdict() for s in spans]})
            continue
        yield f"step {step.index}: K,V of rank {step.kv_rank}; sends {send}, receives {recv} bytes"
        for span in spans:
            yield f"  {_describe(span)}"


def _describe(span: Span) -> str:
    q_length, k_length = span.q1 - span.q0, span.k1 - span.k0
    rows = f"q {span.q0}..{span.q1 - 1} x k {span.k0}..{span.k1 - 1}"
    sides = []
    if span.lo > 1 - q_length:
        sides.append(f"{span.lo} <= j - i")
    if span.hi < k_length - 1:
        sides.append(f"j - i <= {span.hi}")
    return f"{rows}: {' and '.join(sides) or 'all'}"
