"""The cases: what is measured, under ids that stay. A record names the case that made it."""

import fnmatch
from dataclasses import replace

from ringkern.errors import check
from ringkern.schedule import METHODS

from bench import host, memory, planning, ring, stages, transport
from bench.calibration import CALIBRATE
from bench.case import Case
from bench.gpu_cases import device_exchange, gpu_cases, overlap_case, post_case
from bench.paper import PAPER_PASS_Q, UNPADDED, hides_kv


def select(patterns: list[str]) -> list[Case]:
    """Return the cases that any of the ids or globs names; all where there is none."""
    for pattern in patterns:
        known = any(fnmatch.fnmatchcase(case.id, pattern) for case in CASES)
        check(known, "CASE", "an id or a glob that --list shows", repr(pattern))
    return [c for c in CASES if not patterns or any(fnmatch.fnmatchcase(c.id, p) for p in patterns)]


KIB, MIB = 1 << 10, 1 << 20
# Megabits per second of each rank's link. A rank here attends at about 35 GFLOP/s. Of the paper's
# ranks, compute to link is 16000 FLOP/byte over RDMA and ten times that over TCP, for contexts of
# 128000 tokens of 2 bytes an element (paper.md sections 1 and 4). Contexts here are an eighth of
# that, elements twice as large: 1000 and 10000 FLOP/byte put equation (2)'s bound at the same share
# of a context.
RDMA_LIKE, TCP_LIKE = 280, 28


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


def _plan_history(new: int, cached: int) -> Case:
    """One more prompt after many turns, each a prompt and some tokens decoded."""
    case = replace(_plan(1, new, 1), targets={"ringkern": {"time_us.p50": 10e3}})
    shape = case.shape | {"cached": cached, "turns": 64}
    quick = {"seqlen": 30, "cached": 500, "turns": 4}
    return replace(case, id=f"plan/history/w128/b1/s{new}/P{cached}", shape=shape, quick=quick)


def _calibrate() -> Case:
    return Case(
        "calibrate/tcp/w4",
        CALIBRATE,
        {"seconds": 3},
        4,
        layout=None,
        repetitions=3,
        warmup=0,
        quick={"seconds": 0.1},
        targets={"ringkern": {"time_us.max": 5e6}},
    )


def _stage(link_mbit: int | None, batch: int, new: int, cached: int, **options) -> Case:
    """New tokens on top of cached ones by every method: 16 query heads share a key head."""
    link = f"{link_mbit}mbit" if link_mbit else "loopback"
    shape = {"batch": batch, "new": new, "cached": cached}
    shape |= {"nheads": 16, "nheads_k": 1, "headdim": 64, "causal": True}
    options = dict(impls=METHODS, session=link, quick={"new": min(new, 40), "cached": 50}) | options
    return Case(
        f"stage/tcp/w4/{link}/b{batch}/T{new}/P{cached}/h16/hk1/d64/float32",
        stages.STAGE,
        shape,
        4,
        "float32",
        link_mbit=link_mbit,
        **options,
    )


def _grid(link_mbit: int):
    """All four methods over new and cached tokens. Long calls are measured less often."""
    grid = [
        (new, cached) for cached in (0, 2048, 8192, 16384) for new in (1, 16, 64, 256, 1024, 4096)
    ]
    for new, cached in [*grid[1:], (512, 4096)]:
        # Few new tokens are over soon, but for K and V on a slow link.
        soon = new < 64 and link_mbit == RDMA_LIKE
        counts = dict(repetitions=25 if link_mbit == RDMA_LIKE else 9, calls=3, warmup=1)
        if new >= 1024 or cached >= 8192:
            # Calls that compute spread by 8 %, and their methods differ by less.
            counts = dict(repetitions=45 if soon else 15, calls=1, warmup=1)
            if link_mbit != RDMA_LIKE:  # there K and V take seconds, and methods differ by more
                counts["repetitions"] = 9 if new < 1024 else 5
        yield _hidden(_stage(link_mbit, 1, new, cached, **counts))


def _hidden(case: Case) -> Case:
    """Have pass_kv held against hiding K and V, where the paper says that it does."""
    if not hides_kv(case.world_size, case.link_mbit, case.shape):
        return case
    return replace(case, targets={"pass_kv": {"exposed_comm": 0.05}})


