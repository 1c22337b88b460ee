"""The merge of attention parts on a GPU: of n parts into one, or of one into a running state."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from ringkern.kernels import reference

from bench import gpu, gpu_peers
from bench.gpu import GpuOperation
from bench.gpu_sample import ROWS, Rows, same_lse, spread
from bench.operation import nothing


@dataclass
class State:
    """Parts, and where they are merged into."""

    outs: torch.Tensor  # [parts, tokens, nheads, headdim]
    lses: torch.Tensor  # [parts, nheads, tokens] float32
    before: tuple  # (out, lse) of the running state, float32; empty where there is none
    rows: torch.Tensor  # tokens that are looked at
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    count: int = 0  # calls since prepare()
    got: torch.Tensor | None = None
    calls: dict = field(default_factory=dict)


def make_inputs(session, case) -> State:
    """Return random inputs on the device."""
    shape = case.shape
    source = torch.Generator(gpu.device()).manual_seed(0)
    draw = partial(torch.randn, generator=source, device=gpu.device())
    sizes = shape["tokens"], shape["nheads"], shape["headdim"]
    outs = draw(shape["parts"], *sizes, dtype=gpu.dtype(case))
    lses = draw(shape["parts"], sizes[1], sizes[0])
    before = (draw(*sizes), draw(sizes[1], sizes[0])) if shape["seeded"] else ()
    state = State(outs, lses, before, spread(sizes[0], ROWS, outs.device))
    state.calls = {"ringkern": partial(_merge, state)}
    return state


def prepare(state: State, impl: str) -> None:
    """Poison what will be written, or fill in the state."""
    state.count, state.got = 0, None
    if impl != "ringkern":
        return
    if state.before:
        state.out, state.lse = (x.clone() for x in state.before)
        return
    state.out = torch.full_like(state.outs[0], float("nan"))
    state.lse = torch.full_like(state.lses[0], float("nan"))


def _merge(state: State):
    from ringkern.kernels.merge import merge_into

    merge_into(state.outs, state.lses, state.out, state.lse, seeded=bool(state.before))
    return state.out


def call(state: State, impl: str, index: int) -> None:
    state.got = state.calls[impl]()
    state.count += 1


def check(state: State, impl: str) -> dict:
    """Compare some tokens with float64, and see that every element was written."""
    outs, lses = state.outs[:, state.rows].double(), state.lses[:, :, state.rows].double()
    if state.before:
        out, lse = state.before
        outs = torch.cat([out[None, state.rows].double(), outs])
        lses = torch.cat([lse[None, :, state.rows].double(), lses + np.log(state.count)])
    want, want_lse = reference.merge(outs, lses)
    baseline, _ = reference.merge(outs.float(), lses.float())
    found = Rows(want, baseline.to(state.got.dtype)).compare(state.got[state.rows])
    found["ok"] &= bool(torch.isfinite(state.got).all())
    if impl == "ringkern":
        found["ok"] &= same_lse(state.lse[:, state.rows], want_lse)
    return found


def bytes_moved(case) -> int:
    """Return the bytes of the parts, and of what is written; a state is read too."""
    shape, itemsize = case.shape, gpu.dtype(case).itemsize
    rows = shape["tokens"] * shape["nheads"]
    part = rows * (shape["headdim"] * itemsize + 4)
    state = 2 * rows * (shape["headdim"] * 4 + 4)
    return shape["parts"] * part + (state if shape["seeded"] else part)


MERGE = GpuOperation(
    "merge",
    make_inputs,
    call,
    check,
    nothing,
    nothing,
    prepare,
    bytes_moved=bytes_moved,
    peers=gpu_peers.MERGE,
)
