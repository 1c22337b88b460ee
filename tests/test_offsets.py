"""Tensors whose entries lie more than 2^31 elements apart: offsets in 32 bits would wrap.

One tensor at a time gets a large stride along one dimension, with room on both sides of it, so
that an offset that wraps finds zeros and not the end of the process. Nearly all of that room is
memory that nobody touches.
"""

import mmap

import pytest
import torch
from accelerator import DEVICE, ON_GPU
from ringkern.kernels import decode, merge, pack, step
from step_case import cut_of, draw, make_spans, run_of, table_of

REACH = 1 << 31  # elements
SLACK = 1 << 20
NORESERVE = 0x4000  # Linux; mmap has no name for it in Python 3.10


@pytest.fixture(autouse=True)
def leave_untouched(monkeypatch):
    """Keep Triton's interpreter from copying each storage back onto itself, untouched memory too."""
    copy = torch.UntypedStorage.copy_

    def copy_other(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_other)


def room(dtype):
    """Return zeros, 2 * (REACH + SLACK) of them."""
    size = 2 * (REACH + SLACK) * dtype.itemsize
    try:
        if ON_GPU:
            return torch.zeros(size // dtype.itemsize, dtype=dtype, device=DEVICE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except (OSError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no room for {size >> 30} GiB of mostly untouched memory: {error}")


def spread(x, dim):
    """Return a copy of x whose last entry along dim lies REACH elements after the first."""
    rest = [n for i, n in enumerate(x.shape) if i != dim]
    strides = list(torch.empty(rest, device="meta").stride())
    strides.insert(dim, -(-REACH // (x.shape[dim] - 1) // 16) * 16 + 16)
    far = room(x.dtype).as_strided(x.shape, strides, REACH + SLACK // 2)
    assert far.stride(dim) * (x.shape[dim] - 1) > REACH
    return far.copy_(x)


def check(call, tensors, written, which, dims):
    """Compare what is written, bit by bit, with and without large strides."""
    want = {name: x.clone() for name, x in tensors.items()}
    call(**want)
    for dim in dims:
        got = {name: x.clone() for name, x in tensors.items()}
        got[which] = spread(got[which], dim)
        call(**got)
        for name in written:
            assert torch.equal(got[name], want[name]), f"{name}, {which} with a large stride {dim}"


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse"])
def test_step(which, packed):
    q, k, v = draw(9, 50, heads=(4, 2), dims=(16, 16), dtype=torch.float16, batch=2)
    out, lse = torch.zeros(2, 9, 4, 16, device=DEVICE), torch.zeros(2, 4, 9, device=DEVICE)
    spans = make_spans(run_of(9, 30), run_of(50), True)  # a full piece and one under a mask
    cut = cut_of(q, k, packed, block_m=16, block_n=16)
    table = table_of(spans, cut)
    tensors = dict(q=q, k=k, v=v, out=out, lse=lse)
    check(
        lambda **given: step.step(**given, table=table, softmax_scale=0.3),
        *(tensors, ("out", "lse"), which, range(3)),
    )


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse", "block_table"])
def test_decode(which):
    source = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, 16, generator=source).to(DEVICE, torch.float16)
        for n, heads in ((3, 4), (64, 2), (64, 2))
    )
    int32 = dict(dtype=torch.int32, device=DEVICE)
    tensors = dict(
        q=q,
        k=k,
        v=v,
        out=torch.zeros(3, 4, 16, device=DEVICE),
        lse=torch.zeros(4, 3, device=DEVICE),
        block_table=torch.tensor([[3, 0, 2, 5], [7, 1, 6, 4]], **int32),
    )
    numbers = dict(max_seqlen_q=2, page_size=8, softmax_scale=0.3, seeded=True)
    numbers["seqlens"] = torch.tensor([30, 25], **int32)
    numbers["cu_seqlens_q"] = torch.tensor([0, 1, 3], **int32)
    dims = range(1 if which == "block_table" else 2)
    check(
        lambda **given: decode.decode(**given, **numbers),
        *(tensors, ("out", "lse"), which, dims),
    )


def test_decode_from_slots_past_2_31():
    """Slots one element apart, so that 2^31 of them fit: what counts is the slot's number."""
    first = REACH + 64  # of the slots that hold the sequence
    data = torch.randn(96, generator=torch.Generator().manual_seed(0))
    far = room(torch.float16)
    far[REACH + first : REACH + first + 96] = data
    far = far.as_strided((first + 80, 1, 16), (1, 16, 1), REACH)
    near = data.to(DEVICE, torch.float16).as_strided((80, 1, 16), (1, 16, 1))
    int32 = dict(dtype=torch.int32, device=DEVICE)
    results = []
    for cache, page in ((near, 0), (far, first // 16)):
        out, lse = torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
        decode.decode(
            *(near[:1], cache, cache, out, lse),
            block_table=torch.arange(page, page + 5, **int32)[None],
            seqlens=torch.tensor([77], **int32),
            cu_seqlens_q=torch.tensor([0, 1], **int32),
            max_seqlen_q=1,
            page_size=16,
            softmax_scale=1.0,
        )
        results.append((out, lse))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1] > 0


@pytest.mark.parametrize("which", ["outs", "lses", "out", "lse"])
def test_merge(which):
    source = torch.Generator().manual_seed(0)
    shapes = dict(outs=(3, 2, 20, 2, 16), lses=(3, 2, 2, 20), out=(2, 20, 2, 16), lse=(2, 2, 20))
    tensors = {name: torch.randn(s, generator=source).to(DEVICE) for name, s in shapes.items()}
    dims = range(len(shapes[which]) - (which in ("outs", "out")))
    check(
        lambda **given: merge.merge_into(**given, seeded=True),
        *(tensors, ("out", "lse"), which, dims),
    )


@pytest.mark.parametrize("which", ["cache", "packed"])
def test_pack(which):
    source = torch.Generator().manual_seed(0)
    cache = torch.randn(40, 2, 16, generator=source).to(DEVICE, torch.float16)
    slots = torch.randperm(40, generator=source)[:30].to(DEVICE)
    tensors = dict(cache=cache, packed=torch.zeros_like(cache[:30]))
    check(
        lambda cache, packed: pack.gather(cache, slots, packed),
        *(tensors, ["packed"], which, [0]),
    )
    check(
        lambda cache, packed: pack.scatter(packed, slots, cache),
        *(tensors, ["cache"], which, [0]),
    )
