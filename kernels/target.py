"""Where kernels run, the interpreter or a GPU of some architecture, and refusing what cannot."""

import functools
import re

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("triton: want 3.6 or later, got none: pip install triton") from error

OLDEST_TRITON = (3, 6)
# Rows of a tensor that kernels take: a row's number and those of a block after it fit int32.
MAX_ROWS = (1 << 31) - (1 << 16)
MAX_PROGRAMS = (1 << 31) - 1  # of a grid's first dimension

if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST_TRITON:
    raise ImportError(
        f"triton: want {'.'.join(map(str, OLDEST_TRITON))} or later, got {triton.__version__}: "
        "pip install --upgrade triton"
    )

# Kernels are what they are from the moment they are decorated, so once, at import.
INTERPRET = triton.knobs.runtime.interpret


@functools.cache
def arch(device: torch.device) -> int:
    """Return the device's compute capability times ten, as configs.pick() takes it.

    The interpreter has none; it gets the blocks of the oldest.
    """
    if INTERPRET:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check(ok: bool, name: str, want, got) -> None:
    """Raise ValueError naming an argument, what was wanted and what was got, unless ok."""
    if not ok:
        raise ValueError(f"{name}: want {want}, got {got}")


def check_tensors(dtypes=None, **tensors: torch.Tensor) -> None:
    """Refuse tensors of several devices, of one that kernels cannot run on, or of other dtypes."""
    (first, one), *others = tensors.items()
    fits = one.device.type == "cuda" or INTERPRET
    check(fits, first, "a tensor on a CUDA device", f"one on {one.device}")
    for name, x in others:
        check(x.device == one.device, name, f"a tensor on {one.device}, as {first}", x.device)
    for name, x in tensors.items():
        fits = dtypes is None or x.dtype in dtypes
        check(fits, name, " or ".join(map(str, dtypes or ())), x.dtype)


def dtype_name(x: torch.Tensor) -> str:
    """Return a tensor's dtype as configs.pick() takes it."""
    return str(x.dtype).removeprefix("torch.")
