"""Measures a running ring: the profile that the choice of method is made from."""

import json
import time

import torch

from ringkern import local, tiles
from ringkern.profile import load
from ringkern.types import Hardware, Problem

ROWS = (1, 8, 64, 512, 2048)
KEYS = 4096
LINK_BYTES = 4 << 20


def probe(ring) -> Hardware:
    """Return a rough profile in some tenths of a second; every rank must call it."""
    return measure(ring, 0.1, rows=(1, 16, 256), keys=1024)


def measure(ring, budget_s: float = 3.0, rows=ROWS, keys=KEYS) -> Hardware:
    """Return the ring's profile; every rank must call it, and all get the same.

    All ranks compute at once, and exchange with both neighbours at once, as they do in a call. Each
    figure is the median of its repetitions on a rank, then the mean over the ranks.

    Args:
        budget_s: seconds to spend, about.
        rows, keys: the shapes of attention to time.
    """
    share = budget_s / (len(rows) + 4)
    nheads, headdim = 4, 64
    mine = {"attend_tflops": []}
    for count in rows:
        us = _attend_us(count, keys, nheads, headdim, share)
        mine["attend_tflops"].append((count, 4 * count * keys * nheads * headdim / us / 1e6))
    mine["span_us"] = _attend_us(1, 1, nheads, headdim, share)
    mine["merge_gb_s"] = _merge_gb_s(nheads, headdim, share)
    mine["latency_us"] = _exchange_us(ring, 8, share)
    exchange_us = _exchange_us(ring, LINK_BYTES, share)
    mine["link_gb_s"] = LINK_BYTES / max(1e-3, exchange_us - mine["latency_us"]) / 1e3
    ranks = [json.loads(x) for x in ring.gather_bytes(json.dumps(mine).encode())]

    def mean(pick):
        return sum(pick(rank) for rank in ranks) / len(ranks)

    rates = [(n, mean(lambda r, i=i: r["attend_tflops"][i][1])) for i, n in enumerate(rows)]
    rest = {name: mean(lambda r, n=name: r[n]) for name in mine if name != "attend_tflops"}
    return load({"attend_tflops": rates, **rest})


def _median_us(call, seconds: float, least: int = 3) -> float:
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6


def _attend_us(rows, keys, nheads, headdim, seconds):
    problem = Problem(1, nheads, nheads, headdim, headdim, "float32", False, 0.125, (-1, -1), 0.0)
    q = torch.randn(1, rows, nheads, headdim)
    k, v = (torch.randn(1, keys, nheads, headdim) for _ in range(2))
    run = torch.tensor([[0, 0, 0, rows, 1]]).numpy(), torch.tensor([[0, 0, 0, keys, 1]]).numpy()
    spans = tiles.make_spans(*run, tiles.UNBOUNDED, tiles.UNBOUNDED)
    state = local.make_state(q, headdim)
    return _median_us(lambda: local.step(q, k, v, *state, spans, problem), seconds)


def _merge_gb_s(nheads, headdim, seconds):
    q = torch.randn(1, 512, nheads, headdim)
    state, part = local.make_state(q, headdim), (torch.randn_like(q), torch.zeros(1, nheads, 512))
    us = _median_us(lambda: local.merge_(*state, *part), seconds)
    return 4 * (q.numel() + part[1].numel()) / us / 1e3


def _exchange_us(ring, nbytes, seconds):
    """Return the time of a send to the next rank with a receive from the previous one."""
    if ring.world_size == 1:
        return 1.0
    count = ring.gather_int(max(5, int(seconds * (2e3 if nbytes < 1024 else 100))))[0]
    send, recv = torch.zeros(2, nbytes, dtype=torch.uint8)
    before, after = ((ring.rank + way) % ring.world_size for way in (-1, 1))
    times = []
    for _ in range(count):
        start = time.perf_counter()
        ring.exchange([(after, send)], [(before, recv)])
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6
