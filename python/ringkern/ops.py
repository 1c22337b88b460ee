"""The operators of torch: all of torch.ops.ringkern.*, once this module is imported.

A process that loads an exported program needs them before, and `import ringkern` alone is lazy.

Here are the Triton kernels; attn.py has ringkern::attn, attn_varlen and merge. torch.compile and
torch.export trace through them: an operator is opaque, writes what its schema says, and returns
nothing. Arguments, shapes and errors are those of the kernel of the same name; a step's Table and
Cut are spelt out, as operators take tensors, numbers and strings alone.

What they write has no gradient, and torch lets an operator that writes its arguments not refuse to
be asked for one: call them under torch.no_grad().
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import ringkern.attn  # noqa: F401 - registers its operators


@torch.library.custom_op("ringkern::step", mutates_args=("out", "lse", "result"))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    tiles: Tensor,
    pieces: Tensor,
    splits: int,
    rows: Sequence[int],
    cut: Sequence[int],
    softmax_scale: float,
    softcap: float,
    phase: str,
    result: Tensor | None,
    sinks: Tensor | None,
    allow_tf32: bool,
) -> None:
    """Run kernels.step.step() with Table(tiles, pieces, splits, rows, Cut(*cut))."""
    from ringkern.kernels import cut as cuts
    from ringkern.kernels import step as kernel

    table = cuts.Table(tiles, pieces, splits, tuple(rows), cuts.Cut(*cut))
    options = dict(softmax_scale=softmax_scale, softcap=softcap, phase=phase)
    options |= dict(result=result, sinks=sinks, allow_tf32=allow_tf32)
    kernel.step(q, k, v, out, lse, table, **options)


@torch.library.custom_op("ringkern::decode", mutates_args=("out", "lse"))
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    page_table: Tensor,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    page_size: int,
    softmax_scale: float,
    softcap: float,
    limits: Tensor | None,
    sinks: Tensor | None,
    num_splits: int,
    seeded: bool,
    allow_tf32: bool,
) -> None:
    """Run kernels.decode.decode()."""
    from ringkern.kernels import decode as kernel

    options = dict(max_seqlen_q=max_seqlen_q, page_size=page_size, softmax_scale=softmax_scale)
    options |= dict(softcap=softcap, limits=limits, sinks=sinks, num_splits=num_splits)
    options |= dict(seeded=seeded, allow_tf32=allow_tf32)
    kernel.decode(q, k, v, out, lse, page_table, seqused_k, cu_seqlens_q, **options)


@torch.library.custom_op("ringkern::merge_into", mutates_args=("out", "lse"))
def merge_into(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, seeded: bool) -> None:
    """Run kernels.merge.merge_into()."""
    from ringkern.kernels import merge as kernel

    kernel.merge_into(outs, lses, out, lse, seeded=seeded)


@torch.library.custom_op("ringkern::gather_rows", mutates_args=("out",))
def gather_rows(cache: Tensor, slots: Tensor, out: Tensor) -> None:
    """Run kernels.pack.gather()."""
    from ringkern.kernels import pack as kernel

    kernel.gather(cache, slots, out)


@torch.library.custom_op("ringkern::scatter_rows", mutates_args=("cache",))
def scatter_rows(x: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Run kernels.pack.scatter()."""
    from ringkern.kernels import pack as kernel

    kernel.scatter(x, slots, cache)
