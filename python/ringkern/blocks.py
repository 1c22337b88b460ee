"""What a call has at hand and on the wire: K and V, queries, and parts (out, lse) of them.

A block is one flat buffer, sent as it is: K then V; or queries; or lse then out. Buffers come from
a pool that lives as long as the ring, so that layers and calls use the same ones.
"""

import torch

from ringkern.cost import block_bytes
from ringkern.plan import Plan
from ringkern.types import Move, Problem


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
        with torch.inference_mode(False):  # used by later calls too, inside that mode or outside
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def give(self, buffer: torch.Tensor) -> None:
        self._spare.append(buffer)

    def clear(self) -> None:
        self._spare.clear()


class Blocks:
    """The blocks of one call on one rank, by kind and rank."""

    def __init__(self, pool: Pool, plan: Plan, problem: Problem, rank: int, q, partial_dtype):
        self._pool, self._plan, self._problem, self._rank = pool, plan, problem, rank
        self._q = q.contiguous()
        self._partial_dtype = partial_dtype or torch.float32
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    # ---- sizes

    def nbytes(self, kind: str, tokens: int) -> int:
        """Return the bytes of a block on the wire."""
        return block_bytes(kind, tokens, self._problem, self._partial_dtype.itemsize)

    # ---- blocks as tensors

    def load_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for this rank's K and V on the wire, for the caller to fill."""
        self._hold("kv", self._rank, self._plan.kv_tokens(self._rank))
        return self.kv(self._rank)

    def kv(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a rank's K and V, [batch, tokens, nheads_k, headdim(_v)], as views."""
        problem, tokens = self._problem, self._plan.kv_tokens(rank)
        flat = self._buffers["kv", rank][: self.nbytes("kv", tokens)].view(self._q.dtype)
        shape = problem.batch, tokens, problem.nheads_k
        k_size = problem.batch * tokens * problem.nheads_k * problem.headdim
        v_size = problem.batch * tokens * problem.nheads_k * problem.headdim_v
        k, v = flat[:k_size], flat[k_size : k_size + v_size]
        return k.view(*shape, problem.headdim), v.view(*shape, problem.headdim_v)

    def q(self, rank: int) -> torch.Tensor:
        """Return a rank's queries, [batch, tokens, nheads, headdim]."""
        if rank == self._rank:
            return self._q
        problem, tokens = self._problem, self._plan.num_tokens(rank)
        flat = self._buffers["q", rank][: self.nbytes("q", tokens)].view(self._q.dtype)
        return flat.view(problem.batch, tokens, problem.nheads, problem.headdim)

    def make_part(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an empty float32 state for a rank's queries: what is computed for it here."""
        tokens = self._plan.num_tokens(rank)
        size = self._problem.batch * tokens * self._problem.nheads * (self._problem.headdim_v + 1)
        self._buffers["part", rank] = buffer = self._pool.take(4 * size, self._q.device)
        out, lse = self._part_views(buffer, tokens, torch.float32)
        return out.zero_(), lse.fill_(float("-inf"))

    def arrived(self, move: Move) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part that came from a peer, float32."""
        buffer = self._buffers["arrived", move.peer]
        out, lse = self._part_views(buffer, move.tokens, self._partial_dtype)
        return out.float(), lse

    # ---- on the wire

    def outgoing(self, move: Move) -> torch.Tensor:
        """Return the bytes to send."""
        nbytes = self.nbytes(move.kind, move.tokens)
        if move.kind == "q" and move.rank == self._rank:
            return self._q.view(-1).view(torch.uint8)
        if move.kind == "part" and self._partial_dtype != torch.float32:
            self._cast_part(move)
        return self._buffers[move.kind, move.rank][:nbytes]

    def incoming(self, move: Move) -> torch.Tensor:
        """Return where to receive the bytes."""
        if move.kind == "part":
            nbytes = self.nbytes("part", move.tokens)
            buffer = self._buffers["arrived", move.peer] = self._pool.take(nbytes, self._q.device)
        else:
            buffer = self._hold(move.kind, move.rank, move.tokens)
        return buffer[: self.nbytes(move.kind, move.tokens)]

    def drop(self, kind: str, rank: int) -> None:
        """Give a block's buffer back to the pool, if there is one."""
        buffer = self._buffers.pop((kind, rank), None)
        if buffer is not None:
            self._pool.give(buffer)

    def drop_all(self) -> None:
        for kind, rank in list(self._buffers):
            self.drop(kind, rank)

    # ---- inside

    def _hold(self, kind, rank, tokens):
        # As large as the largest of its kind, so that any two of a ring can change places.
        count = self._plan.kv_tokens if kind == "kv" else self._plan.num_tokens
        key = "most tokens", kind
        if key not in self._plan.memo:
            self._plan.memo[key] = max(count(r) for r in range(self._plan.world_size))
        nbytes = self.nbytes(kind, self._plan.memo[key])
        self._buffers[kind, rank] = buffer = self._pool.take(nbytes, self._q.device)
        return buffer

    def _part_views(self, buffer, tokens, dtype):
        problem = self._problem
        rows = problem.batch * problem.nheads * tokens
        lse = buffer[: 4 * rows].view(torch.float32)
        out = buffer[4 * rows : (4 + problem.headdim_v * dtype.itemsize) * rows].view(dtype)
        out = out.view(problem.batch, tokens, problem.nheads, problem.headdim_v)
        return out, lse.view(problem.batch, problem.nheads, tokens)

    def _cast_part(self, move):
        """Put the part's out into the dtype that travels."""
        full = self._buffers["part", move.rank]
        out, lse = self._part_views(full, move.tokens, torch.float32)
        nbytes = self.nbytes("part", move.tokens)
        self._buffers["part", move.rank] = small = self._pool.take(nbytes, self._q.device)
        small_out, small_lse = self._part_views(small, move.tokens, self._partial_dtype)
        small_out.copy_(out)
        small_lse.copy_(lse)
        self._pool.give(full)
