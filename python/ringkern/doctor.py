"""ringkern doctor: what this machine has, what a ring here would use, and why."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from typing import NamedTuple

import ringkern
from ringkern import env, topology
from ringkern.errors import RingkernError
from ringkern.kernels import configs

SYSFS, SYSCTL = pathlib.Path("/sys"), pathlib.Path("/proc/sys/net")
# PCI vendors for whose network cards NCCL takes several threads and sockets by itself.
KNOWN_TO_NCCL = {"0x1d0f": "ENA", "0x1ae0": "gVNIC"}
FAST_MBIT = 10_000  # from here on one socket is not enough
NCCL_WITH_TLS = 23200


class Library(NamedTuple):
    """What came of looking for a library: its path and version, or why there is none."""

    path: str = ""
    version: int = 0
    trouble: str = ""


class Gpu(NamedTuple):
    """A GPU that torch sees."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    place: topology.Place


def report(sysfs: pathlib.Path = SYSFS) -> dict[str, dict[str, object]]:
    """Return findings by section and name; JSON-able. sysfs: where the kernel tells of devices."""
    interfaces, gpus = _interfaces(), _gpus(sysfs)
    driver, nccl = _find("cuda_driver"), _nccl()
    unfit = nccl_warnings(interfaces, os.environ, sysfs) if gpus else {}
    return {
        "ringkern": _ringkern(),
        "network": _network(interfaces, sysfs),
        "packages": _packages(),
        "gpu": _gpu(driver, nccl, gpus),
        "a ring here": _choice(interfaces, nccl, gpus),
        "protection": _protection(nccl),
        "warnings": unfit or {"none": "no setting of NCCL is known to be wrong here"},
        "environment": {
            name: os.environ.get(name, "not set")
            if "SECRET" not in name
            else ("set" if name in os.environ else "not set")
            for name in env.VARIABLES
        },
    }


# ---- what there is


def _ringkern():
    found = {
        "version": ringkern.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    try:
        from ringkern import _C

        found["extension"] = _C.__file__
    except ImportError as error:
        found["extension"] = f"missing: {error}. Build it: pip install ringkern"
    return found


def _interfaces():
    try:
        from ringkern import _C
    except ImportError:
        return []
    return _C.interfaces()


def _network(interfaces, sysfs):
    found: dict[str, str] = {}
    for name, address, is_up, is_loopback in interfaces:
        kind = "loopback" if is_loopback else _speed(name, sysfs)
        state = kind if is_up else f"{kind}, down"
        addresses = found.get(f"interface {name}", "").removesuffix(f" ({state})")
        found[f"interface {name}"] = f"{addresses} {address} ({state})".lstrip()
    found["RDMA"] = ", ".join(_rdma(sysfs)) or "none in /sys/class/infiniband"
    for name, path in (
        ("congestion control", "ipv4/tcp_congestion_control"),
        ("available", "ipv4/tcp_available_congestion_control"),
        ("largest send buffer", "core/wmem_max"),
        ("largest receive buffer", "core/rmem_max"),
        ("send autotuning (min default max)", "ipv4/tcp_wmem"),
        ("receive autotuning (min default max)", "ipv4/tcp_rmem"),
    ):
        found[name] = _read(SYSCTL / path)
    return found


def _packages():
    found = {}
    for name in ("torch", "numpy", "triton"):
        spec = importlib.util.find_spec(name)
        where = f"{importlib.metadata.version(name)} at {spec.origin}" if spec else "not installed"
        found[name] = where
    return found


def _find(function: str, *args) -> Library:
    """Return what a function of the extension found that looks for a library."""
    try:
        from ringkern import _C

        return Library(*getattr(_C, function)(*args))
    except (ImportError, AttributeError, RingkernError) as error:
        return Library(trouble=str(error))


def _nccl() -> Library:
    """Return the NCCL that a ring would use: the copy that torch has loaded, else the wheel's."""
    try:
        from ringkern import gpu
    except ImportError as error:
        return Library(trouble=f"{error}.")
    return _find("nccl_library", gpu.nccl_path())


def _gpus(sysfs) -> list[Gpu]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        facts = torch.cuda.get_device_properties(device)
        place = topology.here(device, sysfs)
        found.append(Gpu(facts.name, (facts.major, facts.minor), facts.total_memory, place))
    return found


def _gpu(driver, nccl, gpus):
    cuda = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10} at {driver.path}"
    found = {
        "CUDA driver": f"none: {driver.trouble}" if driver.trouble else cuda,
        "NCCL": f"{_nccl_version(nccl)} at {nccl.path}" if nccl.path else f"none: {nccl.trouble}",
    }
    for index, gpu in enumerate(gpus):
        place = gpu.place
        node = "unknown" if place.numa is None else place.numa
        found[f"GPU {index}"] = (
            f"{gpu.name}, capability {_dotted(gpu.capability)}, {gpu.memory / 2**30:.0f} GiB, "
            f"PCI {place.pci or 'unknown'}, NUMA node {node}, {place.gpu}"
        )
    for major, minor in sorted({gpu.capability for gpu in gpus if gpu.capability >= (8, 0)}):
        for kernel in ("step", "decode", "merge"):
            line = configs.explain(kernel, 10 * major + minor, 128, 128, "bfloat16")
            found[f"{kernel} kernel, capability {major}.{minor}"] = line
    if not gpus:
        found["GPUs"] = "none that torch sees"
    return found


