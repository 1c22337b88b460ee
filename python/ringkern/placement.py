"""The history: which sequences there are, and where their positions lie."""

from collections.abc import Mapping

from ringkern.errors import UnsupportedError, check
from ringkern.plan import Plan


class Placement:
    """Decides which rank holds which tokens. Host only, and identical on every rank.

    Nothing is negotiated between ranks: each makes the same calls in the same order and comes to
    the same answer.

        placement = ringkern.Placement(world_size=4)
        plan = placement.prefill({"a": 5000, "b": 37})
        mine = plan.shard(tokens, rank)  # this rank's rows of [5037, ...]
    """

    def __init__(self, world_size: int):
        check(
            isinstance(world_size, int) and world_size >= 1,
            "world_size",
            "an int of at least 1",
            repr(world_size),
        )
        self.world_size = world_size
        self._lengths: dict[object, int] = {}

    def prefill(self, lengths: Mapping[object, int]) -> Plan:
        """Return the plan for new tokens of some sequences, sharded zigzag, each alone.

        Args:
            lengths: new tokens per sequence id, in packed order; any lengths above 0.

        Raises:
            ArgumentError: no sequence, or a length that is not an int above 0.
            UnsupportedError: a sequence has tokens already.
        """
        check(len(lengths) > 0, "lengths", "at least one sequence", "none")
        for sequence, length in lengths.items():
            ok = isinstance(length, int) and not isinstance(length, bool) and length > 0
            check(ok, f"length of {sequence!r}", "an int above 0", repr(length))
            if sequence in self._lengths:
                raise UnsupportedError(
                    f"prefill of {sequence!r}: needs a persistent KV cache, which this version "
                    f"does not have; the sequence holds {self._lengths[sequence]} tokens. "
                    "Prefill it under a new id."
                )
        self._lengths.update(lengths)
        return Plan(self.world_size, tuple(lengths.values()), "zigzag", tuple(lengths))

    def length(self, sequence: object) -> int:
        """Return how many tokens the sequence has."""
        check(sequence in self._lengths, "sequence", "an id that was prefilled", repr(sequence))
        return self._lengths[sequence]
