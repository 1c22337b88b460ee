"""Tensors whose entries lie more than 2^31 elements apart: offsets in 32 bits would wrap.

One tensor at a time gets a large stride along one dimension. The stride itself fits 32 bits, and so
is an int32 for the kernel; what does not fit is its product with a row, head, page or part. There
is room before the tensor, so that an offset that wraps finds zeros and not the end of the process.
Nearly all of that room is memory that nobody touches.
"""

import mmap

import pytest
import torch
from accelerator import DEVICE, ON_GPU
from ringkern.kernels import decode, merge, pack, step
from step_case import cut_of, draw, make_spans, run_of, table_of

REACH = 1 << 31  # elements
BEFORE = 2 * REACH + (1 << 20)  # where offsets end that are a sum of two that wrap
NORESERVE = 0x4000  # Linux; mmap has no name for it in Python 3.10


@pytest.fixture(autouse=True)
def leave_untouched(monkeypatch):
    """Keep Triton's interpreter from copying storages, untouched memory too, onto themselves."""
    copy = torch.UntypedStorage.copy_

    def copy_other(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_other)


@pytest.fixture(autouse=True)
def give_back():
    """Leave the GPU's memory to the tests that follow, and to other processes."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def room(span, dtype):
    """Return zeros: `span` of them from number BEFORE on."""
    size = (BEFORE + span) * dtype.itemsize
    try:
        if ON_GPU:
            return torch.zeros(size // dtype.itemsize, dtype=dtype, device=DEVICE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except (OSError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no room for {size >> 30} GiB of mostly untouched memory: {error}")


def spread(x, dim, wraps=None):
    """Return a copy of x whose entries along dim lie over REACH from the first, from `wraps` on.

    wraps: None: the last one alone.
    """
    wraps = wraps or x.shape[dim] - 1
    stride = (REACH // wraps // 16 + 2) * 16
    assert stride < REACH < wraps * stride
    rest = [n for i, n in enumerate(x.shape) if i != dim]
    strides = list(torch.empty(rest, device="meta").stride())
    strides.insert(dim, stride)
    span = sum((n - 1) * each for n, each in zip(x.shape, strides, strict=True)) + 1
    return room(span, x.dtype).as_strided(x.shape, strides, BEFORE).copy_(x)


def check(call, tensors, written, which, dims, wraps=None):
    """Compare what is written, bit by bit, with and without large strides.

    wraps: {dim: as for spread()}.
    """
    want = {name: x.clone() for name, x in tensors.items()}
    call(**want)
    for dim in dims:
        got = {name: x.clone() for name, x in tensors.items()}
        got[which] = spread(got[which], dim, (wraps or {}).get(dim))
        call(**got)
        for name in written:
            assert torch.equal(got[name], want[name]), f"{name}, {which} with a large stride {dim}"


def spread_parts(monkeypatch, *dims):
    """Let what a launcher makes for the parts of splits lie far apart: tensors of so many dims."""
    make = torch.Tensor.new_empty

    def far(*args, **options):
        x = make(*args, **options)
        return spread(x, 0) if x.dim() in dims else x

    monkeypatch.setattr(torch.Tensor, "new_empty", far)


def noise(*shape, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source).to(DEVICE, dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse", "result"])
def test_step(which, packed):
    """Two whole blocks of keys and one under a mask; a block of 16 keys goes beyond by itself."""
    heads = (6, 3) if packed else (3, 3)
    q, k, v = draw(8, 50, heads, (16, 16), torch.float16, batch=3)
    state = dict(out=noise(3, 8, heads[0], 16), lse=noise(3, heads[0], 8))
    spans = make_spans(run_of(8, 40), run_of(50), True)
    table = table_of(spans, cut_of(q, k, packed, block_m=16, block_n=16))
    assert table.tiles.tolist() == [[0, 8, 0, 1, 2]]
    tensors = dict(q=q, k=k, v=v, **state, result=torch.zeros_like(state["out"], dtype=q.dtype))
    wraps = {1: 15} if which in "kv" else {}
    check(
        lambda **given: step.step(**given, table=table, softmax_scale=0.3, phase="last"),
        *(tensors, ("result", "lse"), which, range(3), wraps),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_parts_of_a_step(packed, monkeypatch):
    q, k, v = draw(8, 50, (2, 1), (16, 16))
    cut = cut_of(q, k, packed, block_m=16, block_n=16)
    table = table_of(make_spans(run_of(8, 42), run_of(50), True), cut, splits=3)
    want = noise(1, 8, 2, 16), noise(1, 2, 8)
    got = [x.clone() for x in want]
    step.step(q, k, v, *want, table, softmax_scale=0.3)
    for part in (4, 5):  # the lses, the outs
        with monkeypatch.context() as patch:
            spread_parts(patch, part)
            some = [x.clone() for x in got]
            step.step(q, k, v, *some, table, softmax_scale=0.3)
        assert all(map(torch.equal, some, want)), f"parts of {part} dimensions"


def paged(dtype):
    """Return a decode's tensors and its other arguments."""
    int32 = dict(dtype=torch.int32, device=DEVICE)
    tensors = dict(
        q=noise(4, 6, 16, dtype=dtype),
        k=noise(64, 3, 16, dtype=dtype, seed=1),
        v=noise(64, 3, 16, dtype=dtype, seed=2),
        out=noise(4, 6, 16),
        lse=noise(6, 4),
        page_table=torch.tensor([[3, 0, 2, 5, 6], [7, 1, 6, 4, 0], [2, 7, 1, 3, 5]], **int32),
    )
    numbers = dict(max_seqlen_q=2, page_size=8, softmax_scale=0.3, seeded=True)
    numbers["seqused_k"] = torch.tensor([40, 25, 17], **int32)
    numbers["cu_seqlens_q"] = torch.tensor([0, 1, 3, 4], **int32)
    return tensors, numbers


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse", "page_table"])
def test_decode(which):
    tensors, numbers = paged(torch.float16)
    dims = range(1 if which == "page_table" else 2)
    check(
        lambda **given: decode.decode(**given, **numbers),
        *(tensors, ("out", "lse"), which, dims),
    )


