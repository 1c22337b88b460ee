"""Decode in Triton: few queries per sequence against paged K and V.

Decode reads all of K and V once and computes little, so what counts is bytes in flight. All query
heads of a key head, and all queries of a sequence, are rows of one tile, so K and V are read once
for them; the keys of a sequence are split over programs, whose parts merge.py adds up. The split
and the order of the sum depend on num_splits and the sequence's own length alone: same bits
whatever else is in the batch.
"""

import math

import torch
from ringkern.kernels import configs, merge, target
from ringkern.kernels.launch import Launch
from ringkern.kernels.softmax import finish, fold, load_rows, scales, start
from ringkern.kernels.target import (
    MAX_PROGRAMS,
    MAX_ROWS,
    check,
    check_tensors,
    dtype_name,
    tl,
    triton,
)
from ringkern.kernels.target import arch as arch_of
from ringkern.kernels.variant import Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEWEST_ROWS = 16  # of a tile: what a matrix instruction takes
KEYS_PER_SPLIT = 256  # at least; fewer cost more to start and merge than they save
PROGRAMS_PER_SM = 4  # that choose_splits() aims at


@triton.jit
def _decode(
    q,  # [total_q, nheads, headdim]
    k,  # [num_slots, nheads_k, headdim]
    v,  # [num_slots, nheads_k, headdim_v]
    out,  # [splits, total_q, nheads, headdim_v]; out and lse hold a state if SEED is "state"
    lse,  # [splits, nheads, total_q]
    page_table,  # [batch, max_pages]
    seqused_k,  # [batch]
    cu_seqlens_q,  # [batch + 1]
    limits,  # [total_q], or None
    sinks,  # [nheads], or None
    scale2, cap2, tiles, nheads_k,  # strides of q, k and v are in vectors of VECTOR elements
    q_row, q_head, k_slot, k_head, v_slot, v_head, table_row,
    out_split, out_row, out_head, lse_split, lse_head, lse_row,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SEED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    VECTOR_V: tl.constexpr,
):  # fmt: skip
    """Attend with the rows of a tile, of one sequence and group of heads, to a split of its keys.

    Grid: (batch * tiles * nheads_k, splits), the heads next to each other.
    """
    program, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head_k = (program % nheads_k).to(tl.int64)
    tile = program // nheads_k % tiles
    batch = (program // nheads_k // tiles).to(tl.int64)
    q0, q1 = tl.load(cu_seqlens_q + batch), tl.load(cu_seqlens_q + batch + 1)
    if q0 + tile * BLOCK_M // GROUP >= q1:
        return
    # This split's keys [begin, end): whole blocks, the same number in all splits but the last.
    seqlen = tl.load(seqused_k + batch)
    blocks = tl.cdiv(tl.cdiv(seqlen, BLOCK_N), tl.num_programs(1))
    begin = tl.program_id(1) * blocks * BLOCK_N
    end = tl.minimum(begin + blocks * BLOCK_N, seqlen)
    if SEED == "state" and begin >= end:  # without a state, (0, -inf) is to be written
        return

    m, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row = (q0 + m // GROUP).to(tl.int64)  # [BLOCK_M], as head
    head = head_k * GROUP + m % GROUP
    inside = row < q1  # [BLOCK_M]
    out_at = out + split * out_split + row * out_row + head * out_head  # [BLOCK_M], as lse_at
    lse_at = lse + split * lse_split + row * lse_row + head * lse_head
    seeded = inside & (split == 0)
    sink_at = sinks + head if SEED == "sinks" else None  # [BLOCK_M]
    acc, top, mass = start(out_at, lse_at, sink_at, seeded, HEADDIM_V, SEED, BLOCK_M, BLOCK_DV)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q += (row * q_row + head * q_head)[:, None] * VECTOR + d[None, :]
    q_tile = load_rows(q, inside, HEADDIM, BLOCK_D, AXIS=1)  # [BLOCK_M, BLOCK_D]
    if limits is not None:
        limit = tl.load(limits + row, mask=inside, other=0)  # [BLOCK_M]

    kt_at = k + head_k * k_head * VECTOR + d[:, None]
    v_at = v + head_k * v_head * VECTOR_V + dv[None, :]
    pages_at = page_table + batch * table_row
    # kt [BLOCK_D, BLOCK_N], v_block [BLOCK_N, BLOCK_DV]; what is of keys alone is [BLOCK_N].
    for j in tl.range(begin, end, BLOCK_N):
        key = j + n
        there = key < end
        page = tl.load(pages_at + key // PAGE_SIZE, mask=there, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
        to_k, to_v = slot * k_slot * VECTOR, slot * v_slot * VECTOR_V
        kt = load_rows(kt_at + to_k[None, :], there, HEADDIM, BLOCK_D, AXIS=0)
        v_block = load_rows(v_at + to_v[:, None], there, HEADDIM_V, BLOCK_DV, AXIS=1)
        visible = there[None, :]  # [1, BLOCK_N], or [BLOCK_M, BLOCK_N]
        if limits is not None:
            visible &= key[None, :] < limit[:, None]
        acc, top, mass = fold(
            acc, top, mass, q_tile, kt, v_block, visible, scale2, cap2,
            True, SOFTCAP, True, PRECISION,
        )  # fmt: skip
    finish(acc, top, mass, out_at, lse_at, lse_at, inside, HEADDIM_V, BLOCK_DV, SEED)


def decode(
    q, k, v, out, lse, page_table, seqused_k, cu_seqlens_q, *,
    max_seqlen_q, page_size, softmax_scale, softcap=0.0, limits=None, sinks=None, num_splits=1,
    seeded=False, allow_tf32=False,
) -> None:  # fmt: skip
    """Attend to paged K and V and write (out, lse), or add to what they hold.

    A query sees all seqused_k[i] keys of its sequence, or the first limits[row] of them: keys lie
    in order of position, so that is how causality and right windows come down to a number.

    Args:
        q: [total_q, nheads, headdim], float16, bfloat16 or float32; a last stride of 1, as in
            every tensor with heads here. Other strides are free, but in q, k and v, where a row is
            a multiple of 16 bytes, they and the address must be, too. Other rows are read piece by
            piece, several times slower.
        k, v: [num_slots, nheads_k, headdim] and [..., headdim_v], of q's dtype. A token lies in
            slot page * page_size + offset.
        out: [total_q, nheads, headdim_v] float32; any of q's dtypes unless seeded.
        lse: [nheads, total_q] float32, natural log.
        page_table: [batch, max_pages] int32, the pages of a sequence in order; entries past
            its seqlen are not read.
        seqused_k: [batch] int32, tokens in the pages; with 0 the sequence's queries get
            (0, -inf), or keep their state.
        cu_seqlens_q: [batch + 1] int32, from 0 to total_q.
        max_seqlen_q: an upper bound of queries per sequence; 1 to 16 is what this is made for.
        page_size: any, 1 and up.
        limits: [total_q] int32, or None.
        sinks: [nheads], the score of one more key whose value is 0; None if seeded.
        num_splits: how many programs share the keys of a sequence; see choose_splits().
        seeded: (out, lse) hold the state so far, as in step_torch.step(); -inf: nothing.
        allow_tf32: whether float32 products may be rounded to tf32.

    Raises:
        ValueError: shapes, dtypes, strides, devices or numbers do not fit.
    """
    tables = page_table, seqused_k, cu_seqlens_q
    options = dict(max_seqlen_q=max_seqlen_q, page_size=page_size, softmax_scale=softmax_scale)
    options |= dict(softcap=softcap, limits=limits, sinks=sinks, num_splits=num_splits)
    options |= dict(seeded=seeded, allow_tf32=allow_tf32)
    with torch.cuda.device_of(q):
        prepare(q, k, v, out, lse, *tables, **options)(q, k, v, out, lse, sinks)


def prepare(
    q, k, v, out, lse, page_table, seqused_k, cu_seqlens_q, *,
    max_seqlen_q, page_size, softmax_scale, softcap=0.0, limits=None, sinks=None, num_splits=1,
    seeded=False, allow_tf32=False,
):  # fmt: skip
    """Check what decode() takes; return run(q, k, v, out, lse, sinks), which does it.

    To be run often, on the current device, with tensors as launch.Launch takes them in its calls,
    or as [1, ...] of the same.
    """
    _check(q, k, v, out, lse, page_table, seqused_k, cu_seqlens_q, limits, sinks, seeded)
    _check_numbers(max_seqlen_q, page_size, num_splits, softmax_scale, softcap)
    if not lse.numel():
        return _nothing
    (total_q, nheads, headdim), (_, nheads_k, headdim_v) = q.shape, v.shape
    parts, lses, shape = out[None], lse[None], (num_splits, total_q, nheads, headdim_v)
    if num_splits > 1:
        parts, lses = merge.empty_parts(q, *shape)
        join = merge.prepare(parts, lses, out, lse, seeded=seeded)
    group = nheads // nheads_k
    rows, keys = group * max_seqlen_q, page_table.shape[1] * page_size
    blocks, config = _blocks(arch_of(q.device), headdim, headdim_v, dtype_name(q), rows)
    tiles = triton.cdiv(rows, blocks["BLOCK_M"])
    grid = len(seqused_k) * tiles * nheads_k, num_splits
    check(rows <= MAX_ROWS, "max_seqlen_q", f"at most {MAX_ROWS // group}", max_seqlen_q)
    most = MAX_ROWS - num_splits * config.block_n
    check(keys <= most, "page_table", f"pages of at most {most} tokens", keys)
    check(grid[0] <= MAX_PROGRAMS, "q", f"at most {MAX_PROGRAMS} tiles times heads", grid[0])
    seed = "state" if seeded and num_splits == 1 else "none" if sinks is None else "sinks"
    numbers = (
        *scales(softmax_scale, softcap), tiles, nheads_k, *target.vector_strides(q, k, v),
        page_table.stride(0), *parts.stride()[:3], *lses.stride(),
    )  # fmt: skip
    constexprs = dict(
        HEADDIM=headdim, HEADDIM_V=headdim_v, **blocks, GROUP=group, PAGE_SIZE=page_size,
        SEED=seed, SOFTCAP=softcap > 0, PRECISION="tf32" if allow_tf32 else "ieee",
    )  # fmt: skip
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    launch = Launch(_decode, grid, numbers, constexprs, **options, maxnreg=config.registers)

    def run(q, k, v, out, lse, sinks=None):
        parts, lses = (out, lse) if num_splits == 1 else merge.empty_parts(q, *shape)
        launch(q, k, v, parts, lses, page_table, seqused_k, cu_seqlens_q, limits, sinks)
        if num_splits > 1:
            join(parts, lses, out, lse)

    return run


def _nothing(*_) -> None:
    """Decode no query."""


def choose_splits(batch: int, nheads_k: int, max_seqlen: int, num_sms: int) -> int:
    """Return a num_splits that keeps num_sms SMs busy. Pure; another changes bits."""
    enough = -(-PROGRAMS_PER_SM * num_sms // max(batch * nheads_k, 1))
    return max(1, min(enough, max_seqlen // KEYS_PER_SPLIT))


def _check(q, k, v, out, lse, page_table, seqused_k, cu_seqlens_q, limits, sinks, seeded):
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.dim() == 3, name, "3 dimensions, tokens, heads and headdim", tuple(x.shape))
        check(1 <= x.shape[-1] <= 256, name, "a headdim of 1 to 256", x.shape[-1])
    check(page_table.dim() == 2, "page_table", "[batch, max_pages]", tuple(page_table.shape))
    (total_q, nheads, headdim), (slots, nheads_k, headdim_v) = q.shape, v.shape
    fits = nheads_k > 0 and nheads % nheads_k == 0
    check(fits, "nheads", f"a multiple of {nheads_k}", nheads)
    for name, x, want in (
        ("k", k, (slots, nheads_k, headdim)),
        ("out", out, (total_q, nheads, headdim_v)),
        ("lse", lse, (nheads, total_q)),
        ("seqused_k", seqused_k, (len(page_table),)),
        ("cu_seqlens_q", cu_seqlens_q, (len(page_table) + 1,)),
    ):
        check(x.shape == want, name, want, tuple(x.shape))
    tables = dict(page_table=page_table, seqused_k=seqused_k, cu_seqlens_q=cu_seqlens_q)
    if limits is not None:
        check(limits.shape == (total_q,), "limits", (total_q,), tuple(limits.shape))
        tables["limits"] = limits
    if sinks is not None:
        check(not seeded, "sinks", "None, as (out, lse) hold a state", "a tensor")
        check(sinks.shape == (nheads,), "sinks", (nheads,), tuple(sinks.shape))
        check(sinks.stride(0) == 1 or nheads == 1, "sinks", "a stride of 1", sinks.stride(0))
        check_tensors(DTYPES, sinks=sinks)
        check_tensors(q=q, sinks=sinks)
    check_tensors(q=q, k=k, v=v, out=out, lse=lse, **tables)
    check_tensors(DTYPES, q=q)
    check_tensors((q.dtype,), k=k, v=v)
    check_tensors((torch.float32,) if seeded else DTYPES, out=out)
    check_tensors((torch.float32,), lse=lse)
    check_tensors((torch.int32,), **tables)
    for name, x in dict(q=q, k=k, v=v, out=out, **tables).items():
        fits = x.stride(-1) == 1 or x.shape[-1] <= 1
        check(fits, name, "a last stride of 1", x.stride(-1))
    target.check_aligned(q=q, k=k, v=v)


def _check_numbers(max_seqlen_q, page_size, num_splits, softmax_scale, softcap):
    for name, number in (
        ("max_seqlen_q", max_seqlen_q), ("page_size", page_size), ("num_splits", num_splits)
    ):  # fmt: skip
        check(number >= 1, name, "1 or more", number)
    check(num_splits <= 65535, "num_splits", "at most 65535", num_splits)
    check(math.isfinite(softmax_scale), "softmax_scale", "a finite number", softmax_scale)
    check(0 <= softcap < math.inf, "softcap", "0, which is none, or more", softcap)


def _blocks(arch, headdim, headdim_v, dtype, rows):
    """Return the sizes of a program's blocks, for so many rows per sequence, and the config."""
    itemsize = configs.DTYPES[dtype] // 8
    config = configs.pick("decode", arch, headdim, headdim_v, dtype)
    blocks = dict(
        BLOCK_M=min(max(triton.next_power_of_2(rows), FEWEST_ROWS), config.block_m),
        BLOCK_N=config.block_n,
        BLOCK_D=max(triton.next_power_of_2(headdim), 16),
        BLOCK_DV=max(triton.next_power_of_2(headdim_v), 16),
        VECTOR=target.vector(headdim, itemsize),
        VECTOR_V=target.vector(headdim_v, itemsize),
    )
    return blocks, config


def variants(arch: int) -> list[Variant]:
    """Return what offline compilation compiles: every tile of the table, and each option."""
    cases = [
        ("bfloat16-d128-sinks", "bfloat16", 128, 128, 32, dict(seed="sinks")),
        ("bfloat16-d256-sinks", "bfloat16", 256, 256, 16, dict(seed="sinks", limits=True)),
        ("float16-d64-page3", "float16", 64, 64, 16, dict(page_size=3)),
        ("bfloat16-d72", "bfloat16", 72, 72, 16, {}),
        ("bfloat16-d96-page1", "bfloat16", 96, 96, 8, dict(page_size=1)),
        ("bfloat16-d192-v128", "bfloat16", 192, 128, 16, {}),
        ("bfloat16-d256-seeded", "bfloat16", 256, 256, 16, dict(seed="state", limits=True)),
        ("bfloat16-d256-softcap", "bfloat16", 256, 256, 16, dict(softcap=True)),
        ("float32-d128-tf32", "float32", 128, 128, 8, dict(precision="tf32")),
    ]
    options = dict(softcap=True, limits=True)
    for dtype, other, d, rows in (
        ("bfloat16", "float16", 128, 16), ("bfloat16", "float16", 128, 32),
        ("bfloat16", "float16", 256, 16),
        ("float32", "float32", 128, 16), ("float32", "float32", 256, 16),
    ):  # fmt: skip
        cases.append((f"{dtype}-d{d}-rows{rows}", dtype, d, d, rows, {}))
        narrow, seed = 3 * d // 4, "state" if rows == 16 else "none"
        name = f"{other}-d{narrow}-rows{rows}-softcap"
        cases.append((name, other, narrow, narrow, rows, options | dict(seed=seed)))
    return [_variant(arch, *case[:5], **case[5]) for case in cases]


def _variant(
    arch, name, dtype, headdim, headdim_v, rows, *, seed="none", limits=False, softcap=False,
    page_size=64, precision="ieee",
):  # fmt: skip
    blocks, config = _blocks(arch, headdim, headdim_v, dtype, rows)
    pointer = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    constexprs = dict(
        HEADDIM=headdim, HEADDIM_V=headdim_v, **blocks, GROUP=8, PAGE_SIZE=page_size,
        SEED=seed, SOFTCAP=softcap, PRECISION=precision,
    )  # fmt: skip
    if not limits:
        constexprs["limits"] = None
    if seed != "sinks":
        constexprs["sinks"] = None
    signature = dict.fromkeys(_decode.arg_names, "i32")
    signature |= dict.fromkeys(("q", "k", "v"), pointer)
    signature |= dict.fromkeys(("out", "lse", "sinks"), "*fp32")
    tables = ("page_table", "seqused_k", "cu_seqlens_q", "limits")
    signature |= dict.fromkeys(tables, "*i32") | dict(scale2="fp32", cap2="fp32")
    signature |= dict.fromkeys(constexprs, "constexpr")
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    strides = ("out_row", *["out_head"] * (headdim_v % 16 == 0))
    return Variant(
        name=name,
        fn=_decode,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.registers,
        divisible_by_16=(*pointers, *strides),
        expects=frozenset({"pipelined", *["mma"] * ("16" in dtype or precision == "tf32")}),
    )
