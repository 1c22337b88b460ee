"""What `ringkern trace` runs: a prefill, another on top of its cache, and decode steps."""

import os
import pathlib
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch

from ringkern import api, launch
from ringkern.cache import KVCache
from ringkern.errors import check
from ringkern.placement import Placement
from ringkern.problem import DTYPES, make_problem
from ringkern.schedule import check_method

PAGE_SIZE = 64
SEQUENCE = "text"
_GROWING = ("calls", "bytes_sent", "call_ms", "wait_ms")  # of ring.stats(), summed up by stage


@dataclass(frozen=True)
class Workload:
    """One sequence through the attention layers of a model; its tensors are drawn at random.

    Args:
        cached: tokens of the first prefill; 0 leaves it out.
        new: tokens of the second, on top of the cache; 0 leaves it out.
        decode: steps of one token each.
        layers, nheads, nheads_k, headdim, dtype: of the model.
        method: "auto", or one for every call.
        window: (left, right), -1 for no bound.

    Raises:
        ArgumentError: sizes, dtype, method or window that no ring.attn() would take.
    """

    cached: int = 8192
    new: int = 4096
    decode: int = 4
    layers: int = 2
    nheads: int = 8
    nheads_k: int = 2
    headdim: int = 64
    dtype: str = "float32"
    method: str = "auto"
    window: tuple[int, int] = (-1, -1)

    def __post_init__(self):
        for name, least in (("cached", 0), ("new", 0), ("decode", 0), ("layers", 1)):
            check(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        for name in ("nheads", "nheads_k", "headdim"):
            check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        tokens = self.cached + self.new
        check(tokens >= 1, "new", "at least 1 token, cached or new", tokens)
        check(self.dtype in DTYPES, "dtype", ", ".join(DTYPES), self.dtype)
        check_method(self.method)
        options = dict(causal=True, softmax_scale=None, window_size=self.window, softcap=0.0)
        make_problem(*self.tensors(0), **options)

    def tensors(self, tokens: int) -> list[torch.Tensor]:
        """Return q, k and v of so many tokens: [tokens, heads, headdim]."""
        dtype = getattr(torch, self.dtype)
        heads = self.nheads, self.nheads_k, self.nheads_k
        return [torch.randn(tokens, n, self.headdim, dtype=dtype) for n in heads]


def run(workload: Workload, ranks: int, threads: int, timeout_s: float, out: str) -> list[dict]:
    """Run the workload on `ranks` processes of this host, and write their trace to `out`.

    Returns:
        A dict per stage: stage, tokens, method, reason, calls, ms (of the slowest rank), rank_ms,
        bytes_sent (by all ranks), exposed (share of the ranks' time in calls).

    Raises:
        ArgumentError: nothing was started.
        RuntimeError: a rank failed.
    """
    check(ranks >= 1, "ranks", "at least 1", ranks)
    check(threads >= 1, "threads", "at least 1", threads)
    check(0 < timeout_s <= 1e6, "timeout", "seconds, more than 0 and at most 1e6", timeout_s)
    target = pathlib.Path(out).absolute()
    ok = not target.is_dir() and target.parent.is_dir() and os.access(target.parent, os.W_OK)
    check(ok, "out", "a file in a folder that can be written to", out)
    # In a folder of its own first: a run that fails leaves an older trace as it was.
    with tempfile.TemporaryDirectory(prefix=".ringkern-", dir=target.parent) as folder:
        path = pathlib.Path(folder) / "trace.json"
        reports = launch.launch(
            run_rank, ranks, workload, str(path), timeout_s, threads=threads, timeout_s=86400.0
        )
        os.replace(path, target)
    return [_join(stage) for stage in zip(*reports, strict=True)]


def run_rank(worker, workload: Workload, path: str, timeout_s: float) -> list[dict]:
    """Run this rank's share, traced; return what each stage took on this rank."""
    os.environ["RINGKERN_TRACE"] = path  # of this process
    warnings.filterwarnings("ignore", ".*part alone")  # it goes with the folder
    torch.manual_seed(worker.rank)
    with api.init_ring(device="cpu", timeout_s=timeout_s) as ring, torch.inference_mode():
        placement = Placement(ring.world_size)
        tokens = workload.cached + workload.new + workload.decode
        cache = KVCache(
            ring,
            placement,
            num_layers=workload.layers,
            nheads_k=workload.nheads_k,
            headdim=workload.headdim,
            dtype=getattr(torch, workload.dtype),
            num_pages=tokens // (ring.world_size * PAGE_SIZE) + 4,
            page_size=PAGE_SIZE,
        )
        prefills = (("prefill", workload.cached), ("prefill on cache", workload.new))
        reports = [
            _run_stage(ring, cache, workload, name, [{SEQUENCE: count}])
            for name, count in prefills
            if count
        ]
        if workload.decode:
            steps = [[SEQUENCE]] * workload.decode
            reports.append(_run_stage(ring, cache, workload, "decode", steps))
        ring.barrier()
        return reports


def _run_stage(ring, cache, workload, name, batches):
    """Run one forward per batch: a dict of new tokens to prefill, or a list to decode."""
    placement, window = cache.placement, workload.window
    shape = dict(nheads=workload.nheads, nheads_k=workload.nheads_k, headdim=workload.headdim)
    before, took_ms, tokens, reason = ring.stats(), 0.0, 0, "as asked"
    for number, batch in enumerate(batches):
        make = placement.prefill if isinstance(batch, dict) else placement.decode
        plan = make(batch)
        tokens += plan.total
        qkv = workload.tensors(plan.num_tokens(ring.rank))
        if workload.method == "auto" and number == 0:  # and the ring's profile, outside of the time
            choice = ring.choose(plan, **shape, dtype=workload.dtype, window_size=window)
            reason = choice.reason
        ring.barrier()
        start = time.perf_counter()
        for layer in range(workload.layers):
            options = dict(method=workload.method, window_size=window)
            ring.attn(*qkv, plan, cache=cache, layer=layer, **options)
        took_ms += (time.perf_counter() - start) * 1e3
    after = ring.stats()

    earlier = {method: record["calls"] for method, record in before["methods"].items()}
    methods = [
        method
        for method, record in after["methods"].items()
        if record["calls"] > earlier.get(method, 0)
    ]
    return {
        "stage": name,
        "tokens": tokens,
        "method": ", ".join(methods),
        "reason": reason,
        "ms": took_ms,
        **{what: after[what] - before[what] for what in _GROWING},
    }


def _join(reports: tuple[dict, ...]) -> dict:
    """Return what all ranks of a stage report, as one row."""
    first = reports[0]
    calls_ms = sum(report["call_ms"] for report in reports)
    return {
        **{name: first[name] for name in ("stage", "tokens", "method", "reason", "calls")},
        "ms": round(max(report["ms"] for report in reports), 3),
        "rank_ms": [round(report["ms"], 3) for report in reports],
        "bytes_sent": sum(report["bytes_sent"] for report in reports),
        "exposed": round(min(1.0, sum(r["wait_ms"] for r in reports) / calls_ms), 4),
    }
