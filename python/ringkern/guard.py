"""The device that kernels are launched on."""

import contextlib

import torch


def guard(device: torch.device):
    """Return a context in which the device is the current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
