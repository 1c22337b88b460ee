"""What the doctor finds, on machines that are made up."""

import types

import pytest
import torch
from ringkern import doctor, gpu
from ringkern.doctor import Library
from ringkern.kernels import configs

ETH = ("eth0", "10.0.0.1", True, False)
LO = ("lo", "127.0.0.1", True, True)


def make_sysfs(root, interfaces=(), rdma=(), gpus=()):
    """Write what the kernel tells of devices.

    Args:
        interfaces: (name, speed in Mbit/s or None, PCI vendor or None).
        rdma: names of RDMA devices.
        gpus: (PCI address, NUMA node).
    """
    for name, speed, vendor in interfaces:
        folder = root / "class/net" / name
        folder.mkdir(parents=True)
        if speed is not None:
            (folder / "speed").write_text(f"{speed}\n")
        if vendor:
            (folder / "device").mkdir()
            (folder / "device/vendor").write_text(f"{vendor}\n")
    for name in rdma:
        (root / "class/infiniband" / name).mkdir(parents=True)
    for address, node in gpus:
        folder = root / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return root


@pytest.fixture
def no_variables(monkeypatch):
    names = "RINGKERN_DEVICE RINGKERN_BACKEND RINGKERN_SECRET RINGKERN_SECRET_FILE LOCAL_RANK"
    names += " NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD MASTER_ADDR"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch, no_variables, tmp_path):
    """A host with four GPUs, two on each NUMA node in turn, a driver, NCCL and plain Ethernet."""
    slots = [(f"0000:{0x10 + i:02x}:00.0", i % 2) for i in range(4)]
    facts = [
        types.SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, total_memory=139 << 30, uuid=f"GPU-{i}",
            pci_domain_id=0, pci_bus_id=0x10 + i, pci_device_id=0,
        )
        for i in range(4)
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts[device.index])
    libraries = {
        "cuda_driver": Library("/usr/lib/libcuda.so.1", 13010),
        "nccl_library": Library("/opt/libnccl.so.2", 22809),
    }
    monkeypatch.setattr(doctor, "_find", lambda name, *_: libraries[name])
    monkeypatch.setattr(doctor, "_interfaces", lambda: [LO, ETH])
    make_sysfs(tmp_path, [("eth0", 100000, "0x15b3")], gpus=slots)
    return types.SimpleNamespace(sysfs=tmp_path, libraries=libraries)


def test_a_host_of_gpus(machine):
    found = doctor.report(machine.sysfs)
    assert found["network"]["interface eth0"] == "10.0.0.1 (100000 Mb/s)"
    assert found["network"]["RDMA"].startswith("none")
    assert found["gpu"]["CUDA driver"] == "CUDA 13.1 at /usr/lib/libcuda.so.1"
    assert found["gpu"]["NCCL"] == "2.28.9 at /opt/libnccl.so.2"
    want = "NVIDIA H200, capability 9.0, 139 GiB, PCI 0000:13:00.0, NUMA node 1, GPU-3"
    assert found["gpu"]["GPU 3"] == want and "GPU 4" not in found["gpu"]
    for kernel in ("step", "decode", "merge"):
        line = found["gpu"][f"{kernel} kernel, capability 9.0"]
        assert line == configs.explain(kernel, 90, 128, 128, "bfloat16")
    ring = found["a ring here"]
    assert ring["device"].startswith("cuda:0: ") and "LOCAL_RANK" in ring["device"]
    assert ring["transport"].startswith("nccl 2.28.9, if every rank")
    assert ring["backend"] == "triton: a GPU of capability 9.0"
    assert ring["ring order"].endswith("0 2 1 3; neighbours on one NUMA node: 2, one host: 2")
    assert set(found["warnings"]) == {"NCCL_SOCKET_NTHREADS"}


def test_what_the_choice_of_a_ring_depends_on(machine, monkeypatch):
    def choice():
        return doctor.report(machine.sysfs)["a ring here"]

    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choice()["device"].startswith("cuda:2")
    monkeypatch.setenv("RINGKERN_BACKEND", "torch")
    assert choice()["backend"] == "torch: RINGKERN_BACKEND says so"
    monkeypatch.setenv("RINGKERN_DEVICE", "cpu")
    assert choice()["device"] == "cpu: RINGKERN_DEVICE says so"
    assert choice()["transport"] == "tcp: tensors are on the CPU"
    monkeypatch.setenv("RINGKERN_DEVICE", "cuda:9")
    assert choice()["transport"].startswith("nothing: device: want a GPU from 0 to 3, got cuda:9")
    monkeypatch.delenv("RINGKERN_DEVICE")
    machine.libraries["nccl_library"] = Library(trouble="libnccl: none at all.")
    assert choice()["transport"] == "tcp, by way of host memory: libnccl: none at all."
    assert doctor.report(machine.sysfs)["gpu"]["NCCL"] == "none: libnccl: none at all."


