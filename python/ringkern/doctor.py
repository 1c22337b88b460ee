"""ringkern doctor: what this machine has, what a ring here would use, and why."""

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import platform

import ringkern
from ringkern import env
from ringkern.errors import RingkernError

SYSCTL = pathlib.Path("/proc/sys/net")


def report() -> dict[str, dict[str, object]]:
    """Return findings by section and name; JSON-able."""
    return {
        "ringkern": _ringkern(),
        "network": _network(),
        "packages": _packages(),
        "gpu": _gpu(),
        "a ring here": _choice(),
        "environment": {
            name: os.environ.get(name, "not set")
            if "SECRET" not in name
            else ("set" if name in os.environ else "not set")
            for name in env.VARIABLES
        },
    }


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


def _network():
    found: dict[str, str] = {}
    for name, address, is_up, is_loopback in _interfaces():
        kind = "loopback" if is_loopback else _speed(name)
        state = kind if is_up else f"{kind}, down"
        addresses = found.get(f"interface {name}", "").removesuffix(f" ({state})")
        found[f"interface {name}"] = f"{addresses} {address} ({state})".lstrip()
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


def _gpu():
    found = {"CUDA driver": "not found (libcuda.so.1)"}
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        cuda.cuDriverGetVersion(ctypes.byref(version))
        found["CUDA driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    except OSError:
        pass
    wheels = [
        f"{dist.version} at {dist.locate_file('nvidia/nccl/lib/libnccl.so.2')}"
        for dist in importlib.metadata.distributions()
        if (dist.metadata["Name"] or "").startswith("nvidia-nccl")
    ]
    found["NCCL"] = "; ".join(wheels) or "not found (no nvidia-nccl wheel)"
    return found


def _choice():
    """Return what init_ring() would do here, by the rules that it follows."""
    where = os.environ.get("MASTER_ADDR", "not set: give init_ring() a group, or use torchrun")
    found = {
        "transport": "tcp: this version moves CPU tensors only",
        "backend": "torch on the CPU: this version has no GPU kernels",
        "MASTER_ADDR": where,
    }
    try:
        host = env.listen_host(_interfaces(), one_host=True)
        found["listens on"] = f"{host} ({_listen_reason()})"
    except RingkernError as error:
        found["listens on"] = f"nothing: {error}"
    cubic = "cubic" in str(_read(SYSCTL / "ipv4/tcp_available_congestion_control"))
    found["congestion control within this host"] = (
        "cubic: faster on loopback than a pacing one" if cubic else "the system's: no cubic here"
    )
    try:
        found["lanes"], found["checksum"] = env.lanes(), env.flag("RINGKERN_CHECKSUM")
    except RingkernError as error:
        found["lanes, checksum"] = f"nothing: {error}"
    return found


def _listen_reason() -> str:
    for name in ("RINGKERN_HOST", "RINGKERN_IFNAME"):
        if name in os.environ:
            return f"{name} says so"
    if "MASTER_ADDR" in os.environ:
        return "it routes to MASTER_ADDR"
    return "as long as all ranks are on this host; else set RINGKERN_HOST or RINGKERN_IFNAME"


def _speed(interface: str) -> str:
    speed = _read(pathlib.Path("/sys/class/net") / interface / "speed")
    return f"{speed} Mb/s" if str(speed).isdigit() else "speed unknown"


def _read(path: pathlib.Path) -> str:
    try:
        return " ".join(path.read_text().split())
    except OSError:
        return "unknown"
