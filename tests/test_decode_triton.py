"""The decode kernel against attention by its definition: pages, splits, groups, states.

Slots that no sequence holds are NaN, as are columns beyond a headdim, and page numbers that no
token needs are far outside, so what is read beyond a sequence's tokens shows.
"""

from typing import NamedTuple

import pytest
import torch
from accelerator import DEVICE, DTYPES, EACH_DTYPE, poisoned_memory
from close import assert_close, assert_lse_close
from maximum import drop_nan
from ringkern.kernels import decode, reference
from rounding import REORDERED, U, lse_error

INF, NAN = float("inf"), float("nan")
FAR = 2**30


class Case(NamedTuple):
    q: torch.Tensor  # [total_q, nheads, headdim]
    k: torch.Tensor  # [num_slots, nheads_k, headdim]
    v: torch.Tensor
    tables: dict  # page_table, seqused_k, cu_seqlens_q, max_seqlen_q, page_size
    slots: list  # of each sequence's tokens, in order
    queries: list  # of each sequence


def in_nan(x):
    """Return x on the device, with columns of NaN after each row's own."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), NAN, dtype=x.dtype, device=DEVICE)
    return wide[..., :-16].copy_(x)


def draw_case(seqused_k, queries, heads, dtype, page_size=16, seed=0):
    """Return a case; heads: (nheads, nheads_k, headdim, headdim_v)."""
    nheads, nheads_k, headdim, headdim_v = heads
    draw = torch.Generator().manual_seed(seed)
    pages = [-(-n // page_size) for n in seqused_k]
    order = torch.randperm(sum(pages) + 3, generator=draw).split([*pages, 3])
    num_slots = (sum(pages) + 3) * page_size
    k, v = (torch.full((num_slots, nheads_k, d), NAN) for d in (headdim, headdim_v))
    table = torch.full((len(seqused_k), max(pages) + 2), FAR, dtype=torch.int32)
    slots = []
    for i, n in enumerate(seqused_k):
        table[i, : pages[i]] = order[i]
        slots.append((order[i][:, None] * page_size + torch.arange(page_size)).flatten()[:n])
        for x in (k, v):
            x[slots[-1]] = torch.randn(n, *x.shape[1:], generator=draw)
    q = torch.randn(sum(queries), nheads, headdim, generator=draw)
    edges = torch.tensor([0, *queries]).cumsum(0).int()
    tables = dict(page_table=table, seqused_k=torch.tensor(seqused_k).int(), cu_seqlens_q=edges)
    tables = {name: x.to(DEVICE) for name, x in tables.items()}
    tables |= dict(max_seqlen_q=max(queries), page_size=page_size)
    q, k, v = (in_nan(x.to(dtype)) for x in (q, k, v))
    return Case(q, k, v, tables, slots, queries)


@poisoned_memory()
def run(case, *, out=None, lse=None, **options):
    """Return (out, lse), over poison unless they are given."""
    total_q, nheads, headdim = case.q.shape
    if out is None:
        out = torch.full((total_q, nheads, case.v.shape[2]), NAN, device=DEVICE)
        lse = torch.full((nheads, total_q), NAN, device=DEVICE)
    options.setdefault("softmax_scale", headdim**-0.5)
    decode.decode(case.q, case.k, case.v, out, lse, **case.tables, **options)
    return out, lse


def wanted(case, dtype=torch.float64, limits=None, **options):
    """Return (out, lse) by the definition; a query sees all keys, or its limit of them."""
    outs, lses, row = [], [], 0
    q, k, v = (x.cpu() for x in (case.q, case.k, case.v))
    for slots, count in zip(case.slots, case.queries, strict=True):
        for each in range(row, row + count) if limits is not None else [slice(row, row + count)]:
            seen = slots if limits is None else slots[: limits[each]]
            rows = each if limits is None else slice(each, each + 1)
            out, lse = reference.attn(
                q[None, rows], k[None, seen], v[None, seen], dtype=dtype, **options
            )
            outs.append(out[0])
            lses.append(lse[0])
        row += count
    return torch.cat(outs), torch.cat(lses, dim=1)


def assert_right(case, out, lse, name, **options):
    dtype = case.q.dtype
    want, want_lse = wanted(case, **options)
    base, _ = wanted(case, dtype=dtype, **options)
    assert_close(out.cpu().to(dtype), want, base.to(dtype), name=name)
    assert_lse_close(lse.cpu(), want_lse, name=name)


# nheads, nheads_k, headdim, headdim_v: no group, groups of 2, 3 and 8, one key head; all headdims.
HEADS = [
    (2, 2, 32, 32), (4, 2, 64, 64), (3, 1, 80, 80), (8, 1, 96, 96), (2, 1, 128, 128),
    (2, 1, 192, 128), (2, 1, 256, 256), (4, 2, 64, 128), (2, 1, 24, 5),
]  # fmt: skip


@pytest.mark.parametrize("heads", HEADS)
@EACH_DTYPE
def test_heads_and_lengths(heads, dtype):
    """Around a block of keys and of a page, and sequences without tokens or without queries."""
    case = draw_case([0, 1, 64, 65, 130, 9], [1, 1, 1, 2, 1, 0], heads, dtype)
    out, lse = run(case, num_splits=2)
    assert_right(case, out, lse, f"{heads}")
    assert (out[0] == 0).all() and (lse[:, 0] == -INF).all()


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@EACH_DTYPE
def test_any_page_size(page_size, dtype):
    case = draw_case([100, 3, 67], [1, 1, 1], (4, 2, 32, 32), dtype, page_size)
    assert_right(case, *run(case), f"{page_size=}")


@pytest.mark.parametrize("queries", [[16, 1], [5, 0, 3], [2, 2, 2]])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_queries_and_heads_of_a_group_are_rows(queries, group):
    """More rows than a tile has, rows of one token in two tiles, and sequences with fewer."""
    case = draw_case([70, 33, 0][: len(queries)], queries, (2 * group, 2, 32, 32), torch.float32)
    assert_right(case, *run(case), f"{queries}, {group=}")


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_splits_agree(num_splits):
    case = draw_case([300, 64, 0, 5], [1, 2, 1, 1], (4, 2, 32, 32), torch.float32)
    out, lse = run(case, num_splits=num_splits)
    assert_right(case, out, lse, f"{num_splits=}")
    whole, whole_lse = run(case)
    torch.testing.assert_close((out, lse), (whole, whole_lse), **REORDERED)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_the_same_again_and_in_any_batch(num_splits, dtype):
    case = draw_case([130, 0, 77], [1, 1, 2], (4, 2, 32, 32), dtype)
    out, lse = run(case, num_splits=num_splits)
    again, lse_again = run(case, num_splits=num_splits)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    tables = dict(case.tables, page_table=case.tables["page_table"][2:])
    tables |= dict(seqused_k=case.tables["seqused_k"][2:], cu_seqlens_q=torch.tensor([0, 2]).int())
    tables["cu_seqlens_q"] = tables["cu_seqlens_q"].to(DEVICE)
    alone, lse_alone = run(case._replace(q=case.q[2:], tables=tables), num_splits=num_splits)
    assert torch.equal(alone, out[2:]) and torch.equal(lse_alone, lse[:, 2:])


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_only_the_result_is_written(num_splits, out_dtype):
    """All of it, over poison, in any dtype, and nothing around it."""
    case = draw_case([70, 0], [2, 1], (4, 2, 24, 40), torch.float32)
    around = torch.full((9, 6, 64), 7.0, dtype=out_dtype, device=DEVICE)
    around_lse = torch.full((8, 9), 7.0, device=DEVICE)
    out, lse = around[2:5, 1:5, 8:48], around_lse[3:7, 4:7]
    out.fill_(NAN)
    lse.fill_(NAN)
    run(case, out=out, lse=lse, num_splits=num_splits)
    want, want_lse = wanted(case)
    assert_close(out.cpu(), want, want.to(out_dtype), name=f"{num_splits=}")
    assert_lse_close(lse.cpu(), want_lse, name=f"{num_splits=}")
    out.fill_(7.0)
    lse.fill_(7.0)
    assert (around == 7.0).all() and (around_lse == 7.0).all()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_goes_from_rank_to_rank(num_splits, dtype):
    """Ranks that hold parts of the sequences, or nothing of one, add up to the whole."""
    heads, queries = (4, 2, 32, 48), [1, 2, 1, 1]
    whole = draw_case([150, 70, 33, 0], queries, heads, dtype)
    out = torch.full((5, 4, 48), NAN, device=DEVICE)  # not to be looked at: nothing was seen
    lse = torch.full((4, 5), -INF, device=DEVICE)
    for first in range(3):
        mine = [slots[first::3] if i else slots[:0] if first else slots
                for i, slots in enumerate(whole.slots)]  # fmt: skip
        rank = draw_case([len(x) for x in mine], queries, heads, dtype, page_size=5)
        for slots, theirs in zip(rank.slots, mine, strict=True):
            rank.k[slots], rank.v[slots] = whole.k[theirs], whole.v[theirs]
        before = out[0].clone(), lse[:, 0].clone()
        run(rank._replace(q=whole.q), out=out, lse=lse, num_splits=num_splits, seeded=True)
        if first:  # this rank has none of sequence 0: not a bit of its state moves
            assert torch.equal(out[0], before[0]) and torch.equal(lse[:, 0], before[1])
    seen = slice(0, 4)  # sequence 3 has no token anywhere
    assert (lse[:, 4] == -INF).all()
    want, want_lse = wanted(whole)
    base, _ = wanted(whole, dtype=dtype)
    assert_close(out[seen].cpu().to(dtype), want[seen], base[seen].to(dtype), name="three ranks")
    assert_lse_close(lse.cpu(), want_lse, name="three ranks")


@pytest.mark.parametrize("num_splits", [1, 2])
def test_limits_are_causality(num_splits):
    """New tokens see the cached ones and each other up to themselves; a limit may be 0."""
    case = draw_case([70, 66], [4, 3], (4, 2, 32, 32), torch.float32)
    limits = torch.tensor([67, 68, 69, 70, 0, 1, 66], dtype=torch.int32)
    out, lse = run(case, limits=limits.to(DEVICE), num_splits=num_splits)
    assert_right(case, out, lse, "limits", limits=limits.tolist())
    assert (out[4] == 0).all() and (lse[:, 4] == -INF).all()
    run(case, out=out, lse=lse, limits=limits.to(DEVICE) * 0, num_splits=num_splits, seeded=True)
    assert_right(case, out, lse, "a state and no keys", limits=limits.tolist())


@pytest.mark.parametrize("softcap", [1.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(softcap, dtype):
    case = draw_case([70, 20], [1, 2], (4, 2, 32, 32), dtype)
    out, lse = run(case, softcap=softcap)
    assert_right(case, out, lse, f"{softcap=}", softcap=softcap)


@pytest.mark.parametrize("softmax_scale", [1.0, 0.0, -0.3])
def test_any_scale(softmax_scale):
    case = draw_case([70, 20], [1, 2], (4, 2, 32, 32), torch.float32)
    out, lse = run(case, softmax_scale=softmax_scale)
    assert_right(case, out, lse, f"{softmax_scale=}", softmax_scale=softmax_scale)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_the_kernel_is_told_of_tf32(num_splits, monkeypatch):
    """Only when asked; the interpreter has no less than all of float32."""
    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, PRECISION, **options: told.append(PRECISION)

    monkeypatch.setattr(decode, "_decode", Kernel())
    case = draw_case([70, 20], [1, 2], (4, 2, 16, 16), torch.float32)
    for options in ({}, dict(allow_tf32=True), dict(allow_tf32=False)):
        run(case, num_splits=num_splits, **options)
    assert told == ["ieee", "tf32", "ieee"]


def test_any_strides_give_the_same_bits():
    """Whole tensors, and rows, heads and columns of larger ones."""
    case = draw_case([70, 20], [1, 2], (4, 2, 24, 48), torch.float16)
    want, want_lse = run(case)

    def spread(x):
        wide = x.new_full((x.shape[1] + 1, len(x), x.shape[2] + 16), NAN)
        wide[1:, :, 8:-8] = x.transpose(0, 1)
        return wide.transpose(0, 1)[:, 1:, 8:-8]

    table = case.tables["page_table"]
    wide = torch.full((len(table), table.shape[1] + 3), FAR, dtype=torch.int32, device=DEVICE)
    wide[:, 2:-1] = table
    for change, tables in (
        (torch.Tensor.contiguous, {}),
        (spread, dict(page_table=wide[:, 2:-1])),
    ):
        q, k, v = map(change, (case.q, case.k, case.v))
        other = case._replace(q=q, k=k, v=v, tables=case.tables | tables)
        out, lse = run(other, lse=torch.empty(3, 4, device=DEVICE).T, out=change(want * NAN))
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stays_nan(what, monkeypatch):
    """In the rows that see it, and in no other."""
    drop_nan(monkeypatch)
    case = draw_case([70, 20], [2, 1], (2, 2, 16, 16), torch.float32)
    if what == "q":
        case.q[1, 0, 3] = NAN
        hit = torch.tensor([[0, 0], [1, 0], [0, 0]]).bool()
    else:
        getattr(case, what)[case.slots[0][69], 1, 3] = NAN
        hit = torch.tensor([[0, 1], [0, 1], [0, 0]]).bool()
    for num_splits in (1, 2):
        out, lse = run(case, num_splits=num_splits)
        assert torch.equal(out.isnan().any(-1).cpu(), hit)
        assert torch.equal(lse.isnan().cpu(), hit.T & (what != "v"))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_large_scores(num_splits):
    """Near 2 ** 20, where the largest key takes all; whole numbers, so that only lse is rounded."""
    case = draw_case([70, 20], [1, 2], (4, 2, 16, 16), torch.float32)
    for x in (case.q, case.k):
        x.mul_(600).round_()
    out, lse = run(case, num_splits=num_splits)
    assert_right(case, out, lse, "large scores")
    _, want_lse = wanted(case)
    size = float(want_lse.abs().max())
    assert 2**18 < size < 2**22
    # The merge of the splits rounds once more.
    assert (lse.cpu() - want_lse).abs().max() <= lse_error(size, 70) + U * size


@pytest.mark.parametrize("num_splits", [1, 2])
def test_sinks_are_a_state(num_splits):
    """Of weight without a value, as local.make_state() puts them; for no tokens too."""
    case = draw_case([70, 0], [2, 1], (4, 2, 16, 24), torch.float32)
    sinks = torch.tensor([0.7, -INF, 3.0, 90.0])
    out = torch.zeros(3, 4, 24, device=DEVICE)
    lse = sinks[:, None].expand(4, 3).to(DEVICE).clone()
    run(case, out=out, lse=lse, num_splits=num_splits, seeded=True)
    assert_right(case, out, lse, "sinks", sinks=sinks)
    again = run(case, num_splits=num_splits, sinks=sinks.to(DEVICE))
    assert_right(case, *again, "sinks as an argument", sinks=sinks)


def test_nothing_to_attend_is_no_launch():
    case = draw_case([9], [1], (2, 1, 16, 16), torch.float32)
    tables = case.tables | dict(cu_seqlens_q=case.tables["cu_seqlens_q"] * 0)
    out, lse = run(case._replace(q=case.q[:0], tables=tables))
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_splits_fill_the_gpu_and_no_more():
    assert decode.choose_splits(16, 8, 32768, 132) == 5  # 640 programs on 132
    assert decode.choose_splits(1, 8, 131072, 132) == 66
    assert decode.choose_splits(1, 1, 1000, 132) == 3  # of 256 keys at least
    assert decode.choose_splits(1, 1, 0, 132) == decode.choose_splits(999, 8, 32768, 132) == 1


REFUSALS = [
    (dict(q=lambda x: x[0]), "q: want 3 dimensions"),
    (dict(q=lambda x: x[:, :3]), "nheads: want a multiple of 2, got 3"),
    (dict(k=lambda x: x[:, :1]), r"k: want .*, got"),
    (dict(k=lambda x: x.half()), "k: want torch.float32, got torch.float16"),
    (dict(q=lambda x: x.double()), "q: want .*, got torch.float64"),
    (dict(v=lambda x: x.mT.contiguous().mT), "v: want a last stride of 1"),
    (dict(v=lambda x: x[..., :1].expand(-1, -1, 300)), "v: want a headdim of 1 to 256, got 300"),
    (dict(out=lambda x: x[:1]), r"out: want \(3, 4, 32\), got \(1, 4, 32\)"),
    (dict(out=lambda x: x.half(), seeded=True), "out: want torch.float32, got torch.float16"),
    (dict(lse=lambda x: x.T), r"lse: want \(4, 3\), got \(3, 4\)"),
    (dict(lse=lambda x: x.half()), "lse: want torch.float32"),
    (dict(lse=lambda x: x.to("meta")), "lse: want a tensor on"),
    (dict(page_table=lambda x: x.long()), "page_table: want torch.int32, got torch.int64"),
    (dict(page_table=lambda x: x[0]), r"page_table: want \[batch, max_pages\]"),
    (dict(seqused_k=lambda x: x[:1]), r"seqused_k: want \(2,\), got \(1,\)"),
    (dict(cu_seqlens_q=lambda x: x[:2]), r"cu_seqlens_q: want \(3,\), got \(2,\)"),
    (dict(sinks=torch.zeros(2, device=DEVICE)), r"sinks: want \(4,\), got \(2,\)"),
    (dict(sinks=torch.zeros(4, device=DEVICE).int()), "sinks: want .*, got torch.int32"),
    (dict(sinks=torch.zeros(4, device=DEVICE), seeded=True), "sinks: want None"),
    (dict(sinks=torch.zeros(8, device=DEVICE)[::2]), "sinks: want a stride of 1, got 2"),
    (dict(limits=torch.zeros(2, dtype=torch.int32)), r"limits: want \(3,\), got \(2,\)"),
    (dict(page_size=0), "page_size: want 1 or more, got 0"),
    (dict(num_splits=0), "num_splits: want 1 or more, got 0"),
    (dict(max_seqlen_q=0), "max_seqlen_q: want 1 or more, got 0"),
    (dict(num_splits=70000), "num_splits: want at most 65535"),
    (dict(softcap=-1.0), "softcap: want 0, which is none, or more, got -1.0"),
]


@pytest.mark.parametrize("change, match", REFUSALS)
def test_decode_refuses(change, match):
    case = draw_case([7, 8], [1, 2], (4, 2, 32, 32), torch.float32)
    out, lse = torch.full((3, 4, 32), 7.0).to(DEVICE), torch.full((4, 3), 7.0).to(DEVICE)
    call = dict(q=case.q, k=case.k, v=case.v, out=out, lse=lse, softmax_scale=1.0, **case.tables)
    call |= {name: x(call[name]) if callable(x) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=match):
        decode.decode(**call)
    assert (out == 7.0).all() and (lse == 7.0).all()
