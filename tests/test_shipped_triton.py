"""Every tile shape that ships, on a GPU it ships for, at lengths around the tile's borders.

The interpreter has no bfloat16 and takes up to two minutes for one of them. Where there is no GPU,
a table of small rows stands in for the one that ships, and a few cases of each kernel run through
the same code.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerator import DEVICE, ON_GPU
from close import assert_close, assert_lse_close
from ringkern.kernels import configs, merge, reference, target
from ringkern.kernels.cut import choose_cut
from step_case import add, draw, make_spans, poisoned, run_of
from test_decode_triton import draw_case, run, wanted
from test_merge_triton import assert_merged, empty_some, parts_of

on_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU: such tiles take the interpreter too long")
PHASES = "first", "middle", "last", "only"
LONG = 1 << 20  # queries: tiles are as large as they get
NHEADS_K = 2
HISTORY = 7  # keys of a sequence that the state of a step in phase "middle" or "last" has seen


class StepCase(NamedTuple):
    dtype: str
    headdim: int
    headdim_v: int
    phase: str
    tokens: int = LONG  # for which the cut is chosen
    group: int = 2
    softcap: float = 0.0
    splits: int = 1


class DecodeCase(NamedTuple):
    dtype: str
    headdim: int
    headdim_v: int
    queries: tuple = ()  # of each sequence; (): around what fills a tile
    causal: bool = False
    softcap: float = 0.0
    splits: int = 1
    seeded: bool = False


class MergeCase(NamedTuple):
    dtype: str
    headdim: int
    parts: int
    seeded: bool = False


def make_steps():
    """Return a case for every row and phase, and for what else makes another kernel."""
    bf16, fp16, fp32 = "bfloat16", "float16", "float32"
    dims = [(d, d) for d in (64, 80, 96, 128, 192, 256)] + [(192, 128), (64, 128)]
    some = [(64, 64), (128, 128), (256, 256)]
    two = "middle", "only"  # a step that has a state to read, and one that has none
    for dtype, sizes, phases in ((bf16, dims, PHASES), (fp16, some, two), (fp32, some, PHASES)):
        yield from (StepCase(dtype, *d, phase) for d in sizes for phase in phases)
    for d, phase in itertools.product(some, two):
        yield StepCase(bf16, *d, phase, softcap=3.0)
        yield StepCase(fp32 if d[0] == 64 else bf16, *d, phase, splits=3)
    # Few queries, whose heads share tiles of 16, 32 and 64 rows.
    for d, tokens in itertools.product(some, (2, 4, 8)):
        yield from (StepCase(bf16, *d, phase, tokens, group=8) for phase in two)
        yield StepCase(fp32, *d, "middle", tokens, group=8)


def make_decodes():
    for d in ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)):
        yield DecodeCase("bfloat16", *d)
        yield DecodeCase("bfloat16", *d, (1,), causal=True, seeded=True)
    for dtype, d in itertools.product(("float16", "float32"), (128, 256)):
        yield DecodeCase(dtype, d, d, causal=True, splits=3)
        yield DecodeCase(dtype, d, d, (1,), softcap=3.0)


def make_merges():
    for dtype, d in itertools.product(("bfloat16", "float16", "float32"), (128, 256)):
        yield MergeCase(dtype, d, parts=2)
        yield MergeCase(dtype, d, parts=19, seeded=True)


STEPS, DECODES, MERGES = list(make_steps()), list(make_decodes()), list(make_merges())


def around(block):
    return [max(block - 1, 1), block + 1, 3 * block + 5]


class Sequence(NamedTuple):
    """A sequence of a step: its query rows, and its keys, of which the state has seen the first."""

    rows: range
    keys: range
    seen: int

    @property
    def start(self):
        """Position of the first query: the last stands at the last key."""
        return len(self.keys) - len(self.rows)


def lay_out(lengths, seen):
    """Return sequences of these (queries, keys), packed; each has `seen` keys before."""
    q0 = k0 = 0
    for seqlen_q, seqlen_k in lengths:
        yield Sequence(range(q0, q0 + seqlen_q), range(k0, k0 + seen + seqlen_k), seen)
        q0, k0 = q0 + seqlen_q, k0 + seen + seqlen_k


def oracle(q, k, v, sequences, *, history=False, dtype=torch.float64, **options):
    """Return (out, lse) on the CPU, of all keys or of those that the state has seen."""
    outs, lses = [], []
    for one in sequences:
        count = one.seen if history else len(one.keys)
        keys = slice(one.keys.start, one.keys.start + count)
        where = dict(q_pos=one.start + torch.arange(len(one.rows)), k_pos=torch.arange(count))
        rows = q[:, one.rows.start : one.rows.stop]
        out, lse = reference.attn(rows, k[:, keys], v[:, keys], **where, dtype=dtype, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def check_step(case):
    """Any two lengths around the tile's borders, full and causal, against the definition."""
    dtype, seeded = getattr(torch, case.dtype), case.phase in ("middle", "last")
    heads, dims = (case.group * NHEADS_K, NHEADS_K), (case.headdim, case.headdim_v)
    arch = target.arch(DEVICE)
    cut = choose_cut(*heads, *dims, case.dtype, arch, case.tokens, case.phase)
    lengths = itertools.product(around(cut.block_q), around(cut.block_n))
    sequences = list(lay_out(lengths, HISTORY if seeded else 0))
    total_q, total_k = sequences[-1].rows.stop, sequences[-1].keys.stop
    q, k, v = draw(total_q, total_k, heads, dims, dtype)
    host = [x.cpu() for x in (q, k, v)]
    q_runs, k_runs = [], []
    for seq, (rows, keys, seen) in enumerate(sequences):
        q_runs += [*run_of(len(rows), sequences[seq].start, offset=rows.start, seq=seq)]
        k_runs += [*run_of(len(keys) - seen, seen, offset=keys.start + seen, seq=seq)]
    for causal in (False, True):
        options = dict(causal=causal, softcap=case.softcap)
        out, lse = poisoned(q, case.headdim_v)
        if seeded:
            state = oracle(*host, sequences, history=True, **options)
            for x, held in zip((out, lse), state, strict=True):
                x.copy_(held)
        result = poisoned(q, case.headdim_v, dtype)[0] if case.phase in ("last", "only") else None
        given = dict(cut=cut, splits=case.splits, phase=case.phase, result=result)
        given |= dict(rows=0 if case.phase == "middle" else total_q, softcap=case.softcap)
        spans = make_spans(np.array(q_runs), np.array(k_runs), causal)
        add(q, k, v, None if case.phase == "only" else out, lse, spans, **given)
        found = (out if result is None else result).cpu().to(dtype)
        want, want_lse = oracle(*host, sequences, **options)
        baseline, _ = oracle(*host, sequences, dtype=dtype, **options)
        name = f"{case} {cut} {causal=}"
        assert_close(found, want, baseline, name=name)
        assert_lse_close(lse.cpu(), want_lse, name=name)