def test_a_gpu_that_is_too_old(machine, monkeypatch):
    from ringkern import backend

    backend.why_not_triton.cache_clear()
    monkeypatch.setattr("ringkern.kernels.target.INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = doctor.report(machine.sysfs)["a ring here"]["backend"]
    backend.why_not_triton.cache_clear()
    assert found.startswith("torch: want compute capability 8.0 or later, got 7.5")


def test_a_host_without_gpus(monkeypatch, no_variables, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_interfaces", lambda: [LO, ETH, ("eth1", "10.1.0.1", True, False)])
    none = Library(trouble="loading it: no such file.")
    monkeypatch.setattr(doctor, "_find", lambda name, *_: none)
    found = doctor.report(make_sysfs(tmp_path, [("eth0", 100000, "0x15b3")]))
    assert found["gpu"] == {
        "CUDA driver": "none: loading it: no such file.",
        "NCCL": "none: loading it: no such file.",
        "GPUs": "none that torch sees",
    }
    ring = found["a ring here"]
    assert ring["device"] == "cpu: torch finds no CUDA here"
    assert ring["transport"] == "tcp: tensors are on the CPU"
    assert ring["backend"] == "torch: tensors are on the CPU"
    assert list(found["warnings"]) == ["none"], "NCCL's settings do not matter there"


def test_libraries_are_asked_through_the_extension(monkeypatch):
    from ringkern import _C
    from ringkern.errors import UnsupportedError

    monkeypatch.setattr(_C, "cuda_driver", lambda: ("libcuda", 12080))
    assert doctor._find("cuda_driver") == Library("libcuda", 12080)
    asked = []

    def refuse(path):
        asked.append(path)
        raise UnsupportedError("libnccl: no.")

    monkeypatch.setattr(_C, "nccl_library", refuse)
    monkeypatch.setattr(gpu, "nccl_path", lambda: "the wheel's")
    assert doctor._nccl() == Library(trouble="libnccl: no.") and asked == ["the wheel's"]
    monkeypatch.delattr(_C, "cuda_driver")
    assert "cuda_driver" in doctor._find("cuda_driver").trouble


def test_what_protects_the_data(no_variables, monkeypatch):
    old = doctor._protection(Library("x", 22809))
    assert (
        "HMAC-SHA256" in old["TCP, who may connect"]
        and "drawn by rank 0" in old["TCP, who may connect"]
    )
    assert old["TCP, data"].startswith("not encrypted")
    assert "isolate its network" in old["NCCL, who may connect"]
    assert old["NCCL, encryption of its own"].startswith("none in 2.28.9")
    new = doctor._protection(Library("x", 23203))["NCCL, encryption of its own"]
    assert "built with TLS" in new and "proves nothing" in new and "none in" not in new
    monkeypatch.setenv("RINGKERN_SECRET_FILE", "secret")
    told = doctor._protection(Library(trouble="none"))
    assert "it is given" in told["TCP, who may connect"]
    assert "none in" not in told["NCCL, encryption of its own"]


DOWN = ("eth1", "10.1.0.1", False, False)
SECOND = ("eth1", "10.1.0.1", True, False)
DOCKER = ("docker0", "172.17.0.1", True, False)
IPV6 = ("eth0", "fe80::1", True, False)


@pytest.mark.parametrize(
    "interfaces, speed, vendor, rdma, environ, want",
    [
        ([LO, ETH], 100000, "0x15b3", (), {}, {"NCCL_SOCKET_NTHREADS"}),
        ([LO, ETH], 10000, None, (), {}, {"NCCL_SOCKET_NTHREADS"}),
        ([LO, ETH], 1000, "0x15b3", (), {}, set()),
        ([LO, ETH], -1, "0x15b3", (), {}, set()),
        ([LO, ETH], None, None, (), {}, set()),
        ([LO, ETH], 100000, "0x1d0f", (), {}, set()),
        ([LO, ETH], 100000, "0x1ae0", (), {}, set()),
        ([LO, ETH], 100000, "0x15b3", ["mlx5_0"], {}, set()),
        ([LO, ETH], 100000, "0x15b3", (), {"NCCL_SOCKET_NTHREADS": "4"}, set()),
        ([LO, ETH], 100000, "0x15b3", (), {"NCCL_NSOCKS_PERTHREAD": "4"}, set()),
        ([LO], 100000, "0x15b3", (), {}, set()),
        ([LO, ETH, IPV6, DOWN, DOCKER], 1000, None, (), {}, set()),
        ([LO, ETH, SECOND], 1000, None, (), {}, {"NCCL_SOCKET_IFNAME"}),
        ([LO, ETH, SECOND], 1000, None, ["mlx5_0"], {}, {"NCCL_SOCKET_IFNAME"}),
        ([LO, ETH, SECOND], 1000, None, (), {"NCCL_SOCKET_IFNAME": "eth0"}, set()),
        ([LO, ETH, SECOND], 25000, None, (), {}, {"NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS"}),
    ],
)  # fmt: skip
def test_nccl_on_networks(tmp_path, interfaces, speed, vendor, rdma, environ, want):
    sysfs = make_sysfs(tmp_path, [("eth0", speed, vendor)], rdma)
    found = doctor.nccl_warnings(interfaces, environ, sysfs)
    assert set(found) == want
    for text in found.values():
        assert "eth0" in text and "docker0" not in text
