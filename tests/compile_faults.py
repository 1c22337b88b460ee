"""One kernel, sound and in ways that the offline proof must not let pass, for test_compile.py."""

import os

import triton
import triton.language as tl
from ringkern.kernels.variant import Variant


@triton.jit
def _add(acc, a, b, start, k_length, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    rows, depth = tl.arange(0, BLOCK), start + tl.arange(0, DEPTH)
    # [BLOCK, DEPTH] @ [DEPTH, BLOCK]
    a_tile = tl.load(a + rows[:, None] * k_length + depth[None, :])
    b_tile = tl.load(b + depth[:, None] * BLOCK + rows[None, :])
    return tl.dot(a_tile, b_tile, acc)


@triton.jit
def _product(a, b, out, k_length, BLOCK: tl.constexpr, DEPTH: tl.constexpr, TWICE: tl.constexpr):
    """out [BLOCK, BLOCK] = a [BLOCK, k_length] @ b [k_length, BLOCK], float16. Grid: (1,).

    TWICE: in a second loop that waits for each load, the same again.
    """
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, k_length, DEPTH):
        acc = _add(acc, a, b, start, k_length, BLOCK, DEPTH)
    if TWICE:
        for start in tl.range(0, k_length, DEPTH, num_stages=1):
            acc = _add(acc, a, b, start, k_length, BLOCK, DEPTH)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], acc)


class Aborting(dict):
    """Takes the process down as some failures of the compiler do."""

    def items(self):
        os.abort()


def variants(arch):
    def make(name, block, depth, num_stages, *expects, num_warps=4, twice=False, constexprs=dict):
        return Variant(
            name,
            _product,
            {"a": "*fp16", "b": "*fp16", "out": "*fp32", "k_length": "i32"}
            | dict.fromkeys(("BLOCK", "DEPTH", "TWICE"), "constexpr"),
            constexprs(BLOCK=block, DEPTH=depth, TWICE=twice),
            num_warps,
            num_stages,
            divisible_by_16=("a", "b", "out", "k_length"),
            expects=frozenset(expects),
        )

    return [
        make("sound", 64, 32, 3, "mma", "pipelined", *["wgmma"] * (arch == 90)),
        make("spilling", 256, 32, 2),
        make("too much shared memory", 128, 128, 5, num_warps=8),
        make("waiting", 64, 32, 1, "pipelined"),
        make("waiting in one of two loops", 64, 32, 3, "pipelined", twice=True),
        make("small", 16, 32, 3, "wgmma"),
        make("not a power of two", 48, 32, 3),
        make("aborting", 64, 32, 3, constexprs=Aborting),
    ]
