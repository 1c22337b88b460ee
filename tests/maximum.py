"""The larger of NaN and a number: the number, as GPUs have it. Triton's interpreter says NaN."""

import numpy as np
from accelerator import ON_GPU


def drop_nan(monkeypatch) -> None:
    """Let the interpreter's maximum lose NaN as a GPU's does, for tests of where NaN must stay."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def maximum(self, a, b):
        return self.binary_op(a, b, np.fmax)

    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", maximum)