@pytest.mark.parametrize("dims", [3, 4], ids=["lses", "outs"])
def test_parts_of_a_decode(dims, monkeypatch):
    tensors, numbers = paged(torch.float32)  # of blocks of 16 keys: all three parts have some
    got = {name: x.clone() for name, x in tensors.items()}
    decode.decode(**tensors, **numbers, num_splits=3)
    spread_parts(monkeypatch, dims)
    decode.decode(**got, **numbers, num_splits=3)
    assert torch.equal(got["out"], tensors["out"]) and torch.equal(got["lse"], tensors["lse"])


def test_decode_from_slots_past_2_31():
    """Slots one element apart, so that 2^31 of them fit: what counts is the slot's number.

    Rows of 12 elements are not whole vectors, so that nothing asks them to be aligned.
    """
    first = REACH + 64  # of the slots that hold the sequence
    data = noise(96, dtype=torch.float16)
    far = room(first + 96, torch.float16)[BEFORE:]
    far[first : first + 96] = data
    far = far.as_strided((first + 80, 1, 12), (1, 16, 1))
    near = data.as_strided((80, 1, 12), (1, 16, 1))
    int32 = dict(dtype=torch.int32, device=DEVICE)
    results = []
    for cache, page in ((near, 0), (far, first // 16)):
        out, lse = torch.zeros(1, 1, 12, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
        decode.decode(
            *(near[:1], cache, cache, out, lse),
            page_table=torch.arange(page, page + 5, **int32)[None],
            seqused_k=torch.tensor([77], **int32),
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
    shapes = dict(outs=(3, 3, 8, 3, 16), lses=(3, 3, 3, 8), out=(3, 8, 3, 16), lse=(3, 3, 8))
    tensors = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    dims = range(len(shapes[which]) - (which in ("outs", "out")))
    check(
        lambda **given: merge.merge_into(**given, seeded=True),
        *(tensors, ("out", "lse"), which, dims),
    )


@pytest.mark.parametrize("which", ["outs", "lses"])
def test_merge_of_more_parts_than_it_looks_at_together(which):
    parts = merge.MOST_PARTS + 1
    tensors = dict(outs=noise(parts, 1, 3, 1, 16), lses=noise(parts, 1, 1, 3, seed=1))
    tensors |= dict(out=noise(1, 3, 1, 16), lse=noise(1, 1, 3))
    check(
        lambda **given: merge.merge_into(**given),
        *(tensors, ("out", "lse"), which, [0], {0: merge.MOST_PARTS}),
    )


@pytest.mark.parametrize("which", ["cache", "packed"])
def test_pack(which):
    """Of float32, so that offsets in words are those in elements."""
    cache = noise(40, 2, 16)
    slots = torch.arange(39, 9, -1, device=DEVICE)
    tensors = dict(cache=cache, packed=torch.zeros_like(cache[:30]))
    check(
        lambda cache, packed: pack.gather(cache, slots, packed),
        *(tensors, ["packed"], which, [0]),
    )
    check(
        lambda cache, packed: pack.scatter(packed, slots, cache),
        *(tensors, ["cache"], which, [0]),
    )