def check_decode(case):
    """Any two counts of queries and keys around the tile's borders."""
    dtype, dims = getattr(torch, case.dtype), (case.headdim, case.headdim_v)
    config = configs.pick("decode", target.arch(DEVICE), *dims, case.dtype)
    counts = case.queries or around(config.block_m // 8)
    lengths = list(itertools.product(counts, around(config.block_n)))
    queries, keys = zip(*lengths, strict=True)
    heads = 8 * NHEADS_K, NHEADS_K, *dims
    made = draw_case(list(keys), list(queries), heads, dtype)
    limits, options = None, dict(softcap=case.softcap)
    if case.causal:
        limits = torch.cat([torch.arange(n - m, n) + 1 for m, n in lengths]).clamp(min=0).int()
    given = options | dict(num_splits=case.splits, seeded=case.seeded)
    given |= dict(limits=None if limits is None else limits.to(DEVICE))
    source, state = torch.Generator().manual_seed(1), None
    if case.seeded:
        state = torch.randn(sum(queries), heads[0], dims[1], generator=source)
        state = state, torch.randn(heads[0], sum(queries), generator=source)
        given |= dict(out=state[0].clone().to(DEVICE), lse=state[1].clone().to(DEVICE))
    out, lse = run(made, **given)

    def answer(dtype):
        found = wanted(made, dtype=dtype, limits=limits, **options)
        if state:
            parts = (
                torch.stack([x.double(), y.double()]) for x, y in zip(state, found, strict=True)
            )
            found = reference.merge(*parts)
        return found

    (want, want_lse), (baseline, _) = answer(torch.float64), answer(dtype)
    assert_close(out.cpu().to(dtype), want, baseline.to(dtype), name=f"{case}")
    assert_lse_close(lse.cpu(), want_lse, name=f"{case}")


def check_merge(case):
    dtype, dims = getattr(torch, case.dtype), (case.headdim, case.headdim)
    config = configs.pick("merge", target.arch(DEVICE), *dims, case.dtype)
    for total in around(config.block_m):
        outs, lses = empty_some(*parts_of(case.parts, total, 3, case.headdim, dtype))
        if case.seeded:
            out, lse = outs[0].float(), lses[0].clone()
            merge.merge_into(outs[1:], lses[1:], out, lse, seeded=True)
        else:
            out, lse = merge.merge(outs, lses)
        assert_merged(out.to(dtype), lse, outs, lses, f"{case} of {total}")


@on_gpu
@pytest.mark.parametrize("case", STEPS, ids=lambda x: "-".join(map(str, x)))
def test_steps(case):
    check_step(case)


@on_gpu
@pytest.mark.parametrize("case", DECODES, ids=lambda x: "-".join(map(str, x)))
def test_decodes(case):
    check_decode(case)


@on_gpu
@pytest.mark.parametrize("case", MERGES, ids=lambda x: "-".join(map(str, x)))
def test_merges(case):
    check_merge(case)


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_every_row_is_run(arch):
    """Each that anything on such a GPU can be given, by some case."""

    def rows(kernel, shapes):
        return {configs.find(kernel, arch, *shape) for shape in shapes}

    sizes = [(d, d, dtype) for d in range(1, 257) for dtype in configs.DTYPES]
    steps = [(*size, phase) for size in sizes for phase in PHASES]
    assert rows("step", [(*x[1:3], x.dtype, x.phase) for x in STEPS]) == rows("step", steps)
    for kernel, cases in (("decode", DECODES), ("merge", MERGES)):
        assert rows(kernel, [(x.headdim, x.headdim, x.dtype) for x in cases]) == rows(kernel, sizes)


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_every_cut_is_run(arch):
    """Of many queries, and of so few that the heads of a group share tiles of 16 to 64 rows."""

    def cuts(cases):
        return {
            choose_cut(x.group * NHEADS_K, NHEADS_K, *x[1:3], x.dtype, arch, x.tokens, x.phase)
            for x in cases
        }

    short = itertools.product(configs.DTYPES, range(1, 257), PHASES, (2, 4, 8))
    asked = [StepCase(dtype, d, d, phase, tokens, group=8) for dtype, d, phase, tokens in short]
    missing = cuts(asked) - cuts(STEPS)
    assert not missing, sorted(missing)


# ---- the same code on tiles that the interpreter can take


@pytest.fixture
def small():
    """Let the table be of tiles of 16 rows and 16 keys."""
    with pytest.MonkeyPatch.context() as patch:
        blocks = dict(step=(16, 16), decode=(16, 16), merge=(4, 0))
        rows = itertools.product(blocks, sorted(set(configs.DTYPES.values())))
        made = [
            configs.Row(x, "*", n, 256, "*", None, configs.Config(*blocks[x], 4, 1))
            for x, n in rows
        ]
        patch.setattr(configs, "ROWS", tuple(made))
        configs.find.cache_clear()
        yield
    configs.find.cache_clear()


SMALL = [
    (check_step, StepCase("float32", 16, 24, "first", softcap=3.0)),
    (check_step, StepCase("float16", 24, 16, "middle")),
    (check_step, StepCase("float32", 16, 16, "last")),
    (check_step, StepCase("float16", 16, 16, "only", tokens=2, group=8, splits=2)),
    (check_decode, DecodeCase("float32", 16, 24, causal=True, splits=2)),
    (check_decode, DecodeCase("float16", 24, 16, (1,), softcap=3.0, seeded=True)),
    (check_merge, MergeCase("float32", 16, parts=2)),
    (check_merge, MergeCase("float16", 24, parts=19, seeded=True)),
]


@pytest.mark.skipif(ON_GPU, reason="the table that ships runs here")
@pytest.mark.parametrize("check, case", SMALL, ids=lambda x: getattr(x, "__name__", ""))
def test_the_checks_on_small_tiles(small, check, case):
    check(case)
