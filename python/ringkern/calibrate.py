"""Measures a running ring: the profile that the choice of method is made from."""

import itertools
import json
import math
import time
from typing import NamedTuple

import numpy as np
import torch

from ringkern import local, tiles
from ringkern.guard import guard
from ringkern.profile import load
from ringkern.types import Hardware, Problem

SHAPES = (1, 4096), (8, 4096), (64, 2048), (512, 1024)  # query rows, keys
COLD_BYTES = 32 << 20  # of K and V per rank to go through: more than its share of any cache
LINK_BYTES = 64 << 10, 4 << 20  # the least and the most to time a link with


# What is measured where nothing else is asked for: Llama 3's heads, 4 of them to a key head.
TYPICAL = Problem(1, 16, 4, 64, 64, "float32", False, 0.125, (-1, -1), 0.0)


def probe(ring, problem: Problem) -> Hardware:
    """Return a rough profile in some tenths of a second; every rank must call it."""
    return measure(ring, 0.3, problem, ((1, 1024), (16, 1024), (256, 256)))


def measure(ring, budget_s: float = 3.0, problem: Problem = TYPICAL, shapes=SHAPES) -> Hardware:
    """Return the ring's profile; every rank must call it, and all get the same.

    All ranks compute at once, and exchange with both neighbours at once, as they do in a call. A
    rank's figures of attention are means, so that ranks which share a core count what they wait for
    it; of exchanges, medians. Then the mean over the ranks. And rank 0 computes alone.

    Args:
        budget_s: seconds to spend, about; more on a link that is slow for the least size.
        problem: whose heads, head sizes and dtype to attend with.
        shapes: (query rows, keys) of the attention to time.
    """
    with guard(ring.device):
        return _measure(ring, problem, shapes, budget_s / (1.5 * len(shapes) + 8))


def _measure(ring, problem, shapes, share):
    """Return what measure() does, giving each of its parts `share` seconds or some times that."""
    ring.barrier()
    mine = {"span_us": _mean_us(ring, _attention(ring, 1, 1, problem), share)}
    mine["attend_tflops"] = _rates(ring, problem, shapes, mine["span_us"], share)
    ring.barrier()
    first = ring.rank == 0  # which then computes while the others stand in the barrier
    alone = _rates(ring, problem, shapes, mine["span_us"], share / 2) if first else []
    ring.barrier()
    mine["merge_gb_s"] = _merge_gb_s(ring, problem, share)
    mine["latency_us"] = _exchange_us(ring, 8, share)
    mine["link_gb_s"] = _link_gb_s(ring, share)
    both = _both_us(ring, _attention(ring, 16, 1024, problem), 8, 2 * share)
    mine["step_us"] = max(0.0, both.together - max(both.attend, mine["latency_us"]))
    # Half as long under way as attended: where messages hide, what do they take from attention?
    nbytes = min(LINK_BYTES[1], max(4096, int(mine["link_gb_s"] * 2e3 * both.attend)))
    nbytes = ring.gather_int(nbytes)[0]
    both = _both_us(ring, _attention(ring, 64, 1024, problem), nbytes, 2 * share)
    exchange = mine["latency_us"] + nbytes / mine["link_gb_s"] / 1e3
    lost = both.together - both.attend - mine["step_us"]
    mine["contention"] = min(1.0, max(0.0, lost / exchange))
    ranks = [json.loads(x) for x in ring.gather_bytes(json.dumps(mine | {"alone": alone}).encode())]

    def mean(pick):
        return sum(pick(rank) for rank in ranks) / len(ranks)

    rates = [
        (rows, mean(lambda r, i=i: r["attend_tflops"][i][1])) for i, (rows, _) in enumerate(shapes)
    ]
    rest = {name: mean(lambda r, n=name: r[n]) for name in mine if name != "attend_tflops"}
    return load({"attend_tflops": rates, "alone_tflops": ranks[0]["alone"], **rest})


def _rates(ring, problem, shapes, span_us: float, seconds: float) -> list[tuple[int, float]]:
    """Return (query rows, 1e12 FLOP/s) of attention of these shapes, without its fixed cost."""
    per_pair = 2 * problem.nheads * (problem.headdim + problem.headdim_v)
    rates = []
    for rows, keys in shapes:
        us = _mean_us(ring, _attention(ring, rows, keys, problem), seconds)
        us = max(us - span_us, us / 10)
        rates.append((rows, per_pair * rows * keys / us / 1e6))
    return rates


def _mean_us(ring, call, seconds: float, least: int = 3) -> float:
    call()
    _finish(ring)
    count, start = 0, time.perf_counter()
    while count < least or time.perf_counter() < start + seconds:
        call()
        count += 1
        if count % 64 == 0:  # so that a GPU is not given minutes of work ahead
            _finish(ring)
    _finish(ring)
    return (time.perf_counter() - start) / count * 1e6


