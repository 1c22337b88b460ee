"""A rank's memory in one ring attention call, above its inputs, as the ring grows."""

import os
from dataclasses import replace

import torch
from ringkern.kernels import step_torch

from bench import ring, rss
from bench.measurement import Measurement
from bench.operation import timed

# What torch's fused op keeps besides its result: a tile of scores and a partial out.
SCRATCH_BYTES = 1 << 20


def measure(session, case) -> dict[str, Measurement]:
    """Return peak_mem_bytes, what a first call holds: freed blocks are given back at once."""
    rss.return_freed_blocks()
    return measure_heap(session, case)


def measure_heap(session, case) -> dict[str, Measurement]:
    """Return peak_mem_bytes of a first call, with what the C library keeps of freed blocks.

    A call on few tokens before it loads the code. The wire buffers are made anew in each call, so
    they count. detail has torch_peak_bytes, by torch's allocator, and the model.
    """
    tiny = replace(case, shape=case.shape | {"seqlen": 2 * case.world_size})
    ring.call(ring.make_inputs(session, tiny), "ringkern", 0)
    state = ring.make_inputs(session, case)
    peak, elapsed = _resident_peak(session, state)
    found = Measurement([[elapsed]], peak_mem_bytes=peak)
    finding = ring.check(state, "ringkern")
    found.add(finding | {"torch_peak_bytes": _torch_peak(session, state)} | model(case))
    return {"ringkern": found}


def model(case) -> dict[str, int]:
    """Return what should be needed: two wires, the float32 accumulator, and one block."""
    shape = case.shape
    itemsize = getattr(torch, case.dtype).itemsize
    tokens = -(-shape["seqlen"] // case.world_size)
    row = shape["nheads"] * (shape["headdim"] + 1) * 4  # out and lse of one token
    key = shape["nheads_k"] * shape["headdim"] * 2  # K and V elements of one token
    rows, keys = min(step_torch.BLOCK_Q, tokens), min(step_torch.BLOCK_K, tokens)
    copies = 0 if case.dtype == "float32" else rows * row + keys * key * 4
    parts = {
        "wires_bytes": 2 * tokens * key * itemsize if case.world_size > 1 else 0,
        "accumulator_bytes": tokens * row,
        "block_bytes": rows * row + copies + SCRATCH_BYTES,
    }
    return parts | {"model_bytes": sum(parts.values())}


def _resident_peak(session, state) -> tuple[int, float]:
    """Return the bytes by which resident memory rose in a call, at most, and its seconds."""
    state.ring.drop_buffers()  # as in a first call
    session.barrier()
    before = rss.reset_peak()
    elapsed = timed(ring.call, state, "ringkern", 0)
    peak = rss.peak_bytes() - before
    session.barrier()
    return peak, elapsed


def _torch_peak(session, state) -> int:
    """Return the most bytes that torch's allocator had out during a call, above those before."""
    state.ring.drop_buffers()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would write to the terminal
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        ring.call(state, "ringkern", 0)
    session.barrier()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
