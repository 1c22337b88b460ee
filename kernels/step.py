"""One ring step in Triton: tiles of queries against pieces of K and V, into a running state.

State per query row and head: the normalised out and the lse over the keys seen so far, float32. A
program owns a tile of rows for one head, or for a group of heads: it loads their state as its
accumulator, goes through the tile's keys and writes the state back, so a step needs no merge.
Scores are in base 2 inside; the scale carries log2(e).
"""

import itertools
import math

import torch
from ringkern.kernels import configs, target
from ringkern.kernels import merge as merges
from ringkern.kernels.cut import Table, choose_cut
from ringkern.kernels.launch import Launch
from ringkern.kernels.softmax import finish, fold, load_rows, scales, start
from ringkern.kernels.target import check, tl, triton
from ringkern.kernels.variant import Variant

TILE = tl.constexpr(5)  # numbers of a tile in a cut.Table
PIECE = tl.constexpr(6)  # and of a piece
FARTHEST = tl.constexpr((1 << 31) - 1)  # beyond any position
PHASES = configs.PHASES
LONG = 4096  # queries, of variants: any number that fills tiles
MANY_VALUES = 80  # scores and outs in a thread: few registers are left, and softcap takes some
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _step(
    q,  # [batch, seqlen_q, nheads, headdim]
    k,  # [batch, seqlen_k, nheads_k, headdim]
    v,  # [batch, seqlen_k, nheads_k, headdim_v]
    out,  # [batch, seqlen_q, nheads, headdim_v]: the state that is read, if SEED is "state"
    lse,  # [batch, nheads, seqlen_q], likewise
    result,  # [splits, batch, rows, nheads, headdim_v], from query row `row0` on: what is written
    result_lse,  # [splits, batch, nheads, rows]
    sinks,  # [nheads]
    tiles,  # [ntiles * splits, TILE]: q0, q1, begin, middle, end
    pieces,  # [npieces, PIECE]: k0, k1, lo, hi, q_stride, k_stride
    splits, row0, scale2, cap2,  # strides of q, k and v are in vectors of VECTOR elements
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, lse_batch, lse_head, lse_row,
    result_split, result_batch, result_row, result_head,
    result_lse_split, result_lse_batch, result_lse_head, result_lse_row,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
    SEED: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr, VECTOR: tl.constexpr, VECTOR_V: tl.constexpr,
):  # fmt: skip
    """Add the keys of a tile's pieces, or a split of them, to what its rows have seen.

    Grid: (ntiles * splits, heads, batch), heads of K and V if PACKED.
    """
    index, head_or_group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tiles += index * TILE
    q0, q1, begin = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    middle, end = tl.load(tiles + 3), tl.load(tiles + 4)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if PACKED:  # a row of the tile is a token and one of a group's heads
        head_k = head_or_group
        token, head = m // GROUP, head_k * GROUP + m % GROUP  # [BLOCK_M]
    else:
        head_k = head_or_group // GROUP
        token, head = m, tl.full([BLOCK_M], head_or_group, tl.int64)  # [BLOCK_M]
    inside = token < q1 - q0  # [BLOCK_M]
    row = q0.to(tl.int64) + token  # [BLOCK_M]

    split = (index % splits).to(tl.int64) if SPLIT else 0
    seeded = inside & (split == 0)
    out_at = out + batch * out_batch + row * out_row + head * out_head  # [BLOCK_M], as lse_at
    lse_at = lse + batch * lse_batch + row * lse_row + head * lse_head
    acc, top, mass = start(out_at, lse_at, sinks + head, seeded, HEADDIM_V, SEED, BLOCK_M, BLOCK_DV)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q += (batch * q_batch + row * q_row + head * q_head)[:, None] * VECTOR + d[None, :]
    q_tile = load_rows(q, inside, HEADDIM, BLOCK_D, AXIS=1)  # [BLOCK_M, BLOCK_D]

    k_row, v_row = tl.cast(k_row, tl.int64) * VECTOR, tl.cast(v_row, tl.int64) * VECTOR_V
    kt_at = k + (batch * k_batch + head_k * k_head) * VECTOR + n[None, :] * k_row + d[:, None]
    v_at = v + (batch * v_batch + head_k * v_head) * VECTOR_V + n[:, None] * v_row + dv[None, :]
    # Whole blocks of keys that all rows see: kt [BLOCK_D, BLOCK_N], v_block [BLOCK_N, BLOCK_DV].
    for piece in range(begin, middle):
        piece_at = pieces + piece * PIECE
        k0, k1 = tl.load(piece_at), tl.load(piece_at + 1)
        for j in tl.range(k0, k1, BLOCK_N):
            kt = load_rows(kt_at + j * k_row, None, HEADDIM, BLOCK_D, AXIS=0)
            v_block = load_rows(v_at + j * v_row, None, HEADDIM_V, BLOCK_DV, AXIS=1)
            acc, top, mass = fold(
                acc, top, mass, q_tile, kt, v_block, None, scale2, cap2,
                False, SOFTCAP, NEGATIVE, PRECISION,
            )  # fmt: skip
    # Keys under a mask: token t sees key k0 + i iff lo <= i * k_stride - t * q_stride <= hi.
    # Shapes as above.
    for piece in range(middle, end):
        piece_at = pieces + piece * PIECE
        k0, k1 = tl.load(piece_at), tl.load(piece_at + 1)
        lo, hi = tl.load(piece_at + 2), tl.load(piece_at + 3)
        q_stride, k_stride = tl.load(piece_at + 4), tl.load(piece_at + 5)
        # hi + behind, but at most FARTHEST: 32 bits would wrap.
        behind = token * q_stride  # [BLOCK_M], as low and high
        low, high = lo + behind, tl.minimum(hi, -behind + FARTHEST) + behind
        for j in tl.range(k0, k1, BLOCK_N):
            there = j + n < k1  # [BLOCK_N]
            kt = load_rows(kt_at + j * k_row, there, HEADDIM, BLOCK_D, AXIS=0)
            v_block = load_rows(v_at + j * v_row, there, HEADDIM_V, BLOCK_DV, AXIS=1)
            # Keys that are not there lie left of every band.
            ahead = tl.where(there, (j - k0 + n) * k_stride, -FARTHEST)[None, :]
            visible = (ahead >= low[:, None]) & (ahead <= high[:, None])  # [BLOCK_M, BLOCK_N]
            acc, top, mass = fold(
                acc, top, mass, q_tile, kt, v_block, visible, scale2, cap2,
                True, SOFTCAP, NEGATIVE, PRECISION,
            )  # fmt: skip

    row -= row0
    result += split * result_split + batch * result_batch
    result_lse += split * result_lse_split + batch * result_lse_batch
    result_at = result + row * result_row + head * result_head  # [BLOCK_M], as result_lse_at
    result_lse_at = result_lse + row * result_lse_row + head * result_lse_head
    finish(acc, top, mass, result_at, result_lse_at, lse_at, inside, HEADDIM_V, BLOCK_DV, SEED)


