"""The copies between a paged cache and packed order: bit by bit, any dtype, nothing else."""

import pytest
import torch
from accelerator import DEVICE
from ringkern.kernels import pack
from ringkern.pages import PageTable

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
EVERY = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
EACH_DTYPE = pytest.mark.parametrize("dtype", EVERY, ids=lambda x: str(x).removeprefix("torch."))


def bits(x):
    return x.view(INTEGERS[x.element_size()])


def noise(*shape, dtype, seed=0):
    """Return random bits of a dtype, NaN among them."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    wide = (*shape[:-1], shape[-1] * size)
    raw = torch.randint(0, 256, wide, generator=draw, dtype=torch.uint8)
    return raw.view(dtype).to(DEVICE)


def some_slots(num_slots, rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(num_slots, generator=draw)[:rows].to(DEVICE)


def inside_of(x, dtype, room=8):
    """Return a copy of x whose rows lie in wider ones, and the whole, poisoned around it."""
    rows, heads, headdim = x.shape
    whole = noise(rows + 2, heads * headdim + 2 * room, dtype=dtype, seed=1)
    view = whole[1:-1].as_strided(
        x.shape,
        (whole.shape[1], headdim, 1),
        whole.shape[1] + room,
    )
    bits(view).copy_(bits(x))
    return view, whole


# nheads_k, headdim: rows of odd bytes, of a vector and a bit, of more than a block.
ROWS = [(1, 1), (1, 5), (3, 7), (1, 24), (2, 80), (8, 128), (5, 256)]


@pytest.mark.parametrize("nheads_k, headdim", ROWS)
@EACH_DTYPE
def test_gather_and_scatter_move_rows_and_nothing_else(nheads_k, headdim, dtype):
    num_slots, rows = 50, 21
    source = noise(num_slots, nheads_k, headdim, dtype=dtype)
    slots = some_slots(num_slots, rows)
    cache, whole = inside_of(source, dtype)
    packed, around = inside_of(noise(rows, nheads_k, headdim, dtype=dtype, seed=2), dtype)

    before = bits(around).clone()
    pack.gather(cache, slots, packed)
    assert torch.equal(bits(packed), bits(source)[slots])
    bits(packed).copy_(bits(noise(rows, nheads_k, headdim, dtype=dtype, seed=2)))
    assert torch.equal(bits(around), before)

    want = bits(whole).clone()
    bits(cache)[slots] = bits(packed)
    want, bits(whole)[:] = bits(whole).clone(), want
    pack.scatter(packed, slots, cache)
    assert torch.equal(bits(whole), want)


@pytest.mark.parametrize("nheads_k, headdims", [(1, (1, 5)), (3, (72, 8)), (8, (64, 128))])
@EACH_DTYPE
def test_k_and_v_go_together(nheads_k, headdims, dtype):
    """Of any two widths, each with strides of its own, by the same slots."""
    slots = some_slots(50, 21)
    sources = [noise(50, nheads_k, d, dtype=dtype, seed=d) for d in headdims]
    caches, _ = zip(*(inside_of(x, dtype, 16 * i) for i, x in enumerate(sources)), strict=True)
    packed = [torch.zeros(21, 2 * nheads_k, d, dtype=dtype, device=DEVICE) for d in headdims]
    packed = [x[:, nheads_k:] for x in packed]
    pack.prepare(caches, slots, packed, "out", gather=True)(caches, slots, packed)
    for x, source in zip(packed, sources, strict=True):
        assert torch.equal(bits(x), bits(source)[slots])
        bits(x).copy_(bits(noise(*x.shape, dtype=dtype, seed=3)))
    pack.prepare(caches, slots, packed, "x", gather=False)(caches, slots, packed)
    for x, source, cache in zip(packed, sources, caches, strict=True):
        want = bits(source).clone()
        want[slots] = bits(x)
        assert torch.equal(bits(cache), want)


def test_k_and_v_have_as_many_slots():
    caches = [torch.zeros(n, 1, 8, device=DEVICE) for n in (9, 8)]
    packed, slots = [torch.zeros(3, 1, 8, device=DEVICE)] * 2, some_slots(8, 3)
    with pytest.raises(ValueError, match=r"caches: want of as many slots, got \[9, 8\]"):
        pack.prepare(caches, slots, packed, "out", gather=True)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4, 8])
def test_any_alignment(shift):
    """Tensors that begin anywhere: vectors of 16 bytes down to single elements."""
    flat = noise(shift + 40 * 2 * 64, dtype=torch.bfloat16)
    cache = flat[shift:].view(40, 2, 64)
    out = torch.zeros(9 * 128 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(9, 2, 64)
    slots = some_slots(40, 9)
    pack.gather(cache, slots, out)
    assert torch.equal(bits(out), bits(cache)[slots])
    aligned = torch.zeros(9, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    pack.gather(cache, slots, aligned)
    assert torch.equal(bits(aligned), bits(out))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_pages_come_in_the_order_of_their_tokens(page_size):
    """Sequences that grew by turns, so that their pages mix, and one without tokens."""
    table, lengths = PageTable(200, page_size), [0, 0, 0]
    for more in ((3, 0, 1), (40, 0, 7), (1, 0, 30)):
        for number, count in enumerate(more):
            table.append(number, count)
            lengths[number] += count
    slots = [s for n in range(3) for a, count in table.slots(n) for s in range(a, a + count)]
    assert len(slots) == len(set(slots)) == sum(lengths)
    slots = torch.tensor(slots, device=DEVICE)
    tokens = noise(len(slots), 2, 16, dtype=torch.float16)
    cache = torch.zeros(200 * page_size, 2, 16, dtype=torch.float16, device=DEVICE)
    pack.scatter(tokens, slots, cache)
    held = torch.zeros(len(cache), dtype=torch.bool, device=DEVICE)
    held[slots] = True
    assert (bits(cache)[~held] == 0).all()
    again = torch.zeros_like(tokens)
    pack.gather(cache, slots, again)
    assert torch.equal(bits(again), bits(tokens))


def test_slots_that_are_not_there_move_nothing():
    cache = noise(10, 1, 16, dtype=torch.float32)
    slots = torch.tensor([3, -1, 10, 9, -(2**40), 2**40], device=DEVICE)
    there = torch.tensor([True, False, False, True, False, False], device=DEVICE)
    out = noise(6, 1, 16, dtype=torch.float32, seed=1)
    want = torch.where(there[:, None, None], bits(cache)[slots.clamp(0, 9)], bits(out))
    pack.gather(cache, slots, out)
    assert torch.equal(bits(out), want)
    new = noise(6, 1, 16, dtype=torch.float32, seed=2)
    want = bits(cache).clone()
    want[slots[there]] = bits(new)[there]
    pack.scatter(new, slots, cache)
    assert torch.equal(bits(cache), want)


def test_new_tokens_of_any_strides():
    """K as a part of a fused projection is copied as it lies; heads apart are gathered first."""
    fused = noise(7, 3 * 2, 24, dtype=torch.float32)
    slots = some_slots(30, 7)
    for x in (fused[:, 2:4], fused[:, ::3], fused[:, 2:4, ::2], fused.transpose(1, 2), fused[:1]):
        x = x.expand(7, -1, -1)
        cache = torch.zeros(30, *x.shape[1:], device=DEVICE)
        pack.scatter(x, slots, cache)
        assert torch.equal(bits(cache)[slots], bits(x.contiguous()))


def test_no_rows_are_no_launch():
    cache, slots = noise(4, 1, 8, dtype=torch.float32), some_slots(4, 0)
    pack.gather(cache, slots, cache[:0])
    pack.scatter(cache[:0], slots, cache)
    pack.gather(cache[:0], torch.full((2,), -1, device=DEVICE), cache[:2].clone())


def refusals():
    cache, out = torch.zeros(9, 2, 8, device=DEVICE), torch.zeros(3, 2, 8, device=DEVICE)
    slots = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    return [
        (cache[0], slots, out, r"cache: want \[num_slots, nheads_k, headdim\]"),
        (cache, slots, out[:2], r"out: want \(3, 2, 8\), got \(2, 2, 8\)"),
        (cache, slots, out.half(), "out: want torch.float32, got torch.float16"),
        (cache, slots.int(), out, "slots: want torch.int64, got torch.int32"),
        (cache, slots[:2].repeat(3)[::2], out, "slots: want contiguous"),
        (cache, slots[None], out, r"slots: want \[rows\]"),
        (cache.mT.contiguous().mT, slots, out, "cache: want contiguous rows"),
        (cache, slots, out.mT.contiguous().mT, "out: want contiguous rows"),
        (cache, slots, torch.zeros(3, 2, 8, device="meta"), "out: want a tensor on"),
    ]


@pytest.mark.parametrize("cache, slots, out, match", refusals())
def test_gather_refuses(cache, slots, out, match):
    with pytest.raises(ValueError, match=match):
        pack.gather(cache, slots, out)
