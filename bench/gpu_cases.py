"""The cases that need a GPU: kernels, and what rings of GPUs move and hide."""

from bench import gpu, overlap, posting, staged
from bench.case import Case
from bench.gpu_decode import DECODE
from bench.gpu_merge import MERGE
from bench.gpu_pack import PACK
from bench.gpu_step import ATTN_STEP

# What a kernel should reach of a ceiling is a target on its inverse.


def _gpu(operation_, name: str, shape: dict, quick: dict, peers=(), least=None, **options) -> Case:
    targets = {"ringkern": {"detail.over_floor": round(1 / least, 4)}} if least else {}
    usual = dict(impls=("ringkern", *peers), targets=targets, quick=quick, measure=gpu.measure)
    usual |= dict(repetitions=30, calls=1, warmup=1)
    usual |= dict(in_ranks=False, on_gpu=True, layout=None, transport=None)
    return Case(f"gpu/{name}/bfloat16", operation_, shape, 1, "bfloat16", **usual | options)


ATTENTION_PEERS = ("torch_cudnn", "torch_flash", "flash_attn", "flash_attn_4", "flashinfer")


def gpu_step(
    kind: str, batch: int, seqlen_q: int, seqlen_k: int, nheads=64, nheads_k=8, headdim=128,
    peers=(), **options,
) -> Case:  # fmt: skip
    """Return a case of one step. kind: "full", "causal", or "seeded": full, on a running state."""
    shape = dict(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads=nheads)
    shape |= dict(nheads_k=nheads_k, headdim=headdim, causal=int(kind == "causal"))
    sizes = f"b{batch}/q{seqlen_q}/k{seqlen_k}/h{nheads}/hk{nheads_k}/d{headdim}"
    quick = dict(batch=1, seqlen_q=min(seqlen_q, 40), seqlen_k=40 if kind == "causal" else 72)
    quick |= dict(nheads=4, nheads_k=2, headdim=min(headdim, 32))
    return _gpu(ATTN_STEP, f"step/{kind}/{sizes}", shape, quick, peers, **options)


def gpu_decode(
    batch: int, cached: int, queries=1, page_size=64, nheads=64, nheads_k=8, headdim=128, peers=(),
    **options,
) -> Case:  # fmt: skip
    """Return a case of decode against paged K and V."""
    shape = dict(batch=batch, queries=queries, cached=cached, page_size=page_size, nheads=nheads)
    shape |= dict(nheads_k=nheads_k, headdim=headdim)
    sizes = f"b{batch}/q{queries}/P{cached}/page{page_size}/h{nheads}/hk{nheads_k}/d{headdim}"
    # One sequence long enough to be split, of some more no page is full.
    quick = dict(
        batch=min(batch, 2), cached=520 if batch == 1 else 37, page_size=min(page_size, 32)
    )
    quick |= dict(nheads=4, nheads_k=2, headdim=min(headdim, 32))
    return _gpu(DECODE, f"decode/{sizes}", shape, quick, peers, **options)


def gpu_merge(
    parts: int, tokens: int, nheads=64, headdim=128, seeded=False, peers=(), **options
) -> Case:
    """Return a case of merging parts. seeded: into a running float32 state."""
    shape = dict(parts=parts, tokens=tokens, nheads=nheads, headdim=headdim, seeded=int(seeded))
    name = f"merge/{'state' if seeded else 'parts'}{parts}/s{tokens}/h{nheads}/d{headdim}"
    quick = dict(tokens=3, nheads=2, headdim=min(headdim, 32))
    return _gpu(MERGE, name, shape, quick, peers, **options)


def gpu_pack(kind: str, rows: int, page_size=64, nheads_k=8, headdim=128, **options) -> Case:
    """Return a case of copying rows of a cache. kind: "gather" or "scatter"."""
    shape = dict(rows=rows, page_size=page_size, nheads_k=nheads_k, headdim=headdim)
    shape["gathers"] = int(kind == "gather")
    name = f"pack/{kind}/s{rows}/page{page_size}/hk{nheads_k}/d{headdim}"
    quick = dict(rows=40, page_size=8, nheads_k=2)
    return _gpu(PACK, name, shape, quick, ("torch",), **options)


