"""From the arguments of a call to its Problem. Nothing unsupported gets past."""

import torch

from ringkern.errors import UnsupportedError, check
from ringkern.types import Problem

MOST = torch.finfo(torch.float32).max
FLOAT32 = f"Scores are float32, which ends at {MOST:.1e}."
FURTHEST = 1 << 48  # positions are below; sums of a few stay far from overflow
DTYPES = ("float16", "bfloat16", "float32")


def make_problem(
    q, k, v, *, causal, softmax_scale, window_size, softcap, sinks=None, device=None
) -> Problem:
    """Check the arguments of an attention call and return its Problem.

    q [batch, seqlen_q, nheads, headdim], k [batch, seqlen_k, nheads_k, headdim] and v
    [..., headdim_v], or all three packed, without batch.

    Raises:
        ArgumentError: what was wanted, what was got and what to do.
        UnsupportedError: gradients are asked for.
    """
    _check_tensors(q, k, v, sinks, device)
    nheads, headdim = q.shape[-2:]
    nheads_k, headdim_v = v.shape[-2:]
    _check_mask(causal, window_size)
    ok = _is_finite(softcap) and softcap >= 0
    check(ok, "softcap", "0.0 (off) or more", repr(softcap), FLOAT32)
    if softmax_scale is None:
        softmax_scale = headdim**-0.5
    want = "a finite number or None"
    check(_is_finite(softmax_scale), "softmax_scale", want, repr(softmax_scale), FLOAT32)
    return Problem(
        batch=q.shape[0] if q.dim() == 4 else 1,
        nheads=nheads,
        nheads_k=nheads_k,
        headdim=headdim,
        headdim_v=headdim_v,
        dtype=_dtype(q),
        causal=causal,
        softmax_scale=float(softmax_scale),
        window_size=_bounded(window_size),
        softcap=float(softcap),
    )


def make_asked(
    nheads, nheads_k, headdim, headdim_v, *, dtype, causal=True, window_size=(-1, -1)
) -> Problem:
    """Check what is asked of a call that is not made, and return its Problem.

    Raises:
        ArgumentError: what was wanted, what was got and what to do.
    """
    sizes = dict(nheads=nheads, nheads_k=nheads_k, headdim=headdim, headdim_v=headdim_v)
    check_sizes(**sizes)
    check(nheads % nheads_k == 0, "nheads", f"a multiple of nheads_k = {nheads_k}", nheads)
    name = str(dtype).removeprefix("torch.")
    check(name in DTYPES, "dtype", ", ".join(DTYPES), name)
    _check_mask(causal, window_size)
    window_size = _bounded(window_size)
    return Problem(1, *sizes.values(), name, causal, headdim**-0.5, window_size, 0.0)


def check_sizes(**sizes) -> None:
    """Raise unless all are counts: ints of at least 1."""
    for name, size in sizes.items():
        ok = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        check(ok, name, "an int of at least 1", repr(size))


def _check_mask(causal, window_size):
    check(isinstance(causal, bool), "causal", "True or False", repr(causal))
    want = "two ints (left, right), -1 for no bound"
    check(_is_window(window_size), "window_size", want, repr(window_size))


def _bounded(window_size) -> tuple[int, int]:
    """Return the window with -1 for what no position is as far away as."""
    return tuple(int(side) if side < FURTHEST else -1 for side in window_size)


def _check_tensors(q, k, v, sinks, device):
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(isinstance(x, torch.Tensor), name, "a torch.Tensor", type(x).__name__)
        check(x.layout == torch.strided, name, "a dense tensor", x.layout)
        check(_dtype(x) in DTYPES, name, f"{', '.join(DTYPES)}", _dtype(x), "Cast it first.")
        check(x.dtype == q.dtype, name, f"{_dtype(q)}, as q", _dtype(x))
        want = q.device if device is None else device
        same = x.device.type == want.type and (want.index is None or x.device == want)
        check(same, name, f"a tensor on {want}", x.device)
        last = x.shape[-1] if x.dim() else 0
        check(
            x.numel() == 0 or last == 1 or x.stride(-1) == 1,
            name,
            "a contiguous head dimension",
            f"strides {tuple(x.stride())}",
            "Call .contiguous().",
        )
    check(
        q.dim() in (3, 4),
        "q",
        "[batch, seqlen, nheads, headdim], or [total, nheads, headdim]",
        tuple(q.shape),
    )
    for name, x in (("k", k), ("v", v)):
        check(x.dim() == q.dim(), name, f"{q.dim()} dimensions, as q", tuple(x.shape))
    for axis, what in ((-2, "nheads"), (-1, "headdim")):
        for name, x in (("q", q), ("k", k), ("v", v)):
            check(x.shape[axis] > 0, name, f"{what} of at least 1", tuple(x.shape))
    check(
        k.shape[:-1] == v.shape[:-1],
        "v",
        f"{tuple(k.shape[:-1])} + (headdim_v,), as k",
        tuple(v.shape),
    )
    check(k.shape[-1] == q.shape[-1], "k", f"headdim {q.shape[-1]}, as q", tuple(k.shape))
    check(
        q.shape[-2] % k.shape[-2] == 0,
        "nheads",
        f"a multiple of nheads_k = {k.shape[-2]}",
        q.shape[-2],
    )
    if q.dim() == 4:
        check(q.shape[0] > 0, "q", "batch of at least 1", tuple(q.shape))
        check(k.shape[0] == q.shape[0], "k", f"batch {q.shape[0]}, as q", tuple(k.shape))
    if sinks is not None:
        ok = isinstance(sinks, torch.Tensor) and sinks.is_floating_point()
        check(ok, "sinks", "a floating tensor or None", type(sinks).__name__)
        check(
            tuple(sinks.shape) == (q.shape[-2],),
            "sinks",
            f"[nheads] = [{q.shape[-2]}]",
            list(sinks.shape),
        )
        check(sinks.device == q.device, "sinks", f"a tensor on {q.device}", sinks.device)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        raise UnsupportedError(
            "gradients: ringkern is for inference and has no backward. Call it under "
            "torch.inference_mode() or torch.no_grad(), or pass x.detach()."
        )


def signature(q, k, v, sinks, *more):
    """Return what make_problem() looks at, hashable: equal for calls that it answers alike.

    None where the arguments are not even of such types.
    """
    try:
        tensors = [x for x in (q, k, v, sinks) if x is not None]
        looks = [(x.shape, x.stride(), x.dtype, x.device, x.layout) for x in tensors]
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        key = (*looks, sinks is None, grad, *more, *map(type, more))
        hash(key)
    except (AttributeError, TypeError):
        return None
    return key


def check_dims(q, k, v, dims: int, shape: str) -> None:
    """Raise unless q, k and v are tensors of `dims` dimensions; `shape` says which."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(isinstance(x, torch.Tensor), name, "a torch.Tensor", type(x).__name__)
        check(x.dim() == dims, name, shape, tuple(x.shape))


def _dtype(x) -> str:
    return str(x.dtype).removeprefix("torch.")


def _is_window(window_size) -> bool:
    return (
        isinstance(window_size, (tuple, list))
        and len(window_size) == 2
        and all(isinstance(side, int) and side >= -1 for side in window_size)
    )


def _is_finite(x) -> bool:
    """Return whether x is a number that float32, which kernels take, holds."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= MOST
