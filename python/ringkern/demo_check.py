"""Whether the demo's ring did what one process does, and what its plans said."""

import collections
from dataclasses import dataclass

import numpy as np
import torch

from ringkern import env
from ringkern.agreement import RECORD_BYTES
from ringkern.cost import block_bytes
from ringkern.demo_session import PAGE_SIZE, AloneStage, RankRun, Session
from ringkern.placement import Placement
from ringkern.schedule import make_schedule
from ringkern.types import Problem

TOLERANCE = 1e-4  # largest difference of a hidden state; they are normalised to a mean square of 1


@dataclass(frozen=True)
class Findings:
    """Rows by stage and by rank, totals, and what is wrong: nothing, if all is well."""

    stages: list[dict]
    ranks: list[dict]
    totals: dict
    faults: list[str]


@dataclass(frozen=True)
class _Cell:
    """One stage on one rank."""

    sent: int
    planned: int
    error: float  # largest difference of a hidden state; inf where it is none


def compare(session: Session, alone: list[AloneStage], runs: list[RankRun]) -> Findings:
    """Compare the run of a ring with that of one process, and with a replay of its plans."""
    cells, held = _replay(session, alone, runs)
    tokens, faults = _compare_tokens(session, alone, runs)
    stages = [_stage_row(session, runs, cells, number) for number in range(len(cells))]
    ranks = [_rank_row(run, [row[run.rank] for row in cells]) for run in runs]
    for stage, row in zip(session.stages, cells, strict=True):
        faults += _cell_faults(stage.name, row)
    faults += _method_faults(session, runs) + _capacity_faults(session, ranks, held)
    worst = max(cell.error for row in cells for cell in row)
    totals = {"ok": not faults, "largest_error": worst, "tolerance": TOLERANCE}
    return Findings(stages, ranks, totals | tokens, faults)


# ---- bytes and hidden states


def _replay(session, alone, runs):
    """Return the cells, [stage][rank], and the tokens that each rank should hold at the end."""
    placement, cells = Placement(len(runs)), []
    for number, stage in enumerate(session.stages):
        plans = [stage.plan(placement) for _ in range(stage.passes)]
        cells.append(
            [
                _cell(session, plans, alone[number].hidden, run.rank, run.stages[number].passes)
                for run in runs
            ]
        )
    return cells, [plans[-1].kv_tokens(run.rank) for run in runs]


def _cell(session, plans, want, rank, passes):
    rows = np.concatenate([index + plan.indices(rank) for index, plan in enumerate(plans)])
    got = torch.cat([done.hidden for done in passes])
    planned = sum(
        _planned_bytes(session.shape, plan, rank, done.method)
        for plan, done in zip(plans, passes, strict=True)
    )
    sent = sum(done.bytes_sent for done in passes)
    return _Cell(sent, planned, _largest(got, want[torch.from_numpy(rows)]))


