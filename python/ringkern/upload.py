"""Tables of the host on their way to a device."""

import numpy as np
import torch


def upload(array: np.ndarray, device: torch.device, into: torch.Tensor | None = None):
    """Return the array as a tensor on the device, or in `into`; the host waits for no GPU.

    By way of pinned memory: a copy from other memory would first wait for the stream.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    if into is None:
        return tensor.to(device, non_blocking=True)
    return into.copy_(tensor, non_blocking=True)