# ---- what a ring would do


def _choice(interfaces, nccl, gpus):
    """Return what init_ring() would do here, by the rules that it follows."""
    where = os.environ.get("MASTER_ADDR", "not set: give init_ring() a group, or use torchrun")
    found = {}
    for name, choose in (
        ("device", lambda: _device(gpus)),
        ("transport", lambda: _transport(nccl)),
        ("backend", lambda: _backend(gpus)),
        ("ring order", lambda: _order(gpus)),
        ("MASTER_ADDR", lambda: where),
        ("listens on", lambda: f"{env.listen_host(interfaces, True)} ({_listen_reason()})"),
        ("congestion control within this host", _congestion_control),
        ("lanes", env.lanes),
        ("checksum", lambda: env.flag("RINGKERN_CHECKSUM")),
    ):
        try:
            found[name] = choose()
        except (ImportError, RingkernError) as error:
            found[name] = f"nothing: {error}"
    return found


def _own_device():
    from ringkern import gpu

    return gpu.pick_device(None, "auto")


def _device(gpus) -> str:
    device = _own_device()
    if os.environ.get("RINGKERN_DEVICE"):
        return f"{device}: RINGKERN_DEVICE says so"
    if not gpus:
        return f"{device}: torch finds no CUDA here"
    return f"{device}: the GPU of torch.cuda.set_device(), else number LOCAL_RANK"


def _transport(nccl) -> str:
    if _own_device().type == "cpu":
        return "tcp: tensors are on the CPU"
    if nccl.trouble:
        return f"tcp, by way of host memory: {nccl.trouble}"
    return f"nccl {_nccl_version(nccl)}, if every rank has that version and a GPU of its own"


def _backend(gpus) -> str:
    from ringkern import backend

    device, asked = _own_device(), env.backend()
    if asked != "auto":
        return f"{backend.pick_backend(asked, device)}: RINGKERN_BACKEND says so"
    if device.type == "cpu":
        return "torch: tensors are on the CPU"
    reason = backend.why_not_triton(device, 1, "float32")
    capability = _dotted(gpus[device.index].capability)
    return f"torch: {reason}" if reason else f"triton: a GPU of capability {capability}"


def _order(gpus) -> str:
    if not gpus:
        return "hosts by their lowest rank, and by rank within each"
    places = [gpu.place for gpu in gpus]
    line = topology.describe(places, topology.ring_order(places))
    return f"hosts by their lowest rank; of GPUs here {line}"


def _congestion_control() -> str:
    cubic = "cubic" in _read(SYSCTL / "ipv4/tcp_available_congestion_control")
    return "cubic: faster on loopback than a pacing one" if cubic else "the system's: no cubic here"


