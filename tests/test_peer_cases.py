"""Shapes and lengths at which peers went wrong, or that their own tests hold up: under every method.

A name in a table says whose case it is. Heads and head sizes are small where lengths are the point.
"""

import numpy as np
import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from ringkern import shard
from ringkern.kernels import reference
from ringkern.schedule import METHODS
from threads import run_threads

DTYPES = [torch.float32, torch.bfloat16]
BOTH = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
ALL_ROWS = 700  # longer sequences are compared with the oracle on some rows


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Ranks are threads already; a pool below each only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_qkv(total_q, total_k, heads, dtype):
    nheads, nheads_k, headdim, headdim_v = heads
    draw = torch.Generator().manual_seed(total_q + total_k)
    shapes = (
        (total_q, nheads, headdim),
        (total_k, nheads_k, headdim),
        (total_k, nheads_k, headdim_v),
    )
    return [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]


def some_rows(length):
    """Return rows of a sequence: all of a short one, else its ends, halves and some between."""
    if length <= ALL_ROWS:
        return torch.arange(length)
    near = torch.tensor([0, 1, length // 2 - 1, length // 2, length - 2, length - 1])
    return torch.cat([near, torch.linspace(2, length - 3, 200).long()]).unique()


def assert_packed(found, qkv, lengths_q, lengths_k, name, **options):
    """Compare each (method, out, lse), packed, with the oracle.

    Queries stand at the ends of their sequences.
    """
    dtype, parts, begin = qkv[0].dtype, [], 0
    for q, k, v in zip(
        qkv[0].split(lengths_q), *(x.split(lengths_k) for x in qkv[1:]), strict=True
    ):
        rows = some_rows(len(q))
        asked = dict(q_pos=rows + len(k) - len(q), **options)
        want, want_lse = reference.attn(q[None, rows], k[None], v[None], **asked)
        base, _ = reference.attn(q[None, rows], k[None], v[None], **asked, dtype=dtype)
        parts.append((rows + begin, want[0], base[0], want_lse[0].T))
        begin += len(q)
    rows, want, base, want_lse = (torch.cat(x) for x in zip(*parts, strict=True))
    for method, out, lse in found:
        assert out.dtype == dtype and len(out) == begin
        assert_close(out[rows], want, base, name=f"{method}: {name}")
        assert_lse_close(lse.T[rows], want_lse, name=f"{method}: {name}")


# ---- one device

# flash-attention's (seqlen_q, seqlen_k), as one batch each; heads, head sizes and masks as there.
PAIRS = [(1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256)]
LARGE = [(1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)]
VARLEN = [
    (PAIRS, (2, 2, 32, 32), dict()),
    (PAIRS, (3, 1, 59, 59), dict(causal=True)),
    (PAIRS, (6, 2, 111, 111), dict(causal=True, softcap=50.0)),
    (PAIRS, (2, 1, 256, 256), dict(window_size=(37, 50))),
    (PAIRS, (2, 2, 80, 96), dict(causal=True, window_size=(64, 0), softcap=50.0)),
    (PAIRS, (6, 6, 128, 128), dict(causal=True)),
    (PAIRS, (6, 1, 160, 160), dict(softcap=50.0)),
    (PAIRS, (4, 2, 192, 192), dict(causal=True, window_size=(64, 0))),
    (PAIRS, (2, 2, 224, 224), dict(causal=True)),
    (LARGE, (2, 1, 40, 40), dict(causal=True)),
    (LARGE, (1, 1, 64, 64), dict(window_size=(511, 128))),
]


@BOTH
@pytest.mark.parametrize("pairs, heads, options", VARLEN)
def test_flash_attention_lengths(pairs, heads, options, dtype):
    lengths_q, lengths_k = (list(x) for x in zip(*pairs, strict=True))
    qkv = draw_qkv(sum(lengths_q), sum(lengths_k), heads, dtype)
    edges = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    out, lse = ringkern.attn_varlen_func(*qkv, *edges, **options)
    found = [("one device", out, lse)]
    assert_packed(found, qkv, lengths_q, lengths_k, f"{heads} {options}", **options)


# ---- the ring, new sequences

PREFILLS = [
    # whose, world_size, lengths, heads, options
    ("SGLang: remainders", 4, [1534, 161, 353], (2, 1, 16, 16), dict(causal=True)),
    ("ring-flash-attention", 8, [120, 1128, 2984], (2, 1, 8, 8), dict(causal=True)),
    ("ring-flash-attention, zigzag", 3, [128, 1120, 2992], (1, 1, 8, 8), dict(causal=True)),
    ("ring-flash-attention, short", 5, [7, 7, 2, 15, 141, 373], (2, 2, 8, 8), dict(causal=True)),
    ("MagiAttention, uneven_full_10k", 7, [10000], (1, 1, 8, 8), dict()),
    ("MagiAttention, 11021 tokens", 6, [4097, 1, 3587, 3329, 7], (1, 1, 8, 8), dict(causal=True)),
    ("MagiAttention, sdpa", 5, [840, 900, 960, 1050], (8, 2, 64, 64), dict(causal=True)),
    ("FlashInfer", 4, [8191, 24576], (1, 1, 8, 8), dict()),
    ("Transformer Engine #3331", 4, [698], (4, 1, 16, 16), dict(causal=True)),
    ("Transformer Engine #1930", 2, [7], (2, 2, 16, 16), dict(causal=True)),
    ("lucidrains", 8, [31], (2, 1, 8, 8), dict()),
    ("lucidrains", 8, [31, 5], (2, 1, 8, 8), dict(causal=True)),
    ("shorter than the ring", 7, [1, 2, 3, 6], (4, 2, 8, 12), dict(causal=True)),
    ("shorter than the ring, window", 6, [1, 3, 5, 13], (4, 2, 8, 8), dict(window_size=(1, 2))),
]


def prefilled(ring, lengths, qkv, options):
    """Return what this rank has by each method: (its rows, out, lse)."""
    plan = ringkern.Placement(ring.world_size).prefill(dict(enumerate(lengths)))
    mine = [plan.shard(x, ring.rank) for x in qkv]
    rows, options = plan.indices(ring.rank), dict(return_lse=True, **options)
    return [(rows, *ring.attn(*mine, plan, method=method, **options)) for method in METHODS]


def joined(answers):
    """Yield (method, out, lse) in packed global order, of what each rank has by each method.

    Cheaper than Ring.unshard(), which has tests of its own.
    """
    for method, shares in zip(METHODS, zip(*answers, strict=True), strict=True):
        rows, outs, lses = zip(*shares, strict=True)
        rows = torch.from_numpy(np.concatenate(rows))
        order = rows.argsort()
        assert torch.equal(rows[order], torch.arange(len(rows)))
        yield method, torch.cat(outs)[order], torch.cat(lses, dim=1)[:, order]


@BOTH
@pytest.mark.parametrize("whose, world_size, lengths, heads, options", PREFILLS)
def test_prefill(whose, world_size, lengths, heads, options, dtype):
    qkv = draw_qkv(sum(lengths), sum(lengths), heads, dtype)
    options = dict(causal=False) | options
    answers = run_threads(prefilled, world_size, lengths, qkv, options)
    assert_packed(joined(answers), qkv, lengths, lengths, whose, **options)


DENSE = [
    # Transformer Engine's windows, grouped heads, MLA's head sizes: world_size, batch, seqlen, ...
    (4, 2, 4096, (12, 12, 128, 128), dict(causal=True, window_size=(512, 0))),
    (4, 2, 4096, (1, 1, 16, 16), dict(window_size=(512, 512))),
    (3, 2, 2050, (12, 12, 128, 128), dict(causal=True, window_size=(128, 0))),
    (6, 2, 300, (32, 4, 128, 128), dict(causal=True)),
    (5, 2, 300, (12, 2, 128, 128), dict(causal=True)),
    (4, 1, 130, (128, 128, 192, 128), dict(causal=True)),
    (2, 1, 130, (2, 1, 256, 256), dict(causal=True)),
]


def dense(ring, qkv, options):
    mine = [ringkern.shard_sequence(x, ring) for x in qkv]
    options = dict(ring=ring, return_lse=True, **options)
    return [ringkern.ring_attn_func(*mine, method=method, **options) for method in METHODS]


@BOTH
@pytest.mark.parametrize("world_size, batch, seqlen, heads, options", DENSE)
def test_dense(world_size, batch, seqlen, heads, options, dtype):
    qkv = draw_qkv(batch * seqlen, batch * seqlen, heads, dtype)
    answers = run_threads(dense, world_size, [x.unflatten(0, (batch, -1)) for x in qkv], options)
    plan = ringkern.Plan(world_size, (seqlen,))
    for b in range(batch):
        mine = [
            [(plan.indices(rank), out[b], lse[b]) for out, lse in found]
            for rank, found in enumerate(answers)
        ]
        part = [x[b * seqlen : (b + 1) * seqlen] for x in qkv]
        name = f"{world_size=} {seqlen=} {heads} {options}"
        assert_packed(joined(mine), part, [seqlen], [seqlen], name, **options)


# ---- the ring, on top of cached tokens

TURNS = [
    # whose, world_size, page_size, (new, all) tokens per sequence, heads
    (
        "flash-attention 3, kvcache", 3, 4,
        [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000)],
        (2, 1, 16, 16),
    ),
    ("flash-attention 3, kvcache", 5, 128, [(128, 128), (256, 512), (2048, 3577)], (2, 1, 16, 16)),
    ("flash-attention 3, a page a token", 2, 1, [(1, 128), (3, 799), (64, 256)], (6, 2, 16, 8)),
    ("fewer new tokens than ranks", 8, 16, [(1, 8), (2, 4), (3, 4), (1, 1)], (4, 2, 8, 8)),
    ("fewer new tokens than ranks", 7, 4, [(2, 15)], (4, 1, 8, 8)),
    ("one new token, more ranks than keys", 6, 1, [(1, 2)], (2, 1, 8, 8)),
    ("TensorRT-LLM, decode", 4, 64, [(1, n) for n in (64, 1024, 16384)], (4, 1, 8, 8)),
    ("TensorRT-LLM, decode of a million", 4, 64, [(1, 1_048_576)], (2, 1, 8, 8)),
    (
        "TensorRT-LLM, decode of half of 8 and half of 16", 4, 16,
        [(1, 131_072)] * 4 + [(1, 65_536)] * 8, (2, 1, 8, 8),
    ),
    ("lucidrains, decode", 8, 16, [(1, 31)], (2, 2, 8, 8)),
]  # fmt: skip


def on_top(ring, cached, shared, new, kv, qkv, page_size, window_size):
    """Fill a cache, and attend by every method with new tokens on forks of what is there.

    shared: all new tokens are on the first sequence. Returns what this rank has by each method:
    (its rows, out, lse). A window of one key makes the filling cheap.
    """
    placement = ringkern.Placement(ring.world_size)
    nheads_k, headdim = qkv[1].shape[1:]
    cache = ringkern.KVCache(
        ring, placement, num_layers=1, nheads_k=nheads_k, headdim=headdim,
        headdim_v=qkv[2].shape[2], dtype=kv[0].dtype, page_size=page_size,
        num_pages=(sum(cached.values()) + 4 * sum(new.values())) // (ring.world_size * page_size)
        + 4 * len(METHODS) * len(new),
    )  # fmt: skip
    if cached:
        plan = placement.prefill(cached)
        fill = [plan.shard(x, ring.rank) for x in (kv[0], *kv)]
        ring.attn(*fill, plan, cache=cache, layer=0, method="pass_kv", window_size=(0, 0))
    found = []
    for method in METHODS:
        for number in new:
            source = 0 if shared else number
            if source in cached:
                placement.fork(source, (method, number))
        plan = placement.prefill({(method, number): length for number, length in new.items()})
        mine = [plan.shard(x, ring.rank) for x in qkv]
        options = dict(window_size=window_size, return_lse=True)
        answer = ring.attn(*mine, plan, cache=cache, layer=0, method=method, **options)
        found.append((plan.indices(ring.rank), *answer))
    return found


def assert_on_top(name, world_size, page_size, lengths, heads, dtype, shared=0, window=(-1, -1)):
    """lengths: (new, all) per sequence; shared: all are forks of one prefix of this length."""
    new = [pair[0] for pair in lengths]
    old = [shared] if shared else [pair[1] - pair[0] for pair in lengths]
    cached = {number: length for number, length in enumerate(old) if length}
    _, *kv = draw_qkv(0, sum(old), heads, dtype)
    qkv = draw_qkv(sum(new), sum(new), heads, dtype)
    args = cached, bool(shared), dict(enumerate(new)), kv, qkv, page_size, window
    answers = run_threads(on_top, world_size, *args)
    whole = [qkv[0]]
    for before, after in zip(kv, qkv[1:], strict=True):
        prefixes = [before] * len(new) if shared else before.split(old)
        both = zip(prefixes, after.split(new), strict=True)
        whole.append(torch.cat([part for pair in both for part in pair]))
    all_k = [pair[1] for pair in lengths]
    options = dict(causal=True, window_size=window)
    assert_packed(joined(answers), whole, new, all_k, name, **options)


@BOTH
@pytest.mark.parametrize("whose, world_size, page_size, lengths, heads", TURNS)
def test_new_tokens_on_a_cache(whose, world_size, page_size, lengths, heads, dtype):
    assert_on_top(whose, world_size, page_size, lengths, heads, dtype)


@BOTH
@pytest.mark.parametrize("window_size", [(0, 0), (5, 0), (200, 0)])
def test_a_window_over_a_cache(window_size, dtype):
    """Some ranks hold no key in the window: their parts are empty, and so may be the first."""
    lengths = [(3, 799), (1, 128), (1, 1), (9, 12)]
    assert_on_top("window", 5, 4, lengths, (4, 2, 8, 8), dtype, window=window_size)


SHARED = [(12, 37, 128, 1), (17, 17, 512, 16), (2, 37, 2048, 16)]


@BOTH
@pytest.mark.parametrize("batch, unique, shared, page_size", SHARED)
def test_a_shared_prefix(batch, unique, shared, page_size, dtype):
    """FlashInfer's batches over one prefix: here they are forks of it."""
    lengths = [(unique, shared + unique)] * batch
    assert_on_top("shared prefix", 3, page_size, lengths, (2, 1, 8, 8), dtype, shared=shared)


# ---- plans and messages


def test_zigzag_with_remainders_and_prefixes():
    """SGLang's lengths at 4 ranks: the first chunks take what is left over, one each."""
    lengths, prefixes = (1534, 161, 353), (0, 100, 7)
    sizes = [[192] * 6 + [191] * 2, [21] + [20] * 7, [45] + [44] * 7]
    for length, want in zip(lengths, sizes, strict=True):
        held = [shard.chunks("zigzag", length, 4, rank) for rank in range(4)]
        found = [[held[rank][0], held[rank][-1]] for rank in range(3)]
        assert [(a.length, b.length) for a, b in found] == [
            (want[r], want[7 - r]) for r in range(3)
        ]
        assert held[3][0].length == want[3] + want[4]  # neighbours: one chunk
        assert [a.start for a, _ in found] == [sum(want[:rank]) for rank in range(3)]
        assert [b.start for _, b in found] == [sum(want[: 7 - rank]) for rank in range(3)]
    placement = ringkern.Placement(4)
    placement.prefill({number: length for number, length in enumerate(prefixes) if length})
    plan = placement.prefill(dict(enumerate(lengths)))
    positions = torch.cat([torch.from_numpy(plan.positions(rank)) for rank in range(4)])
    indices = torch.cat([torch.from_numpy(plan.indices(rank)) for rank in range(4)])
    want = [torch.arange(n) + begin for n, begin in zip(lengths, prefixes, strict=True)]
    assert torch.equal(positions[indices.argsort()], torch.cat(want))


def test_a_cache_that_grows_stays_even():
    """TensorRT-LLM's example: 400 tokens over 4 ranks, then one at a time."""
    placement = ringkern.Placement(4)
    plan = placement.prefill({"a": 400})
    assert [plan.kv_tokens(rank) for rank in range(4)] == [100] * 4
    for length in range(401, 501):
        plan = placement.decode(["a"])
        held = [plan.kv_tokens(rank) for rank in range(4)]
        assert sum(held) == length and max(held) - min(held) <= 1
    assert held == [125] * 4


def count_messages(ring):
    plan = ringkern.Placement(ring.world_size).prefill({"a": 8 * ring.world_size})
    x = torch.zeros(plan.num_tokens(ring.rank), 1, 8)
    found = {}
    for method in METHODS:
        before, seen = ring.stats()["transport"]["messages_sent"], len(ring.events())
        ring.attn(x, x, x, plan, method=method)
        exchanges = [e for e in ring.events()[seen:] if e.name == "exchange"]
        found[method] = ring.stats()["transport"]["messages_sent"] - before, len(exchanges)
    return found


@pytest.mark.parametrize("world_size", [3, 4, 6])
def test_messages_and_exchanges_of_a_call(world_size):
    """PyTorch counts a forward's all-to-alls: world_size - 1. By method, (messages, exchanges).

    An answer is two messages, its out and its lse.
    """
    others = world_size - 1
    for found in run_threads(count_messages, world_size):
        assert found == {
            "pass_kv": (others, others),
            "pass_q": (3 * others, world_size + 1),  # the returns begin at the third
            "gather_kv": (others, 1),
            "gather_q": (3 * others, 2),
        }
