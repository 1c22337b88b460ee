"""The ring between threads: any lengths, layout, world size, mask and dtype."""

import threading

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import api, tiles
from ringkern.kernels import reference, step_torch
from ringkern.transport_local import LocalTransport
from strategies import LAYOUTS, LENGTHS, WINDOWS, WORLD_SIZES
from threads import run_threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_qkv(*shape, nheads, nheads_k, headdim, headdim_v=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(sum(shape))
    heads = (nheads, headdim), (nheads_k, headdim), (nheads_k, headdim_v or headdim)
    return [torch.randn(*shape, *h, generator=draw).to(dtype) for h in heads]


def whole_dense(ring, qkv, layout, options):
    """Return this rank's view of the whole (out, lse), after a check of its bytes."""
    mine = [ringkern.shard_sequence(x, ring, layout=layout) for x in qkv]
    out, lse = ringkern.ring_attn_func(*mine, **options, layout=layout, ring=ring, return_lse=True)
    stats = ring.stats()
    assert stats["bytes_sent"] == stats["bytes_planned"]
    assert out.dtype == qkv[0].dtype
    return (
        ringkern.unshard_sequence(out, ring, layout=layout),
        ringkern.unshard_sequence(lse, ring, dim=2, layout=layout),
    )


def assert_dense(world_size, qkv, layout, name, **options):
    want, want_lse = reference.attn(*qkv, **options)
    base, _ = reference.attn(*qkv, **options, dtype=qkv[0].dtype)
    for out, lse in run_threads(whole_dense, world_size, qkv, layout, options):
        assert_close(out, want, base, name=name)
        assert_lse_close(lse, want_lse, name=name)


@given(
    world_size=WORLD_SIZES,
    layout=LAYOUTS,
    seqlen=st.integers(1, 90),
    heads=st.sampled_from([(2, 2, 8, 8), (4, 1, 16, 16), (6, 2, 8, 24)]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window_size=WINDOWS,
    softcap=st.sampled_from([0.0, 3.0]),
)
@settings(max_examples=120)
def test_any_dense_ring_matches_one_device(world_size, layout, seqlen, heads, dtype, **options):
    nheads, nheads_k, headdim, headdim_v = heads
    qkv = make_qkv(2, seqlen, nheads=nheads, nheads_k=nheads_k, headdim=headdim,
                   headdim_v=headdim_v, dtype=dtype)  # fmt: skip
    name = f"{world_size=} {layout=} {seqlen=} {heads=} {dtype=} {options}"
    assert_dense(world_size, qkv, layout, name, **options)


def whole_packed(ring, qkv, lengths, sinks, options):
    plan = ringkern.Placement(ring.world_size).prefill(dict(enumerate(lengths)))
    mine = [plan.shard(x, ring.rank) for x in qkv]
    out, lse = ring.attn(*mine, plan, sinks=sinks, return_lse=True, **options)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    again = ringkern.ring_attn_varlen_func(*mine, cu_seqlens, ring=ring, **options)
    assert sinks is not None or torch.equal(again, out)
    return ring.unshard(out, plan), ring.unshard(lse.T, plan).T


@given(WORLD_SIZES, LENGTHS, st.sampled_from(DTYPES), st.booleans(), st.booleans(), WINDOWS)
@settings(max_examples=60)
def test_any_packed_ring_matches_one_device(
    world_size, lengths, dtype, causal, with_sinks, window_size
):
    qkv = make_qkv(sum(lengths), nheads=4, nheads_k=2, headdim=8, dtype=dtype)
    sinks = torch.linspace(-1, 1, 4) if with_sinks else None
    options = dict(causal=causal, window_size=window_size)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    both = (cu_seqlens, cu_seqlens)
    want, want_lse = reference.attn_varlen(*qkv, *both, sinks=sinks, **options)
    base, _ = reference.attn_varlen(*qkv, *both, sinks=sinks, **options, dtype=dtype)
    name = f"{world_size=} {lengths=} {dtype=} {options}"
    for out, lse in run_threads(whole_packed, world_size, qkv, lengths, sinks, options):
        assert_close(out, want, base, name=name)
        assert_lse_close(lse, want_lse, name=name)


def test_each_sequence_cut_by_hand_is_what_varlen_wants():
    lengths = (13, 1, 30)
    qkv = make_qkv(sum(lengths), nheads=2, nheads_k=1, headdim=8)
    edges = torch.tensor([0, *lengths]).cumsum(0)

    def attend(ring):
        mine = [
            torch.cat([ringkern.shard_sequence(part, ring, dim=0) for part in x.split(lengths)])
            for x in qkv
        ]
        out = ringkern.ring_attn_varlen_func(*mine, edges, causal=True, ring=ring)
        return ring.unshard(out, ringkern.Plan(ring.world_size, lengths))

    want, _ = reference.attn_varlen(*qkv, edges, edges, causal=True)
    for out in run_threads(attend, 3):
        assert_close(out, want, want.float(), name="by hand")


@given(WORLD_SIZES, LAYOUTS, st.integers(1, 40), st.integers(-3, 2), st.booleans())
@settings(max_examples=60)
def test_unshard_inverts_shard(world_size, layout, seqlen, dim, told):
    shape = [2, 3, 4]
    shape[dim] = seqlen
    x = torch.arange(24 * seqlen)[: torch.Size(shape).numel()].view(shape)

    def there_and_back(ring):
        mine = ringkern.shard_sequence(x, ring, dim=dim, layout=layout)
        assert mine.is_contiguous()
        length = seqlen if told else None
        return ringkern.unshard_sequence(mine, ring, dim=dim, layout=layout, seqlen=length)

    for back in run_threads(there_and_back, world_size):
        assert torch.equal(back, x)


def reversed_ring(monkeypatch):
    """Plant a fault: pass K and V to the previous rank instead of the next."""
    post = LocalTransport.post

    def mirrored(self, sends, recvs, keep):
        def mirror(messages):
            return [((2 * self.rank - peer) % self.world_size, *rest) for peer, *rest in messages]

        return post(self, mirror(sends), mirror(recvs), keep)

    monkeypatch.setattr(LocalTransport, "post", mirrored)


def merge_one_percent_off(monkeypatch):
    """Plant a fault: a part weighs 1 % more than it should."""
    merge = step_torch.merge_

    def faulty(out, lse, part_out, part_lse):
        merge(out, lse, part_out, part_lse + 0.01)

    monkeypatch.setattr(step_torch, "merge_", faulty)


def mask_off_by_one(monkeypatch):
    """Plant a fault: a query does not see its own key."""
    make_spans_each = tiles.make_spans_each

    def faulty(tables, left, right):
        return make_spans_each(tables, left, right - 1)

    monkeypatch.setattr(tiles, "make_spans_each", faulty)


@pytest.mark.parametrize("fault", [reversed_ring, merge_one_percent_off, mask_off_by_one])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [3, 5])
def test_planted_faults_are_caught(monkeypatch, fault, dtype, world_size):
    qkv = make_qkv(1, 97, nheads=4, nheads_k=2, headdim=16, dtype=dtype)
    assert_dense(world_size, qkv, "zigzag", "sound", causal=True)
    fault(monkeypatch)
    api._make_plan.cache_clear()  # or the schedule of the sound run is used again
    try:
        with pytest.raises(AssertionError):
            assert_dense(world_size, qkv, "zigzag", "faulty", causal=True)
    finally:
        api._make_plan.cache_clear()


def test_no_allocation_grows_with_the_ring():
    """Two wire buffers, whatever world_size, and the same ones from call to call."""
    qkv = make_qkv(64, nheads=2, nheads_k=1, headdim=8)

    def wires(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 64})
        mine = [plan.shard(x, ring.rank) for x in qkv]
        ring.attn(*mine, plan, method="pass_kv")
        before = {buffer.data_ptr() for buffer in ring.programs._pool._spare}
        ring.attn(*mine, plan, method="pass_kv")
        after = {buffer.data_ptr() for buffer in ring.programs._pool._spare}
        assert before == after and len(after) == 2
        return sum(buffer.numel() for buffer in ring.programs._pool._spare) * ring.world_size

    totals = {sum(run_threads(wires, n)) // n for n in (2, 4, 8)}
    assert totals == {4 * 2 * 64 * 2 * 8}, "wires times ranks is two copies of K and V"


def test_stats_count_what_was_done():
    qkv = make_qkv(30, nheads=2, nheads_k=1, headdim=8)

    def attend(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 30})
        for _ in range(2):
            ring.attn(*[plan.shard(x, ring.rank) for x in qkv], plan, method="pass_kv")
        return ring.stats(), ring.events()

    for stats, events in run_threads(attend, 3):
        assert stats["calls"] == 2 and stats["steps"] == 6
        assert stats["bytes_sent"] == stats["transport"]["bytes_sent"] == 2 * 2 * 10 * 2 * 8 * 4
        assert [e.name for e in events].count("attend") == 6
        assert all(e.end_ns >= e.start_ns for e in events)
        assert stats["attend_ms"] > 0


