"""Which sequences there are, and which rank gets their next positions."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from ringkern.errors import check
from ringkern.history import History
from ringkern.plan import Plan


@dataclass(slots=True)
class _Record:
    """One sequence."""

    changed: int  # how many plans there were when it was last truncated, or begun
    number: int  # never used again, so that caches tell a new sequence from a freed one
    row: int  # of the tables


class Placement:
    """Decides which rank holds which tokens. Host only, and identical on every rank.

    Nothing is negotiated between ranks: each makes the same calls in the same order and comes to
    the same answer.

        placement = ringkern.Placement(world_size=4)
        plan = placement.prefill({"a": 5000, "b": 37})
        mine = plan.shard(tokens, rank)  # this rank's rows of [5037, ...]
        plan = placement.decode(["a", "b"])  # one more token each

    Of any sequence, any two ranks hold the same number of tokens, give or take one, over any mix of
    prefills and decodes. Where sequences begin, the odd tokens go to the ranks that hold fewest of
    all sequences; while there are none, as for drop-in calls, each is sharded as shard_sequence()
    does it, its odd tokens on the first ranks. After truncate(), which takes from where the last
    tokens lie, new tokens go where there are fewest of the sequence's.
    """

    def __init__(self, world_size: int):
        ok = isinstance(world_size, int) and not isinstance(world_size, bool) and world_size >= 1
        check(ok, "world_size", "an int of at least 1", repr(world_size))
        self.world_size = world_size
        self._records: dict[object, _Record] = {}
        self._numbers = 0
        self._plans = 0
        # Per sequence and rank: tokens held * world_size + the rank's turn among equals. The least
        # key is where the next token goes.
        self._keys = np.zeros((4, world_size), dtype=np.int64)
        self._lengths = np.zeros(4, dtype=np.int64)  # tokens of each sequence
        self._history = History(4, world_size)
        self._free_rows = [3, 2, 1, 0]
        self._load = np.zeros(world_size, dtype=np.int64)  # tokens of all sequences, by rank
        self._changed = 0  # how many plans there were when any was last truncated or freed
        self._watchers: list = []  # caches, told of fork, truncate and free

    # ---- new tokens

    def prefill(self, lengths: Mapping[object, int]) -> Plan:
        """Return the plan for new tokens of some sequences, on top of what they have.

        Only the new tokens are sharded, zigzag, each sequence alone, wherever the cached ones lie.

        Args:
            lengths: new tokens per sequence id, in packed order; any lengths above 0. An id that
                is not known begins a sequence.

        Raises:
            ArgumentError: no sequence, or a length that is not an int above 0. Nothing changed.
        """
        ok = isinstance(lengths, Mapping)
        check(ok, "lengths", "a dict of new tokens by sequence id", type(lengths).__name__)
        check(len(lengths) > 0, "lengths", "at least one sequence", "none")
        for sequence, length in lengths.items():
            ok = isinstance(length, int) and not isinstance(length, bool) and length > 0
            check(ok, f"length of {sequence!r}", "an int above 0", repr(length))
            check(length < 1 << 48, f"length of {sequence!r}", "less than 2^48", length)
        return self._extend(tuple(lengths), tuple(lengths.values()))

    def decode(self, sequences: Collection[object]) -> Plan:
        """Return the plan for one new token of each sequence.

        The rank that owns a sequence's new token rotates (paper.md, Algorithm 4), from where the
        fewest other sequences are.

        Raises:
            ArgumentError: no sequence, one twice, or one that is not known. Nothing changed.
        """
        # A set of strings has another order in each process.
        ok = isinstance(sequences, Collection)
        ok = ok and not isinstance(sequences, str | bytes | set | frozenset | Mapping)
        if not ok:
            check(False, "sequences", "a list of sequence ids", repr(sequences))
        check(len(sequences) > 0, "sequences", "at least one sequence", "none")
        names = tuple(sequences)
        try:
            known = self._records.keys() >= set(names)
        except TypeError:  # one cannot be hashed
            known = False
        if not known:
            for sequence in names:  # says which
                self._record(sequence)
        check(len(set(names)) == len(names), "sequences", "each once", list(names))
        return self._extend(names, (1,) * len(names))

    def _extend(self, sequences, lengths) -> Plan:
        new = np.array(lengths, dtype=np.int64)
        records = [self._records.get(sequence) or self._begin(sequence) for sequence in sequences]
        rows = np.array([record.row for record in records])
        starts, keys = self._lengths[rows], self._keys[rows]
        places = self._places(keys, starts, new)
        self._plans += 1
        plan = Plan(
            self.world_size,
            lengths,
            "zigzag",
            sequences,
            starts,
            places,
            self._history.at(rows),
            keys // self.world_size,
            tuple([record.number for record in records]),
            self._plans,
            self,
        )
        ranks, runs = plan.all_runs()
        counts = plan.all_counts()
        self._keys[rows] = keys + self.world_size * counts
        self._load += counts.sum(axis=0)
        self._lengths[rows] = starts + new
        self._history.append(rows[runs[:, 0]], ranks, runs[:, 2:])
        dealt = np.flatnonzero((new > 1) | (starts == 0)).tolist()
        if dealt:
            self._deal([records[index] for index in dealt])
        return plan

    def _deal(self, records) -> None:
        """Choose the order in which the ranks get the sequences' next tokens, one each.

        First those get one that hold fewer than others; then all in turn, which decoding keeps to,
        so that a rank's tokens are world_size apart. The turns begin such that a batch's new tokens
        spread over the ranks: in the long run, and then the next ones.
        """
        rows, size = [record.row for record in records], self.world_size
        ranks = np.arange(size)
        dealt = set(rows)
        others = self._keys[
            [other.row for other in self._records.values() if other.row not in dealt]
        ]
        going = np.bincount(_phases(others), minlength=size)
        first = np.bincount(others.argmin(axis=1), minlength=size)
        held = self._keys[rows] // size
        missing = (held.max(axis=1, keepdims=True) - held).sum(axis=1)
        lowest = held == held.min(axis=1, keepdims=True)
        for i in np.argsort(lowest.sum(axis=1), kind="stable"):  # who can choose least, first
            fewest = np.flatnonzero(lowest[i])
            owners = fewest[((fewest - ranks[:, None]) % size).argmin(axis=1)]  # by start
            phases = (ranks - missing[i]) % size
            start = (going[phases] * len(self._records) + first[owners]).argmin()
            going[phases[start]] += 1
            first[owners[start]] += 1
            self._keys[rows[i]] = held[i] * size + (ranks - start) % size

    def _places(self, keys, starts, lengths):
        """Return which share of each sequence is each rank's, int64 [sequences, ranks].

        Shares that are one token longer go to the ranks that hold fewest of the sequence, or, where
        it begins, of all. Where there is nothing yet, each is dealt by rank number, as
        shard_sequence() does.
        """
        size, load = self.world_size, self._load.copy()
        if not load.any():
            return np.broadcast_to(np.arange(size), keys.shape)
        extra = lengths % (2 * size)
        position = keys.argsort(axis=1).argsort(axis=1)  # 0: the rank that holds fewest
        for i in np.flatnonzero(starts == 0):
            order = load.argsort(kind="stable")
            position[i, order] = np.arange(size)
            load[order[: extra[i] - size * (extra[i] > size)]] += 1
        # The longer shares are places 0 .. extra - 1, or, beyond world_size, those from
        # 2 * world_size - extra on.
        return (position - (extra * (extra > size))[:, None]) % size

    # ---- changes to the history

    def length(self, sequence: object) -> int:
        """Return how many tokens the sequence has."""
        return int(self._lengths[self._record(sequence).row])

    def truncate(self, sequence: object, length: int) -> None:
        """Forget the sequence's tokens from position `length` on: rejected drafts, retries."""
        record = self._record(sequence)
        has = int(self._lengths[record.row])
        ok = isinstance(length, int) and not isinstance(length, bool) and 0 <= length <= has
        check(ok, "length", f"0 to {has}, what {sequence!r} has", repr(length))
        lost = np.array(self._history.truncate(record.row, length))
        self._lengths[record.row] = length
        self._changed = record.changed = self._plans
        self._keys[record.row] -= self.world_size * lost
        self._load -= lost
        held = self._keys[record.row] // self.world_size
        self._tell("truncated", record.number, held.tolist())

    def fork(self, sequence: object, new: object) -> None:
        """Begin sequence `new` with all tokens of `sequence`. Caches share the pages until one
        of the two writes."""
        record = self._record(sequence)
        fresh = isinstance(new, Hashable) and new not in self._records
        check(fresh, "new", "an id that is not in use", repr(new))
        copy = self._begin(new)
        self._history.copy(record.row, copy.row)
        self._lengths[copy.row] = self._lengths[record.row]
        self._keys[copy.row] = self._keys[record.row]
        self._load += self._keys[record.row] // self.world_size
        self._deal([copy])
        self._tell("forked", record.number, copy.number)

    def free(self, sequence: object) -> None:
        """Forget the sequence."""
        record = self._record(sequence)
        del self._records[sequence]
        self._changed = self._plans
        self._load -= self._keys[record.row] // self.world_size
        self._history.clear(record.row)
        self._free_rows.append(record.row)
        self._tell("freed", record.number)

    # ---- for caches

    def number(self, sequence: object) -> int:
        """Return what tells this sequence from others that had its id before."""
        return self._record(sequence).number

    def changed_since(self, plan: Plan) -> list:
        """Return the plan's sequences that were truncated or freed since it was made."""
        if self._changed < plan.serial:
            return []
        return [
            sequence
            for sequence, number in zip(plan.sequences, plan.numbers, strict=True)
            if not self._is_current(sequence, number, plan.serial)
        ]

    def _is_current(self, sequence, number, serial):
        record = self._records.get(sequence)
        return record is not None and record.number == number and record.changed < serial

    def watch(self, cache) -> None:
        """Tell the cache of every later fork, truncate and free."""
        self._watchers.append(cache)

    def unwatch(self, cache) -> None:
        self._watchers = [other for other in self._watchers if other is not cache]

    def _tell(self, event: str, *what) -> None:
        for cache in self._watchers:
            getattr(cache, event)(*what)

    def _record(self, sequence) -> _Record:
        known = isinstance(sequence, Hashable) and sequence in self._records
        check(known, "sequence", "an id that was prefilled and not freed", repr(sequence))
        return self._records[sequence]

    def _begin(self, sequence) -> _Record:
        if not self._free_rows:
            self._free_rows = list(range(len(self._keys), 2 * len(self._keys)))[::-1]
            self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)])
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
            self._history.grow()
        row, number = self._free_rows.pop(), self._numbers
        self._numbers += 1
        self._keys[row], self._lengths[row] = np.arange(self.world_size), 0
        record = self._records[sequence] = _Record(self._plans, number, row)
        return record


def _phases(keys):
    """Return whose turn it would be if all ranks held as many tokens as any, by sequence."""
    size = keys.shape[1]
    held = keys // size
    missing = (held.max(axis=1, keepdims=True) - held).sum(axis=1)
    return (-keys[:, 0] - missing) % size
