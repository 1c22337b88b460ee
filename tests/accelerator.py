"""Where the tests of kernels run: on a GPU where there is one, else in Triton's interpreter."""

import contextlib
import importlib.util
import threading

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))


@contextlib.contextmanager
def poisoned_memory():
    """Let new tensors hold NaN until they are written: a launcher's own buffers too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def patch_once():
    """Let the interpreter patch triton.language once per launch, and one thread at a time.

    It does so at each call of a device function, tl.max() among them: a third of all its time. The
    language is the process's, so of ranks that are threads one may launch while others wait.
    """
    from triton.runtime import interpreter

    run, patch, done = interpreter.InterpretedFunction.run, interpreter._patch_lang, set()

    turn = threading.RLock()

    def run_anew(*args, **options):
        with turn:
            done.clear()
            return run(*args, **options)

    def patch_module(fn):
        if fn.__module__ not in done:
            done.add(fn.__module__)
            return patch(fn)

    interpreter.InterpretedFunction.run, interpreter._patch_lang = run_anew, patch_module


if not ON_GPU:
    patch_once()
