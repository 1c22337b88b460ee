"""Rows of a paged cache to and from packed order: cache to wire buffer, new tokens to slots.

A row is the K or V of one token, all heads. Rows are copied as integers of up to 32 bits, four at
a time where addresses allow it, so any dtype moves bit by bit.
"""

import math

import torch
from ringkern.kernels import configs
from ringkern.kernels.launch import Launch
from ringkern.kernels.target import arch as arch_of
from ringkern.kernels.target import check, check_tensors, tl, triton
from ringkern.kernels.variant import Variant

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes
WIDEST = 512  # words of a row that one program copies


@triton.jit
def _copy_rows(
    cache,  # [num_slots, words]
    packed,  # [rows, words]
    cache_2,  # likewise
    packed_2,
    slots,  # [rows] int64
    rows, num_slots, vectors, cache_row, packed_row, vectors_2, cache_row_2, packed_row_2,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_W words of BLOCK_R rows from a cache to packed order if GATHER, else back.

    Grid: (row blocks, word blocks, 2, or 1 without the second cache). Sizes and strides come in
    vectors of VECTOR words, so that the compiler sees how they are aligned.
    """
    second = tl.program_id(2) == 1
    if second:
        cache, packed = cache_2, packed_2
    vectors = tl.where(second, vectors_2, vectors)
    cache_row = tl.where(second, cache_row_2, cache_row)
    packed_row = tl.where(second, packed_row_2, packed_row)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    # Past the last row: slot -1, which no cache has.
    slot = tl.load(slots + row, mask=row < rows, other=-1)  # [BLOCK_R]
    inside = ((slot >= 0) & (slot < num_slots))[:, None] & (word < vectors * VECTOR)[None, :]
    cache += (slot * cache_row * VECTOR)[:, None] + word[None, :]  # [BLOCK_R, BLOCK_W]
    packed += (row * packed_row * VECTOR)[:, None] + word[None, :]  # likewise
    if GATHER:
        tl.store(packed, tl.load(cache, mask=inside), mask=inside)
    else:
        tl.store(cache, tl.load(packed, mask=inside), mask=inside)


def gather(cache, slots, out) -> None:
    """Copy rows of a cache into out: out[i] = cache[slots[i]], bit by bit.

    Args:
        cache: [num_slots, nheads_k, headdim], any dtype; a row's heads lie together.
        slots: [rows] int64, page * page_size + offset, in the order that out is to have. A row
            whose slot the cache does not have is left as it was, as with -1.
        out: [rows, nheads_k, headdim], of cache's dtype; a row's heads lie together.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    with torch.cuda.device_of(out):
        prepare([cache], slots, [out], "out", gather=True)([cache], slots, [out])


def scatter(x, slots, cache) -> None:
    """Copy rows into a cache: cache[slots[i]] = x[i], bit by bit.

    Arguments and errors as for gather(), with any strides in x. Where a slot comes twice, one of
    its rows is left, nobody knows which.
    """
    with torch.cuda.device_of(x):
        prepare([cache], slots, [x], "x", gather=False)([cache], slots, [x])


def prepare(caches, slots, packed, name: str, *, gather: bool):
    """Check what gather() or scatter() take; return run(caches, slots, packed), which does it.

    To be run often, on the current device, with tensors as launch.Launch takes them in its calls,
    or as [1, ...] of the same.

    Args:
        caches, packed: a list of one each, or of two that go by the same slots, K and V.
        name: of what is packed, in errors.
    """
    if not (gather or all(map(_rows_are_whole, packed))):
        whole = prepare(caches, slots, _contiguous(packed), name, gather=gather)
        return lambda caches, slots, packed: whole(caches, slots, _contiguous(packed))
    for cache, x in zip(caches, packed, strict=True):
        _check(cache, slots, x, name)
    lengths = [len(cache) for cache in caches]
    check(len(set(lengths)) == 1, "caches", "of as many slots", lengths)
    if not (len(slots) and caches[0].numel()):
        return _nothing
    unit = _unit(*caches, *packed)
    word = min(unit, 4)
    vector = unit // word

    def in_words(tensors):
        return [x.flatten(0, -3).flatten(1).view(WORDS[word]) for x in tensors]

    copies = list(zip(in_words(caches), in_words(packed), strict=True))
    words = max(cache.shape[1] for cache, _ in copies)
    blocks, num_warps = _blocks(words, arch_of(slots.device))
    grid = triton.cdiv(len(slots), blocks["BLOCK_R"]), triton.cdiv(words, blocks["BLOCK_W"])
    sizes = [
        size // vector
        for cache, x in (copies[0], copies[-1])
        for size in (cache.shape[1], cache.stride(0), x.stride(0))
    ]
    numbers, constexprs = (len(slots), len(caches[0]), *sizes), dict(VECTOR=vector, **blocks)
    constexprs |= dict(GATHER=gather)
    launch = Launch(_copy_rows, (*grid, len(copies)), numbers, constexprs, num_warps=num_warps)

    def run(caches, slots, packed):
        if not launch.ready:  # then it takes addresses
            caches, packed = in_words(caches), in_words(packed)
        launch(caches[0], packed[0], caches[-1], packed[-1], slots)

    return run


def _check(cache, slots, packed, name):
    check(cache.dim() == 3, "cache", "[num_slots, nheads_k, headdim]", tuple(cache.shape))
    check(slots.dim() == 1, "slots", "[rows]", tuple(slots.shape))
    want = (len(slots), *cache.shape[1:])
    check(packed.shape == want, name, want, tuple(packed.shape))
    check_tensors(cache=cache, slots=slots, **{name: packed})
    check_tensors((torch.int64,), slots=slots)
    check_tensors((cache.dtype,), **{name: packed})
    check(slots.is_contiguous(), "slots", "contiguous", f"stride {slots.stride(0)}")
    for what, x in (("cache", cache), (name, packed)):
        check(_rows_are_whole(x), what, "contiguous rows", f"strides {x.stride()}")


def _contiguous(tensors):
    return [x.contiguous() for x in tensors]


def _nothing(*_) -> None:
    """Copy no row."""


def _rows_are_whole(x):
    """Return whether a row, all dimensions but the first, lies together."""
    return x[:1].is_contiguous()


def _unit(*tensors):
    """Return the bytes, 16 at most, that divide every row's address and size."""
    unit = 16
    for x in tensors:
        numbers = x.storage_offset(), x.stride(0), math.prod(x.shape[1:])
        unit = math.gcd(unit, x.data_ptr(), *(n * x.element_size() for n in numbers))
    return unit


def _blocks(words, arch):
    """Return the sizes of a program's blocks for rows of so many words, and its warps.

    The table's block_m is rows of WIDEST words; of narrower ones it takes more.
    """
    config = configs.pick("pack", arch, 1, 1, "float32")  # a word's bits
    block_w = min(triton.next_power_of_2(words), WIDEST)
    return dict(BLOCK_R=config.block_m * WIDEST // block_w, BLOCK_W=block_w), config.num_warps


def variants(arch: int) -> list[Variant]:
    """Return what offline compilation compiles: both ways, 16 bytes at once and 2."""
    return [
        _variant(arch, "gather-2048-bytes", torch.int32, 512, 4, gather=True),
        _variant(arch, "scatter-2048-bytes", torch.int32, 512, 4, gather=False),
        _variant(arch, "gather-160-bytes", torch.int32, 40, 4, gather=True),
        _variant(arch, "scatter-2-bytes", torch.int16, 1, 1, gather=False),
    ]


def _variant(arch, name, dtype, words, vector, *, gather):
    blocks, num_warps = _blocks(words, arch)
    constexprs = dict(VECTOR=vector, **blocks, GATHER=gather)
    pointer = {torch.int32: "*i32", torch.int16: "*i16"}[dtype]
    signature = dict.fromkeys(_copy_rows.arg_names, "i32")
    signature |= dict.fromkeys(constexprs, "constexpr")
    signature |= dict(
        cache=pointer, packed=pointer, cache_2=pointer, packed_2=pointer, slots="*i64"
    )
    return Variant(
        name=name,
        fn=_copy_rows,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=1,
        divisible_by_16=("cache", "packed", "cache_2", "packed_2", "slots"),
    )
