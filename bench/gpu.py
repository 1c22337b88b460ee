"""Measuring a kernel on a GPU: by events, with a cold L2, against what the same card does at best.

Where there is no GPU, --quick tries the same cases in Triton's interpreter, by the wall clock.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from bench import operation, record
from bench.measurement import Measurement
from bench.operation import Operation, nothing

# An implementation that is not ours is given up after so long, over all cases: compiling itself
# may take longer than measuring everything else.
SETUP_S = 90.0
FLUSH_BYTES = 1 << 30  # written before a timed call: many times the L2, and time to queue the call
MOST_FLUSHES = 8
PEER_PACKAGES = ("flash-attn", "flash-attn-4", "flashinfer-python")


@dataclass(frozen=True)
class GpuOperation(Operation):
    """An operation on one card. Its state has calls, impl -> callable, and shows what came of one.

    call(state, impl, index) runs state.calls[impl].
    """

    bytes_moved: Callable = nothing  # (case) -> bytes that one call must read and write
    # impl that is not ours -> (state) -> what state.calls takes; raises where it cannot
    peers: dict[str, Callable] = field(default_factory=dict)


def why_not(quick: bool = False) -> str | None:
    """Return why no kernel can be measured here; None where one can.

    quick: the interpreter will do, where TRITON_INTERPRET=1 asks for it.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted() and not quick:
        return "TRITON_INTERPRET=1 measures an interpreter: unset it"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        low = f"compute capability {major}.{minor}: want 8.0 or later"
        return None if major >= 8 or interpreted() else low
    if interpreted():
        return None
    return "no CUDA device" + ("; TRITON_INTERPRET=1 tries it in the interpreter" if quick else "")


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(case) -> torch.dtype:
    """Return the dtype to compute a case in. The interpreter takes bfloat16 for integers."""
    swapped = interpreted() and case.dtype == "bfloat16"
    return torch.float16 if swapped else getattr(torch, case.dtype)


def multiprocessors() -> int:
    """Return how many the card has; few where there is none."""
    here = device().type == "cuda"
    return torch.cuda.get_device_properties(0).multi_processor_count if here else 4


def measure(session, case) -> dict[str, Measurement]:
    """Return what was measured of each implementation that is there, interleaved.

    Peers that are missing, refuse or are wrong are in each record's detail, with the reason.

    Raises:
        RuntimeError: one of ours failed.
    """
    try:
        return _measure(case)
    except Exception as error:
        raise RuntimeError(reason(error)) from error
    finally:
        if device().type == "cuda":
            torch.cuda.empty_cache()


def _measure(case):
    state = case.operation.make_inputs(None, case)
    peers = [impl for impl in case.impls if impl in case.operation.peers]
    absent = {impl: why for impl in peers if (why := _set_up_peer(case, state, impl))}
    impls = tuple(impl for impl in case.impls if impl not in absent)
    for impl in impls:
        once(case, state, impl)  # compiles
    clock = Clock()
    ceilings = Ceilings(clock)
    session = SimpleNamespace(barrier=ceilings.measure)
    ready = replace(case.operation, make_inputs=lambda *_: state)
    found = operation.measure(session, replace(case, operation=ready, impls=impls), clock.timed)
    for one in found.values():
        one.facts = {
            "timer": clock.name,
            "dtype": str(dtype(case)).removeprefix("torch."),
            "machine": describe(),
            "versions": versions(),
            "detail": roofline(case, one, ceilings.matmul_tflops, ceilings.copy_gb_s)
            | ({"absent": absent} if absent else {}),
        }
    return found


def roofline(case, found: Measurement, matmul_tflops: float, copy_gb_s: float) -> dict:
    """Return how near a call is to the least time that the card's ceilings allow.

    over_floor is its p50 over that time: 1 is perfect. bound: which of the two ceilings it is.
    """
    p50 = statistics.median(time for times in found.times_s for time in times)
    computed = (case.operation.flops(case) or 0) / (matmul_tflops * 1e12)
    moved = case.operation.bytes_moved(case) / (copy_gb_s * 1e9)
    return {
        "bound": "matmul" if computed > moved else "copy",
        "floor_us": round(max(computed, moved) * 1e6, 3),
        "over_floor": round(p50 / max(computed, moved), 4),
        "gb_s": round(case.operation.bytes_moved(case) / p50 / 1e9, 3),
        "matmul_tflops": round(matmul_tflops, 3),
        "copy_gb_s": round(copy_gb_s, 3),
    }


_spent_s: dict[str, float] = {}  # by peer, in setting up


