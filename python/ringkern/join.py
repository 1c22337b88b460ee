"""How ranks that found each other come to share a ring over TCP."""

import hashlib
import hmac
import os
from typing import NamedTuple

from ringkern import env
from ringkern.errors import ArgumentError, AuthenticationError, check


class Facts(NamedTuple):
    """What a rank tells the others of itself before there is a ring. JSON-able values.

    alike: what must be the same on all ranks, by name.
    own: what may differ.
    """

    alike: dict
    own: dict


def exchange_facts(meeting, secret: bytes | None, facts: Facts) -> list[dict]:
    """Return every rank's facts, by rank, with what rank 0 draws for the ring.

    Raises on every rank alike where what must be the same differs.
    """
    mine = facts.alike | facts.own | {"rank": meeting.rank}
    if meeting.rank == 0:
        mine["ring_id"] = os.urandom(16).hex()
        if secret is None:
            mine["secret"] = os.urandom(env.MIN_SECRET).hex()
    every = meeting.all_gather(mine)
    for key in facts.alike:
        check_alike(key, [fact[key] for fact in every])
    return every


def check_alike(key: str, values: list) -> None:
    """Raise unless all ranks, in whose order the values are, have the same."""
    ranks: dict = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) > 1:
        told = "; ".join(f"{value}: ranks {where}" for value, where in ranks.items())
        raise ArgumentError(f"{key} differs between ranks: {told}. Give all ranks the same.")


def join(meeting, secret: bytes | None, every: list[dict], timeout_s: float, **options):
    """Return (_C.Link, addresses) of a ring over TCP among the ranks that exchanged facts.

    Args:
        every: what exchange_facts() returned; each has "host", which tells hosts apart.
        options: lanes and checksum.
    """
    from ringkern import _C  # here, so that planning and attn_func need no extension

    ring_id = bytes.fromhex(every[0]["ring_id"])
    secret = bytes.fromhex(every[0]["secret"]) if secret is None else secret
    one_host = len({fact["host"] for fact in every}) == 1
    listener = _C.Listener(env.listen_host(_C.interfaces(), one_host))
    tag = hmac.new(secret, b"ringkern rendezvous" + ring_id, "sha256").hexdigest()
    where = meeting.all_gather({"address": listener.address, "tag": tag})
    other = [r for r, record in enumerate(where) if record["tag"] != where[0]["tag"]]
    if other:
        raise AuthenticationError(
            f"secret: want the same on every rank, got another than rank 0's on ranks {other}. "
            "Give all ranks one secret, RINGKERN_SECRET or RINGKERN_SECRET_FILE."
        )
    addresses = [record["address"] for record in where]
    inside = [r for r, address in enumerate(addresses) if env.is_loopback(address)]
    check(
        one_host or not inside,
        "RINGKERN_HOST",
        "addresses that the other hosts can reach",
        f"loopback addresses on ranks {inside}",
        "MASTER_ADDR means loopback there: set RINGKERN_HOST or RINGKERN_IFNAME.",
    )
    core = _C.join_tcp(listener, meeting.rank, addresses, ring_id, secret, timeout_s, **options)
    return core, addresses


def host_hash() -> str:
    """Return what tells this host from the others of a ring, and tells them nothing else."""
    return hashlib.sha256(env.host_id().encode()).hexdigest()[:32]
