"""What one call computes: the new tokens of a batch, the cached ones, and who holds which."""

import functools
from dataclasses import dataclass, field

import numpy as np

from ringkern import shard
from ringkern.errors import check


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
    held: object = field(default=None, repr=False)  # history.Held: the cached tokens' chunks
    cached: np.ndarray | None = field(default=None, repr=False)  # tokens, [sequences, ranks]
    numbers: tuple[int, ...] = ()  # which sequences, for caches
    serial: int = 0  # which plan of its Placement, from 1; 0: made by hand
    source: object = field(default=None, repr=False)  # the Placement

    def __post_init__(self):
        check(self.world_size >= 1, "world_size", "at least 1", self.world_size)
        lengths = self.lengths if isinstance(self.lengths, (tuple, list)) else ()
        ok = len(lengths) > 0 and all(isinstance(n, int) and n >= 0 for n in lengths)
        if not ok:
            check(False, "lengths", "a tuple of ints, 0 or more", repr(self.lengths)[:100])
        object.__setattr__(self, "lengths", tuple(lengths))
        shard.check_layout(self.layout)
        alone = self.starts is not None and (self.held is None or self.cached is None)
        check(not alone, "starts", "None in a plan made by hand", "cached tokens of no Placement")

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

    def all_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return whose each run is, int64 [n], and runs(rank) of every rank in one table.

        In less time than one by one, and with it what all_counts() and the like return.
        """
        shares = self._shares(np.arange(self.world_size))
        whose, table = shard.runs(shares)
        self._on_top(table).flags.writeable = False
        for rank, mine in enumerate(shard.split(table, whose, self.world_size)):
            self.memo["new", rank] = mine
        counts = self.memo["counts"] = shares.counts
        counts.flags.writeable = False
        for rank, tokens in enumerate(counts.sum(axis=0).tolist()):
            self.memo["tokens", rank] = tokens
        return whose, table

    def kv_runs(self, rank: int) -> np.ndarray:
        """Return the rank's runs of cached and new tokens together, as runs().

        By sequence, and within one as they are stored: by position.
        """
        return self._table(rank, "kv")

    def kv_blocks(self, ranks) -> list[np.ndarray]:
        """Return kv_runs() of some ranks with what is cached of a sequence as one run, before the new.

        The same rows in the same order: to queries that see all that lies before them it makes no
        difference where. Long histories are many runs. All ranks at once, as calls of numpy cost time.
        """
        if not self.has_history:
            return [self.runs(rank) for rank in ranks]
        missing = [rank for rank in ranks if ("blocks", rank) not in self.memo]
        for rank, table in zip(missing, self._blocks(missing) if missing else (), strict=True):
            table.flags.writeable = False
            self.memo["blocks", rank] = table
        return [self.memo["blocks", rank] for rank in ranks]

    def counts(self, ranks, rows=slice(None)) -> np.ndarray:
        """Return how many new tokens of each sequence the ranks hold, int64 [sequences, ranks].

        rows: of which sequences; an index as numpy takes it.
        """
        if "counts" in self.memo:
            return self.memo["counts"][rows][:, ranks]
        return self._shares(np.asarray(ranks), rows).counts

    def all_counts(self) -> np.ndarray:
        """Return counts() of every rank and sequence, which is kept."""
        if "counts" not in self.memo:
            self.memo["counts"] = self.counts(range(self.world_size))
            self.memo["counts"].flags.writeable = False
        return self.memo["counts"]

    def num_tokens(self, rank: int) -> int:
        """Return how many of the new tokens the rank holds."""
        self._check_rank(rank)
        key = "tokens", rank
        if key not in self.memo:
            self.memo[key] = int(self.runs(rank)[:, 3].sum())
        return self.memo[key]

    def kv_tokens(self, rank: int) -> int:
        """Return how many tokens of these sequences the rank holds, new ones counted."""
        self._check_rank(rank)
        key = "kv tokens", rank
        if key not in self.memo:
            if "cached" not in self.memo:
                no = np.zeros((1, self.world_size), dtype=np.int64)
                cached = no if self.cached is None else self.cached
                self.memo["cached"] = cached.sum(axis=0).tolist()
            self.memo[key] = self.num_tokens(rank) + self.memo["cached"][rank]
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
        """Return the rank's rows of x [total, ...], as a copy in local packed order.

        x: an array, or a tensor on any device; of a GPU's the host waits for nothing.
        """
        shape = tuple(getattr(x, "shape", ()))
        check(len(shape) > 0, "x", "a tensor or an array [total, ...]", shape or type(x).__name__)
        check(len(x) == self.total, "x", f"{self.total} rows, one per new token", len(x))
        rows = self.indices(rank)
        if getattr(x, "is_cuda", False):
            from ringkern.upload import upload  # here, as planning needs no torch

            rows = upload(rows, x.device)
        return x[rows]

    @functools.cached_property
    def memo(self) -> dict:
        """What has been derived from this plan, by key: made once and used by every layer."""
        return {}

    def _check_rank(self, rank) -> None:
        if isinstance(rank, bool) or not (isinstance(rank, int) and 0 <= rank < self.world_size):
            check(False, "rank", f"0 to {self.world_size - 1}", repr(rank))

    def _table(self, rank: int, kind: str) -> np.ndarray:
        self._check_rank(rank)
        table = self.memo.get((kind, rank))
        if table is None:
            table = self._new_runs(rank) if kind == "new" else self._joint_runs(rank)
            table.flags.writeable = False
            self.memo[kind, rank] = table
        return table

    def _shares(self, ranks, rows=slice(None)):
        places = ranks[None, :] if self.places is None else self.places[rows][:, ranks]
        lengths = np.asarray(self.lengths, dtype=np.int64)[rows]
        return shard.deal(self.layout, lengths, self.world_size, places)

    def _new_runs(self, rank):
        return self._on_top(shard.runs(self._shares(np.array([rank])))[1])

    def _on_top(self, table):
        if self.starts is not None:
            table[:, 2] += self.starts[table[:, 0]]
        return table

    def _joint_runs(self, rank):
        new = self.runs(rank)
        if not self.has_history:
            return new.copy()
        parts = self.held.runs(rank), new
        return shard.pack(1, *((np.zeros(len(part), dtype=np.int64), part) for part in parts))[0]

    def _blocks(self, ranks):
        cached = self.cached.T[ranks]  # [ranks, sequences]
        kept = cached.ravel().nonzero()[0]
        whose, seqs = np.divmod(kept, len(self.lengths))
        table = np.ones((len(kept), 5), dtype=np.int64)
        table[:, 0], table[:, 3] = seqs, cached.ravel()[kept]
        table[:, 2] = self.starts[seqs] - table[:, 3]
        new = [self.runs(rank) for rank in ranks]
        whose_new = np.arange(len(ranks)).repeat([len(runs) for runs in new])
        return shard.pack(len(ranks), (whose, table), (whose_new, np.concatenate(new)))
