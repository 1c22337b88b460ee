"""One kernel, sound and in ways that the offline proof must not let pass, for test_compile.py."""

import os

import triton
import triton.language as tl
from ringkern.kernels.variant import Variant


@triton.jit
def _product(a, b, out, k_length, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """out [BLOCK, BLOCK] = a [BLOCK, k_length] @ b [k_length, BLOCK], float16. Grid: (1,)."""
    rows, depth = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k_length, DEPTH):
        # [BLOCK, DEPTH] @ [DEPTH, BLOCK]
        a_tile = tl.load(a + rows[:, None] * k_length + (start + depth)[None, :])
        b_tile = tl.load(b + (start + depth)[:, None] * BLOCK + rows[None, :])
        acc = tl.dot(a_tile, b_tile, acc)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], acc)


class Aborting(dict):
    """Takes the process down as some failures of the compiler do."""

    def items(self):
        os.abort()


def variants(arch):
    def make(name, block, depth, num_stages, *expects, num_warps=4, constexprs=dict):
        return Variant(
            name,
            _product,
            {"a": "*fp16", "b": "*fp16", "out": "*fp32", "k_length": "i32"}
            | {"BLOCK": "constexpr", "DEPTH": "constexpr"},
            constexprs(BLOCK=block, DEPTH=depth),
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
        make("small", 16, 32, 3, "wgmma"),
        make("not a power of two", 48, 32, 3),
        make("aborting", 64, 32, 3, constexprs=Aborting),
    ]
