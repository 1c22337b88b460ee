"""All four methods over random histories, between threads, against the float64 oracle."""

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import program
from ringkern.kernels import reference
from ringkern.launch import launch
from ringkern.schedule import METHODS
from strategies import WORLD_SIZES
from test_placement import CHANGES, grown
from threads import HARDWARE, run_threads

# The layers hold the same, so that every plan runs by every method.
LAYERS = len(METHODS) + 1


class Model:
    """What every rank knows: the whole q, k, v of each step, and all K and V so far."""

    def __init__(self, nheads, nheads_k, headdim, headdim_v, dtype, seed):
        self.heads = nheads, nheads_k, headdim, headdim_v
        self.dtype, self.draw = dtype, torch.Generator().manual_seed(seed)
        self.kv: dict = {}

    def new(self, plan):
        """Return q, k, v of the plan's tokens, packed, and remember k and v."""
        nheads, nheads_k, headdim, headdim_v = self.heads
        q, k, v = (
            torch.randn(plan.total, *heads, generator=self.draw).to(self.dtype)
            for heads in ((nheads, headdim), (nheads_k, headdim), (nheads_k, headdim_v))
        )
        news = zip(plan.numbers, k.split(plan.lengths), v.split(plan.lengths), strict=True)
        for number, *new in news:
            old = self.kv.get(number, (k[:0], v[:0]))
            self.kv[number] = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
        return q, k, v

    def want(self, plan, q, dtype=torch.float64, **options):
        outs, lses = [], []
        for number, part in zip(plan.numbers, q.split(plan.lengths), strict=True):
            k, v = self.kv[number]
            out, lse = reference.attn(part[None], k[None], v[None], dtype=dtype, **options)
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

    # What the placement tells a cache, it tells this one too.

    def truncated(self, number, held):
        length = sum(held)
        if number in self.kv:
            self.kv[number] = tuple(x[:length] for x in self.kv[number])

    def forked(self, number, new):
        self.kv[new] = self.kv[number]

    def freed(self, number):
        self.kv.pop(number, None)


def live(ring, changes, methods, heads, dtype, page_size, options, seed):
    """Run a history through the cache by each method, and compare every output."""
    placement = ringkern.Placement(ring.world_size)
    nheads, nheads_k, headdim, headdim_v = heads
    cache = ringkern.KVCache(
        ring, placement, num_layers=LAYERS, nheads_k=nheads_k, headdim=headdim,
        headdim_v=headdim_v, dtype=dtype, num_pages=600 // page_size, page_size=page_size,
    )  # fmt: skip
    model = Model(*heads, dtype, seed)
    placement.watch(model)
    for plan in grown(placement, changes, most_decodes=3):
        q, k, v = model.new(plan)
        mine = [plan.shard(x, ring.rank) for x in (q, k, v)]
        want, want_lse = model.want(plan, q, **options)
        base, _ = model.want(plan, q, dtype=dtype, **options)
        outs = []
        for layer, method in enumerate((*methods, "auto")):
            before = ring.stats()
            out, lse = ring.attn(
                *mine, plan, cache=cache, layer=layer, method=method, return_lse=True, **options
            )
            after = ring.stats()
            for count in ("bytes_planned", "bytes_sent"):
                moved = after["transport"]["bytes_sent"] - before["transport"]["bytes_sent"]
                assert after[count] - before[count] == moved, f"{method}: {count}"
            name = f"{method} on {ring}, {plan}, {options}"
            outs.append(ring.unshard(out, plan))
            assert_close(outs[-1], want, base, name=name)
            whole_lse = ring.unshard(lse.T.contiguous(), plan).T
            assert_lse_close(whole_lse, want_lse, name=name)
        if dtype == torch.float32:
            for out in outs[1:]:
                torch.testing.assert_close(out, outs[0], rtol=0, atol=4e-6)
    used = cache.stats()["tokens"]
    assert used == sum(cache._tables[ring.rank].held(n).tokens for n in cache._lengths)
    for sequence in list(placement._records):
        placement.free(sequence)
    assert cache.stats()["pages_used"] == 0, "pages are lost"


@given(
    world_size=WORLD_SIZES,
    changes=CHANGES,
    methods=st.permutations(METHODS),
    heads=st.sampled_from([(2, 2, 8, 8), (3, 1, 8, 12), (4, 2, 16, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    page_size=st.sampled_from([1, 4, 16]),
    causal=st.booleans(),
    window_size=st.sampled_from([(-1, -1), (-1, -1), (5, -1), (0, 0), (17, 0), (4, 3), (-1, 2)]),
    softcap=st.sampled_from([0.0, 0.0, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_history_by_any_method(
    world_size, changes, methods, heads, dtype, page_size, causal, window_size, softcap, sinks, seed
):
    options = dict(causal=causal, window_size=window_size, softcap=softcap)
    options["sinks"] = torch.linspace(-1, 2, heads[0]) if sinks else None
    run_threads(live, world_size, changes, methods, heads, dtype, page_size, options, seed)


def agree(ring, lengths):
    placement = ringkern.Placement(ring.world_size)
    plan = placement.prefill(dict(enumerate(lengths)))
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(plan.total, heads, 16, generator=draw) for heads in (4, 2, 2))
    mine = [plan.shard(x, ring.rank) for x in (q, k, v)]
    return [ring.unshard(ring.attn(*mine, plan, method=m), plan) for m in (*METHODS, "auto")]


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("lengths", [(1534, 161, 353), (1, 1), (2,), (7, 300)])
@pytest.mark.parametrize("at_once", [0, program.AT_ONCE], ids=["each", "together"])
def test_methods_agree(world_size, lengths, at_once, monkeypatch):
    """Also where parts are merged as they come, as large ones are."""
    monkeypatch.setattr(program, "AT_ONCE", at_once)
    for outs in run_threads(agree, world_size, lengths):
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=0, atol=2e-6)


def small_parts(ring, method, partial_dtype):
    """Of odd sizes: what lies behind out in bfloat16 does not begin at a multiple of 4 bytes."""
    plan = ringkern.Placement(ring.world_size).prefill({"a": 91})
    x = torch.randn(91, 1, 5, generator=torch.Generator().manual_seed(2))
    mine = plan.shard(x, ring.rank)
    out = ring.attn(mine, mine, mine, plan, method=method, partial_dtype=partial_dtype)
    return ring.unshard(out, plan), ring.stats()["bytes_sent"]


@pytest.mark.parametrize("method", ["pass_q", "gather_q"])
def test_parts_can_travel_smaller(method):
    (full, more), (half, less) = (
        run_threads(small_parts, 3, method, dtype)[0] for dtype in (None, torch.bfloat16)
    )
    assert less < more
    assert 1e-6 < (full - half).abs().max() < 2e-2


def over_tcp(worker):
    """Two turns and some tokens, every method, over real sockets."""
    changes = [("prefill", {"a": 97, "b": 5}), ("decode", 3, 1), ("prefill", {"a": 20, "c": 1})]
    changes += [("fork", 0), ("decode", 2, 3), ("free", 1), ("decode", 1, 2)]
    with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
        for number, methods in enumerate((METHODS, METHODS[::-1])):
            heads = (4, 2, 16, 16) if number else (4, 1, 16, 8)
            dtype = torch.bfloat16 if number == 1 else torch.float32
            options = dict(causal=True, window_size=(-1, -1), softcap=0.0, sinks=None)
            live(ring, changes, methods, heads, dtype, 16, options, number)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_histories_over_tcp(world_size):
    launch(over_tcp, world_size, threads=1, timeout_s=120)