def step(
    q, k, v, out, lse, table: Table, *, softmax_scale: float, softcap: float = 0.0,
    phase: str = "middle", result=None, sinks=None, allow_tf32: bool = False,
) -> None:  # fmt: skip
    """Add the keys of a table to the running (out, lse), in place.

    Args:
        q: [batch, seqlen_q, nheads, headdim], float16, bfloat16 or float32. The last dimension of
            every tensor but lse must be contiguous. Other strides are free, but in q, k and v, where
            a row is a multiple of 16 bytes, they and the address must be, too. Other rows are read
            piece by piece, several times slower.
        k, v: [batch, seqlen_k, nheads_k, headdim] and [..., headdim_v], of q's dtype.
        out: [batch, seqlen_q, nheads, headdim_v] float32, normalised; None in phase "only".
        lse: [batch, nheads, seqlen_q] float32, natural log, +inf excepted; -inf where nothing was
            seen, and out is not looked at there.
        table: rows that are in no tile are neither read nor written.
        softmax_scale: any finite number.
        softcap: scores become softcap * tanh(score / softcap); 0: they stay.
        phase: "middle" reads the state and writes it. "first" has none to read. "last" writes out
            to `result` instead, "only" does both.
        result: [batch, seqlen_q, nheads, headdim_v] in q's dtype, for "last" and "only".
        sinks: [nheads], the score of one more key whose value is 0, for "first" and "only".
        allow_tf32: lets float32 products be of 10 bits, several times faster.

    Raises:
        ValueError: an argument does not fit; nothing was computed.
    """
    options = dict(softmax_scale=softmax_scale, softcap=softcap, phase=phase, allow_tf32=allow_tf32)
    with torch.cuda.device_of(q):
        prepare(q, k, v, out, lse, table, result=result, sinks=sinks, **options)(
            q, k, v, out, lse, result, sinks
        )


