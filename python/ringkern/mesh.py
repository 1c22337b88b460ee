"""Rings beside tensor parallelism: a ring for each share of the heads (paper.md, section 1)."""

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringkern import gpu, topology
from ringkern.errors import ArgumentError, check
from ringkern.rendezvous import GroupRendezvous
from ringkern.topology import Place


def make_mesh(
    tp: int,
    *,
    device=None,
    places: Sequence[Place] | None = None,
    timeout_s: float = 60.0,
) -> DeviceMesh:
    """Return a DeviceMesh ("cp", "tp") of the default process group. Every rank must call it.

    The ranks of mesh["tp"] are on one host, those of mesh["cp"] go over the hosts. A rank has its
    share of the heads, of every token that its ring, mesh["cp"], holds:

        mesh = ringkern.mesh.make_mesh(tp=8)
        ring = ringkern.init_ring(mesh["cp"])
        heads, heads_k = ringkern.mesh.head_range(128, 8, 8, mesh["tp"].get_local_rank())

    With as many ranks to a tp group as key heads this is one ring for each key head.

    Args:
        tp: ranks that share the heads; divides the ranks of every host.
        device: as init_ring() takes it.
        places: where the ranks are, by rank; None asks them.
        timeout_s: for asking them.

    Raises:
        ArgumentError: no process group, a tp that does not divide, or ranks that are numbered in an
            order of which no such mesh can be made.
        TransportError: a rank did not answer in time.
    """
    hint = "Call torch.distributed.init_process_group() first."
    check(dist.is_initialized(), "group", "a default process group", "none", hint)
    device = gpu.pick_device(device, "auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # as DeviceMesh would, where the program has chosen none
    if places is None:
        mine = topology.here(device).to_record()
        every = GroupRendezvous(None, timeout_s, device).all_gather(mine)
        places = [Place.from_record(record) for record in every]
    world_size = dist.get_world_size()
    check(len(places) == world_size, "places", f"one for each of {world_size} ranks", len(places))
    return DeviceMesh(
        device.type, torch.tensor(arrange(places, tp), device="cpu"), mesh_dim_names=("cp", "tp")
    )


def arrange(places: Sequence[Place], tp: int) -> list[list[int]]:
    """Return the ranks of such a mesh, [cp][tp]: each row on one host.

    Where ranks can be grouped so, a row is of one NUMA node as well. torch numbers a group's ranks
    by their global ones: so rows and columns ascend, that a rank's number in the ring is its row,
    and its number among the heads its column.

    Raises:
        ArgumentError: tp does not divide, or no such rows and columns ascend.
    """
    ok = isinstance(tp, int) and not isinstance(tp, bool) and tp >= 1
    check(ok, "tp", "an int of at least 1", repr(tp))
    sizes = sorted(set(Counter(place.host for place in places).values()))
    even = all(size % tp == 0 for size in sizes)
    hint = "Ranks that share heads must be on one host."
    check(even, "tp", f"a divisor of the ranks on each host, {sizes}", tp, hint)
    for known in (places, [Place(place.host) for place in places]):
        order = topology.ring_order(known)
        rows = sorted(sorted(order[i : i + tp]) for i in range(0, len(order), tp))
        if all(a < b for pair in itertools.pairwise(rows) for a, b in zip(*pair, strict=True)):
            return rows
    hosts = list(dict.fromkeys(place.host for place in places))
    raise ArgumentError(
        "places: want hosts that follow one another or take turns, got ranks on hosts "
        f"{[hosts.index(place.host) for place in places]}. Start the ranks host by host."
    )


def head_range(nheads: int, nheads_k: int, tp: int, tp_rank: int) -> tuple[slice, slice]:
    """Return which query heads and which key heads a rank has, as slices of all.

    Where there are as many key heads as ranks, or more, a rank has an equal share of both. Where
    there are fewer, tp / nheads_k ranks have the same key head, and each of them an equal share of
    the query heads that belong to it: each stores and passes on K and V of its own.

    Args:
        nheads: a multiple of nheads_k and of tp.
        nheads_k: a multiple or a divisor of tp.
        tp: ranks that share the heads.
        tp_rank: 0 to tp - 1.

    Raises:
        ArgumentError: something does not divide.
    """
    for name, value in (("nheads", nheads), ("nheads_k", nheads_k), ("tp", tp)):
        check(isinstance(value, int) and value >= 1, name, "an int of at least 1", repr(value))
    check(nheads % nheads_k == 0, "nheads", f"a multiple of nheads_k = {nheads_k}", nheads)
    fits = nheads_k % tp == 0 or tp % nheads_k == 0
    check(fits, "tp", f"a divisor or a multiple of nheads_k = {nheads_k}", tp)
    check(nheads % tp == 0, "tp", f"a divisor of nheads = {nheads}", tp)
    ok = isinstance(tp_rank, int) and 0 <= tp_rank < tp
    check(ok, "tp_rank", f"0 to {tp - 1}", repr(tp_rank))
    count, count_k = nheads // tp, max(1, nheads_k // tp)
    first, first_k = tp_rank * count, tp_rank * nheads_k // tp
    return slice(first, first + count), slice(first_k, first_k + count_k)
