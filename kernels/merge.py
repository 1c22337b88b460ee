"""The exact merge of n attention parts (out, lse) in one pass over their outs, in Triton.

A part weighs exp(lse - top) over the sum of these, top being the largest lse: paper.md, equation
(4). Differences of natural logs are taken before anything is scaled, so a large lse costs nothing.
"""

import torch
from ringkern.kernels import configs
from ringkern.kernels.launch import Launch
from ringkern.kernels.softmax import LN2, LOG2E
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

# Parts that one program looks at together. A constant, as it decides the order of the sum.
MOST_PARTS = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _weight(lse, top):
    """Return exp(lse - top): 0 for lse = -inf even if top is, 1 for +inf, NaN for NaN."""
    shift = tl.where(top == float("-inf"), 0.0, top)
    return tl.where(lse == float("inf"), 1.0, tl.exp2((lse - shift) * LOG2E))


@triton.jit
def _merge(
    outs,  # [parts, batch, tokens, nheads, headdim]
    lses,  # [parts, batch, nheads, tokens]
    out,  # [batch, tokens, nheads, headdim]; out and lse are one more part, the first, if SEEDED
    lse,  # [batch, nheads, tokens]
    parts, tokens, nheads, tiles,
    outs_part, outs_batch, outs_row, outs_head, lses_part, lses_batch, lses_head, lses_row,
    out_batch, out_row, out_head, lse_batch, lse_head, lse_row,
    HEADDIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SEEDED: tl.constexpr,
):  # fmt: skip
    """Merge the parts of BLOCK_T tokens of one head, whose out and lse nobody else touches.

    Grid: (batch * tiles * nheads,), the heads next to each other.
    """
    program = tl.program_id(0)
    head = (program % nheads).to(tl.int64)
    tile = program // nheads % tiles
    batch = (program // nheads // tiles).to(tl.int64)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = token < tokens  # [BLOCK_T]
    inside_d = inside[:, None] & (d < HEADDIM)[None, :]  # [BLOCK_T, BLOCK_D]

    # lse [BLOCK_T], out [BLOCK_T, BLOCK_D]; lses [BLOCK_P, BLOCK_T], outs [..., BLOCK_D].
    lse += batch * lse_batch + head * lse_head + token * lse_row
    out += batch * out_batch + head * out_head + token[:, None] * out_row + d[None, :]
    lses += batch * lses_batch + head * lses_head
    lses += part[:, None] * lses_part + token[None, :] * lses_row
    outs += batch * outs_batch + head * outs_head
    outs += part[:, None, None] * outs_part + token[None, :, None] * outs_row + d[None, None, :]

    # The largest lse and the sum of the weights. A NaN need not be the largest: its weight is NaN.
    if SEEDED:
        own = tl.load(lse, mask=inside, other=float("-inf"))  # [BLOCK_T]
    else:
        own = tl.full([BLOCK_T], float("-inf"), tl.float32)
    top = own
    mass = _weight(own, top)
    for p in range(0, parts, BLOCK_P):
        ahead = tl.cast(p, tl.int64)
        there = (p + part < parts)[:, None] & inside[None, :]
        some = tl.load(lses + ahead * lses_part, mask=there, other=float("-inf"))  # as lses
        higher = tl.maximum(top, tl.max(some, axis=0))
        mass = mass * _weight(top, higher) + tl.sum(_weight(some, higher[None, :]), axis=0)
        top = higher
    mass = tl.where(mass == 0.0, 1.0, mass)

    # The weighted sum. What weighs nothing is not read: it may hold anything.
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if SEEDED:
        kept = tl.math.div_rn(_weight(own, top), mass)  # [BLOCK_T]
        seed = tl.load(out, mask=inside_d & (kept != 0.0)[:, None], other=0.0)  # [BLOCK_T, BLOCK_D]
        acc += seed.to(tl.float32) * kept[:, None]
    for p in range(0, parts, BLOCK_P):
        ahead = tl.cast(p, tl.int64)
        there = (p + part < parts)[:, None] & inside[None, :]
        some = tl.load(lses + ahead * lses_part, mask=there, other=float("-inf"))  # as lses
        weight = tl.math.div_rn(_weight(some, top[None, :]), mass[None, :])
        read = inside_d[None, :, :] & (weight != 0.0)[:, :, None]
        x = tl.load(outs + ahead * outs_part, mask=read, other=0.0)  # [BLOCK_P, BLOCK_T, BLOCK_D]
        acc += tl.sum(x.to(tl.float32) * weight[:, :, None], axis=0)

    # Warps share rows, and a state may be one of the parts: nobody writes before all have read.
    tl.debug_barrier()
    tl.store(out, acc.to(out.dtype.element_ty), mask=inside_d)
    tl.store(lse, top + tl.log2(mass) * LN2, mask=inside)


def merge(outs, lses, *, dtype: torch.dtype | None = None):
    """Return the (out, lse) of all parts together; exact and total, as reference.merge().

    Args:
        outs: [parts, total, nheads, headdim] or [parts, batch, seqlen, nheads, headdim], float16,
            bfloat16 or float32; any strides but for the last, which is 1.
        lses: [parts, nheads, total] or [parts, batch, nheads, seqlen] float32, natural log. A part
            with -inf weighs nothing and its out is not read; parts with +inf share all the weight
            evenly; NaN stays NaN.
        dtype: of out; None means that of outs. lse is float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or headdim is over 256.
    """
    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:])
    merge_into(outs, lses, out, lse)
    return out, lse