def prepare(
    q, k, v, out, lse, table: Table, *, softmax_scale: float, softcap: float = 0.0,
    phase: str = "middle", result=None, sinks=None, allow_tf32: bool = False,
):  # fmt: skip
    """Check what step() takes; return run(q, k, v, out, lse, result, sinks), which does it.

    To be run often, on the current device, with tensors as launch.Launch takes them in its calls.
    """
    ends = phase not in ("first", "middle")
    written = result if ends else out
    _check(q, k, v, out, lse, table, softmax_scale, softcap, phase, written, sinks)
    if not (len(table.tiles) and q.shape[0] and q.shape[2]):
        return _nothing
    seed = _seed(phase, sinks is not None)
    options, state = (softmax_scale, softcap, allow_tf32), written if out is None else out
    if table.splits == 1:
        launch = _launch(q, k, v, state, lse, table, *options, written[None], lse[None], 0, seed)

        def run(q, k, v, out, lse, result=None, sinks=None):
            written = result if ends else out
            launch(
                q, k, v, written if out is None else out, lse, written, lse,
                lse if sinks is None else sinks, table.tiles, table.pieces,
            )  # fmt: skip

        return run
    # The state joins with the parts, or as part 0 where what is written is not the state.
    first, last, seeded = table.rows[0], table.rows[-1], phase == "middle"
    shape = (table.splits, q.shape[0], last - first, *written.shape[2:])
    some = merges.empty_parts(q, *shape)
    launch = _launch(
        q, k, v, state, lse, table, *options, *some, first, "none" if seeded else seed
    )  # fmt: skip

    def slices(parts, lses, written, lse):
        for a, b in zip(table.rows[::2], table.rows[1::2], strict=True):
            some = parts[:, :, a - first : b - first], lses[..., a - first : b - first]
            yield *some, written[:, a:b], lse[:, :, a:b]

    joins = [merges.prepare(*each, seeded=seeded) for each in slices(*some, written, lse)]

    def run_splits(q, k, v, out, lse, result=None, sinks=None):
        written = result if ends else out
        parts, lses = merges.empty_parts(q, *shape)
        launch(
            q, k, v, written if out is None else out, lse, parts, lses,
            lse if sinks is None else sinks, table.tiles, table.pieces,
        )  # fmt: skip
        for join, each in zip(joins, slices(parts, lses, written, lse), strict=True):
            join(*each)

    return run_splits


def _nothing(*_) -> None:
    """Run a step that has no keys or no rows."""


def _seed(phase, sinks):
    """Return what a tile starts from."""
    return "state" if phase in ("middle", "last") else "sinks" if sinks else "none"


def _launch(
    q, k, v, out, lse, table, softmax_scale, softcap, allow_tf32, result, result_lse, row0, seed
):
    cut = table.cut
    grid = len(table.tiles), q.shape[2] // cut.group, q.shape[0]
    numbers = (
        table.splits, row0, *scales(softmax_scale, softcap), *target.vector_strides(q, k, v),
        *out.stride()[:3], *lse.stride(), *result.stride()[:4], *result_lse.stride(),
    )  # fmt: skip
    constexprs = _constexprs(
        cut, q.shape[2] // k.shape[2], q.shape[3], v.shape[3], q.itemsize, seed, table.splits > 1,
        softcap != 0, softmax_scale < 0, "tf32" if allow_tf32 else "ieee",
    )  # fmt: skip
    options = dict(num_warps=cut.num_warps, num_stages=cut.num_stages, maxnreg=cut.registers)
    return Launch(_step, grid, numbers, constexprs, **options)


def _constexprs(
    cut, group, headdim, headdim_v, itemsize, seed, split, softcap, negative, precision
):
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (headdim, headdim_v))
    return dict(
        HEADDIM=headdim, HEADDIM_V=headdim_v, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, GROUP=group, PACKED=cut.group > 1, SEED=seed,
        SPLIT=split, SOFTCAP=softcap, NEGATIVE=negative, PRECISION=precision,
        VECTOR=target.vector(headdim, itemsize), VECTOR_V=target.vector(headdim_v, itemsize),
    )  # fmt: skip


