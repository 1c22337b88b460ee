"""Attention and merge on one device, without a ring."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ringkern import local, tiles
from ringkern.backend import pick_backend
from ringkern.errors import UnsupportedError, check
from ringkern.packed import check_edges, whole_runs
from ringkern.problem import check_dims, make_problem
from ringkern.types import Problem


def attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of attention on one device.

        out, lse = ringkern.attn_func(q, k, v, causal=True)

    Args:
        q: [batch, seqlen_q, nheads, headdim], float16, bfloat16 or float32.
        k: [batch, seqlen_k, nheads_k, headdim], nheads % nheads_k == 0.
        v: [batch, seqlen_k, nheads_k, headdim_v].
        causal: a query sees the keys at its position and before. Bottom-right aligned: the last
            query stands at the position of the last key.

                seqlen_q = 2, seqlen_k = 4      k0 k1 k2 k3
                                            q0   1  1  1  .
                                            q1   1  1  1  1

        softmax_scale: None means headdim ** -0.5.
        window_size: (left, right): how many positions before and after a query it sees; -1 means
            no bound.
        softcap: 0.0 is off; else scores become softcap * tanh(scores / softcap).
        sinks: [nheads], one more score per head with a value of zero; None means none.
        backend: "triton" (CUDA devices of compute capability 8.0 and later), "torch", or "auto":
            RINGKERN_BACKEND if that is set, else Triton on CUDA devices and torch on the CPU. In
            float32, Triton's products are of tf32 only under torch.set_float32_matmul_precision().

    Returns:
        out: [batch, seqlen_q, nheads, headdim_v] in q's dtype, accumulated in float32; 0 where a
            query sees no key.
        lse: [batch, nheads, seqlen_q] float32, log-sum-exp of the scaled scores, natural log; -inf
            where a query sees no key.

    Raises:
        ArgumentError: shapes or dtypes do not fit together; nothing was computed.
        UnsupportedError: the backend or device is not to be had, or gradients are asked for.
    """
    if torch.compiler.is_compiling():
        asked = causal, softmax_scale, list(window_size), softcap, sinks, backend
        return torch.ops.ringkern.attn(q, k, v, *asked)
    problem, taken = _problem_on_device(
        q,
        k,
        v,
        4,
        "[batch, seqlen, heads, headdim]",
        backend,
        sinks,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
    )
    check(q.shape[1] > 0, "q", "seqlen of at least 1", tuple(q.shape))
    edges_q, edges_k = (np.array([0, x.shape[1]]) for x in (q, k))
    return _attend(q, k, v, edges_q, edges_k, problem, sinks, taken)


def attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | Sequence[int],
    cu_seqlens_k: torch.Tensor | Sequence[int],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of attention over a packed batch, on one device.

    Args:
        q: [total_q, nheads, headdim], sequence after sequence; k and v [total_k, ...] likewise.
        cu_seqlens_q: int32 [batch + 1], where each sequence begins; starts with 0, ends with
            total_q. A sequence may be empty. Best a list or on the CPU: of a GPU's tensor each call
            waits for that GPU.
        cu_seqlens_k: the same for k and v.
        The rest: see attn_func().

    Returns:
        out: [total_q, nheads, headdim_v] in q's dtype.
        lse: [nheads, total_q] float32, natural log.
    """
    if torch.compiler.is_compiling():
        edges = (torch.as_tensor(x, dtype=torch.int32) for x in (cu_seqlens_q, cu_seqlens_k))
        asked = causal, softmax_scale, list(window_size), softcap, sinks, backend
        return torch.ops.ringkern.attn_varlen(q, k, v, *edges, *asked)
    problem, taken = _problem_on_device(
        q,
        k,
        v,
        3,
        "[total, heads, headdim]",
        backend,
        sinks,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
    )
    edges_q = check_edges("cu_seqlens_q", cu_seqlens_q, len(q))
    edges_k = check_edges("cu_seqlens_k", cu_seqlens_k, len(k))
    check(
        len(edges_q) == len(edges_k),
        "cu_seqlens_k",
        f"{len(edges_q)} entries, as cu_seqlens_q",
        len(edges_k),
    )
    out, lse = _attend(q[None], k[None], v[None], edges_q, edges_k, problem, sinks, taken)
    return out[0], lse[0]


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) of attention over all parts' keys together, exactly.

    Each part is attention of the same queries to other keys (paper equation 4). Total: a part with
    lse = -inf saw no key, weighs nothing, and its out is not looked at; all parts -inf give
    (0, -inf). lse = +inf is a score beyond float32's range: such parts share all the weight evenly
    and the lse stays +inf. (flash-attention 2 marks a row without keys by +inf: make it -inf
    first.) NaN stays NaN.

    Args:
        outs: [parts, total, nheads, headdim], or dense [parts, batch, seqlen, nheads, headdim].
        lses: [parts, nheads, total], or [parts, batch, nheads, seqlen]; natural log.

    Returns:
        out: outs' shape without parts, in outs' dtype, computed in float32.
        lse: lses' shape without parts, float32.

    Raises:
        ArgumentError: shapes or dtypes do not fit together; nothing was computed.
        UnsupportedError: what RINGKERN_BACKEND asks for is not to be had, or gradients are.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    if torch.compiler.is_compiling():
        return torch.ops.ringkern.merge(outs, lses)
    for name, x in (("outs", outs), ("lses", lses)):
        ok = isinstance(x, torch.Tensor) and x.is_floating_point()
        check(ok, name, "a floating tensor", getattr(x, "dtype", type(x).__name__))
    check(
        outs.dim() in (4, 5),
        "outs",
        "[parts, total, nheads, headdim] or with batch",
        tuple(outs.shape),
    )
    check(len(outs) > 0, "outs", "at least one part", tuple(outs.shape))
    want = (*outs.shape[:-3], outs.shape[-2], outs.shape[-3])
    check(tuple(lses.shape) == want, "lses", want, tuple(lses.shape))
    check(lses.device == outs.device, "lses", f"a tensor on {outs.device}", lses.device)
    if torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad):
        _refuse_gradients()
    return local.merge(outs, lses)


def _stacked(name, parts):
    if not isinstance(parts, (list, tuple)):
        return parts
    shapes = sorted({tuple(x.shape) for x in parts if isinstance(x, torch.Tensor)})
    ok = len(shapes) == 1 and all(isinstance(x, torch.Tensor) for x in parts)
    check(ok, name, "one or more tensors of one shape", f"{len(parts)} of {shapes}")
    return torch.stack(tuple(parts))


def _attend(q, k, v, edges_q, edges_k, problem: Problem, sinks, taken: str):
    """Return (out, lse) of packed sequences on this device, [batch, total, heads, headdim]."""
    lengths_q, lengths_k = np.diff(edges_q), np.diff(edges_k)
    # Bottom-right aligned: the last query of a sequence stands at its last key.
    q_runs = whole_runs(edges_q, lengths_k - lengths_q)
    k_runs = whole_runs(edges_k, np.zeros_like(lengths_k))
    left, right = tiles.bounds(problem.causal, problem.window_size)
    spans = tiles.make_spans(q_runs, k_runs, left, right)
    return local.attend(q, k, v, spans, problem, sinks, taken)


def _problem_on_device(q, k, v, dims, shape, asked, sinks, **options) -> tuple[Problem, str]:
    """Return the Problem of checked arguments, and the backend that computes it."""
    check_dims(q, k, v, dims, shape)
    problem = make_problem(q, k, v, sinks=sinks, **options)
    return problem, pick_backend(asked, q.device, problem)


# ---- the same as operators, which torch.compile and torch.export trace through


@torch.library.custom_op("ringkern::attn", mutates_args=())
def _attn_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    asked = dict(causal=causal, softmax_scale=softmax_scale, window_size=tuple(window_size))
    return attn_func(q, k, v, **asked, softcap=softcap, sinks=sinks, backend=backend)


@torch.library.custom_op("ringkern::attn_varlen", mutates_args=())
def _attn_varlen_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    sinks: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    asked = dict(causal=causal, softmax_scale=softmax_scale, window_size=tuple(window_size))
    asked |= dict(softcap=softcap, sinks=sinks, backend=backend)
    return attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, **asked)


@_attn_op.register_fake
@_attn_varlen_op.register_fake
def _attn_shapes(q, k, v, *_):
    *where, seqlen, nheads, _ = q.shape
    out = q.new_empty(*where, seqlen, nheads, v.shape[-1])
    return out, q.new_empty(*where, nheads, seqlen, dtype=torch.float32)


@torch.library.custom_op("ringkern::merge", mutates_args=())
def _merge_op(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return merge(outs, lses)


@_merge_op.register_fake
def _merge_shapes(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:], dtype=torch.float32)


def _refuse_gradients(*_, **__):
    raise UnsupportedError(
        "gradients: ringkern is for inference and has no backward. Call it under "
        "torch.inference_mode() or torch.no_grad(), or pass tensors that were detached."
    )


# torch calls setup_context where gradients are asked for: in the call, not only in backward.
for _op in (_attn_op, _attn_varlen_op, _merge_op):
    _op.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)
