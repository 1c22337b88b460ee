"""Where ranks run, and the order round the ring that follows from it."""

import itertools
import json
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import topology
from ringkern.errors import ProtocolError
from ringkern.join import host_hash
from ringkern.topology import Place, crossings, ring_order


def gpu_place(host, numa, slot):
    """Return the place of GPU number `slot` of a host."""
    return Place(f"host {host}", numa, f"0000:{slot:02x}:00.0", f"GPU-{host}-{slot}")


PLACE = st.builds(gpu_place, st.integers(0, 3), st.sampled_from([None, 0, 1]), st.integers(1, 9))
PLACES = st.lists(PLACE, min_size=1, max_size=12)


def is_grouped(keys):
    """Return whether equal keys are next to each other."""
    return len([key for key, _ in itertools.groupby(keys)]) == len(set(keys))


@given(PLACES)
def test_every_group_of_ranks_is_one_stretch_of_the_ring(places):
    order = ring_order(places)
    assert sorted(order) == list(range(len(places)))
    ordered = [places[rank] for rank in order]
    assert is_grouped([place.host for place in ordered])
    assert is_grouped([(place.host, place.numa) for place in ordered])
    for _, near in itertools.groupby(order, lambda rank: (places[rank].host, places[rank].numa)):
        near = list(near)
        assert near == sorted(near, key=lambda rank: (places[rank].pci, rank))


@given(PLACES)
def test_the_ring_leaves_each_host_once(places):
    """Less is not possible: a way round that comes to all hosts leaves each of them."""
    hosts = {place.host for place in places}
    assert crossings(places, ring_order(places)) == (len(hosts) if len(hosts) > 1 else 0)


@given(st.lists(PLACE, min_size=1, max_size=6))
@settings(max_examples=40)
def test_no_order_crosses_less(places):
    orders = itertools.permutations(range(len(places)))
    assert crossings(places, ring_order(places)) == min(crossings(places, o) for o in orders)


@pytest.mark.parametrize(
    "places",
    [
        [Place("a")] * 8,
        [Place("a")] * 3 + [Place("b")] * 3,
        [gpu_place(host, numa, slot) for host, numa, slot in
         [(1, 1, 1), (1, 1, 2), (1, 0, 3), (1, 0, 4), (0, 0, 1), (0, None, 2)]],
    ],
    ids=["CPU", "CPU, two hosts", "grouped"],
)  # fmt: skip
def test_ranks_that_are_grouped_stay_as_they_are(places):
    assert ring_order(places) == tuple(range(len(places)))


@pytest.mark.parametrize(
    "places, want",
    [
        ([Place(host) for host in "abab"], (0, 2, 1, 3)),
        ([Place(host) for host in "babac"], (0, 2, 1, 3, 4)),
        ([gpu_place(0, numa, 1 + slot) for slot, numa in enumerate([0, 1, 0, 1])], (0, 2, 1, 3)),
        ([gpu_place(0, 0, slot) for slot in (3, 1, 2)], (1, 2, 0)),
        ([gpu_place(0, None, 1), gpu_place(1, None, 1), gpu_place(0, None, 1)], (0, 2, 1)),
    ],
    ids=["turns", "lowest rank first", "NUMA", "PCI", "one GPU"],
)
def test_orders(places, want):
    assert ring_order(places) == want


def test_pci_addresses_are_numbers():
    places = [Place("a", 0, pci, pci) for pci in ("10000:01:00.0", "ffff:02:00.0", "0000:a0:00.0")]
    assert ring_order(places) == (2, 1, 0)


@given(PLACES)
def test_the_line_counts_every_link(places):
    order = ring_order(places)
    links = topology.links(places, order)
    assert len(links) == (len(places) if len(places) > 1 else 0)
    line = topology.describe(places, order)
    for name in topology.LINKS:
        count = links.count(name)
        assert (f"{name}: {count}" in line) == (count > 0)


def test_the_line():
    places = [gpu_place(0, 0, 1), gpu_place(1, 0, 1), gpu_place(0, 0, 2), gpu_place(0, 1, 3)]
    want = "0 2 3 1; neighbours on one NUMA node: 1, one host: 1, two hosts: 2"
    assert topology.describe(places, ring_order(places)) == want
    assert topology.describe([Place("a")], (0,)) == "0"
    many = [Place("a")] * 100
    assert "15 and 84 more; neighbours on one host: 100" in topology.describe(many, range(100))


def test_gpus_that_several_ranks_claim():
    mine, other = gpu_place(0, 0, 1), gpu_place(0, 0, 2)
    assert topology.shared_gpus([mine, other, mine, other, mine]) == [[0, 2, 4], [1, 3]]
    assert topology.shared_gpus([mine, other, gpu_place(1, 0, 1), Place("host 0")]) == []
    assert topology.shared_gpus([Place("host 0")] * 2) == []
    assert topology.link(mine, mine) == "one GPU"


@given(PLACES)
def test_a_place_travels_as_a_record(places):
    for place in [*places, Place("a" * 32)]:
        record = json.loads(json.dumps(place.to_record()))
        assert Place.from_record(record | {"rank": 3}) == place
        assert len(json.dumps(record)) < 200


@pytest.mark.parametrize(
    "change",
    [{"host": None}, {"host": 3}, {"numa": "0"}, {"numa": 0.5}, {"pci": "0"}, {"pci": 7},
     {"gpu": []}],
)  # fmt: skip
def test_a_record_that_is_no_place(change):
    with pytest.raises(ProtocolError, match="published a place that is none"):
        Place.from_record(Place("a", 0, "0000:19:00.0", "x").to_record() | change)


def pretend_gpu(monkeypatch, **facts):
    found = types.SimpleNamespace(uuid="GPU-7", **facts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.parametrize(
    "written, want", [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)]
)
def test_the_place_of_a_gpu(monkeypatch, tmp_path, written, want):
    pretend_gpu(monkeypatch, pci_domain_id=0, pci_bus_id=0xCB, pci_device_id=1)
    folder = tmp_path / "bus/pci/devices/0000:cb:01.0"
    folder.mkdir(parents=True)
    if written is not None:
        (folder / "numa_node").write_text(written)
    place = topology.here(torch.device("cuda", 0), tmp_path)
    assert place == Place(host_hash(), want, "0000:cb:01.0", "GPU-7")
    assert Place.from_record(place.to_record()) == place


def test_a_torch_that_does_not_say_where_a_gpu_is(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch, pci_bus_id=3)
    assert topology.here(torch.device("cuda", 0), tmp_path) == Place(host_hash(), gpu="GPU-7")


def test_a_rank_on_the_cpu_has_its_host_alone():
    assert topology.here(torch.device("cpu")) == Place(host_hash())


def test_needs_no_torch():
    code = "import sys, ringkern.topology; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
