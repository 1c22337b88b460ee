"""The environment: every RINGKERN_* variable, and what this machine is.

Precedence everywhere: argument, then variable, then default.
"""

import ipaddress
import os
import pathlib
import socket

from ringkern.errors import ArgumentError, check

# name -> what it does. doctor prints this list; the README repeats it.
VARIABLES = {
    "RINGKERN_SECRET": "the ring's shared secret, at least 32 bytes of text",
    "RINGKERN_SECRET_FILE": "a file that holds the secret",
    "RINGKERN_HOST": "numeric address to listen on; default: the one that routes to MASTER_ADDR",
    "RINGKERN_IFNAME": "network interface to listen on, by name",
    "RINGKERN_LANES": "TCP connections per peer that share the data, 1 to 16; default 1",
    "RINGKERN_CHECKSUM": "1: check every payload by CRC32C",
    "RINGKERN_NCCL_PATH": "the NCCL library to load where the process has none loaded",
    "RINGKERN_NCCL_MIN_CTAS": "thread blocks that NCCL takes of a GPU at least; default 0: its own",
    "RINGKERN_NCCL_MAX_CTAS": "thread blocks that NCCL takes of a GPU at most; default 0: its own",
    "RINGKERN_NCCL_CHANNELS": "NCCL's channels to a peer on another host; default 0: its own",
    "RINGKERN_PROFILE": "a file that `ringkern calibrate` wrote, for the choice of method",
    "RINGKERN_DEVICE": "the device of rings that name none: cpu, cuda, cuda:1",
    "RINGKERN_BACKEND": "auto, triton or torch: what computes where a call says auto; default auto",
    "RINGKERN_NUM_SPLITS": "parts that Triton kernels split keys into, the same on every GPU, 1 to 32; "
    "default: as many as fill it",
    "RINGKERN_CHECK": "1: compare the arguments of every call between ranks first",
    "RINGKERN_TRACE": "a file for rank 0 to write a trace of all ranks to, when the ring closes",
}
MIN_SECRET = 32


def flag(name: str) -> bool:
    """Return whether a 0/1 variable is set to 1."""
    value = os.environ.get(name, "0")
    check(value in ("0", "1"), name, "0 or 1", repr(value))
    return value == "1"


def lanes() -> int:
    """Return RINGKERN_LANES, 1 to 16."""
    return whole("RINGKERN_LANES", 16, least=1)


def num_splits() -> int:
    """Return RINGKERN_NUM_SPLITS, 1 to 128; 0 if it is not set."""
    name = "RINGKERN_NUM_SPLITS"
    return whole(name, 128, least=1) if name in os.environ else 0


def whole(name: str, most: int, least: int = 0) -> int:
    """Return a variable that is a whole number from least to most; least if it is not set."""
    value = os.environ.get(name, str(least))
    ok = value.isascii() and value.isdigit() and least <= int(value) <= most
    check(ok, name, f"{least} to {most}", repr(value))
    return int(value)


def backend() -> str:
    """Return RINGKERN_BACKEND: "auto", "triton" or "torch"."""
    value = os.environ.get("RINGKERN_BACKEND", "auto")
    ok = value in ("auto", "triton", "torch")
    check(ok, "RINGKERN_BACKEND", "auto, triton or torch", repr(value))
    return value


def trace() -> str | None:
    """Return RINGKERN_TRACE as an absolute path that could be written to; None if it is not set.

    Every rank checks: a ring that fails leaves a part of the trace on each.
    """
    path = os.environ.get("RINGKERN_TRACE")
    if not path:
        return None
    file = pathlib.Path(path).absolute()
    ok = not file.is_dir() and file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)
    check(ok, "RINGKERN_TRACE", "a file in a folder that can be written to", path)
    return str(file)


