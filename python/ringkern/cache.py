"""The paged KV cache: one rank's shard of every sequence's K and V, for all layers."""

import itertools

import numpy as np
import torch

from ringkern import local
from ringkern.backend import pick_backend
from ringkern.decode_table import Rows
from ringkern.errors import ArgumentError, check
from ringkern.pages import PageTable
from ringkern.placement import Placement
from ringkern.plan import Plan
from ringkern.problem import DTYPES, check_sizes
from ringkern.progress import Progress, Unfinished, check_parents
from ringkern.upload import upload

_numbers = itertools.count()


class _Reservation:
    """Where one plan's tokens lie on this rank: made once, used by every layer."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.new_slots = None  # int64 tensor: of the new tokens, in local packed order
        self.runs = None  # [n, 5], columns as in types.Run, with slots as offsets
        self.slots = None  # int64 array: of all, in the order of plan.kv_runs()
        self.all_slots = None  # the same as a tensor, once a layer gathers them
        self.fits = set()  # problems that were checked


class KVCache:
    """K and V of all sequences of a Placement, the part that this rank holds, in pages.

        cache = ringkern.KVCache(ring, placement, num_layers=32, nheads_k=8, headdim=128,
                                 dtype=torch.bfloat16, num_pages=1024)
        out = ring.attn(q, k, v, plan, cache=cache, layer=0)

    ring.attn() stores the new tokens' K and V. placement.truncate(), fork() and free() take effect
    here at once. A page is page_size tokens of one sequence, in every layer; sequences that forked
    share pages until one of them writes.

    Args:
        ring: what init_ring() returned.
        placement: whose sequences these are. Every rank makes its cache with the same numbers.
        num_layers, nheads_k, headdim: of the model.
        headdim_v: None means headdim.
        dtype: float16, bfloat16 or float32.
        num_pages: pages on this rank. All layers together take
            num_layers * num_pages * page_size * nheads_k * (headdim + headdim_v) elements.
        page_size: tokens per page.
    """

    def __init__(
        self,
        ring,
        placement: Placement,
        *,
        num_layers: int,
        nheads_k: int,
        headdim: int,
        headdim_v: int | None = None,
        dtype: torch.dtype,
        num_pages: int,
        page_size: int = 64,
    ):
        headdim_v = headdim if headdim_v is None else headdim_v
        sizes = dict(
            num_layers=num_layers,
            nheads_k=nheads_k,
            headdim=headdim,
            headdim_v=headdim_v,
            num_pages=num_pages,
            page_size=page_size,
        )
        check_sizes(**sizes)
        name = str(dtype).removeprefix("torch.")
        ok = isinstance(dtype, torch.dtype) and name in DTYPES
        check(ok, "dtype", ", ".join(DTYPES), repr(dtype), "Give one of torch, as torch.float32.")
        check(hasattr(ring, "attn"), "ring", "what init_ring() returned", type(ring).__name__)
        check(
            isinstance(placement, Placement), "placement", "a Placement", type(placement).__name__
        )
        check(
            placement.world_size == ring.world_size,
            "placement",
            f"world_size {ring.world_size}, as the ring",
            placement.world_size,
        )
        self.ring, self.placement, self.dtype = ring, placement, dtype
        self._rows = local.Rows(pick_backend("auto", ring.device))
        self.number = next(_numbers)  # in the memos of plans: never another cache's
        self.num_layers, self.page_size, self.num_pages = num_layers, page_size, num_pages
        slots = num_pages * page_size
        # [num_layers, 1, slots, nheads_k, headdim(_v)]: a layer is a batch of one, as steps take it
        with torch.inference_mode(False):  # written by later calls, inside that mode or outside
            self._k, self._v = (
                torch.empty(num_layers, 1, slots, nheads_k, size, dtype=dtype, device=ring.device)
                for size in (headdim, headdim_v)
            )
            self._layers = list(
                zip(self._k, self._v, strict=True)
            )  # to index costs a call 1 us each
        # The books of all ranks: so every rank knows, without asking, when one runs out.
        self._tables = [PageTable(num_pages, page_size) for _ in range(ring.world_size)]
        self._lengths: dict[int, int] = {}  # sequence number -> tokens, on all ranks together
        self._unfinished = Unfinished()
        placement.watch(self)

    # ---- one call

    def check_call(self, ring, plan: Plan, layer: int, problem) -> None:
        """Raise ArgumentError unless the call fits this cache. Changes nothing."""
        reservation = self._reservation(plan)
        if reservation is None or problem not in reservation.fits or ring is not self.ring:
            self._check_fit(ring, plan, problem)
            if reservation:
                reservation.fits.add(problem)
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            check(False, "layer", f"0 to {self.num_layers - 1}", repr(layer))
        if reservation is None:
            self._check_new(plan, self._new(plan))
            check_parents(self._unfinished.parents(plan.numbers), layer)
        else:
            reservation.progress.check_layer(layer)

    def _check_fit(self, ring, plan, problem) -> None:
        check(ring is self.ring, "cache", "one that was made for this ring", "another's")
        check(plan.source is self.placement, "plan", "one of the cache's placement", "another's")
        for what, got, want in (
            ("nheads_k", problem.nheads_k, self._k.shape[-2]),
            ("headdim", problem.headdim, self._k.shape[-1]),
            ("headdim_v", problem.headdim_v, self._v.shape[-1]),
            ("dtype", problem.dtype, str(self.dtype).removeprefix("torch.")),
        ):
            check(got == want, what, f"{want}, as the cache", got)
        check(problem.batch == 1, "batch", "1 with a cache", problem.batch)

    def write(self, plan: Plan, layer: int, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' K and V, [1, n_local, nheads_k, headdim(_v)], checked before.

        Returns this layer's whole K and V by slot, [1, slots, nheads_k, headdim(_v)].
        """
        reservation = self._reservation(plan) or self._reserve(plan)
        reservation.progress.ran((layer,), self.num_layers)
        self.store(layer, reservation.new_slots, k, v)
        return self._layers[layer]

    def store(self, layer: int, slots: torch.Tensor, k, v) -> None:
        """Copy K and V, [1, len(slots), ...], into slots of a layer."""
        self._rows.scatter((k, v), slots, self._layers[layer])

    def reserve(self, plan: Plan, into: torch.Tensor | None) -> torch.Tensor:
        """Make room for a decode plan that a graph is to run; return the slots of its new tokens.

        into: the slots of an earlier plan of as many new tokens here, to be overwritten.

        Raises:
            ArgumentError: the plan is not the next one, or pages run out; nothing was changed.
        """
        check(plan.source is self.placement, "plan", "one of the cache's placement", "another's")
        check(self._reservation(plan) is None, "plan", "one that has not run", plan.serial)
        new = self._new(plan)
        self._check_new(plan, new)
        for before in self._unfinished.parents(plan.numbers):
            want = "one on top of plans that have run in every layer"
            check(False, "plan", want, f"plan {plan.serial}", before.missing())
        reservation = self._append(plan, new)
        mine, size = self._tables[self.ring.rank], self.page_size
        held = [mine.held(number) for number, _ in new[self.ring.rank]]
        slots = [x.pages[-1] * size + (x.tokens - 1) % size for x in held]
        slots = np.array(slots, dtype=np.int64)
        if into is None:
            with torch.inference_mode(False):  # overwritten inside that mode and outside
                into = torch.empty(len(slots), dtype=torch.int64, device=self.ring.device)
        reservation.new_slots = upload(slots, self.ring.device, into)
        return reservation.new_slots

    def ran(self, plan: Plan) -> None:
        """Note that a graph has run a plan, for which reserve() made room, in every layer."""
        self._reservation(plan).progress.ran(range(self.num_layers), self.num_layers)

    def runs(self, plan: Plan) -> np.ndarray:
        """Return where K and V of the plan's sequences lie on this rank.

        A table like plan.kv_runs(), offsets counted in slots; a run ends where its pages do.
        """
        reservation = self._reservation(plan) or self._reserve(plan)
        if reservation.runs is None:
            self._lay_out(plan, reservation)
        return reservation.runs

    def held(self, plan: Plan, rank: int) -> Rows:
        """Return the pages that the plan's sequences have on a rank, sequence after sequence."""
        table = self._tables[rank]
        held = [table.held(number) for number in plan.numbers]
        counts = np.array([len(x.pages) for x in held])
        page_table = np.zeros((len(held), max(counts.max(), 1)), dtype=np.int32)
        inside = np.arange(page_table.shape[1]) < counts[:, None]
        page_table[inside] = np.frombuffer(b"".join(x.pages for x in held), dtype=np.int32)
        return Rows(page_table, np.array([x.tokens for x in held], dtype=np.int32))

    def most_pages(self, plan: Plan) -> tuple[int, int]:
        """Return in how many pages a sequence of the plan lies on a rank at most, and all do."""
        pages = -(-(plan.cached + plan.all_counts()) // self.page_size)
        return int(pages.max()), int(pages.sum(axis=0).max())

    def slots(self, plan: Plan) -> torch.Tensor:
        """Return where K and V of the plan's sequences lie here, in plan.kv_runs()'s order."""
        reservation = self._reservation(plan)
        if reservation.all_slots is None:
            self.runs(plan)
            reservation.all_slots = upload(reservation.slots, self.ring.device)
        return reservation.all_slots

    def gather(self, layer: int, slots: torch.Tensor, k_out, v_out) -> None:
        """Copy K and V of slots, int64 [tokens], into [1, tokens, ...].

        Of slot -1, which only tables of Triton's kernels have, nothing.
        """
        self._rows.gather(self._layers[layer], slots, (k_out, v_out))

    def page_table(self, sequence) -> torch.Tensor:
        """Return the sequence's page ids on this rank, int32 [pages], in order."""
        number = self.placement.number(sequence)
        return torch.tensor(self._tables[self.ring.rank].held(number).pages, dtype=torch.int32)

    def stats(self) -> dict:
        """Return pages, tokens and bytes of this rank, and the fewest free pages of any rank."""
        mine = self._tables[self.ring.rank]
        used = mine.num_pages - mine.num_free
        total = sum(x.numel() * x.element_size() for x in (self._k, self._v))
        return {
            "pages": mine.num_pages,
            "pages_used": used,
            "pages_free": mine.num_free,
            "pages_free_least": min(table.num_free for table in self._tables),
            "tokens": sum(mine.held(number).tokens for number in self._lengths),
            "bytes": total,
            "bytes_used": total * used // mine.num_pages,
        }

    def close(self) -> None:
        """Forget everything and stop following the placement."""
        self.placement.unwatch(self)
        self._k = self._v = torch.empty(0)
        self._layers = []

    # ---- what the placement tells

    def truncated(self, number: int, held: list[int]) -> None:
        """held: tokens that each rank keeps."""
        if number in self._lengths:
            for table, tokens in zip(self._tables, held, strict=True):
                table.truncate(number, tokens)
            self._lengths[number] = sum(table.held(number).tokens for table in self._tables)
            self._unfinished.cut(number, self._lengths[number])

    def forked(self, number: int, new: int) -> None:
        if number in self._lengths:
            self._lengths[new] = self._lengths[number]
            self._unfinished.fork(number, new)
            for table in self._tables:
                table.fork(number, new)

    def freed(self, number: int) -> None:
        self._lengths.pop(number, None)
        self._unfinished.cut(number, 0)
        for table in self._tables:
            table.free(number)

    # ---- reserving

    def _reservation(self, plan: Plan) -> _Reservation | None:
        return plan.memo.get(("cache", self.number))

    def _check_new(self, plan: Plan, counts) -> None:
        for sequence in self.placement.changed_since(plan):
            want = "one whose sequences are as it left them"
            got = f"{sequence!r} changed since by truncate, fork or free"
            check(False, "plan", want, got, "Plan again.")
        each = zip(plan.sequences, plan.numbers, plan.starts.tolist(), strict=True)
        for sequence, number, start in each:
            has = self._lengths.get(number, 0)
            if has != start:
                want = f"one for the {has} tokens of {sequence!r} that have run"
                hint = "Run the plans in the order they were made, each once."
                check(False, "plan", want, f"one on top of {start}", hint)
        tokens = plan.all_counts()
        pages = -(-tokens // self.page_size) + (tokens > 0)  # at most: with a copy for each
        each = zip(self._tables, counts, pages.sum(axis=0).tolist(), strict=True)
        for rank, (table, new, most) in enumerate(each):
            if most > table.num_free and (need := table.pages_for(new)) > table.num_free:
                raise ArgumentError(
                    f"num_pages: want {need} free pages on rank {rank} for this plan, got "
                    f"{table.num_free} of {table.num_pages}. Nothing was written or sent: free a "
                    "sequence and call again, or make the cache with more pages."
                )

            for number, _ in new if self._unfinished else ():
                # A copy of a page has what its layers had: those to come would write the other one.
                before = self._unfinished.latest(number)
                if before and table.must_copy(number):
                    want = "one on top of plans that have run in every layer, after a fork"
                    check(False, "plan", want, f"plan {plan.serial}", before.missing())

    def _new(self, plan: Plan) -> list[list[tuple[int, int]]]:
        """Return for each rank which sequences get new tokens there, and how many."""
        counts = plan.all_counts()
        rows, ranks = np.nonzero(counts)
        new: list[list] = [[] for _ in range(plan.world_size)]
        for row, rank, count in zip(
            rows.tolist(), ranks.tolist(), counts[rows, ranks].tolist(), strict=True
        ):
            new[rank].append((plan.numbers[row], count))
        return new

    def _reserve(self, plan: Plan) -> _Reservation:
        reservation = self._append(plan, self._new(plan))
        self._lay_out(plan, reservation)
        # The last tokens of each sequence here are the new ones.
        packed = plan.kv_runs(self.ring.rank)
        new = np.repeat(packed[:, 2] >= plan.starts[packed[:, 0]], packed[:, 3])
        reservation.new_slots = upload(reservation.slots[new], self.ring.device)
        return reservation

    def _append(self, plan: Plan, counts) -> _Reservation:
        """Enter the plan into the books; counts as _new() returns them."""
        progress = Progress(plan, self._unfinished.parents(plan.numbers))
        reservation = plan.memo["cache", self.number] = _Reservation(progress)
        for rank, (table, new) in enumerate(zip(self._tables, counts, strict=True)):
            for number, count in new:
                copies = table.append(number, count)
                for source, target in copies if rank == self.ring.rank else ():
                    self._copy_page(source, target)
        for number, (_, end) in progress.tokens.items():
            self._lengths[number] = end
        self._unfinished.enter(progress)
        return reservation

    def _lay_out(self, plan: Plan, reservation: _Reservation) -> None:
        runs = self._slot_runs(plan)
        before_run = np.cumsum(runs[:, 3]) - runs[:, 3]
        slots = np.repeat(runs[:, 1] - before_run, runs[:, 3]) + np.arange(runs[:, 3].sum())
        reservation.runs, reservation.slots = runs, slots

    def _slot_runs(self, plan: Plan) -> np.ndarray:
        table, rows = self._tables[self.ring.rank], []
        packed = plan.kv_runs(self.ring.rank)
        edges = np.searchsorted(packed[:, 0], np.arange(len(plan.numbers) + 1)).tolist()
        packed = packed.tolist()
        for seq, number in enumerate(plan.numbers):
            stretches = iter(table.slots(number))
            slot, room = 0, 0
            for _, _, start, length, stride in packed[edges[seq] : edges[seq + 1]]:
                while length:
                    if not room:
                        slot, room = next(stretches)
                    count = min(length, room)
                    rows.append((seq, slot, start, count, stride))
                    slot, room = slot + count, room - count
                    start, length = start + count * stride, length - count
        return np.array(rows, dtype=np.int64).reshape(-1, 5)

    def _copy_page(self, source: int, target: int) -> None:
        size = self.page_size
        for pool in (self._k, self._v):
            page = pool[:, :, source * size : (source + 1) * size]
            pool[:, :, target * size : (target + 1) * size] = page
