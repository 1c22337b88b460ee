"""Which kernels compute on a device, and why others cannot."""

import functools
import warnings

import torch

from ringkern import env
from ringkern.errors import UnsupportedError, check
from ringkern.types import Problem

BACKENDS = ("auto", "triton", "hopper", "torch")
OLDEST_GPU = (8, 0)
MAX_HEADDIM = 256  # of the Triton kernels
DTYPES = ("float16", "bfloat16", "float32")  # of theirs; torch merges float64 as well


def pick_backend(
    asked: str, device: torch.device, problem: Problem | None = None, what: str = "attention"
) -> str:
    """Return "triton" or "torch", whichever computes this problem here.

    "auto" is RINGKERN_BACKEND if that is set; else Triton on CUDA devices, torch on the CPU. Where
    "auto" finds that Triton cannot on a CUDA device, it warns once and takes torch.

    Args:
        asked: one of BACKENDS.
        problem: None: any.
        what: is computed, in words.

    Raises:
        UnsupportedError: what was asked for cannot, and why.
    """
    check(asked in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(asked))
    asked = env.backend() if asked == "auto" else asked
    if asked == "hopper":
        hint = 'Use "torch", or "triton" on a GPU.'
        raise UnsupportedError(f'backend "hopper": this version has no such kernels. {hint}')
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"{what} on {device.type}: want tensors on the CPU or on CUDA.")
    if asked == "torch" or (asked == "auto" and device.type == "cpu"):
        return "torch"
    widest = max(problem.headdim, problem.headdim_v) if problem else 1
    reason = why_not_triton(device, widest, problem.dtype if problem else "float32")
    if not reason:
        return "triton"
    if asked == "triton":
        raise UnsupportedError(f'backend "triton": {reason}')
    _warn(what, reason)
    return "torch"


@functools.lru_cache(maxsize=256)
def why_not_triton(device: torch.device, headdim: int, dtype: str) -> str:
    """Return why the Triton kernels cannot compute this on the device; empty if they can."""
    try:
        from ringkern.kernels import target
    except ImportError as error:  # triton is missing or too old
        return f"{error}."
    if headdim > MAX_HEADDIM:
        return f'want a headdim of at most {MAX_HEADDIM}, got {headdim}. Use "torch".'
    if dtype not in DTYPES:
        return f'want {", ".join(DTYPES)}, got {dtype}. Use "torch".'
    if target.INTERPRET:
        wrong = dtype == "bfloat16"
        return "Triton's interpreter computes bfloat16 wrongly. Use float32." if wrong else ""
    if device.type != "cuda":
        return f'want tensors on a CUDA device, got {device}. Use "torch".'
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        got = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f'want compute capability 8.0 or later, got {got}. Use "torch".'
    return ""


@functools.cache
def _warn(what: str, reason: str) -> None:
    """Say once that a slower way is taken."""
    message = f"{what} computes with torch, which is slower, as Triton cannot: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=5)