def _order(link_mbit: int, new: int, cached: int, batch: int = 1) -> Case:
    """pass_q against the paper's order of the same, which returns all partial outputs at the end."""
    # Calls of some 60 ms spread by 8 %: a median of 75 of them is good to about 1 %.
    counts = dict(repetitions=75 if new < 256 else 15, calls=1, warmup=1)
    targets = {"pass_q": {"ratio": 1.0, "detail.tail_ratio": 0.5}}
    impls = dict(impls=("pass_q", PAPER_PASS_Q), peer=PAPER_PASS_Q)
    case = _stage(link_mbit, batch, new, cached, targets=targets, **impls, **counts)
    return replace(case, id=case.id.replace("stage/", "order/"))


def _decode(batch: int) -> Case:
    """One token of each sequence: gather_q against the paper's ring decode."""
    targets = {"gather_q": {"ratio": 0.5}} if batch == 1 else {}
    impls = dict(impls=("gather_q", PAPER_PASS_Q, UNPADDED), peer=PAPER_PASS_Q, targets=targets)
    case = _stage(None, batch, 1, 32768, repetitions=15, calls=3, warmup=2, **impls)
    return replace(case, id=case.id.replace("stage/", "decode/"), session=None)


HOST = {
    "plan": (host.HOST_PLAN, host.measure_plan, 500, "time_us.p50"),
    "layer": (host.HOST_LAYER, host.measure_layer, 60, "time_us.p50"),
    "launch": (host.HOST_LAYER, host.measure_launches, 60, "time_us.p50"),
    "graph": (host.HOST_GRAPH, host.measure_graph, 500, "detail.layer_us"),
}


def _host(what: str, most_us: float, world_size: int = 4, aimed=METHODS, **options) -> Case:
    operation_, measure, cached, aim = HOST[what]
    return Case(
        f"host/{what}/w{world_size}/b64",
        operation_,
        {"batch": 64, "cached": cached},
        world_size,
        impls=METHODS,
        measure=measure,
        in_ranks=False,
        transport=None,
        quick={"batch": 5},
        targets={method: {aim: most_us} for method in aimed},
        **options,
    )


DTYPES = ("float32", "bfloat16")
RING_TARGETS = {"ringkern": {"ratio": 1.10}}

CASES = (
    _exchange("64MiB", 2, 64 * MIB, 0.5, repetitions=20),
    _exchange("1MiB", 2, MIB, None, repetitions=20, calls=20),
    _exchange("8B", 2, 8, 0.5, repetitions=20, calls=500),
    _exchange("16MiB", 4, 16 * MIB, 1.0, repetitions=20),
    _options(),
    device_exchange(),
    *(post_case(messages) for messages in (1, 7)),
    *(overlap_case("tcp", 2, link) for link in (RDMA_LIKE, TCP_LIKE)),
    *(_ring(1024, dtype, calls=5) for dtype in DTYPES),  # short: where waiting shows
    *(_ring(n, dtype, targets=RING_TARGETS) for n in (8192, 16384) for dtype in DTYPES),
    *(_memory(world_size, dtype) for dtype in DTYPES for world_size in (1, 2, 4, 8)),
    *(_memory(world_size, dtype, heap=True) for dtype in DTYPES for world_size in (2, 8)),
    *_grid(RDMA_LIKE),
    *_grid(TCP_LIKE),
    _hidden(_stage(TCP_LIKE, 1, 8192, 16384, impls=("pass_kv",), repetitions=5)),
    _calibrate(),
    *(_order(link, new, 16384) for link in (RDMA_LIKE, TCP_LIKE) for new in (64, 256, 1024)),
    *(_decode(batch) for batch in (1, 4, 16)),
    _host("plan", 1000.0, calls=20),
    _host("layer", 50.0, calls=50),
    _host("launch", 100.0, world_size=8, calls=50, needs="triton"),
    _host("graph", 15.0, 8, ("gather_q", "pass_q"), calls=32, warmup=2, needs="triton"),
    _plan(1, 1 << 20, 1),
    _plan(1, 1 << 20, 128),
    _plan(1000, 1000, 1),
    _plan_history(1000, 1 << 20),
    *gpu_cases(),
)
