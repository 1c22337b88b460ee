"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# Without a GPU, kernels run in Triton's interpreter. Read when ringkern.kernels.target is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where there is a GPU, rings that name no device would be on it: tests of that name it.
os.environ.setdefault("RINGKERN_DEVICE", "cpu")

# No deadline per example: a busy machine is no fault of the code. Runs draw the same examples.
settings.register_profile("ringkern", deadline=None, derandomize=True)
settings.load_profile("ringkern")
