"""Where ranks run, and the order round the ring that puts neighbours on fast links."""

import dataclasses
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ringkern.errors import ProtocolError
from ringkern.join import host_hash

SYSFS = pathlib.Path("/sys")
LINKS = ("one GPU", "one NUMA node", "one host", "two hosts")  # what two ranks lie on, best first
_PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_SHOWN = 16  # ranks of an order that is printed


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        host: tells hosts apart.
        numa: the NUMA node that its GPU is on; None where the system does not say.
        pci: its GPU's address, as "0000:19:00.0"; None where it is not known.
        gpu: tells GPUs apart; None for a rank on the CPU.
    """

    host: str
    numa: int | None = None
    pci: str | None = None
    gpu: str | None = None

    def to_record(self) -> dict:
        """Return what another rank makes the same Place of; JSON-able, below 200 bytes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict) -> "Place":
        """Return the Place of a rank that published this record, in which there may be more.

        Raises:
            ProtocolError: it is none of a Place.
        """
        host, numa, pci, gpu = (record.get(field.name) for field in dataclasses.fields(cls))
        ok = isinstance(host, str) and isinstance(numa, int | None)
        ok = ok and isinstance(gpu, str | None)
        if not ok or not (pci is None or isinstance(pci, str) and _PCI.fullmatch(pci)):
            raise ProtocolError(f"a rank published a place that is none: {record}"[:500])
        return cls(host, numa, pci, gpu)


def here(device, sysfs: pathlib.Path = SYSFS) -> Place:
    """Return where this process runs with a torch.device.

    sysfs: where the kernel says on which NUMA node a GPU is.
    """
    if device.type != "cuda":
        return Place(host_hash())
    import torch  # here, so that planning needs none

    found = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    numbers = [getattr(found, name, None) for name in names]
    pci = None if None in numbers else "{:04x}:{:02x}:{:02x}.0".format(*numbers)
    return Place(host_hash(), _numa_node(pci, sysfs), pci, str(found.uuid))


def _numa_node(pci: str | None, sysfs: pathlib.Path) -> int | None:
    """Return the NUMA node of a PCI device; None where the system does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / str(pci) / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: none, as on most machines with one


def ring_order(places: Sequence[Place]) -> tuple[int, ...]:
    """Return the ranks in the order in which a ring goes round, the same on every rank.

    By host, and on one host by NUMA node, there by PCI address, then by rank. Hosts come in the
    order of their lowest ranks, and so do the nodes of a host: ranks that are grouped so, or of
    which nothing is known, stay as they are. The ring leaves each host once.
    """
    first: dict = {}
    for rank, place in enumerate(places):
        first.setdefault(place.host, rank)
        first.setdefault((place.host, place.numa), rank)

    def key(rank):
        place = places[rank]
        address = [int(part, 16) for part in re.split("[:.]", place.pci or "") if part]
        return first[place.host], first[place.host, place.numa], address, rank

    return tuple(sorted(range(len(places)), key=key))


def link(one: Place, other: Place) -> str:
    """Return which of LINKS the two lie on."""
    if one.host != other.host:
        return "two hosts"
    if one.gpu is not None and one.gpu == other.gpu:
        return "one GPU"
    return "one NUMA node" if one.numa is not None and one.numa == other.numa else "one host"


def links(places: Sequence[Place], order: Sequence[int]) -> list[str]:
    """Return the link from each rank of the order to the next, the last one's to the first."""
    ranks = [*order, order[0]] if len(order) > 1 else order
    return [link(places[a], places[b]) for a, b in itertools.pairwise(ranks)]


def crossings(places: Sequence[Place], order: Sequence[int]) -> int:
    """Return how many links of the ring are between two hosts."""
    return links(places, order).count("two hosts")


def shared_gpus(places: Sequence[Place]) -> list[list[int]]:
    """Return the ranks of each GPU that several ranks claim, also out of different containers."""
    owners: dict = {}
    for rank, place in enumerate(places):
        if place.gpu is not None:
            owners.setdefault(place.gpu, []).append(rank)
    return [ranks for ranks in owners.values() if len(ranks) > 1]


def describe(places: Sequence[Place], order: Sequence[int]) -> str:
    """Return a line: the order, and what its neighbours lie on."""
    shown = " ".join(map(str, order[:_SHOWN]))
    more = f" and {len(order) - _SHOWN} more" if len(order) > _SHOWN else ""
    counts = Counter(links(places, order))
    told = ", ".join(f"{name}: {counts[name]}" for name in LINKS if counts[name])
    return f"{shown}{more}; neighbours on {told}" if told else f"{shown}{more}"
