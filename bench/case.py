"""A case: what is measured, under an id that stays."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bench import operation


@dataclass(frozen=True)
class Case:
    """One row of measurements: some implementations of one operation, on the same inputs."""

    id: str
    operation: operation.Operation
    shape: dict[str, int]
    world_size: int
    dtype: str | None = None
    impls: tuple[str, ...] = ("ringkern",)
    peer: str | None = None  # of impls, that the others are held against
    repetitions: int = 10
    calls: int = 1  # timed calls in each repetition
    warmup: int = 2  # repetitions before
    measure: Callable = operation.measure  # (session, case) -> impl -> Measurement
    in_ranks: bool = True  # measure() is for every rank to call; else for the program itself
    alone: str | None = None  # of impls, what one process does with the threads of all ranks
    layout: str | None = "zigzag"
    transport: str | None = "tcp"
    link_mbit: int | None = None  # a shaped link between ranks; None: loopback
    session: str | None = None  # cases of one session share processes, rings and a profile
    on_gpu: bool = False
    needs: str | None = None  # a package that may not be there
    why_not: Callable = operation.nothing  # (case) -> why this machine cannot measure it, or None
    quick: dict[str, int] = field(default_factory=dict)  # sizes that only try the machinery
    # impl -> record field -> what it should be at most
    targets: dict[str, dict[str, float]] = field(default_factory=dict)


def tiny(case: Case) -> Case:
    """Return the case in sizes that take no time, for one or three ranks: numbers mean nothing."""
    world_size = case.world_size if not case.in_ranks or case.world_size == 1 else 3
    counts = dict(world_size=world_size, repetitions=2, calls=min(case.calls, 3), warmup=1)
    if case.link_mbit:  # shaped, but not slow
        counts["link_mbit"] = 1000
    return replace(case, shape=case.shape | case.quick, targets={}, **counts)
