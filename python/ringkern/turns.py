"""In which order a GPU does what a ring is called for."""

import torch


class Turns:
    """Calls of a ring share buffers: each comes after the one before, whatever streams they are on.

        with turns:
            ...  # work on the device's current stream, not under capture

    device: where they compute; there is nothing to do on a CPU.
    """

    def __init__(self, device: torch.device):
        self._device, self._is_gpu = device, device.type == "cuda"
        self._stream = self._done = None  # of the latest call

    def __enter__(self):
        if self._is_gpu:
            stream = torch.cuda.current_stream(self._device)
            if self._done is None:
                self._done = torch.cuda.Event()
            elif stream != self._stream:
                stream.wait_event(self._done)
            self._stream = stream

    def __exit__(self, kind, error, trace):
        if self._is_gpu:
            self._done.record(self._stream)