def test_the_latest_open_ring_is_the_default(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    q, k, v = make_qkv(1, 5, nheads=2, nheads_k=1, headdim=8)
    with pytest.raises(ringkern.ArgumentError, match="torchrun"):
        ringkern.ring_attn_func(q, k, v)


@pytest.mark.parametrize("first", [True, False])
def test_inside_inference_mode_and_outside(first):
    """Buffers are kept from call to call, whichever mode the next is in."""
    qkv = make_qkv(30, nheads=2, nheads_k=1, headdim=8)

    def attend(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 30})
        for mode in (first, not first):
            with torch.inference_mode(mode):
                ring.attn(*[plan.shard(x, ring.rank) for x in qkv], plan, method="pass_kv")

    run_threads(attend, 3)


def test_a_call_that_breaks_off_fails_the_ring(monkeypatch):
    """Between a post and its wait: else the ranks would be one exchange apart."""
    qkv = make_qkv(30, nheads=2, nheads_k=1, headdim=8)
    step = step_torch.step

    def attend(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 30})
        mine = [plan.shard(x, ring.rank) for x in qkv]
        with pytest.raises(MemoryError if ring.rank == 1 else ringkern.TransportError):
            for _ in range(3):
                ring.attn(*mine, plan, method="pass_kv")
        with pytest.raises(ringkern.TransportError, match="MemoryError: no more"):
            ring.barrier()

    def faulty(q, *rest, **options):
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no more")
        return step(q, *rest, **options)

    monkeypatch.setattr(step_torch, "step", faulty)
    run_threads(attend, 3)
