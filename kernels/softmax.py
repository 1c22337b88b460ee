"""The online softmax in Triton that a step and decode share: a tile's state, block by block.

The state of a tile of rows is (acc, top, mass): the weighted sum of values [BLOCK_M, BLOCK_DV], the
largest score [BLOCK_M] and the sum of weights [BLOCK_M], all float32. A weight is 2 ** (score -
top), scores being in base 2: scale2 carries log2(e).
"""

import math

from ringkern.kernels import target
from ringkern.kernels.target import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# The interpreter multiplies bfloat16 as integers: there, products are of float32.
INTERPRET = tl.constexpr(target.INTERPRET)


def scales(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """Return (scale2, cap2) as fold() takes them."""
    if softcap:
        return 2 * softmax_scale / softcap * LOG2E.value, softcap * LOG2E.value
    return softmax_scale * LOG2E.value, 0.0


@triton.jit
def load_rows(at, inside, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, AXIS: tl.constexpr):
    """Return rows of q, K or V as an operand of a product; 0 beyond HEADDIM and where not inside.

    at: pointers, [rows, BLOCK_D] where a row's elements run along AXIS 1, [BLOCK_D, rows] along 0.
    inside: [rows], or None: all are.
    """
    d = tl.expand_dims(tl.arange(0, BLOCK_D), 1 - AXIS)
    if inside is not None:
        x = tl.load(at, mask=tl.expand_dims(inside, AXIS) & (d < HEADDIM), other=0.0)
    elif HEADDIM < BLOCK_D:
        x = tl.load(at, mask=d < HEADDIM, other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def start(
    out_at, lse_at, sink_at, inside, HEADDIM_V: tl.constexpr, SEED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Return (acc, top, mass) before the first block. SEED: "none", "state" or "sinks".

    A state stands for one key of weight 1 whose score is its lse and whose value is its out, a sink
    for one whose value is 0. Before any key: (0, -inf, 0), whatever the state's out holds.
    """
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if SEED == "state":
        dv = tl.arange(0, BLOCK_DV)
        top = tl.load(lse_at, mask=inside, other=float("-inf")) * LOG2E  # [BLOCK_M]
        there = inside[:, None] & (dv < HEADDIM_V)[None, :]
        acc = tl.load(out_at[:, None] + dv[None, :], mask=there, other=0.0)  # [BLOCK_M, BLOCK_DV]
        acc = tl.where((top == float("-inf"))[:, None], 0.0, acc)
    if SEED == "sinks":
        top = tl.load(sink_at, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E  # [BLOCK_M]
    return acc, top, tl.where(top == float("-inf"), 0.0, 1.0)


@triton.jit
def fold(
    acc, top, mass, q, kt, v, visible, scale2, cap2,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (acc, top, mass) with one more block of keys.

    q [BLOCK_M, BLOCK_D], kt [BLOCK_D, BLOCK_N], v [BLOCK_N, BLOCK_DV], visible [BLOCK_M, BLOCK_N].
    NEGATIVE: scale2 may be below 0, where the largest product is not the largest score.
    """
    s = tl.dot(q, kt, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] float32
    if SOFTCAP:  # cap2 * tanh(x), where 2 ** (s * scale2) = exp(2 * x)
        s = cap2 - 2.0 * cap2 / (1.0 + tl.exp2(s * scale2))
    elif MASKED or NEGATIVE:
        s *= scale2
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    if MASKED or SOFTCAP or NEGATIVE:
        higher = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet: -inf - 0, where -inf + inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
    else:  # the same, with scale and shift in one multiply-add per score
        higher = tl.maximum(top, tl.max(s, 1) * scale2)
        base = higher
        p = tl.exp2(s * scale2 - base[:, None])
    kept = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
    return acc, higher, mass * kept + tl.sum(p, 1)


@triton.jit
def finish(
    acc, top, mass, result_at, result_lse_at, lse_at, inside, HEADDIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, SEED: tl.constexpr,
):  # fmt: skip
    """Write the normalised out and its lse: (0, -inf) for a row that saw no key."""
    mass = tl.where(mass == 0.0, 1.0, mass)
    # Correctly rounded, where a plain division is off by up to 2 ulp on a GPU: 1 stays 1. Ahead of
    # the lse, since further down the division takes registers that float32 does not have.
    inverse = tl.math.div_rn(1.0, mass)
    lse = (top + tl.log2(mass)) * LN2
    if SEED == "state":  # to base 2 and back may change the last bit: not of rows that saw nothing
        before = tl.load(lse_at, mask=inside, other=float("-inf"))  # [BLOCK_M]
        lse = tl.where((top == before * LOG2E) & (mass == 1.0), before, lse)
    out = acc * inverse[:, None]
    dv = tl.arange(0, BLOCK_DV)
    there = inside[:, None] & (dv < HEADDIM_V)[None, :]
    if SEED == "state":  # warps share rows: nobody writes the state before all have read it
        tl.debug_barrier()
    tl.store(result_at[:, None] + dv[None, :], out.to(result_at.dtype.element_ty), mask=there)
    tl.store(result_lse_at, lse, mask=inside)
