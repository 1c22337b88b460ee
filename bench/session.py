"""What one rank keeps from case to case: its rings, and the process group it is held against."""

import os

import ringkern
import torch.distributed as dist
from ringkern import calibrate

TIMEOUT_S = 600.0  # a rank stands in a barrier while another one measures a whole call alone


class Session:
    """Opened on every rank alike, and asked for the same things in the same order."""

    def __init__(self, rank: int, world_size: int, quick: bool = False):
        self.rank, self.world_size, self._quick = rank, world_size, quick
        self._rings: dict[tuple, ringkern.Ring] = {}

    def ring(self, **variables: str) -> ringkern.Ring:
        """Return the ring that was made under these environment variables."""
        key = tuple(sorted(variables.items()))
        if key not in self._rings:
            before = {name: os.environ.get(name) for name in variables}
            os.environ.update(variables)
            try:
                self._rings[key] = ringkern.init_ring(
                    transport="tcp", device="cpu", timeout_s=TIMEOUT_S
                )
            finally:
                for name, value in before.items():
                    os.environ.pop(name)
                    if value is not None:
                        os.environ[name] = value
        return self._rings[key]

    def ring_with_profile(self, problem) -> ringkern.Ring:
        """Return a ring that knows its profile, as `ringkern calibrate` measures it."""
        key = ("profile", problem)
        if key not in self._rings:
            seconds = 0.1 if self._quick else 3.0
            hardware = calibrate.measure(self.ring(), seconds, problem)
            self._rings[key] = ringkern.init_ring(
                transport="tcp", device="cpu", timeout_s=TIMEOUT_S, profile=hardware
            )
        return self._rings[key]

    def gloo(self):
        """Return torch.distributed, its default group being gloo over loopback."""
        if not dist.is_initialized():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo")
        return dist

    def barrier(self) -> None:
        """Return when every rank has come here. Ranks that wait sleep."""
        self.ring().barrier()

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()
        if dist.is_initialized():
            dist.destroy_process_group()