def _check(q, k, v, out, lse, table, softmax_scale, softcap, phase, written, sinks):
    check(phase in PHASES, "phase", f"one of {', '.join(PHASES)}", repr(phase))
    ends = phase in ("last", "only")
    check(written is not None, "result" if ends else "out", "a tensor", None)
    check(phase != "last" or out is not None, "out", "a state", None)
    check(sinks is None or phase in ("first", "only"), "sinks", "phase first or only", phase)
    check(math.isfinite(softmax_scale), "softmax_scale", "a finite number", softmax_scale)
    check(0 <= softcap < math.inf, "softcap", "0 or more", softcap)
    tensors = dict(q=q, k=k, v=v, out=out, lse=lse, result=written if ends else None, sinks=sinks)
    tensors |= dict(table=table.tiles, pieces=table.pieces)
    tensors = {name: x for name, x in tensors.items() if x is not None}
    float32, int32 = (torch.float32,), (torch.int32,)
    dtypes = dict(q=DTYPES, k=(q.dtype,), v=(q.dtype,), out=float32, lse=float32, sinks=DTYPES)
    dtypes |= dict(result=(q.dtype,), table=int32, pieces=int32)
    target.check_tensors(**tensors)
    for name, x in tensors.items():
        target.check_tensors(dtypes[name], **{name: x})
    _check_shapes(tensors, table)


def _check_shapes(tensors, table):
    q, k, v = (tensors[name] for name in "qkv")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.dim() == 4, name, "[batch, seqlen, heads, headdim]", tuple(x.shape))
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k, headdim_v = k.shape[1], k.shape[2], v.shape[3]
    fits = 0 < min(headdim, headdim_v) <= max(headdim, headdim_v) <= 256
    check(fits, "headdim", "1 to 256", (headdim, headdim_v))
    fits = batch < 1 << 16 and nheads < 1 << 16
    check(fits, "q", "batch and nheads below 65536", (batch, nheads))
    longest = max(seqlen_q, seqlen_k)
    check(longest <= target.MAX_ROWS, "seqlen", f"at most {target.MAX_ROWS}", longest)
    check(nheads_k > 0 and nheads % nheads_k == 0, "nheads", f"a multiple of {nheads_k}", nheads)
    shapes = dict(
        k=(batch, seqlen_k, nheads_k, headdim),
        v=(batch, seqlen_k, nheads_k, headdim_v),
        out=(batch, seqlen_q, nheads, headdim_v),
        lse=(batch, nheads, seqlen_q),
        sinks=(nheads,),
        table=(len(table.tiles), TILE.value),
        pieces=(len(table.pieces), PIECE.value),
    )
    shapes |= dict(q=tuple(q.shape), result=shapes["out"])
    for name, x in tensors.items():
        check(tuple(x.shape) == shapes[name], name, shapes[name], tuple(x.shape))
        unit = name == "lse" or x.stride(-1) == 1 or x.shape[-1] == 1 or not x.numel()
        check(unit, name, "a last stride of 1", x.stride(-1))
    for name, x in (("table", table.tiles), ("pieces", table.pieces)):
        check(x.numel() <= target.MAX_ROWS, name, f"at most {target.MAX_ROWS} numbers", x.numel())
        check(x.is_contiguous(), name, "contiguous", f"strides {x.stride()}")
    target.check_aligned(q=q, k=k, v=v)
    group, end = nheads // nheads_k, max(table.rows, default=0)
    check(table.cut.group in (1, group), "table", f"1 or {group} heads packed", table.cut.group)
    check(end <= seqlen_q, "table", f"query rows up to {seqlen_q}", end)