def _finish(ring) -> None:
    """Wait for the GPU, whose work a clock of the host times only so."""
    if ring.device.type == "cuda":
        torch.cuda.synchronize(ring.device)


def _attention(ring, rows, keys, problem):
    """Return a function that attends, of so many query rows to so many keys.

    To others each time: a layer's K and V are in no cache when their turn comes.
    """
    nheads, nheads_k, dtype = problem.nheads, problem.nheads_k, getattr(torch, problem.dtype)
    here = dict(dtype=dtype, device=ring.device)
    q = torch.ones(1, rows, nheads, problem.headdim, **here)
    k_shape, v_shape = ((1, keys, nheads_k, d) for d in (problem.headdim, problem.headdim_v))
    sizes = [math.prod(shape) for shape in (k_shape, v_shape)]
    layers = max(1, COLD_BYTES // (sum(sizes) * dtype.itemsize))
    pool, turns = torch.ones(layers, sum(sizes), **here), itertools.cycle(range(layers))
    run = (np.array([[0, 0, 0, count, 1]], dtype=np.int64) for count in (rows, keys))
    spans = tiles.make_spans(*run, tiles.UNBOUNDED, tiles.UNBOUNDED)
    backend, layouts = ring.backend(problem), local.Layouts()
    work = local.prepare(spans, problem, ring.device, backend, rows=rows)
    state = local.make_state(q, problem.headdim_v)

    def attend():
        k, v = pool[next(turns)].split(sizes)
        k, v = k.view(k_shape), v.view(v_shape)
        layout = layouts.find(q, k, v) if backend == "triton" else None
        local.step(q, k, v, *state, work, problem, layout=layout)

    return attend


def _merge_gb_s(ring, problem, seconds):
    q = torch.randn(1, 512, problem.nheads, problem.headdim_v, device=ring.device)
    state = local.make_state(q, problem.headdim_v)
    part = torch.randn_like(q), torch.zeros(1, problem.nheads, 512, device=ring.device)
    merge = local.Merge(*(x[None] for x in part))
    us = _mean_us(ring, lambda: merge(*state), seconds)
    return 4 * (q.numel() + part[1].numel()) / us / 1e3


def _link_gb_s(ring, seconds):
    """Return the rate of a send to the next rank with a receive from the previous one.

    From the times of two sizes, so that what an exchange costs at any size is left out. The larger
    fits the link: enough to be timed, and little for a slow one.
    """
    nbytes, most = LINK_BYTES
    while nbytes < most:
        us = max(ring.gather_int(int(_exchange_us(ring, nbytes, 0.0))))  # all ranks go on, or none
        if us > 1e6 * seconds / 20:
            break
        nbytes *= 4
    more = _exchange_us(ring, nbytes, seconds) - _exchange_us(ring, nbytes // 4, seconds / 2)
    return (nbytes - nbytes // 4) / max(1e-3, more) / 1e3


def _exchange_us(ring, nbytes, seconds):
    """Return the median time of an exchange with both neighbours."""
    if ring.world_size == 1:
        return 1.0
    post = _neighbours(ring, nbytes)
    times = _repeat(ring, lambda: post().wait(), seconds)
    return sorted(times)[len(times) // 2] * 1e6


class _Both(NamedTuple):
    """Mean microseconds of a step that attends while it exchanges."""

    attend: float
    together: float


def _both_us(ring, attend, nbytes, seconds):
    """Return the times of a step, as a call makes them, and of its attention alone, in turns."""
    post = _neighbours(ring, nbytes) if ring.world_size > 1 else None
    alone = []

    def step():
        start = time.perf_counter()
        attend()
        _finish(ring)
        alone.append(time.perf_counter() - start)
        ring.barrier()
        start = time.perf_counter()
        ticket = post and post()
        attend()
        if ticket:
            ticket.wait()
        _finish(ring)
        together.append(time.perf_counter() - start)

    together = []
    _repeat(ring, step, seconds)
    return _Both(*(sum(times[1:]) / len(times[1:]) * 1e6 for times in (alone, together)))


def _neighbours(ring, nbytes):
    """Return a function that posts an exchange with both neighbours, and returns its ticket."""
    send, recv = torch.zeros(2, nbytes, dtype=torch.uint8, device=ring.device)
    place = ring.order.index(ring.rank)
    before, after = (ring.order[(place + way) % ring.world_size] for way in (-1, 1))
    return lambda: ring.post([(after, send)], [(before, recv)])


def _repeat(ring, call, seconds):
    """Return the seconds of each of some calls, as many on every rank: at least 3."""

    def timed():
        start = time.perf_counter()
        call()
        _finish(ring)
        return time.perf_counter() - start

    timed()
    first = max(ring.gather_int(int(1e9 * timed()) + 1)) / 1e9
    return [timed() for _ in range(max(3, min(1000, int(seconds / first))))]
