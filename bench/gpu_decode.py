"""Decode on a GPU: few queries of each sequence against its paged keys and values."""

from dataclasses import dataclass, field
from functools import partial

import torch

from bench import gpu, gpu_peers
from bench.gpu import GpuOperation
from bench.gpu_sample import Attention, Rows, same_lse, spread
from bench.operation import nothing

SEQUENCES = 2  # of the batch, that are looked at


@dataclass
class State:
    """A batch of sequences of the same length, their pages in random order."""

    q: torch.Tensor  # [batch * queries, nheads, headdim]
    k: torch.Tensor  # [num_slots, nheads_k, headdim]
    v: torch.Tensor
    page_table: torch.Tensor  # [batch, pages], int32
    seqused_k: torch.Tensor  # [batch], int32
    cu_seqlens_q: torch.Tensor  # [batch + 1], int32
    queries: int  # of each sequence
    cached: int
    page_size: int
    sequences: torch.Tensor | None = None  # those of the sample
    sample: Attention | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    got: torch.Tensor | None = None  # [batch * queries, nheads, headdim], by the last call
    calls: dict = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def unpaged(self, sequences):
        """Return k and v of some sequences, [sequences, cached, nheads_k, headdim]."""
        inside = torch.arange(self.page_size, device=self.k.device)
        slots = self.page_table[sequences].long()[:, :, None] * self.page_size + inside
        slots = slots.flatten(1)[:, : self.cached]
        return self.k[slots], self.v[slots]


def make_inputs(session, case) -> State:
    """Return random inputs on the device."""
    shape, on = case.shape, gpu.device()
    batch, cached, page_size = shape["batch"], shape["cached"], shape["page_size"]
    source = torch.Generator(on).manual_seed(0)
    pages = -(-cached // page_size)

    def draw(*size):
        return torch.randn(*size, generator=source, device=on, dtype=gpu.dtype(case))

    q = draw(batch * shape["queries"], shape["nheads"], shape["headdim"])
    k, v = (draw(batch * pages * page_size, shape["nheads_k"], shape["headdim"]) for _ in range(2))
    order = torch.randperm(batch * pages, generator=source, device=on, dtype=torch.int32)
    cu_seqlens_q = torch.arange(batch + 1, device=on, dtype=torch.int32) * shape["queries"]
    seqused_k = torch.full((batch,), cached, device=on, dtype=torch.int32)
    sizes = shape["queries"], cached, page_size
    state = State(q, k, v, order.view(batch, pages), seqused_k, cu_seqlens_q, *sizes)
    state.sequences = spread(batch, SEQUENCES, on)
    rows = q.unflatten(0, (batch, -1))[state.sequences]
    state.sample = Attention(rows, *state.unpaged(state.sequences))
    state.calls = {"ringkern": partial(_decode, state)}
    return state


def prepare(state: State, impl: str) -> None:
    """Poison what will be written."""
    state.got = None
    if impl == "ringkern":
        state.out = torch.full_like(state.q, float("nan"))
        total, nheads, _ = state.q.shape
        state.lse = state.q.new_full((nheads, total), float("nan"), dtype=torch.float32)


def _decode(state: State):
    from ringkern.kernels.decode import choose_splits, decode

    batch, nheads_k = len(state.seqused_k), state.k.shape[1]
    splits = choose_splits(batch, nheads_k, state.cached, gpu.multiprocessors())
    tables = state.page_table, state.seqused_k, state.cu_seqlens_q
    options = dict(max_seqlen_q=state.queries, page_size=state.page_size, num_splits=splits)
    options["softmax_scale"] = state.scale
    decode(state.q, state.k, state.v, state.out, state.lse, *tables, **options)
    return state.out


def call(state: State, impl: str, index: int) -> None:
    state.got = state.calls[impl]()


def check(state: State, impl: str) -> dict:
    """Compare some rows with float64, and see that every element was written."""
    sample, batch = state.sample, len(state.seqused_k)
    got = state.got.unflatten(0, (batch, -1))[state.sequences]
    found = Rows(sample.out, sample.baseline).compare(sample.rows(got))
    found["ok"] &= bool(torch.isfinite(state.got).all())
    if impl == "ringkern":
        lse = state.lse.unflatten(1, (batch, -1)).transpose(0, 1)[state.sequences]
        found["ok"] &= same_lse(sample.lses(lse), sample.lse)
    return found


def flops(case) -> int:
    """Return the model FLOPs of one call."""
    shape = case.shape
    pairs = shape["batch"] * shape["queries"] * shape["cached"]
    return 4 * pairs * shape["nheads"] * shape["headdim"]


def bytes_moved(case) -> int:
    """Return the bytes of the cached keys and values: beside them all else is little."""
    shape, itemsize = case.shape, gpu.dtype(case).itemsize
    return 2 * shape["batch"] * shape["cached"] * shape["nheads_k"] * shape["headdim"] * itemsize


DECODE = GpuOperation(
    "decode",
    make_inputs,
    call,
    check,
    flops,
    nothing,
    prepare,
    bytes_moved=bytes_moved,
    peers=gpu_peers.DECODE,
)
