"""What ranks tell each other beside attention: small agreements, barriers, whole tensors."""

import torch

from ringkern.agreement import RECORD_BYTES
from ringkern.errors import check


class Collectives:
    """Part of a Ring, which has `rank`, `world_size`, `check_open()` and a transport `_link`.

    Every rank must make the same calls in the same order.
    """

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """Return what every rank passed, at most RECORD_BYTES each. Small, for agreements."""
        check(len(mine) <= RECORD_BYTES, "mine", f"at most {RECORD_BYTES} bytes", len(mine))
        padded = torch.frombuffer(bytearray(mine.ljust(RECORD_BYTES)), dtype=torch.uint8)
        parts = self.gather(padded, [(RECORD_BYTES,)] * self.world_size)
        return [bytes(part.numpy()).rstrip() for part in parts]

    def gather_int(self, mine: int) -> list[int]:
        """Return the int that every rank passed."""
        parts = self.gather(torch.tensor([mine], device="cpu"), [(1,)] * self.world_size)
        return [int(part) for part in parts]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.gather_int(0)

    def exchange(self, sends, recvs) -> None:
        """Exchange raw messages, lists of (peer, contiguous tensor), and wait for them."""
        self.post(sends, recvs).wait()

    def post(self, sends, recvs):
        """Post raw messages, as exchange() takes them; return the ticket to wait() for.

        Tensors on the ring's device, or all on the CPU, which a ring of GPUs moves beside.
        """
        self.check_open()
        on_host = all(x.device.type == "cpu" for _, x in (*sends, *recvs))
        return (self._link.host if on_host else self._link).exchange(sends, recvs)

    def gather(self, mine: torch.Tensor, shapes) -> list[torch.Tensor]:
        """Return every rank's tensor, of the shape given for it, by one exchange with all."""
        parts = [mine if r == self.rank else mine.new_empty(s) for r, s in enumerate(shapes)]
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        sends = [(rank, mine) for rank in others if mine.numel()]
        recvs = [(rank, parts[rank]) for rank in others if parts[rank].numel()]
        if sends or recvs:
            self.exchange(sends, recvs)
        return parts
