"""What one call computes: the new tokens of a batch and which rank holds which."""

import functools
from dataclasses import dataclass

import numpy as np

from ringkern import shard
from ringkern.errors import check


@dataclass(frozen=True)
class Plan:
    """New tokens of a packed batch, sharded over the ranks of a ring. Equal on every rank.

    Made by Placement.prefill(), or by hand for one call without a history.

    Attributes:
        world_size: ranks.
        lengths: new tokens per sequence, in packed order.
        layout: "zigzag", "contiguous" or "striped".
        sequences: the ids behind `lengths`, where the plan came from a Placement.
    """

    world_size: int
    lengths: tuple[int, ...]
    layout: str = "zigzag"
    sequences: tuple[object, ...] = ()

    def __post_init__(self):
        check(self.world_size >= 1, "world_size", "at least 1", self.world_size)
        shard.check_layout(self.layout)

    @property
    def total(self) -> int:
        """How many new tokens there are on all ranks together."""
        return sum(self.lengths)

    def runs(self, rank: int) -> np.ndarray:
        """Return the rank's runs, int64 [n, 5], columns as in types.Run. Read-only, shared."""
        check(0 <= rank < self.world_size, "rank", f"0 to {self.world_size - 1}", rank)
        if rank not in self._tables:
            table = shard.runs(self.layout, self.lengths, self.world_size, rank)
            table.flags.writeable = False
            self._tables[rank] = table
        return self._tables[rank]

    @functools.cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        return {}

    def num_tokens(self, rank: int) -> int:
        """Return how many of the new tokens the rank holds."""
        return int(self.runs(rank)[:, 3].sum())

    def positions(self, rank: int) -> np.ndarray:
        """Return the rank's positions, int64 [n_local], in local packed order: for RoPE."""
        table = self.runs(rank)
        within = np.arange(table[:, 3].sum()) - np.repeat(table[:, 1], table[:, 3])
        return np.repeat(table[:, 2], table[:, 3]) + within * np.repeat(table[:, 4], table[:, 3])

    def indices(self, rank: int) -> np.ndarray:
        """Return where the rank's tokens stand in the packed global order, int64 [n_local]."""
        table = self.runs(rank)
        begins = np.cumsum(self.lengths, dtype=np.int64) - np.asarray(self.lengths, dtype=np.int64)
        return self.positions(rank) + np.repeat(begins[table[:, 0]], table[:, 3])

    def shard(self, x, rank: int):
        """Return the rank's rows of x [total, ...], as a copy in local packed order."""
        check(len(x) == self.total, "x", f"{self.total} rows, one per new token", len(x))
        return x[self.indices(rank)]
