"""How ranks find each other before there is a ring: who is there, and small records from all.

Records are JSON of a fixed small size over a store or a process group that exists. No pickle.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import time

import torch
import torch.distributed as dist

from ringkern import env
from ringkern.errors import (
    ArgumentError,
    ProtocolError,
    TransportError,
    TransportTimeoutError,
    check,
)

RECORD_BYTES = 2048
PAUSE_S = 0.05  # between attempts to reach a store
LINGER_S = 1.0  # for how long at most rank 0 keeps its store for ranks that have not read all


class GroupRendezvous:
    """Ranks of a torch.distributed process group."""

    def __init__(self, group, timeout_s: float, device: torch.device):
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout_s = group, timeout_s
        # The program need not have made this rank's GPU the current device.
        self._device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")

    def all_gather(self, record: dict) -> list[dict]:
        """Return every rank's record."""
        mine = torch.frombuffer(bytearray(_pack(record)), dtype=torch.uint8).to(self._device)
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        doing = f"rank {self.rank} of {self.world_size}: meeting the ranks of the process group"
        with _NamedErrors(f"{doing} (timeout {self._timeout_s:g} s)"):
            work = dist.all_gather(theirs, mine, group=self._group, async_op=True)
            work.wait(datetime.timedelta(seconds=self._timeout_s))
        return [_unpack(x.cpu().numpy().tobytes(), r) for r, x in enumerate(theirs)]


class StoreRendezvous:
    """Ranks of torchrun's environment. Joins torchrun's store, or rank 0 serves one."""

    def __init__(self, timeout_s: float, number: int):
        self.rank, self.world_size, self._host, self._port = env.torchrun()
        self._timeout_s = timeout_s
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"ringkern/{restart}/{number}"
        self._rounds = itertools.count()
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._serves = self.rank == 0 and not served
        self._linger = datetime.timedelta(seconds=min(LINGER_S, timeout_s / 4))
        with self._named_errors("joining"):
            if not self._serves:
                self._reach()
            self._store = dist.TCPStore(
                self._host,
                self._port,
                is_master=self._serves,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )

    def all_gather(self, record: dict) -> list[dict]:
        """Return every rank's record. Checks on the way that all count the same ranks."""
        here = f"{self._prefix}/{next(self._rounds)}"
        record = record | {"world_size": self.world_size}
        records = []
        try:
            with self._named_errors("telling"):
                self._store.set(f"{here}/{self.rank}", _pack(record))
            for rank in range(self.world_size):
                with self._named_errors(f"waiting for rank {rank} at"):
                    theirs = _unpack(self._store.get(f"{here}/{rank}"), rank)
                check(
                    theirs["world_size"] == self.world_size,
                    "WORLD_SIZE",
                    f"{self.world_size} on every rank, as on rank {self.rank}",
                    f"{theirs['world_size']} on rank {rank}",
                    "Start all ranks with the same --nnodes and --nproc-per-node.",
                )
                records.append(theirs)
        finally:
            self._leave(f"{here}/read")
        return records

    def _reach(self) -> None:
        """Return when the store's port takes connections; torch would try beyond the timeout."""
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                left = max(end - time.monotonic(), PAUSE_S)
                socket.create_connection((self._host, self._port), timeout=left).close()
                return
            except OSError as error:
                if time.monotonic() + PAUSE_S >= end:
                    raise dist.DistStoreError(f"timed out: {error}") from error
            time.sleep(PAUSE_S)

    def _leave(self, key: str) -> None:
        """Note that this rank has read all that it will; rank 0 stays for the others' sake.

        Its store ends with it, and who has not read by then would not learn what it has.
        """
        with contextlib.suppress(dist.DistError, RuntimeError):
            if self._store.add(key, 1) == self.world_size:
                self._store.set(f"{key}/all", b"")
            if self._serves:
                self._store.wait([f"{key}/all"], self._linger)

    def _named_errors(self, doing: str):
        return _NamedErrors(
            f"rank {self.rank} of {self.world_size}: {doing} the store of MASTER_ADDR = "
            f"{self._host}, MASTER_PORT = {self._port} (timeout {self._timeout_s:g} s)"
        )


class _NamedErrors:
    """Turns torch's store errors into ringkern's, with what was being done."""

    def __init__(self, doing: str):
        self._doing = doing

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (dist.DistError, RuntimeError, ConnectionError)) or isinstance(
            error, (ArgumentError, TransportError)
        ):
            return
        words = str(error).splitlines()[0]
        late = isinstance(error, dist.DistStoreError) or "time" in words.lower()
        raise (TransportTimeoutError if late else TransportError)(
            f"{self._doing}: {words}. Have all ranks started? Is the port open to this host?"
        ) from error


def meet(group, timeout_s: float, number: int, device: torch.device):
    """Return the rendezvous of a process group, a 1-D DeviceMesh, or torchrun's environment.

    number: which ring of this process it is; rings of a job are told apart by it.
    device: this rank's, which a process group over NCCL meets by.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return StoreRendezvous(timeout_s, number)
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh
        hint = 'Take one dimension: mesh["cp"].'
        check(group.ndim == 1, "group", "a 1-D DeviceMesh", f"{group.ndim} dimensions", hint)
        group = group.get_group()
    outside = group is not None and group is dist.GroupMember.NON_GROUP_MEMBER
    check(not outside, "group", "a group that this rank is in", "one that it is not in")
    ok = group is None or isinstance(group, dist.ProcessGroup)
    want = "a ProcessGroup, a 1-D DeviceMesh, a LocalGroup's member or None"
    check(ok, "group", want, type(group).__name__)
    return GroupRendezvous(group, timeout_s, device)


def _pack(record: dict) -> bytes:
    data = json.dumps(record).encode()
    check(len(data) <= RECORD_BYTES, "record", f"at most {RECORD_BYTES} bytes", len(data))
    return data.ljust(RECORD_BYTES)


def _unpack(data: bytes, rank: int) -> dict:
    try:
        record = json.loads(data[:RECORD_BYTES])
    except ValueError as error:
        raise ProtocolError(f"rank {rank} published a record that is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ProtocolError(f"rank {rank} published a record that is not an object")
    return record
