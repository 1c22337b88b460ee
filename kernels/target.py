"""Where kernels run, the interpreter or a GPU of some architecture, and refusing what cannot.

Triton comes from here to every other module: where it is missing or too old, this says so.
"""

import functools
import re

import torch

try:
    import triton
    import triton.language as tl  # noqa: F401 - for the other modules, which import it from here
except ImportError as error:
    raise ImportError("triton: want 3.6 or later, got none: pip install triton") from error

OLDEST_TRITON = (3, 6)
# Rows of a tensor that kernels take: a row's number and those of a block after it fit int32.
MAX_ROWS = (1 << 31) - (1 << 16)
VECTOR_BYTES = 16  # that a thread loads at once, from an address that so many divide
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


def vector(headdim: int, itemsize: int) -> int:
    """Return the elements of a vector of 16 bytes if a row is a whole number of those, else 1.

    Kernels take strides of aligned tensors in vectors, and multiply: of strides in elements the
    compiler sees multiples of 16 alone, and it copies rows of 72 piece by piece.
    """
    return 1 if headdim * itemsize % VECTOR_BYTES else VECTOR_BYTES // itemsize


def vector_strides(*tensors: torch.Tensor) -> list[int]:
    """Return the strides of aligned tensors in vectors, but for their last dimensions'."""
    return [
        stride // vector(x.shape[-1], x.element_size())
        for x in tensors
        for stride in x.stride()[:-1]
    ]


def is_aligned(x: torch.Tensor) -> bool:
    """Return whether all rows of x, of its last dimension, begin where a vector can.

    True for rows that are not whole vectors: no layout of them is better.
    """
    size = x.element_size()
    if vector(x.shape[-1], size) == 1 or not x.numel():
        return True
    steps = (step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
    return not any(start % VECTOR_BYTES for start in (x.data_ptr(), *(s * size for s in steps)))


def check_aligned(**tensors: torch.Tensor) -> None:
    """Refuse tensors that are not is_aligned(): kernels are several times slower on such."""
    for name, x in tensors.items():
        size = x.element_size()
        strides = tuple(step * size for step in x.stride()[:-1])
        got = f"an address of {x.data_ptr() % VECTOR_BYTES} more and strides of {strides}"
        want = f"an address and strides that are multiples of {VECTOR_BYTES} bytes"
        hint = f"pass {name}.clone(memory_format=torch.contiguous_format)"
        check(is_aligned(x), name, want, f"{got}: {hint}")


def dtype_name(x: torch.Tensor) -> str:
    """Return a tensor's dtype as configs.pick() takes it."""
    return str(x.dtype).removeprefix("torch.")