def secret(argument: bytes | str | None) -> bytes | None:
    """Return the secret that the user gave, by argument, variable or file; None if by none."""
    path = os.environ.get("RINGKERN_SECRET_FILE")
    if argument is not None:
        what, value = "secret", argument
    elif "RINGKERN_SECRET" in os.environ:
        what, value = "RINGKERN_SECRET", os.environ["RINGKERN_SECRET"]
    elif path is not None:
        what = "RINGKERN_SECRET_FILE"
        try:
            value = pathlib.Path(path).read_bytes().strip()
        except OSError as error:
            raise ArgumentError(f"{what}: want a readable file, got {path}: {error}") from error
    else:
        return None
    value = value.encode() if isinstance(value, str) else value
    check(isinstance(value, bytes), what, "bytes or text", type(value).__name__)
    hint = "`openssl rand -hex 32` makes one."
    check(len(value) >= MIN_SECRET, what, f"at least {MIN_SECRET} bytes", len(value), hint)
    return value


def torchrun() -> tuple[int, int, str, int]:
    """Return (rank, world_size, master address, master port) as torchrun sets them."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    check(
        not missing,
        "group",
        "a process group, a DeviceMesh or torchrun's environment",
        f"none, and {', '.join(missing)} not set",
        "Start with `torchrun --nproc-per-node N script.py`, or call "
        "torch.distributed.init_process_group() first.",
    )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        value = os.environ[name]
        check(value.isascii() and value.isdigit(), name, "a whole number", repr(value))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check(0 <= rank < world_size, "RANK", f"below WORLD_SIZE = {world_size}", rank)
    port = int(os.environ["MASTER_PORT"])
    check(0 < port < 65536, "MASTER_PORT", "1 to 65535", port)
    return rank, world_size, os.environ["MASTER_ADDR"], port


def host_id() -> str:
    """Return what tells this host (and network namespace) from another."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    net = pathlib.Path("/proc/self/ns/net")
    boot_id = boot.read_text().strip() if boot.exists() else ""
    return f"{socket.gethostname()}/{boot_id}/{os.readlink(net) if net.exists() else ''}"


def route_to(host: str) -> str:
    """Return the numeric address of the interface that routes to host. Sends nothing."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise ArgumentError(
            f"MASTER_ADDR: want a host that this one can route to, got {host!r}: {error}. "
            "Set RINGKERN_HOST or RINGKERN_IFNAME."
        ) from error


def is_loopback(address: str) -> bool:
    """Return whether "host:port" is on the loopback interface."""
    return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback


def listen_host(interfaces: list[tuple[str, str, bool, bool]], one_host: bool) -> str:
    """Return the one address to listen on: never a wildcard, refused where it is ambiguous.

    Args:
        interfaces: (name, address, is up, is loopback), as the extension lists them.
        one_host: all ranks run on this host.
    """
    if "RINGKERN_HOST" in os.environ:
        host = os.environ["RINGKERN_HOST"]
        hint = "A wildcard would listen on every interface; `ringkern doctor` lists them."
        check(host not in ("", "0.0.0.0", "::"), "RINGKERN_HOST", "one address", repr(host), hint)
        return host
    name = os.environ.get("RINGKERN_IFNAME")
    if name is not None:
        up = [(n, a) for n, a, is_up, _ in interfaces if is_up]
        mine = [a for n, a in up if n == name and not a.startswith("fe80:")]
        mine = [a for a in mine if ":" not in a] or mine  # IPv4 where the interface has both
        names = ", ".join(sorted({n for n, _ in up}))
        check(bool(mine), "RINGKERN_IFNAME", f"an interface that is up ({names})", name)
        check(
            len(mine) == 1,
            "RINGKERN_IFNAME",
            "an interface with one address",
            f"{name} with {', '.join(mine)}",
            "Set RINGKERN_HOST to one of them.",
        )
        return mine[0]
    if "MASTER_ADDR" in os.environ:
        return route_to(os.environ["MASTER_ADDR"])
    check(
        one_host,
        "RINGKERN_HOST",
        "an address to listen on, as the ranks are on several hosts",
        "none, and no MASTER_ADDR to route to",
        "Set RINGKERN_HOST or RINGKERN_IFNAME.",
    )
    return "127.0.0.1"
