"""Triton without a GPU: kernels are compiled for one, and launches are noted instead of made."""

import contextlib
import itertools

import pytest
import triton
from ringkern import backend
from ringkern.kernels import target
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

STREAM = 7  # its handle


class _Launcher:
    """What launches a compiled kernel."""

    def __init__(self, src, metadata):
        self._name = src.fn.__name__

    def __call__(self, *args):
        _Driver.launches.append((self._name, args))


class _Utils:
    _functions = itertools.count(1)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536}

    def load_binary(self, name, kernel, shared, device):
        return 1, next(self._functions), 32, 0, 1024


class _Driver:
    """What Triton asks of a driver in JITFunction.run() and CompiledKernel."""

    launcher_cls, utils = _Launcher, _Utils()
    launches: list = []

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM


@contextlib.contextmanager
def stub_triton():
    """Have Triton's kernels take tensors of the CPU, and do nothing.

    Returns a list to which each launch adds (kernel's name, arguments as a launcher gets them).
    Empty where TRITON_INTERPRET=1: the interpreter only does nothing.
    """
    launches = _Driver.launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGKERN_BACKEND", "triton")
        patch.setattr(backend, "why_not_triton", lambda *_: "")
        patch.setattr(target, "INTERPRET", True)  # so that tensors of the CPU will do
        patch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
        patch.setattr(triton.runtime.driver, "_active", _Driver())
        yield launches
