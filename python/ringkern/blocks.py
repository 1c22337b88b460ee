"""What a call has at hand and on the wire: K and V, queries, and parts (out, lse) of them.

A block travels as it lies in a flat buffer: K then V; or queries; or out, and lse in a message of
its own. What comes or is computed together lies together, so that one kernel takes it all. Buffers
come from a pool that lives as long as the ring, so that layers and calls use the same ones.
"""

import itertools
import math

import torch

from ringkern.cost import block_bytes
from ringkern.plan import Plan
from ringkern.types import Problem


class Pool:
    """Flat buffers of bytes that are not in use."""

    def __init__(self):
        self._spare: list[torch.Tensor] = []

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return a buffer of at least nbytes: the smallest that will do, else a new one."""
        fit = [i for i, buffer in enumerate(self._spare) if buffer.numel() >= nbytes]
        if fit:
            return self._spare.pop(min(fit, key=lambda i: self._spare[i].numel()))
        if self._spare:  # a ring that grows keeps as many buffers as it needs, not all it had
            del self._spare[max(range(len(self._spare)), key=lambda i: self._spare[i].numel())]
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def give(self, buffer: torch.Tensor) -> None:
        self._spare.append(buffer)

    def clear(self) -> None:
        self._spare.clear()


class _Held:
    """Blocks in one buffer, rank after rank.

    Attributes:
        dtype: of all but lse.
        rows: rank -> (first, end) of its tokens.
        users: how many of the blocks are still held.
    """

    def __init__(self, buffer: torch.Tensor, tokens: dict[int, int], dtype: torch.dtype):
        self.buffer, self.tokens, self.dtype = buffer, tokens, dtype
        self.total, self.users = sum(tokens.values()), len(tokens)
        ends = list(itertools.accumulate(tokens.values(), initial=0))
        self.rows = dict(zip(tokens, itertools.pairwise(ends), strict=True))


class Blocks:
    """The blocks that a rank holds at one point of its steps, by kind and rank.

    Kinds: "kv", "q"; "part", what is computed here for another rank's queries; "arrived", what
    another rank computed for this rank's; "out", this rank's own sum.

    kv_room: tokens of every "kv", as a block has them whose plan may change; None: the plan's.
    """

    def __init__(
        self, pool: Pool, plan: Plan, problem: Problem, dtype, device, partial_dtype, kv_room=None
    ):
        self._pool, self._plan, self._problem = pool, plan, problem
        self._kv_room = kv_room
        self._dtype, self._device = dtype, device
        self._partial_dtype = partial_dtype or torch.float32
        self._held: dict[tuple[str, int], _Held] = {}

    def nbytes(self, kind: str, tokens: int) -> int:
        """Return the bytes of a block on the wire."""
        return block_bytes(
            kind, self._sized(kind, tokens), self._problem, self._partial_dtype.itemsize
        )

    # ---- taking and dropping

    def take(self, kind: str, tokens: dict[int, int]) -> None:
        """Hold what comes from some ranks, so many tokens each, not filled yet.

        Together, but for K and V, and for queries of several batches: one after the other they are
        no tensor of [batch, tokens, ...].
        """
        if kind == "arrived":
            self._hold_parts(kind, tokens, self._partial_dtype)
            return
        most = self.nbytes(kind, self._most(kind))  # so that any two of a ring can change places
        together = kind == "q" and self._problem.batch == 1
        for some in [tokens] if together else [{rank: n} for rank, n in tokens.items()]:
            self._hold(kind, some, len(some) * most, self._dtype)

    def drop(self, kind: str, rank: int) -> None:
        """Let go of a block, if there is one; its buffer goes back to the pool with the last."""
        held = self._held.pop((kind, rank), None)
        if held is not None:
            held.users -= 1
            if not held.users:
                self._pool.give(held.buffer)

    def drop_all(self) -> None:
        for kind, rank in list(self._held):
            self.drop(kind, rank)

    def holds(self, kind: str, rank: int) -> bool:
        return (kind, rank) in self._held

    def beside(self, kind: str, rank: int) -> tuple[int, ...]:
        """Return whose blocks lie in one buffer with a rank's, its own too, in order."""
        return tuple(self._held[kind, rank].tokens)

    # ---- as bytes and as tensors

    def wire(self, kind: str, rank: int) -> list[torch.Tensor]:
        """Return the bytes of a block as they travel, by message."""
        held = self._held[kind, rank]
        if kind == "kv":
            return [held.buffer[: self.nbytes(kind, held.total)]]
        first, end = held.rows[rank]
        if kind == "q":
            return [held.buffer[self.nbytes(kind, first) : self.nbytes(kind, end)]]
        problem = self._problem
        rows = problem.batch * problem.nheads
        flat = zip(self._flat_parts(held), (rows * problem.headdim_v, rows), strict=True)
        return [x[first * size : end * size].view(torch.uint8) for x, size in flat]

    def kv(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rank's K and V, [batch, tokens, nheads_k, headdim(_v)]."""
        problem = self._problem
        shape = problem.batch, self._held["kv", rank].total, problem.nheads_k
        flat = self.wire("kv", rank)[0].view(self._dtype)
        k_size = shape[0] * shape[1] * shape[2] * problem.headdim
        return (
            flat[:k_size].view(*shape, problem.headdim),
            flat[k_size:].view(*shape, problem.headdim_v),
        )

    def q(self, rank: int) -> torch.Tensor:
        """Return the queries of the ranks beside(rank), [batch, tokens, nheads, headdim]."""
        problem, held = self._problem, self._held["q", rank]
        shape = problem.batch, held.total, problem.nheads, problem.headdim
        return held.buffer[: self.nbytes("q", held.total)].view(self._dtype).view(shape)

    def make_parts(self, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for (out, lse) of ranks' queries against this rank's keys, float32.

        out [batch, tokens, nheads, headdim_v], lse [batch, nheads, tokens]; of several ranks only
        where there is one batch.
        """
        tokens = {rank: self._plan.num_tokens(rank) for rank in ranks}
        self._hold_parts("part", tokens, torch.float32)
        return self._parts(self._held["part", ranks[0]], self._problem.batch)

    def make_out(self, rank: int) -> torch.Tensor | None:
        """Return room for a rank's own output while it is summed up, float32.

        None where that is what the call returns, which no later call may overwrite.
        """
        if self._dtype == torch.float32:
            return None
        problem, tokens = self._problem, self._plan.num_tokens(rank)
        shape = problem.batch, tokens, problem.nheads, problem.headdim_v
        nbytes = 4 * math.prod(shape)
        self._hold("out", {rank: tokens}, nbytes, torch.float32)
        return self._held["out", rank].buffer[:nbytes].view(torch.float32).view(shape)

    def arrived(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what comes from the ranks beside(rank) for the same queries.

        out [ranks, batch, tokens, nheads, headdim_v] in the dtype that travels, lse [ranks, batch,
        nheads, tokens] float32.
        """
        held = self._held["arrived", rank]
        ranks, batch = len(held.tokens), self._problem.batch
        return tuple(x.unflatten(0, (ranks, batch)) for x in self._parts(held, ranks * batch))

    def cast_part(self, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Put a computed part into the dtype that travels, and those that lie beside it.

        Returns what to copy, as (from, to); nothing for what has that dtype.
        """
        computed = self._held["part", rank]
        if computed.dtype == self._partial_dtype:
            return []
        self._hold_parts("part", computed.tokens, self._partial_dtype)
        self._pool.give(computed.buffer)
        batch = self._problem.batch
        travels = self._held["part", rank]
        return list(zip(self._parts(computed, batch), self._parts(travels, batch), strict=True))

    # ---- inside

    def _hold(self, kind, tokens, nbytes, dtype):
        tokens = {rank: self._sized(kind, count) for rank, count in tokens.items()}
        held = _Held(self._pool.take(nbytes, self._device), tokens, dtype)
        self._held |= {(kind, rank): held for rank in tokens}

    def _hold_parts(self, kind, tokens, dtype):
        out, lse = self._part_nbytes(sum(tokens.values()), dtype)
        self._hold(kind, tokens, _padded(out) + lse, dtype)

    def _part_nbytes(self, tokens, dtype):
        """Return the bytes of out and of lse."""
        rows = self._problem.batch * self._problem.nheads * tokens
        return rows * self._problem.headdim_v * dtype.itemsize, 4 * rows

    def _flat_parts(self, held):
        """Return (out, lse) of parts that lie together, flat."""
        out, lse = self._part_nbytes(held.total, held.dtype)
        begin = _padded(out)
        buffer = held.buffer
        return buffer[:out].view(held.dtype), buffer[begin : begin + lse].view(torch.float32)

    def _parts(self, held, batch):
        """Return (out, lse) of parts that lie together, [batch, tokens, nheads, headdim_v] and
        [batch, nheads, tokens]: lse lies by token, so that each rank's is one piece."""
        problem = self._problem
        out, lse = self._flat_parts(held)
        shape = batch, held.total * problem.batch // batch, problem.nheads
        return out.view(*shape, problem.headdim_v), lse.view(shape).transpose(1, 2)

    def _sized(self, kind, tokens):
        return self._kv_room if kind == "kv" and self._kv_room else tokens

    def _most(self, kind):
        """Return the most tokens that any rank's block of this kind has."""
        count = self._plan.kv_tokens if kind == "kv" else self._plan.num_tokens
        key = "most tokens", kind
        if key not in self._plan.memo:
            self._plan.memo[key] = max(count(r) for r in range(self._plan.world_size))
        return self._plan.memo[key]


def _padded(nbytes: int) -> int:
    """Return where what comes next begins, for kernels that read in vectors."""
    return -(-nbytes // 16) * 16
