"""Opens a transport, and gives the extension's pointers and sizes a tensor's face."""

import atexit
import hashlib
import hmac
import itertools
import os
import weakref

import torch

from ringkern import env
from ringkern.errors import (
    ArgumentError,
    AuthenticationError,
    UnsupportedError,
    check,
)
from ringkern.profile import load
from ringkern.rendezvous import meet
from ringkern.transport_local import LocalGroup, LocalTransport

__all__ = ["LocalGroup", "Ticket", "TcpTransport", "open_transport"]


class Ticket:
    """A posted exchange. Its tensors stay alive until it is done, also if the ticket is dropped."""

    def __init__(self, transport, number: int):
        self._transport, self._number = transport, number

    def wait(self) -> tuple[int, int]:
        """Return when every message is through: (posted, done), time.monotonic_ns() both.

        Raises:
            TransportError: the ring failed; the same first error on every call from then on.
        """
        return self._transport.wait(self._number)


class TcpTransport:
    """Ranks as processes, over TCP. Wraps _C.Tcp; the contract is csrc/transport.h."""

    name = "tcp"

    def __init__(
        self, group, timeout_s: float, secret: bytes | str | None, number: int, alike: dict
    ):
        from ringkern import _C  # here, so that planning and attn_func need no extension

        secret = env.secret(secret)
        options = {"lanes": env.lanes(), "checksum": env.flag("RINGKERN_CHECKSUM")}
        alike = (
            options
            | alike
            | {
                "timeout_s": timeout_s,
                "own_secret": secret is not None,
                "RINGKERN_CHECK": env.flag("RINGKERN_CHECK"),
                "RINGKERN_TRACE": env.trace() is not None,
            }
        )
        self._meeting = meeting = meet(
            group, timeout_s, number
        )  # rank 0 may serve the store: keep it
        self.rank, self.world_size = meeting.rank, meeting.world_size
        mine = {"rank": self.rank, "host": hashlib.sha256(env.host_id().encode()).hexdigest()}
        mine |= alike
        if self.rank == 0:
            mine["ring_id"] = os.urandom(16).hex()
            if secret is None:
                mine["secret"] = os.urandom(env.MIN_SECRET).hex()
        facts = meeting.all_gather(mine)
        _check_alike(facts, alike)
        ring_id = bytes.fromhex(facts[0]["ring_id"])
        secret = bytes.fromhex(facts[0]["secret"]) if secret is None else secret

        one_host = len({fact["host"] for fact in facts}) == 1
        host = env.listen_host(_C.interfaces(), one_host)
        listener = _C.Listener(host)
        tag = hmac.new(secret, b"ringkern rendezvous" + ring_id, "sha256").hexdigest()
        where = meeting.all_gather({"address": listener.address, "tag": tag})
        other = [r for r, record in enumerate(where) if record["tag"] != where[0]["tag"]]
        if other:
            raise AuthenticationError(
                f"secret: want the same on every rank, got another than rank 0's on ranks {other}. "
                "Give all ranks one secret, RINGKERN_SECRET or RINGKERN_SECRET_FILE."
            )
        self.addresses = [record["address"] for record in where]
        inside = [r for r, address in enumerate(self.addresses) if env.is_loopback(address)]
        check(
            one_host or not inside,
            "RINGKERN_HOST",
            "addresses that the other hosts can reach",
            f"loopback addresses on ranks {inside}",
            "MASTER_ADDR means loopback there: set RINGKERN_HOST or RINGKERN_IFNAME.",
        )
        self._core = _C.Tcp(
            listener, self.rank, self.addresses, ring_id, secret, float(timeout_s), **options
        )
        self._kept: dict[int, object] = {}  # by ticket: what its messages lie in
        _open.add(self)

    def exchange(self, sends, recvs) -> Ticket:
        """Post messages: lists of (peer, contiguous CPU tensor). All progress together."""
        raw = [
            [(peer, x.data_ptr(), x.numel() * x.element_size()) for peer, x in side]
            for side in (sends, recvs)
        ]
        return self.post(*raw, (sends, recvs))

    def post(self, sends, recvs, keep) -> Ticket:
        """Post messages: lists of (peer, pointer, nbytes), into what `keep` keeps alive."""
        number = self._core.exchange(sends, recvs)
        self._kept[number] = keep
        return Ticket(self, number)

    def wait(self, number: int) -> tuple[int, int]:
        try:
            return self._core.wait(number)
        except KeyboardInterrupt:
            self.abort(f"rank {self.rank} was interrupted")
            raise
        finally:
            # Done, or failed: then no thread touches the buffers any more.
            self._kept.pop(number, None)

    def abort(self, reason: str) -> None:
        """Fail every pending and later call, on every rank, with this reason."""
        self._core.abort(reason)

    def close(self) -> None:
        self._core.close()
        self._kept.clear()
        _open.discard(self)

    def stats(self) -> dict:
        return self._core.stats()


_open: weakref.WeakSet = weakref.WeakSet()
_numbers = itertools.count()


@atexit.register
def _close_all():
    for transport in list(_open):
        transport.close()


def open_transport(group, transport: str, device, timeout_s: float, secret, profile):
    """Return the transport that the arguments of init_ring() name, its device, and the profile."""
    number = next(_numbers)  # before any check: one rank's refusal must not shift its later rings
    profile = os.environ.get("RINGKERN_PROFILE") if profile is None else profile
    hardware = None if profile is None else load(profile)
    names = ("auto", "tcp", "nccl", "local")
    check(transport in names, "transport", f"one of {', '.join(names)}", repr(transport))
    ok = isinstance(timeout_s, (int, float)) and 0 < timeout_s <= 1e6
    check(ok, "timeout_s", "seconds, more than 0 and at most 1e6", repr(timeout_s))
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device: want a torch device, got {device!r}: {error}") from error
    if transport == "nccl" or device.type != "cpu":
        raise UnsupportedError(
            f"a ring over {transport!r} on {device.type!r}: needs the NCCL transport, this version "
            'moves CPU tensors over "tcp" and "local" only. Use transport="tcp", device="cpu".'
        )
    if transport == "local" or isinstance(group, LocalGroup.Member):
        check(transport in ("local", "auto"), "transport", '"local" with a LocalGroup', transport)
        check(secret is None, "secret", 'None with transport="local"', "a secret")
        return LocalTransport(group, timeout_s), device, hardware
    # Ranks with other profiles would choose other methods.
    alike = {"profile": hashlib.sha256(repr(hardware).encode()).hexdigest()[:8]}
    return TcpTransport(group, timeout_s, secret, number, alike), device, hardware


def _check_alike(facts: list[dict], keys) -> None:
    """Raise on every rank alike if the ranks' options differ."""
    for key in keys:
        values: dict = {}
        for rank, fact in enumerate(facts):
            values.setdefault(fact[key], []).append(rank)
        if len(values) > 1:
            told = "; ".join(f"{value}: ranks {ranks}" for value, ranks in values.items())
            raise ArgumentError(f"{key} differs between ranks: {told}. Give all ranks the same.")
