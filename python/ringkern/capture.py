"""Whether work becomes a CUDA graph instead of running."""

import torch


def captures(device: torch.device) -> bool:
    """Return whether the current stream of that device is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks about the current device's
        return torch.cuda.is_current_stream_capturing()