def _set_up_peer(case, state, impl: str) -> str | None:
    """Make a peer ready and compare its answer; return why it cannot take part, if so."""
    if _spent_s.get(impl, 0.0) > SETUP_S:
        return f"setting it up took {_spent_s[impl]:.0f} s in the cases before"
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            state.calls[impl] = case.operation.peers[impl](state)
            finding = once(case, state, impl)
        except Exception as error:
            return reason(error, *(one.message for one in said[-2:]))
        finally:
            _spent_s[impl] = _spent_s.get(impl, 0.0) + time.perf_counter() - began
    return None if finding["ok"] else f"a wrong result, max_err {finding['max_err']:.3g}"


def once(case, state, impl):
    """Call an implementation once, and return what its check found."""
    case.operation.prepare(state, impl)
    case.operation.call(state, impl, 0)
    finding = case.operation.check(state, impl)
    synchronize()
    return finding


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def reason(error: Exception, *said) -> str:
    """Return one line on why something failed, without paths."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = " ".join([f"{type(error).__name__}: {error}", *map(str, said)])
    text = re.sub(r"\(Triggered internally at[^)]*\)?", "", text)
    return record.A_PATH.sub(" ...", " ".join(text.split()))[:240]


class Clock:
    """Times calls: on a GPU by events around each, after its L2 was flushed."""

    def __init__(self):
        self._cuda = device().type == "cuda"
        self.name = "cuda_event" if self._cuda else "wall"
        self._flushes = 1
        if self._cuda:
            size = max(FLUSH_BYTES, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
            self._buffer = torch.empty(size, dtype=torch.int8, device=device())
            self._flush_s = size / 1e13  # or longer: no card writes faster yet

    def timed(self, call, *args) -> float:
        """Return the seconds that call(*args) takes."""
        if not self._cuda:
            return operation.timed(call, *args)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._flushes):
            self._buffer.zero_()
        began = time.perf_counter()
        begin.record()
        call(*args)
        end.record()
        host_s = time.perf_counter() - began
        end.synchronize()
        # The GPU must still be flushing while the call is queued, or it waits for the host.
        if host_s > self._flushes * self._flush_s and self._flushes < MOST_FLUSHES:
            self._flushes += 1
        return begin.elapsed_time(end) / 1e3


class Ceilings:
    """What this card does at best, measured between the calls of a case."""

    PRODUCTS = 4  # in one go, as one alone is over before the card has found its clocks

    def __init__(self, clock: Clock):
        big = device().type == "cuda"
        self._clock, self._size, nbytes = clock, 8192 if big else 64, (1 << 30) if big else 1 << 16
        draw = functools.partial(torch.randn, device=device(), dtype=torch.bfloat16)
        self._a, self._b, self._c = (draw(self._size, self._size) for _ in range(3))
        self._from = draw(nbytes // 2)
        self._to = torch.empty_like(self._from)
        self._matmul_s, self._copy_s = [], []

    def measure(self) -> None:
        self._matmul_s.append(self._clock.timed(self._multiply) / self.PRODUCTS)
        self._copy_s.append(self._clock.timed(self._to.copy_, self._from))

    def _multiply(self):
        for _ in range(self.PRODUCTS):
            torch.mm(self._a, self._b, out=self._c)

    @property
    def matmul_tflops(self) -> float:
        """1e12 FLOPs per second of a large bfloat16 matrix product."""
        return 2 * self._size**3 / statistics.median(self._matmul_s) / 1e12

    @property
    def copy_gb_s(self) -> float:
        """1e9 bytes per second, read and written, of a large copy on the card."""
        return 2 * self._from.nbytes / statistics.median(self._copy_s) / 1e9


def name() -> str:
    """Return what this card is called in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


@functools.cache
def describe() -> dict:
    """Return what decides a measurement on this card, for a record's machine."""
    if device().type != "cuda":
        return {"gpu": "none: Triton's interpreter"}
    here = torch.cuda.get_device_properties(0)
    return {
        "gpu": here.name,
        "compute_capability": f"{here.major}.{here.minor}",
        "multiprocessors": here.multi_processor_count,
        "gpu_memory_gb": round(here.total_memory / 1e9, 1),
        "l2_mb": round(here.L2_cache_size / 1e6, 1),
        **_nvidia_smi("driver_version", "power.limit"),
    }


def _nvidia_smi(*fields: str) -> dict:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    names = [one.replace(".", "_") for one in fields]
    return dict(zip(names, values, strict=False)) if done.returncode == 0 else {}


@functools.cache
def versions() -> dict:
    """Return the versions that only a case on a GPU depends on."""
    found = {"triton": importlib.metadata.version("triton")}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for package in PEER_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
