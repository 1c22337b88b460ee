"""Opens a transport: finds the other ranks, agrees with them on one, and joins it."""

import hashlib
import itertools
import os

import torch

from ringkern import env, gpu, topology
from ringkern.errors import UnsupportedError, check
from ringkern.join import Facts, exchange_facts, join
from ringkern.link import DeviceLink, Link, close_at_exit
from ringkern.profile import load
from ringkern.rendezvous import meet
from ringkern.topology import Place
from ringkern.transport_local import LocalGroup, LocalTransport

__all__ = ["LocalGroup", "open_transport"]

_numbers = itertools.count()


def open_transport(group, transport: str, device, timeout_s: float, secret, profile):
    """Return the link that the arguments of init_ring() name, its device, and the profile."""
    number = next(_numbers)  # before any check: one rank's refusal must not shift its later rings
    profile = os.environ.get("RINGKERN_PROFILE") if profile is None else profile
    hardware = None if profile is None else load(profile)
    names = ("auto", "tcp", "nccl", "local")
    check(transport in names, "transport", f"one of {', '.join(names)}", repr(transport))
    ok = isinstance(timeout_s, (int, float)) and 0 < timeout_s <= 1e6
    check(ok, "timeout_s", "seconds, more than 0 and at most 1e6", repr(timeout_s))
    local = transport == "local" or isinstance(group, LocalGroup.Member)
    device = gpu.pick_device(device, "local" if local else transport)
    if local:
        check(transport in ("local", "auto"), "transport", '"local" with a LocalGroup', transport)
        check(secret is None, "secret", 'None with transport="local"', "a secret")
        if device.type != "cpu":
            raise UnsupportedError(
                f'a ring over "local" on {device}: it moves CPU tensors only. Use device="cpu", or '
                'processes and transport="auto".'
            )
        return LocalTransport(group, timeout_s), device, hardware
    if transport == "nccl" and device.type == "cpu":
        raise UnsupportedError(
            'a ring over "nccl" on the CPU: NCCL moves CUDA tensors only. Use transport="tcp", or '
            'device="cuda".'
        )
    # Ranks with other profiles would choose other methods.
    alike = {"profile": hashlib.sha256(repr(hardware).encode()).hexdigest()[:8]}
    link = _open(group, transport, device, float(timeout_s), secret, number, alike)
    close_at_exit(link)
    return link, device, hardware


def _open(group, transport, device: torch.device, timeout_s, secret, number, alike) -> Link:
    """Return this rank's link of a ring of processes."""
    secret = env.secret(secret)
    options = {"lanes": env.lanes(), "checksum": env.flag("RINGKERN_CHECKSUM")}
    nccl = gpu.nccl_options(timeout_s)
    alike |= options | nccl | {"transport": transport, "device": device.type}
    alike |= {
        "timeout_s": timeout_s,
        "own_secret": secret is not None,
        "RINGKERN_CHECK": env.flag("RINGKERN_CHECK"),
        "RINGKERN_TRACE": env.trace() is not None,
    }
    facts = Facts(alike, topology.here(device).to_record() | gpu.describe(device))
    meeting = meet(group, timeout_s, number, device)
    every = exchange_facts(meeting, secret, facts)
    on_nccl = device.type == "cuda" and gpu.takes_nccl(transport, every)
    wire_s = timeout_s / 2 if on_nccl else timeout_s
    core, addresses = join(meeting, secret, every, wire_s, **options)
    if device.type == "cpu":
        link = Link(core, "tcp", addresses)
    else:
        link = _on_gpu(core, addresses, device, nccl if on_nccl else None, wire_s)
    link.order = topology.ring_order([Place.from_record(fact) for fact in every])
    link.meeting = meeting  # rank 0 may serve the store: it must outlive the others' meeting
    return link


def _on_gpu(wire, addresses, device, nccl: dict | None, wire_s: float) -> DeviceLink:
    """Return a link for a GPU's memory: over NCCL, with its options, or staged over the wire."""
    from ringkern import _C

    if nccl is None:
        core = _C.join_staged(wire, device.index)
        return DeviceLink(core, "tcp", addresses, device)
    path = gpu.nccl_path()
    core = _C.join_nccl(wire, device.index, path, control_timeout_s=wire_s, **nccl)
    return DeviceLink(core, "nccl", addresses, device)
