"""The cases: what is measured, under ids that stay. A record names the case that made it."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ringkern.errors import check

from bench import memory, operation, planning, ring, transport


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
    quick: dict[str, int] = field(default_factory=dict)  # sizes that only try the machinery
    # impl -> record field -> what it should be at most
    targets: dict[str, dict[str, float]] = field(default_factory=dict)


def tiny(case: Case) -> Case:
    """Return the case in sizes that take no time, for one or three ranks: numbers mean nothing."""
    world_size = case.world_size if not case.in_ranks or case.world_size == 1 else 3
    counts = dict(world_size=world_size, repetitions=2, calls=min(case.calls, 3), warmup=1)
    return replace(case, shape=case.shape | case.quick, targets={}, **counts)


def select(patterns: list[str]) -> list[Case]:
    """Return the cases that any of the ids or globs names; all where there is none."""
    for pattern in patterns:
        known = any(fnmatch.fnmatchcase(case.id, pattern) for case in CASES)
        check(known, "CASE", "an id or a glob that --list shows", repr(pattern))
    return [c for c in CASES if not patterns or any(fnmatch.fnmatchcase(c.id, p) for p in patterns)]


KIB, MIB = 1 << 10, 1 << 20


def _exchange(name: str, world_size: int, nbytes: int, most: float | None, **counts) -> Case:
    return Case(
        f"exchange/tcp/w{world_size}/{name}",
        transport.EXCHANGE,
        {"nbytes": nbytes},
        world_size,
        "int64",
        impls=("ringkern", "gloo"),
        peer="gloo",
        layout=None,
        quick={"nbytes": min(nbytes, 64 * KIB)},
        targets={"ringkern": {"ratio": most}} if most else {},
        **counts,
    )


def _options() -> Case:
    """What lanes and checksums cost. For information: no target."""
    return Case(
        "exchange_options/tcp/w2/64MiB",
        transport.EXCHANGE,
        {"nbytes": 64 * MIB},
        2,
        "int64",
        impls=tuple(transport.RINGS),
        peer="ringkern",
        layout=None,
        repetitions=20,
        quick={"nbytes": 64 * KIB},
    )


def _shape(seqlen: int) -> dict[str, int]:
    return {"batch": 1, "seqlen": seqlen, "nheads": 8, "nheads_k": 8, "headdim": 64, "causal": True}


def _ring(seqlen: int, dtype: str, **options) -> Case:
    return Case(
        f"ring_attn_fwd/zigzag/tcp/w2/b1/s{seqlen}/h8/hk8/d64/causal/{dtype}",
        ring.RING_ATTN_FWD,
        _shape(seqlen),
        2,
        dtype,
        impls=("ringkern", "ringkern_func", ring.SINGLE),
        peer=ring.SINGLE,
        alone=ring.SINGLE,
        quick={"seqlen": 192},
        **options,
    )


def _memory(world_size: int, dtype: str, heap: bool = False) -> Case:
    """2048 tokens on each rank, however many ranks. heap: count what the C library keeps too."""
    seqlen = 2048 * world_size
    case = Case(
        f"memory/zigzag/tcp/w{world_size}/b1/s{seqlen}/h8/hk8/d64/causal/{dtype}{'/heap' * heap}",
        ring.RING_ATTN_FWD,
        _shape(seqlen),
        world_size,
        dtype,
        repetitions=1,
        warmup=1,
        measure=memory.measure_heap if heap else memory.measure,
        quick={"seqlen": 96 * (1 if world_size == 1 else 3)},
    )
    most = round(1.05 * memory.model(case)["model_bytes"])
    return case if heap else replace(case, targets={"ringkern": {"peak_mem_bytes": most}})


def _plan(batch: int, seqlen: int, ranks_planned: int) -> Case:
    whose = "all_ranks" if ranks_planned > 1 else "one_rank"
    return Case(
        f"plan/zigzag/w128/b{batch}/s{seqlen}/{whose}",
        planning.PLAN,
        {"batch": batch, "seqlen": seqlen, "ranks_planned": ranks_planned},
        128,
        warmup=0,
        measure=planning.measure,
        in_ranks=False,
        transport=None,
        quick={"seqlen": 300},
        targets={"ringkern": {"time_us.p50": 1e6, "peak_mem_bytes": 200e6}},
    )


DTYPES = ("float32", "bfloat16")
RING_TARGETS = {"ringkern": {"ratio": 1.10}}

CASES = (
    _exchange("64MiB", 2, 64 * MIB, 0.5, repetitions=20),
    _exchange("1MiB", 2, MIB, None, repetitions=20, calls=20),
    _exchange("8B", 2, 8, 0.5, repetitions=20, calls=500),
    _exchange("16MiB", 4, 16 * MIB, 1.0, repetitions=20),
    _options(),
    *(_ring(1024, dtype, calls=5) for dtype in DTYPES),  # short: where waiting shows
    *(_ring(n, dtype, targets=RING_TARGETS) for n in (8192, 16384) for dtype in DTYPES),
    *(_memory(world_size, dtype) for dtype in DTYPES for world_size in (1, 2, 4, 8)),
    *(_memory(world_size, dtype, heap=True) for dtype in DTYPES for world_size in (2, 8)),
    _plan(1, 1 << 20, 1),
    _plan(1, 1 << 20, 128),
    _plan(1000, 1000, 1),
)