def gpu_cases():
    """About 8 minutes on one GPU, what peers compile included."""
    k = 1024
    every = dict(peers=ATTENTION_PEERS)
    yield gpu_step("full", 1, 16 * k, 16 * k, least=0.60, **every)
    yield gpu_step("causal", 1, 16 * k, 16 * k, least=0.55, **every)
    for seqlen, most in ((16 * k, {"ringkern+middle": {"ratio": 1.03}}), (4 * k, {})):
        impls = ("ringkern+middle", "ringkern+first", "ringkern")
        options = dict(impls=impls, peer="ringkern+first", targets=most)
        yield gpu_step("seeded", 1, seqlen, seqlen, **options)
    for headdim in (64, 256):
        for kind in ("full", "causal"):
            yield gpu_step(kind, 1, 8 * k, 8 * k, headdim=headdim, **every)
    yield gpu_step("causal", 8, 2 * k, 2 * k, **every)
    yield gpu_step("full", 1, 64, 128 * k, **every)
    yield gpu_step("full", 1, 512, 128 * k, **every)
    yield gpu_decode(16, 32 * k, least=0.85, **every)
    yield gpu_decode(1, 128 * k, least=0.80, **every)
    yield gpu_decode(1, 8 * k, **every)
    yield gpu_decode(64, 4 * k, **every)
    yield gpu_decode(16, 32 * k, page_size=16, **every)
    yield gpu_decode(16, 32 * k, queries=4, **every)
    merges = dict(least=0.85, peers=("torch", "flashinfer"))
    yield gpu_merge(8, 16 * k, **merges)
    yield gpu_merge(1, 16 * k, seeded=True, **merges)
    yield gpu_merge(64, 64)  # as a decode step's splits
    yield gpu_pack("gather", 256 * k, least=0.85)
    yield gpu_pack("scatter", 256 * k, least=0.85)
    yield device_exchange(on_gpu=True)
    for messages in (1, 7):
        yield post_case(messages, on_gpu=True)
    yield overlap_case("nccl", 1, on_gpu=True)  # to itself: NCCL's kernels beside attention
    yield overlap_case("tcp", 2, on_gpu=True)


# ---- rings


def device_exchange(on_gpu: bool = False) -> Case:
    """Return a case of exchanging device memory over TCP, by the stub driver's where no GPU is."""
    return Case(
        f"{'gpu/' * on_gpu}exchange_device/tcp/w2/64MiB",
        staged.EXCHANGE_DEVICE,
        {"nbytes": 64 << 20},
        2,
        "int64",
        impls=tuple(staged.IMPLS),
        peer="host",
        targets={"ringkern": {"ratio": 1.25}},
        layout=None,
        repetitions=20,
        on_gpu=on_gpu,
        quick={"nbytes": (3 << 20) + 24},
    )


def post_case(messages: int, on_gpu: bool = False) -> Case:
    """Return a case of what posting a group of messages over NCCL takes of the host."""
    return Case(
        f"{'gpu' if on_gpu else 'stub'}/post/nccl/w1/m{messages}",
        posting.POST,
        dict(messages=messages, nbytes=64 << 10),
        1,
        "int64",
        layout=None,
        transport="nccl",
        repetitions=20,
        calls=64,
        on_gpu=on_gpu,
        why_not=posting.why_not,
        quick=dict(nbytes=80),
    )


def overlap_case(
    transport: str, world_size: int, link_mbit: int | None = None, on_gpu: bool = False
) -> Case:
    """Return a case of a ring step whose attention takes longer than its messages.

    On a CPU some 24 ms beside 16 ms. On a GPU, of 600 TFLOP/s, 4 ms beside 64 MiB over NCCL, and over
    TCP 15 ms on a GPU that two ranks share beside 16 MiB.
    """
    shape = dict(rows=384, keys=1024, nheads=16, nheads_k=1, headdim=64)
    if link_mbit:  # as long under way whatever the rate
        shape |= dict(rows=384 * 280 // link_mbit, keys=1024 * link_mbit // 280)
    if on_gpu:
        shape = dict(rows=8192, keys=8192, nheads=64, nheads_k=16, headdim=128)
        if transport == "tcp":
            shape |= dict(rows=16384, nheads_k=4)
    where = f"{link_mbit}mbit/" if link_mbit else ""
    return Case(
        f"{'gpu/' * on_gpu}overlap/{transport}/w{world_size}/{where}q{shape['rows']}/k{shape['keys']}",
        overlap.OVERLAP,
        shape,
        world_size,
        "bfloat16" if on_gpu else "float32",
        impls=overlap.IMPLS if on_gpu else (*overlap.IMPLS, *overlap.OTHERS),
        peer="compute",
        targets={"step": {"ratio": 1.05}},
        layout=None,
        transport=transport,
        link_mbit=link_mbit,
        repetitions=30 if on_gpu else 60,
        on_gpu=on_gpu,
        quick=dict(rows=24, keys=40, nheads=2, nheads_k=1, headdim=16),
    )
