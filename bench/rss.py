"""Resident memory of this process, as Linux counts it."""

import ctypes
import pathlib


def now_bytes() -> int:
    """Return what is resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that was resident since the process began, or since reset_peak()."""
    return _status("VmHWM")


def return_freed_blocks() -> None:
    """Map each larger block by itself from now on, so that freeing it gives it back at once.

    Else glibc keeps freed blocks, and how many depends on the order in which they came and went.
    """
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)


def reset_peak() -> int:
    """Give freed memory back, forget the peak so far, and return what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return now_bytes()


def _status(name: str) -> int:
    # Not getrusage(): its peak is inherited from the process that started this one.
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{name} is not in /proc/self/status: memory is measured on Linux only")