def variants(arch: int) -> list[Variant]:
    """Return what offline compilation compiles: every cut that a step can have, in each phase.

    Each has a full and a masked loop. One whose keys are split needs all registers that it needs
    otherwise, so that it stands for both. A float32 step's result is of its state's dtype, so that
    "last" is the kernel of "middle", and "only" that of "first"; the compiler may spill there for
    any headdim, so that narrower ones are compiled, too.
    """
    bf16, found = "bfloat16", []

    def add(*shape, **options):
        found.append(_variant(arch, *shape, **options))

    for dtype, phases in ((bf16, PHASES), ("float32", PHASES[:2])):
        for row, places in _rows(arch, dtype, phases).items():
            start_phase, (d, rows) = next(iter(places.items()))
            add(dtype, d, d, rows, start_phase, split=True, softcap=True)
            if dtype == "float32":
                add(dtype, 5 * d // 8, 3 * d // 4, rows, start_phase, negative=True)
            for phase, (d, rows) in places.items():
                values = row.config.block_m * (row.config.block_n + d)
                tight = dtype == bf16 and values >= MANY_VALUES * 32 * row.config.num_warps
                # The parts of "middle" have no state to start from.
                capped = phase == start_phase != "middle"
                if tight or not capped:
                    add(dtype, d, d, rows, phase, softcap=rows != LONG and phase == "last")
                if tight and not capped:
                    add("float16", 3 * d // 4, 3 * d // 4, rows, phase, softcap=True)
                if tight:
                    add("float16", 3 * d // 4, 3 * d // 4, row.config.block_m, phase)
    add(bf16, 192, 128, LONG, "middle")
    add(bf16, 128, 128, LONG, "first", negative=True)
    add(bf16, 128, 128, LONG, "last", negative=True)
    add(bf16, 72, 72, LONG, "middle")
    add(bf16, 72, 72, LONG, "first", split=True, softcap=True)
    add(bf16, 128, 128, LONG, "first", sinks=True)
    add("float32", 128, 128, LONG, "middle", precision="tf32")
    return found


def _rows(arch, dtype, phases):
    """Return the table's rows that apply, as {row: {phase: (headdim, rows of the tile)}}."""
    dims = sorted({row.headdim for row in configs.ROWS if row.kernel == "step"}, reverse=True)
    found = {}
    for d, rows, phase in itertools.product(dims, (LONG, 64, 32, 16), phases):
        row = configs.find("step", arch, d, d, dtype, phase, rows)
        found.setdefault(row, {}).setdefault(phase, (d, rows))
    return found


def _variant(
    arch, dtype, headdim, headdim_v, rows, phase, *, sinks=False, split=False, softcap=False,
    negative=False, precision="ieee",
):  # fmt: skip
    """Return a step of 64 heads in groups of 8 whose tiles have use for so many rows."""
    tokens = rows if rows == LONG else rows // 8
    words = [dtype, f"d{headdim}", *[f"dv{headdim_v}"] * (headdim_v != headdim), phase]
    words += [f"rows{rows}"] * (rows != LONG)
    options = dict(sinks=sinks, split=split, softcap=softcap, negative=negative)
    options[precision] = precision != "ieee"
    words += [word for word, given in options.items() if given]
    cut = choose_cut(64, 8, headdim, headdim_v, dtype, arch, tokens, phase)
    seed = "none" if split and phase == "middle" else _seed(phase, sinks)
    itemsize = configs.DTYPES[dtype] // 8
    constexprs = _constexprs(
        cut, 8, headdim, headdim_v, itemsize, seed, split, softcap, negative, precision
    ) | dict(lse_row=1, result_lse_row=1)
    pointer = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    signature = dict.fromkeys(_step.arg_names, "i32") | dict.fromkeys(constexprs, "constexpr")
    signature |= dict.fromkeys(("q", "k", "v"), pointer) | dict(scale2="fp32", cap2="fp32")
    signature |= dict.fromkeys(("out", "lse", "result", "result_lse", "sinks"), "*fp32")
    if phase in ("last", "only") and not split:
        signature["result"] = pointer
    signature |= dict(tiles="*i32", pieces="*i32")
    plain = ("splits", "row0", "scale2", "cap2", "lse_batch", "lse_head", "result_lse_split")
    plain += ("result_lse_batch", "result_lse_head")
    if headdim_v % 16:  # which is no matter of parts: merge.empty_parts() pads them
        plain += ("out_head", *["result_head"] * (not split))
    plain += tuple(x for x in signature if x[:2] in ("q_", "k_", "v_"))  # in vectors: any number
    expects = {"pipelined"}
    if tokens == LONG and dtype != "float32" and arch == 90:
        expects.add("wgmma")
    if dtype != "float32" or precision == "tf32":
        expects.add("mma")
    return Variant(
        name="-".join(words),
        fn=_step,
        signature=signature,
        constexprs=constexprs,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        maxnreg=cut.registers,
        divisible_by_16=tuple(x for x in signature if x not in constexprs and x not in plain),
        expects=frozenset(expects),
    )
