"""What a call has at hand and on the wire: K and V, queries, and parts (out, lse) of them.

A block is one flat buffer, sent as it is: K then V; or queries; or lse then out. Buffers come from
a pool that lives as long as the ring, so that layers and calls use the same ones.
"""

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
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._tokens: dict[tuple[str, int], int] = {}

    def nbytes(self, kind: str, tokens: int) -> int:
        """Return the bytes of a block on the wire."""
        kind, tokens = "part" if kind == "arrived" else kind, self._sized(kind, tokens)
        return block_bytes(kind, tokens, self._problem, self._partial_dtype.itemsize)

    # ---- taking and dropping

    def take(self, kind: str, rank: int, tokens: int) -> None:
        """Hold a block of so many tokens, not filled yet."""
        nbytes = self.nbytes(kind, tokens)
        if kind in ("kv", "q"):  # as large as the largest: any two of a ring can change places
            nbytes = self.nbytes(kind, self._most(kind))
        self._hold(kind, rank, tokens, nbytes)

    def drop(self, kind: str, rank: int) -> None:
        """Give a block's buffer back to the pool, if there is one."""
        buffer = self._buffers.pop((kind, rank), None)
        if buffer is not None:
            self._pool.give(buffer)

    def drop_all(self) -> None:
        for kind, rank in list(self._buffers):
            self.drop(kind, rank)

    # ---- as bytes and as tensors

    def wire(self, kind: str, rank: int) -> torch.Tensor:
        """Return the bytes of a block as they travel."""
        return self._buffers[kind, rank][: self.nbytes(kind, self._tokens[kind, rank])]

    def kv(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rank's K and V, [batch, tokens, nheads_k, headdim(_v)]."""
        problem = self._problem
        shape = problem.batch, self._tokens["kv", rank], problem.nheads_k
        flat = self.wire("kv", rank).view(self._dtype)
        k_size = shape[0] * shape[1] * shape[2] * problem.headdim
        return (
            flat[:k_size].view(*shape, problem.headdim),
            flat[k_size:].view(*shape, problem.headdim_v),
        )

    def q(self, rank: int) -> torch.Tensor:
        """Return a rank's queries, [batch, tokens, nheads, headdim]."""
        problem = self._problem
        shape = problem.batch, self._tokens["q", rank], problem.nheads, problem.headdim
        return self.wire("q", rank).view(self._dtype).view(shape)

    def make_part(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for (out, lse) of a rank's queries against this rank's keys, float32."""
        tokens = self._plan.num_tokens(rank)
        rows = self._problem.batch * tokens * self._problem.nheads
        self._hold("part", rank, tokens, 4 * rows * (self._problem.headdim_v + 1))
        return self.part("part", rank, torch.float32)

    def make_out(self, rank: int) -> torch.Tensor | None:
        """Return room for a rank's own output while it is summed up, float32.

        None where that is what the call returns, which no later call may overwrite.
        """
        if self._dtype == torch.float32:
            return None
        problem, tokens = self._problem, self._plan.num_tokens(rank)
        shape = problem.batch, tokens, problem.nheads, problem.headdim_v
        nbytes = 4 * math.prod(shape)
        self._hold("out", rank, tokens, nbytes)
        return self._buffers["out", rank][:nbytes].view(torch.float32).view(shape)

    def part(self, kind: str, rank: int, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, lse) of a block, out in the dtype that travels unless one is given."""
        problem, dtype = self._problem, dtype or self._partial_dtype
        buffer, tokens = self._buffers[kind, rank], self._tokens[kind, rank]
        rows = problem.batch * problem.nheads * tokens
        lse = buffer[: 4 * rows].view(torch.float32)
        out = buffer[4 * rows : (4 + problem.headdim_v * dtype.itemsize) * rows].view(dtype)
        out = out.view(problem.batch, tokens, problem.nheads, problem.headdim_v)
        return out, lse.view(problem.batch, problem.nheads, tokens)

    def cast_part(self, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Put a computed part into the dtype that travels; return what to copy, as (from, to)."""
        if self._partial_dtype == torch.float32:
            return []
        full = self._buffers["part", rank]
        computed = self.part("part", rank, torch.float32)
        tokens = self._tokens["part", rank]
        self._hold("part", rank, tokens, self.nbytes("part", tokens))
        self._pool.give(full)
        return list(zip(computed, self.part("part", rank), strict=True))

    # ---- inside

    def _hold(self, kind, rank, tokens, nbytes):
        self._buffers[kind, rank] = self._pool.take(nbytes, self._device)
        self._tokens[kind, rank] = self._sized(kind, tokens)

    def _sized(self, kind, tokens):
        return self._kv_room if kind == "kv" and self._kv_room else tokens

    def _most(self, kind):
        """Return the most tokens that any rank's block of this kind has."""
        count = self._plan.kv_tokens if kind == "kv" else self._plan.num_tokens
        key = "most tokens", kind
        if key not in self._plan.memo:
            self._plan.memo[key] = max(count(r) for r in range(self._plan.world_size))
        return self._plan.memo[key]