def _largest(got, want) -> float:
    """Return the largest difference; inf where shapes differ or a number is none."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got - want).abs().nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def _planned_bytes(shape, plan, rank, method) -> int:
    """Return what the rank has to send in one pass: from the plan alone, not from the ring."""
    heads = shape.nheads, shape.nheads_k, shape.headdim, shape.headdim
    problem = Problem(1, *heads, "float32", True, shape.headdim**-0.5, (-1, -1), 0.0)
    moves = [move for step in make_schedule(plan, rank, method) for move in step.sends]
    nbytes = sum(block_bytes(move.kind, move.tokens, problem) for move in moves)
    if env.flag("RINGKERN_CHECK"):  # each call begins with a record for every other rank
        nbytes += RECORD_BYTES * (plan.world_size - 1)
    return shape.layers * nbytes


def _cell_faults(name, row):
    faults = []
    for rank, cell in enumerate(row):
        if cell.sent != cell.planned:
            faults.append(f"{name}: rank {rank} sent {cell.sent} bytes, planned {cell.planned}")
        if not cell.error <= TOLERANCE:
            faults.append(f"{name}: rank {rank}'s hidden states are off by {cell.error:.2g}")
    return faults


# ---- tokens and methods


def _compare_tokens(session, alone, runs):
    """Return the counts of decoded tokens, and the faults.

    Another token is a tie, and no fault, where the logits of the two are closer than what a hidden
    state within TOLERANCE can make of them.
    """
    closest, equal, ties, faults = float("inf"), 0, 0, []
    tie = TOLERANCE * session.shape.hidden**0.5
    for number, (stage, want) in enumerate(zip(session.stages, alone, strict=True)):
        if stage.kind != "decode":
            continue
        first, second = want.logits.topk(2).values.T
        closest = min(closest, (first - second).min().item())
        chosen = torch.tensor([run.chosen(number) for run in runs])  # [ranks, tokens]
        margin = first - want.logits.gather(1, chosen.T).T
        differs = chosen != torch.tensor(want.tokens)
        equal += int((~differs).all(0).sum())
        ties += int((differs & (margin <= tie)).any(0).sum())
        for rank, index in (differs & ~(margin <= tie)).nonzero().tolist():
            faults.append(
                f"{stage.name}: rank {rank} chose {chosen[rank, index]} as token {index}, one "
                f"process {want.tokens[index]}, by {margin[rank, index]:.2g}"
            )
    decoded = 2 * session.decode
    counts = {"decoded": decoded, "equal": equal, "ties": ties, "tie": tie, "closest": closest}
    return counts, faults


def _method_faults(session, runs):
    faults = []
    for number, stage in enumerate(session.stages):
        methods = {tuple(done.method for done in run.stages[number].passes) for run in runs}
        if len(methods) > 1:
            faults.append(f"{stage.name}: the ranks did not all choose the same method")
    return faults


def _capacity_faults(session, ranks, held):
    tokens = [row["tokens"] for row in ranks]
    faults = [
        f"rank {rank} holds {got} tokens, planned {want}"
        for rank, (got, want) in enumerate(zip(tokens, held, strict=True))
        if got != want
    ]
    if sum(tokens) != session.total:
        faults.append(f"the caches hold {sum(tokens)} tokens of {session.total}")
    if max(tokens) - min(tokens) > PAGE_SIZE + 1:
        faults.append("capacity: two ranks differ by more than a page and a token")
    return faults


# ---- rows


def _stage_row(session, runs, cells, number):
    stage = session.stages[number]
    done = [run.stages[number] for run in runs]
    begin = min(rank.passes[0].start_ns for rank in done)
    end = max(rank.passes[-1].end_ns for rank in done)
    methods = collections.Counter(one.method for one in done[0].passes)
    most = methods.most_common(1)[0][0]
    return {
        "stage": stage.name,
        "new_tokens": stage.new,
        "cached_tokens": stage.cached,
        "methods": dict(methods),
        "reason": next(one.reason for one in done[0].passes if one.method == most),
        "time_ms": round((end - begin) / 1e6, 1),
        "wait_ms": round(max(rank.stats["wait_ms"] for rank in done), 1),
        "bytes_sent": sum(cell.sent for cell in cells[number]),
        "bytes_planned": sum(cell.planned for cell in cells[number]),
        "largest_error": max(cell.error for cell in cells[number]),
    }


def _rank_row(run, cells):
    times = ("attend_ms", "exchange_ms", "wait_ms")
    return {
        "rank": run.rank,
        "tokens": run.cache["tokens"],
        "pages_used": run.cache["pages_used"],
        "pages": run.cache["pages"],
        **{name: round(sum(stage.stats[name] for stage in run.stages), 1) for name in times},
        "bytes_sent": sum(cell.sent for cell in cells),
        "bytes_planned": sum(cell.planned for cell in cells),
        "largest_error": max(cell.error for cell in cells),
    }
