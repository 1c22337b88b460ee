"""Rows of a paged cache to a wire buffer and back, on a GPU."""

from dataclasses import dataclass, field
from functools import partial

import torch

from bench import gpu, gpu_peers
from bench.gpu import GpuOperation
from bench.operation import nothing


@dataclass
class State:
    """A cache, its pages in random order, and packed rows."""

    cache: torch.Tensor  # [num_slots, nheads_k, headdim]
    packed: torch.Tensor  # [rows, nheads_k, headdim]
    slots: torch.Tensor  # [rows] int64
    gathers: bool  # from the cache; else into it
    calls: dict = field(default_factory=dict)


def make_inputs(session, case) -> State:
    """Return random inputs on the device: half of a cache's pages, whole."""
    shape, on = case.shape, gpu.device()
    source = torch.Generator(on).manual_seed(0)
    rows, page_size = shape["rows"], shape["page_size"]
    pages = -(-rows // page_size)
    chosen = torch.randperm(2 * pages, generator=source, device=on)[:pages]
    slots = chosen[:, None] * page_size + torch.arange(page_size, device=on)
    sizes = shape["nheads_k"], shape["headdim"]
    draw = partial(torch.randn, generator=source, device=on, dtype=gpu.dtype(case))
    cache, packed = draw(2 * pages * page_size, *sizes), draw(rows, *sizes)
    state = State(cache, packed, slots.flatten()[:rows].contiguous(), bool(shape["gathers"]))
    state.calls = {"ringkern": partial(_copy, state)}
    return state


def prepare(state: State, impl: str) -> None:
    """Poison what will be written."""
    (state.packed if state.gathers else state.cache).fill_(float("nan"))


def _copy(state: State):
    from ringkern.kernels import pack

    if state.gathers:
        pack.gather(state.cache, state.slots, state.packed)
    else:
        pack.scatter(state.packed, state.slots, state.cache)


def call(state: State, impl: str, index: int) -> None:
    state.calls[impl]()


def check(state: State, impl: str) -> dict:
    """Compare every row, and see that no other slot was written."""
    ok = torch.equal(state.cache[state.slots], state.packed)
    if not state.gathers:
        ok &= int(torch.isfinite(state.cache).all(dim=(1, 2)).sum()) == len(state.slots)
    return {"ok": ok, "max_err": 0.0}


def bytes_moved(case) -> int:
    """Return the bytes of the rows, read and written, and of their slots."""
    shape = case.shape
    row = shape["nheads_k"] * shape["headdim"] * gpu.dtype(case).itemsize
    return shape["rows"] * (2 * row + 8)


PACK = GpuOperation(
    "pack",
    make_inputs,
    call,
    check,
    nothing,
    nothing,
    prepare,
    bytes_moved=bytes_moved,
    peers=gpu_peers.PACK,
)
