"""What a benchmark ran on: the machine, and the versions of what was measured."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import subprocess

import ringkern

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Variables that change what is measured. A list, so that no secret and no path gets into a record.
VARIABLES = ("RINGKERN_LANES", "RINGKERN_CHECKSUM", "RINGKERN_CHECK", "GLOO_SOCKET_IFNAME")
VARIABLES += ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "MKL_NUM_THREADS")
VARIABLES += ("ATEN_CPU_CAPABILITY", "MALLOC_ARENA_MAX")


def describe() -> dict:
    """Return what decides a measurement here, and how busy the machine is now."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "congestion_control": _sysctl("net/ipv4/tcp_congestion_control"),
        "tcp_rmem": _sysctl("net/ipv4/tcp_rmem"),
        "tcp_wmem": _sysctl("net/ipv4/tcp_wmem"),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def versions() -> dict:
    """Return the version of everything that is measured, ringkern's with its commit."""
    names = ("torch", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"ringkern": f"{ringkern.__version__}+{_commit()}", **found} | {
        "python": platform.python_version()
    }


def environment() -> dict:
    """Return the variables of VARIABLES that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def host() -> str:
    """Return a short hash of the host name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def name() -> str:
    """Return what this kind of machine is called in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", f"{_cpu()} {os.cpu_count()}c".lower()).strip("-")


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _sysctl(path: str) -> str | None:
    file = pathlib.Path("/proc/sys") / path
    return " ".join(file.read_text().split()) if file.exists() else None


def _commit() -> str:
    """Return gSHA, with .dirty where files differ from it: code, not records or README."""
    if not pathlib.Path(ringkern.__file__).is_relative_to(ROOT):
        return "installed"  # not what this checkout holds
    sha = _git("rev-parse", "--short=10", "HEAD")
    if not sha:
        return "unknown.dirty"
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    return f"g{sha}.dirty" if changed else f"g{sha}"


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
