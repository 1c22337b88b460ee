"""A call made ready: its messages, views and spans, once per plan and method, for every layer."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from ringkern import local, tiles
from ringkern.blocks import Blocks, Pool
from ringkern.plan import Plan
from ringkern.room import Room, Share, Tables
from ringkern.types import FIRST_HALF, SECOND_HALF, WHOLE, Move, Problem, Step, Work
from ringkern.upload import upload

# Of a step, by whether a state begins with it, and whether it ends.
PHASES = {(True, False): "first", (False, False): "middle", (False, True): "last"}
PHASES[True, True] = "only"
AT_ONCE = (
    4 << 20
)  # bytes of parts, up to which they wait for each other, to be merged by one kernel


class _Work(NamedTuple):
    """One local computation: a types.Work, or several whose queries lie together.

    None stands for what is another in every call.
    """

    q: torch.Tensor | None  # this rank's queries
    kv: tuple[torch.Tensor, torch.Tensor] | None  # this rank's K and V
    state: tuple[torch.Tensor, torch.Tensor] | None  # of this rank's queries
    sinks: bool  # whether the state starts here, from the sinks
    task: object  # as local.prepare() returns it
    share: Share | None  # of the tables, where retarget() tells the pages
    q_ranks: list[int]
    kv_rank: int
    half: int  # as in types.Work


class _Ready(NamedTuple):
    """One step. A message is (peer, pointer, nbytes), as transports take it."""

    index: int
    sends: list[tuple[int, int | None, int]]  # None: this rank's queries
    recvs: list[tuple[int, int, int]]
    keep: list[torch.Tensor]  # what the messages lie in
    own_q: bool  # whether any message is this rank's queries
    casts: list[tuple[torch.Tensor, torch.Tensor]]  # (from, to), before the messages are posted
    works: list[_Work]
    merge: local.Merge | None  # of parts that have come
    nbytes: int  # sent
    planned: int  # bytes that the plan says are sent


class Program:
    """One rank's steps with their buffers, which are the pool's: one program runs at a time.

    The buffers that a later program takes are the same, so two programs share them.

    Args:
        room: for a program that retarget() gives its plans, the first one too; None: for this one.

    Attributes:
        sends_q: whether this rank's queries travel.
        kv_room: where this rank's K and V travel, to be filled before each run; None: they stay.
        kv_slots: of the cache, which a program with room has there; None: the plan's.
    """

    def __init__(
        self,
        schedule: tuple[Step, ...],
        plan: Plan,
        problem: Problem,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        partial_dtype: torch.dtype | None,
        pool: Pool,
        backend: str,
        page_size: int | None,
        room: Room | None = None,
    ):
        self._plan, self._problem, self._rank = plan, problem, rank
        self._device, self._backend = device, backend
        self._page_size = page_size
        self._layouts = local.Layouts()
        # What changes the state of this rank's queries, in order: its work, and parts that come.
        changes = [
            change
            for step in schedule
            for change in (*step.work, *(move for move in step.recvs if move.kind == "part"))
            if isinstance(change, Move) or change.q_rank == rank
        ]
        self._first, self._last = (changes[0], changes[-1]) if changes else (None, None)
        # Only Triton's kernels write out in another dtype than that of the state.
        self._writes_result = backend == "triton" and dtype != torch.float32
        self._writes_result &= isinstance(self._last, Work)
        sent = {(move.kind, move.rank) for step in schedule for move in step.sends}
        self.sends_q = ("q", rank) in sent
        self.kv_room = self.kv_slots = None
        kv_room = room.wire_pages * page_size if room else None
        blocks = Blocks(pool, plan, problem, dtype, device, partial_dtype, kv_room)
        with torch.inference_mode(False):  # its views are written inside that mode and outside
            self._tables = None
            if room:
                rows = [plan.num_tokens(work.q_rank) for step in schedule for work in step.work]
                self._tables = Tables(rows, room.pages, device)
            if ("kv", rank) in sent:
                blocks.take("kv", {rank: plan.kv_tokens(rank)})
                self.kv_room = blocks.kv(rank)
                if room:
                    self.kv_slots = torch.empty(kv_room, dtype=torch.int64, device=device)
            # The running out; None where the call's own result is that, or nothing runs on.
            self._out = blocks.make_out(rank)
            self._merged = _merged(schedule, blocks)
            self._steps = [self._make_ready(step, blocks) for step in schedule]
        blocks.drop_all()

    def _make_ready(self, step: Step, blocks: Blocks) -> _Ready:
        casts, sends, recvs, coming = [], [], [], {}
        for move in step.sends:
            if move.kind == "part":
                casts += blocks.cast_part(move.rank)
            if move.kind == "q" and move.rank == self._rank:
                sends.append((move.peer, None, blocks.nbytes("q", move.tokens)))
                continue
            sends += [(move.peer, x, x.numel()) for x in blocks.wire(move.kind, move.rank)]
        for move in step.recvs:
            kind, rank = self._received(move)
            if kind != "arrived":
                coming.setdefault(kind, {})[rank] = move.tokens
            elif not blocks.holds(kind, rank):
                coming[kind] = next(some for some in self._merged.values() if rank in some)
        for kind, tokens in coming.items():
            blocks.take(kind, tokens)
        for move in step.recvs:
            recvs += [(move.peer, x) for x in blocks.wire(*self._received(move))]
        works = [self._make_work(some, blocks) for some in self._together(step.work, blocks)]
        arrived = list(self._merged.get(step.index, ()))
        merge = local.Merge(*blocks.arrived(arrived[0])) if arrived else None
        for peer in arrived:
            blocks.drop("arrived", peer)
        for block in step.drops:
            blocks.drop(*block)
        return _Ready(
            step.index,
            [(peer, None if x is None else x.data_ptr(), n) for peer, x, n in sends],
            [(peer, x.data_ptr(), x.numel()) for peer, x in recvs],
            [x for _, x, *_ in (*sends, *recvs) if x is not None],
            any(x is None for _, x, _ in sends),
            casts,
            works,
            merge,
            sum(n for _, _, n in sends),
            sum(blocks.nbytes(move.kind, move.tokens) for move in step.sends),
        )

    def _received(self, move):
        """Return (kind, rank) under which a block that comes is held: parts by who sent them."""
        return ("arrived", move.peer) if move.kind == "part" else (move.kind, move.rank)

    def _together(self, works, blocks):
        """Return lists of works, each for one kernel: of other ranks' queries that lie together."""
        found = {}
        for work in works:
            mine = work.q_rank == self._rank
            key = id(work) if mine else blocks.beside("q", work.q_rank)
            found.setdefault(key, []).append(work)
        return found.values()

    def _make_work(self, works, blocks):
        work, ranks = works[0], [work.q_rank for work in works]
        mine, stays = work.q_rank == self._rank, work.kv_rank == self._rank
        begins = work is self._first or not mine
        ends = work is self._last and self._writes_result
        task, share = self._prepare(works, stays, PHASES[begins, ends])
        return _Work(
            None if mine else blocks.q(work.q_rank),
            None if stays else blocks.kv(work.kv_rank),
            None if mine else blocks.make_parts(ranks),
            mine and begins,
            task,
            share,
            ranks,
            work.kv_rank,
            work.half,
        )

    def _prepare(self, works, stays, phase):
        counts = [self._plan.num_tokens(work.q_rank) for work in works]
        rows = sum(counts)
        if self._tables:
            share = self._tables.take(rows)
            options = dict(page_size=self._page_size, phase=phase)
            return local.prepare_room(share, self._problem, **options), share
        spans = tiles.stack([work.spans for work in works], counts)
        where = self._problem, self._device, self._backend
        page_size = self._page_size if stays else None
        return local.prepare(spans, *where, rows=rows, page_size=page_size, phase=phase), None

    def retarget(self, plan: Plan, held) -> None:
        """Compute a plan from now on, where the program was made with room, in place.

        Args:
            plan: of one token per sequence, in which every rank has as many of them, and sees the
                same ranks.
            held: held(rank) -> decode_table.Rows, the pages of the plan's sequences on a rank. New
                tokens see all that is in them.
        """
        size = self._page_size

        @functools.cache
        def asking(q_rank):
            return np.flatnonzero(plan.all_counts()[:, q_rank])

        @functools.cache
        def whole(kv_rank, *q_ranks):
            rows = held(kv_rank) if kv_rank == self._rank else held(kv_rank).pack(size)
            return rows.take(np.concatenate([asking(q_rank) for q_rank in q_ranks]))

        @functools.cache
        def parts(kv_rank, *q_ranks):
            rows = whole(kv_rank, *q_ranks)
            return dict(zip((FIRST_HALF, SECOND_HALF), rows.halve(size), strict=True))

        for work in (work for step in self._steps for work in step.works):
            ranks = work.kv_rank, *work.q_ranks
            work.share.fill(whole(*ranks) if work.half == WHOLE else parts(*ranks)[work.half])
        self._tables.send()
        if self.kv_slots is not None:
            slots = np.full(len(self.kv_slots), -1, dtype=np.int64)
            mine = held(self._rank).slots(size)
            slots[: len(mine)] = mine
            upload(slots, self._device, self.kv_slots)

    def run(self, link, stats, q, own_kv, sinks=None):
        """Return (out, lse) of this rank's queries against the keys of every rank.

        One loop for every method: post the messages, attend with what is at hand, wait, merge the
        parts that have come.

        Args:
            q: [batch, n_local, nheads, headdim]; contiguous if sends_q.
            own_kv: this rank's K and V, as the spans of its own work count them.
            sinks: [nheads], or None.

        Returns:
            out [batch, n_local, nheads, headdim_v] in q's dtype, lse [batch, nheads, n_local]
            float32.
        """
        problem, now = self._problem, stats.now
        batch, rows, nheads, _ = q.shape
        result = q.new_empty(batch, rows, nheads, problem.headdim_v)
        lse = q.new_empty(batch, nheads, rows, dtype=torch.float32)
        out = result if self._out is None else self._out
        layout = None
        if self._backend == "triton":
            sinks = local.as_sinks(sinks)
            layout = self._layouts.find(q, *own_kv, sinks)
            if not layout.aligned:  # copied once, where each step would
                q, *own_kv = local.align(q, *own_kv, say="qkv")
        if not isinstance(self._first, Work):
            local.clear_state(out, lse, sinks)
        for step in self._steps:
            ticket = None
            if step.sends or step.recvs:
                for source, target in step.casts:
                    target.copy_(source)
                sends, keep = step.sends, step.keep
                if step.own_q:
                    pointer, keep = q.data_ptr(), (q, keep)
                    sends = [(peer, at or pointer, n) for peer, at, n in sends]
                ticket = link.post(sends, step.recvs, keep)
            stats.steps += 1
            stats.bytes_sent += step.nbytes
            stats.bytes_planned += step.planned
            began = now()
            for work in step.works:
                operands = q if work.q is None else work.q, *(work.kv or own_kv)
                state, seed = work.state or (out, lse), sinks if work.sinks else None
                local.step(*operands, *state, work.task, problem, seed, result, layout)
                ended = now()
                stats.add("attend", step.index, began, ended)
                began = ended
            if ticket:
                times = ticket.wait()
                ended = now()
                stats.add("wait", step.index, began, ended)
                stats.add("exchange", step.index, *times, step.nbytes)
                began = ended
            if step.merge:
                step.merge(out, lse)
                stats.add("merge", step.index, began, now())
        if out is not result and not self._writes_result:
            result.copy_(out)
        return result, lse


def _merged(schedule, blocks) -> dict[int, dict[int, int]]:
    """Return which parts are merged in which steps: {step: {who sent it: tokens}}.

    Those of a step together; small ones all in the last one, as kernels take their time by number.
    """
    each = {
        step.index: {move.peer: move.tokens for move in step.recvs if move.kind == "part"}
        for step in schedule
    }
    each = {index: parts for index, parts in each.items() if parts}
    whole = {peer: tokens for parts in each.values() for peer, tokens in parts.items()}
    if sum(blocks.nbytes("part", tokens) for tokens in whole.values()) > AT_ONCE:
        return each
    return {max(each): whole} if each else {}