def merge_(out, lse, part_out, part_lse) -> None:
    """Merge a part into the running (out, lse), in place; shapes as for step_torch.merge_().

    out [batch, rows, nheads, headdim] and lse [batch, nheads, rows] are float32, part_out any
    floating dtype. Where an lse is -inf its out is not read.
    """
    merge_into(part_out[None], part_lse[None], out, lse, seeded=True)


def empty_parts(like: torch.Tensor, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (outs, lses) as merge_into() takes them, with nothing in them, on the device of `like`.

    Args:
        shape: [parts, total, nheads, headdim], or [parts, batch, seqlen, nheads, headdim]. Rows
            begin at multiples of 16 elements whatever headdim, so that kernels store vectors.
    """
    *where, tokens, nheads, headdim = shape
    width = triton.cdiv(headdim, 16) * 16
    outs = like.new_empty(*where, tokens, nheads, width, dtype=torch.float32)[..., :headdim]
    return outs, like.new_empty(*where, nheads, tokens, dtype=torch.float32)


def merge_into(outs, lses, out, lse, *, seeded: bool = False) -> None:
    """Write what merge() returns into (out, lse).

    seeded: what (out, lse) hold is one more part, the first; out must be float32 then. (out, lse)
    may be one of the parts, but must not overlap them in any other way.
    """
    with torch.cuda.device_of(out):
        prepare(outs, lses, out, lse, seeded=seeded)(outs, lses, out, lse)


def prepare(outs, lses, out, lse, *, seeded: bool = False):
    """Check what merge_into() takes; return run(outs, lses, out, lse), which does it.

    To be run often, on the current device, with tensors as launch.Launch takes them in its calls.
    """
    _check(outs, lses, out, lse, seeded)
    if not lse.numel():
        return _nothing
    if outs.dim() == 4:
        outs, lses, out, lse = outs[:, None], lses[:, None], out[None], lse[None]
    parts, batch, tokens, nheads, headdim = outs.shape
    blocks, num_warps = _blocks(parts, headdim, arch_of(out.device), dtype_name(outs))
    tiles = triton.cdiv(tokens, blocks["BLOCK_T"])
    programs = batch * tiles * nheads
    check(programs <= MAX_PROGRAMS, "outs", f"at most {MAX_PROGRAMS} tiles", programs)
    check(tokens <= MAX_ROWS, "outs", f"at most {MAX_ROWS} tokens", tokens)
    numbers = (
        parts, tokens, nheads, tiles,
        *outs.stride()[:-1], *lses.stride(), *out.stride()[:-1], *lse.stride(),
    )  # fmt: skip
    constexprs = dict(HEADDIM=headdim, **blocks, SEEDED=seeded)
    return Launch(_merge, (programs,), numbers, constexprs, num_warps=num_warps)


def _nothing(*_) -> None:
    """Merge parts of no rows."""


def _check(outs, lses, out, lse, seeded):
    check(outs.dim() in (4, 5), "outs", "[parts, total, nheads, headdim]", tuple(outs.shape))
    check(len(outs) > 0, "outs", "at least one part", 0)
    check(1 <= outs.shape[-1] <= 256, "headdim", "1 to 256", outs.shape[-1])
    parts, *where, tokens, nheads, _ = outs.shape
    want = (parts, *where, nheads, tokens)
    check(lses.shape == want, "lses", want, tuple(lses.shape))
    check(out.shape == outs.shape[1:], "out", tuple(outs.shape[1:]), tuple(out.shape))
    check(lse.shape == lses.shape[1:], "lse", tuple(lses.shape[1:]), tuple(lse.shape))
    check_tensors(outs=outs, lses=lses, out=out, lse=lse)
    check_tensors(DTYPES, outs=outs)
    check_tensors((torch.float32,) if seeded else DTYPES, out=out)
    check_tensors((torch.float32,), lses=lses, lse=lse)
    for name, x in (("outs", outs), ("out", out)):
        check(x.stride(-1) == 1 or x.shape[-1] == 1, name, "a last stride of 1", x.stride(-1))


def _blocks(parts, headdim, arch, dtype):
    """Return the sizes of a program's blocks, by parts and headdim alone, and its warps."""
    config = configs.pick("merge", arch, headdim, headdim, dtype)
    block_p = min(triton.next_power_of_2(parts), MOST_PARTS)
    block_t = max(config.block_m // block_p, 1)
    block_d = triton.next_power_of_2(headdim)
    return dict(BLOCK_P=block_p, BLOCK_T=block_t, BLOCK_D=block_d), config.num_warps


def variants(arch: int) -> list[Variant]:
    """Return what offline compilation compiles: in place, few parts and many, wide and narrow."""
    return [
        _variant(arch, "float32-d128-in-place", "float32", 128, parts=1, seeded=True),
        _variant(arch, "bfloat16-d128-in-place", "bfloat16", 128, parts=1, seeded=True),
        _variant(arch, "bfloat16-d128-2-parts", "bfloat16", 128, parts=2),
        _variant(arch, "bfloat16-d256-2-parts", "bfloat16", 256, parts=2),
        _variant(arch, "float16-d64-8-parts", "float16", 64, parts=8),
        _variant(arch, "float32-d80-16-parts", "float32", 80, parts=16, out="bfloat16"),
        _variant(arch, "float32-d128-64-parts", "float32", 128, parts=64, out="bfloat16"),
        _variant(arch, "float32-d128-64-parts-seeded", "float32", 128, parts=64, seeded=True),
        _variant(arch, "float32-d256-3-parts", "float32", 256, parts=3),
    ]


def _variant(arch, name, dtype, headdim, *, parts, out=None, seeded=False):
    short = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
    blocks, num_warps = _blocks(parts, headdim, arch, dtype)
    constexprs = dict(HEADDIM=headdim, **blocks, SEEDED=seeded)
    signature = dict.fromkeys(_merge.arg_names, "i32") | dict.fromkeys(constexprs, "constexpr")
    signature |= dict(outs=short[dtype], lses="*fp32", lse="*fp32")
    signature["out"] = "*fp32" if seeded else short[out or dtype]
    strides = ("outs_part", "outs_batch", "outs_row", "outs_head", "out_row", "out_head")
    return Variant(
        name=name,
        fn=_merge,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=1,
        divisible_by_16=("outs", "lses", "out", "lse", *strides),
    )
