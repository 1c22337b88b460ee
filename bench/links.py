"""Links of a chosen rate: every rank in a network namespace of its own, all on one bridge.

A rank's interface is shaped by a token bucket (tc-tbf) both ways, so that a rank sends and receives
at most so much, whoever the peers are: what a network card does. Needs root and iproute2.
"""

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import struct
import subprocess

SUBNET = "10.231.77"
# A bucket of one packet of 0.5 ms: what it lets through at once must be little beside a message.
# But a packet larger than the bucket is cut to what a wire takes, 1500 bytes, and on fast links the
# kernel's work per packet would take the cores that the ranks compute on.
PACKET_S = 0.5e-3
LEAST_PACKET_BYTES = 1600
FRAME_BYTES = 100  # headers, which count
QUEUE_BYTES = 4 << 20  # deep enough that nothing is dropped: a receive window is smaller
SLICE_NS = 300_000
CONGESTION_CONTROL = "reno"  # every kernel has it; on links without loss it fills them
CLONE_NEWNET = 0x40000000


@functools.cache
def why_not() -> str | None:
    """Return why links cannot be shaped here; None if they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [tool for tool in ("ip", "tc", "sysctl") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}, of iproute2 and procps"
    try:  # a container's root may not be allowed to
        with Links(1, 1000):
            return None
    except OSError as error:
        return f"cannot make namespaces: {error}"


class Links:
    """The namespaces of one ring. A context manager: what it made is gone afterwards.

    Args:
        world_size: ranks.
        mbit: megabits per second that each rank can send, and receive.
    """

    def __init__(self, world_size: int, mbit: int):
        self.world_size, self.mbit = world_size, mbit
        self._packet = max(LEAST_PACKET_BYTES, int(mbit * 1e6 / 8 * PACKET_S))
        self._prefix = f"rk{os.getpid()}"
        self._made: list[str] = []

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_):
        self._remove()

    def _make(self) -> None:
        hub = self._namespace("hub")
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "addr", "add", f"{SUBNET}.254/24", "dev", "bridge")
        for name in ("lo", "bridge"):
            _run("ip", "-n", hub, "link", "set", name, "up")
        for rank in range(self.world_size):
            mine, port = self._namespace(rank), f"port{rank}"
            ends = ("eth0", "netns", mine, "type", "veth", "peer", "name", port, "netns", hub)
            _run("ip", "link", "add", *ends)
            _run("ip", "-n", mine, "addr", "add", f"{SUBNET}.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", hub, "link", "set", port, "master", "bridge")
            for where, name in ((mine, "lo"), (mine, "eth0"), (hub, port)):
                _run("ip", "-n", where, "link", "set", name, "up")
            for where, name in ((mine, "eth0"), (hub, port)):
                shape = ("rate", f"{self.mbit}mbit", "burst", str(self._packet + FRAME_BYTES))
                queue = ("limit", str(QUEUE_BYTES))
                large = ("gso_max_size", str(self._packet))
                _run("ip", "-n", where, "link", "set", "dev", name, *large)
                _run("tc", "-n", where, "qdisc", "add", "dev", name, "root", "tbf", *shape, *queue)

    def _namespace(self, what) -> str:
        name = f"{self._prefix}-{what}"
        _run("ip", "netns", "add", name)
        self._made.append(name)
        control = f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}"
        _run("ip", "netns", "exec", name, "sysctl", "-q", "-w", control)
        return name

    def _remove(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        self._made.clear()

    def join(self, rank: int) -> None:
        """Move this thread, and those that it starts, into the rank's namespace.

        And onto one core, shared evenly with the other ranks there: ranks stand for hosts of the
        same speed, which ranks that drift between cores are not.
        """
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        _share_finely()
        os.environ["MASTER_ADDR"] = f"{SUBNET}.254"
        os.environ["RINGKERN_HOST"] = f"{SUBNET}.{rank + 1}"
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        _enter(f"/run/netns/{self._prefix}-{rank}")

    @contextlib.contextmanager
    def hub(self):
        """Be in the bridge's namespace: where the rendezvous is served, not shaped."""
        with open("/proc/self/ns/net") as before:
            _enter(f"/run/netns/{self._prefix}-hub")
            try:
                yield
            finally:
                _set_namespace(before)


def _share_finely() -> None:
    """Ask the scheduler for short turns of this process, where it knows them (Linux 6.12).

    Hosts do not take turns; ranks on one core do, and long turns look like ranks out of step.
    """
    numbers = {"x86_64": 314, "aarch64": 274}  # of sched_setattr, which the C library lacks
    if platform.machine() in numbers:
        # struct sched_attr: size, policy (SCHED_OTHER), flags, nice, priority, runtime, ...
        attributes = struct.pack("IIQiIQQQ", 48, 0, 0, 0, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(numbers[platform.machine()], 0, attributes, 0)


def _enter(path: str) -> None:
    with open(path) as file:
        _set_namespace(file)


def _set_namespace(file) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
