"""What one call computes: the new tokens of a batch, the cached ones, and who holds which."""

import functools
from dataclasses import dataclass, field

import numpy as np

from ringkern import shard
from ringkern.errors import check
from ringkern.types import Chunk


@dataclass(frozen=True, eq=False)
class Plan:
    """New tokens of a packed batch on top of cached ones, sharded over the ranks of a ring.

    Made by Placement.prefill() and Placement.decode(), alike on every rank; or by hand, for one
    call without a history: Plan(world_size, lengths).

    Attributes:
        world_size: ranks.
        lengths: new tokens per sequence, in packed order.
        layout: of the new tokens: "zigzag", "contiguous" or "striped".
        sequences: the ids behind `lengths`, where the plan came from a Placement.
    """

    world_size: int
    lengths: tuple[int, ...]
    layout: str = "zigzag"
    sequences: tuple[object, ...] = ()
    starts: np.ndarray | None = field(default=None, repr=False)  # cached tokens, [sequences]
    places: np.ndarray | None = field(default=None, repr=False)  # shares, [sequences, ranks]
    held: tuple[tuple[tuple[Chunk, ...], ...], ...] = field(default=(), repr=False)  # [seq][rank]
    cached: np.ndarray | None = field(default=None, repr=False)  # tokens, [sequences, ranks]
    numbers: tuple[int, ...] = ()  # which sequences, for caches
    serial: int = 0  # which plan of its Placement, from 1; 0: made by hand
    source: object = field(default=None, repr=False)  # the Placement

    def __post_init__(self):
        check(self.world_size >= 1, "world_size", "at least 1", self.world_size)
        lengths = self.lengths if isinstance(self.lengths, (tuple, list)) else ()
        ok = len(lengths) > 0 and all(isinstance(n, int) and n >= 0 for n in lengths)
        check(ok, "lengths", "a tuple of ints, 0 or more", repr(self.lengths)[:100])
        object.__setattr__(self, "lengths", tuple(lengths))
        shard.check_layout(self.layout)

    @property
    def total(self) -> int:
        """How many new tokens there are on all ranks together."""
        return sum(self.lengths)

    @property
    def has_history(self) -> bool:
        """Whether any of the sequences has cached tokens."""
        return self.starts is not None and bool(self.starts.any())

    def runs(self, rank: int) -> np.ndarray:
        """Return the rank's runs of new tokens, int64 [n, 5], columns as in types.Run."""
        return self._table(rank, "new")

    def all_runs(self) -> list[np.ndarray]:
        """Return runs(rank) of every rank: in less time than one by one."""
        places = np.arange(self.world_size)[None, :] if self.places is None else self.places
        each = shard.runs_each(self.layout, self.lengths, self.world_size, places)
        for rank, table in enumerate(each):
            self._keep("new", rank, self._on_top(table))
        return [self.runs(rank) for rank in range(self.world_size)]

    def kv_runs(self, rank: int) -> np.ndarray:
        """Return the rank's runs of cached and new tokens together, as runs().

        By sequence, and within one as they are stored: by position.
        """
        return self._table(rank, "kv")

    def kv_blocks(self, rank: int) -> np.ndarray:
        """Return kv_runs() with what is cached of a sequence as one run, at positions before the new.

        The same rows in the same order: to queries that see all that lies before them it makes no
        difference where. Long histories are many runs.
        """
        return self._table(rank, "blocks") if self.has_history else self.runs(rank)

    def counts(self, ranks, rows=slice(None)) -> np.ndarray:
        """Return how many new tokens of each sequence the ranks hold, int64 [sequences, ranks].

        rows: of which sequences; an index as numpy takes it.
        """
        if "counts" in self.memo:
            return self.memo["counts"][rows][:, ranks]
        places = np.asarray(ranks)[None, :] if self.places is None else self.places[rows][:, ranks]
        lengths = np.asarray(self.lengths, dtype=np.int64)[rows]
        return shard.counts(self.layout, lengths, self.world_size, places)

    def all_counts(self) -> np.ndarray:
        """Return counts() of every rank and sequence, which is kept."""
        if "counts" not in self.memo:
            self.memo["counts"] = self.counts(range(self.world_size))
            self.memo["counts"].flags.writeable = False
        return self.memo["counts"]

    def num_tokens(self, rank: int) -> int:
        """Return how many of the new tokens the rank holds."""
        key = "tokens", rank
        if key not in self.memo:
            self.memo[key] = int(self.runs(rank)[:, 3].sum())
        return self.memo[key]

    def kv_tokens(self, rank: int) -> int:
        """Return how many tokens of these sequences the rank holds, new ones counted."""
        key = "kv tokens", rank
        if key not in self.memo:
            cached = 0 if self.cached is None else int(self.cached[:, rank].sum())
            self.memo[key] = self.num_tokens(rank) + cached
        return self.memo[key]

    def positions(self, rank: int) -> np.ndarray:
        """Return the rank's positions, int64 [n_local], in local packed order: for RoPE."""
        table = self.runs(rank)
        within = np.arange(table[:, 3].sum()) - np.repeat(table[:, 1], table[:, 3])
        return np.repeat(table[:, 2], table[:, 3]) + within * np.repeat(table[:, 4], table[:, 3])

    def indices(self, rank: int) -> np.ndarray:
        """Return where the rank's tokens stand in the packed global order, int64 [n_local]."""
        table = self.runs(rank)
        lengths = np.asarray(self.lengths, dtype=np.int64)
        begins = np.cumsum(lengths) - lengths - (0 if self.starts is None else self.starts)
        return self.positions(rank) + np.repeat(begins[table[:, 0]], table[:, 3])

    def shard(self, x, rank: int):
        """Return the rank's rows of x [total, ...], as a copy in local packed order."""
        check(len(x) == self.total, "x", f"{self.total} rows, one per new token", len(x))
        return x[self.indices(rank)]

    @functools.cached_property
    def memo(self) -> dict:
        """What has been derived from this plan, by key: made once and used by every layer."""
        return {}

    def _table(self, rank: int, kind: str) -> np.ndarray:
        ok = isinstance(rank, int) and 0 <= rank < self.world_size
        check(ok, "rank", f"0 to {self.world_size - 1}", repr(rank))
        key = kind, rank
        if key not in self.memo:
            make = {"new": self._new_runs, "kv": self._joint_runs, "blocks": self._blocks}
            self._keep(*key, make[kind](rank))
        return self.memo[key]

    def _keep(self, kind: str, rank: int, table) -> None:
        table.flags.writeable = False
        self.memo[kind, rank] = table

    def _new_runs(self, rank):
        place = rank if self.places is None else self.places[:, rank]
        table = shard.runs(self.layout, self.lengths, self.world_size, place)
        return self._on_top(table)

    def _on_top(self, table):
        if self.starts is not None:
            table[:, 2] += self.starts[table[:, 0]]
        return table

    def _joint_runs(self, rank):
        new = self.runs(rank)
        if not self.has_history:
            return new.copy()
        cached = np.array(
            [(seq, 0, *chunk) for seq, ranks in enumerate(self.held) for chunk in ranks[rank]],
            dtype=np.int64,
        ).reshape(-1, 5)
        return _joined(cached, new)

    def _blocks(self, rank):
        seqs = np.flatnonzero(self.cached[:, rank])
        cached = np.ones((len(seqs), 5), dtype=np.int64)
        cached[:, 0], cached[:, 3] = seqs, self.cached[seqs, rank]
        cached[:, 2] = self.starts[seqs] - cached[:, 3]
        return _joined(cached, self.runs(rank))


def _joined(cached, new):
    """Return runs by sequence, cached before new, as they lie in a packed tensor."""
    table = np.concatenate([cached, new])
    table = table[np.argsort(table[:, 0], kind="stable")]
    table[:, 1] = np.cumsum(table[:, 3]) - table[:, 3]
    return table