def _listen_reason() -> str:
    for name in ("RINGKERN_HOST", "RINGKERN_IFNAME"):
        if name in os.environ:
            return f"{name} says so"
    if "MASTER_ADDR" in os.environ:
        return "it routes to MASTER_ADDR"
    return "as long as all ranks are on this host; else set RINGKERN_HOST or RINGKERN_IFNAME"


# ---- who can read or change what is under way, and what is tuned badly


def _protection(nccl) -> dict[str, str]:
    """Return what protects the data, by path."""
    given = {"RINGKERN_SECRET", "RINGKERN_SECRET_FILE"} & set(os.environ)
    secret = "given" if given else "drawn by rank 0 and shared over the rendezvous"
    tls = "needs NCCL 2.32 or later that was built with TLS, and then covers its sockets alone. "
    tls += "That ncclSetEncryption() succeeds proves nothing: it does without TLS as well"
    if not nccl.trouble and nccl.version < NCCL_WITH_TLS:
        tls = f"none in {_nccl_version(nccl)}: it {tls}"
    return {
        "TCP, who may connect": f"ranks that prove the secret by HMAC-SHA256; it is {secret}",
        "TCP, data": "not encrypted; RINGKERN_CHECKSUM=1 finds accidents, not attackers",
        "NCCL, who may connect": "ringkern checks nobody there: isolate its network",
        "NCCL, data": "not encrypted by ringkern, over any of its paths",
        "NCCL, encryption of its own": tls,
    }


def nccl_warnings(interfaces, environ, sysfs: pathlib.Path = SYSFS) -> dict[str, str]:
    """Return what to set so that NCCL suits this host's network, by variable.

    Args:
        interfaces: (name, address, is up, is loopback), as the extension lists them.
        environ: variables that are set.
        sysfs: where the kernel tells of devices.
    """
    found = {}
    names = {name for name, _, is_up, is_loopback in interfaces if is_up and not is_loopback}
    names = sorted(name for name in names if not name.startswith("docker"))  # as NCCL does
    if len(names) > 1 and "NCCL_SOCKET_IFNAME" not in environ:
        found["NCCL_SOCKET_IFNAME"] = (
            f"not set, and {', '.join(names)} are up: NCCL may take one that the other hosts do "
            "not reach, or a slow one. Name the right one, alike on all hosts."
        )
    plain = [name for name in names if _is_fast(name, sysfs) and not _is_known(name, sysfs)]
    tuned = {"NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD"} & set(environ)
    if plain and not tuned and not _rdma(sysfs):
        speeds = ", ".join(f"{name}: {_speed(name, sysfs)}" for name in plain)
        found["NCCL_SOCKET_NTHREADS"] = (
            f"not set, nor NCCL_NSOCKS_PERTHREAD, on plain Ethernet ({speeds}): NCCL then sends by "
            "one thread over one socket. Try 4 for both; their product may be 64."
        )
    return found


def _rdma(sysfs) -> list[str]:
    folder = sysfs / "class/infiniband"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _is_fast(interface: str, sysfs) -> bool:
    speed = _read(sysfs / "class/net" / interface / "speed")
    return speed.isdigit() and int(speed) >= FAST_MBIT


def _is_known(interface: str, sysfs) -> bool:
    return _read(sysfs / "class/net" / interface / "device/vendor") in KNOWN_TO_NCCL


def _speed(interface: str, sysfs) -> str:
    speed = _read(sysfs / "class/net" / interface / "speed")
    return f"{speed} Mb/s" if speed.isdigit() else "speed unknown"


def _read(path: pathlib.Path) -> str:
    try:
        return " ".join(path.read_text().split())
    except OSError:
        return "unknown"


def _nccl_version(nccl: Library) -> str:
    return _dotted((nccl.version // 10000, nccl.version % 10000 // 100, nccl.version % 100))


def _dotted(numbers) -> str:
    return ".".join(map(str, numbers))
