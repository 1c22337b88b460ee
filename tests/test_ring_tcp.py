"""The ring between processes over real sockets: every case in one launch per world size."""

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from ringkern.kernels import reference
from ringkern.launch import launch
from threads import HARDWARE

DENSE = [
    # batch, seqlen, nheads, nheads_k, headdim, headdim_v, dtype, layout, options
    (1, 96, 4, 4, 32, 32, "float32", "zigzag", {}),
    (2, 97, 4, 2, 32, 32, "float32", "zigzag", dict(causal=True)),
    (1, 97, 4, 1, 32, 32, "bfloat16", "zigzag", dict(causal=True)),
    (1, 241, 8, 2, 64, 64, "bfloat16", "striped", dict(causal=True)),
    (1, 130, 4, 2, 16, 24, "float16", "contiguous", dict(causal=True, window_size=(20, 0))),
    (1, 77, 2, 1, 16, 16, "float32", "zigzag", dict(causal=True, softcap=4.0)),
    (1, 7, 2, 1, 16, 16, "float32", "zigzag", dict(causal=True)),
    (1, 1, 2, 1, 16, 16, "bfloat16", "striped", dict(causal=True)),
    (1, 600, 2, 1, 16, 16, "float32", "zigzag", dict(window_size=(3, 2))),
]
PACKED = [(5, 1, 37, 2), (1,), (1534, 161, 353), (1, 1, 1)]


def check_dense(ring):
    for number, (batch, seqlen, nheads, nheads_k, d, dv, dtype, layout, options) in enumerate(
        DENSE
    ):
        torch.manual_seed(number)  # the same tensors on every rank; no broadcast needed
        dtype = getattr(torch, dtype)
        q = torch.randn(batch, seqlen, nheads, d).to(dtype)
        k = torch.randn(batch, seqlen, nheads_k, d).to(dtype)
        v = torch.randn(batch, seqlen, nheads_k, dv).to(dtype)
        want, want_lse = reference.attn(q, k, v, **options)
        base, _ = reference.attn(q, k, v, **options, dtype=dtype)
        mine = [ringkern.shard_sequence(x, ring, layout=layout) for x in (q, k, v)]
        out, lse = ringkern.ring_attn_func(*mine, **options, layout=layout, return_lse=True)
        whole = ringkern.unshard_sequence(out, ring, layout=layout)
        whole_lse = ringkern.unshard_sequence(lse, ring, dim=2, layout=layout, seqlen=seqlen)
        name = f"{seqlen=} {nheads_k=} {d=} {dv=} {dtype=} {layout=} {options} on {ring}"
        assert_close(whole, want, base, name=f"out, {name}")
        assert_lse_close(whole_lse, want_lse, name=f"lse, {name}")


def check_packed(ring):
    for lengths in PACKED:
        torch.manual_seed(len(lengths))
        q, k, v = (torch.randn(sum(lengths), heads, 32) for heads in (4, 2, 2))
        plan = ringkern.Placement(ring.world_size).prefill(dict(enumerate(lengths)))
        before = ring.stats()["transport"]["bytes_sent"]
        out = ring.attn(*(plan.shard(x, ring.rank) for x in (q, k, v)), plan)
        stats = ring.stats()
        edges = torch.tensor([0, *lengths]).cumsum(0)
        want, _ = reference.attn_varlen(q, k, v, edges, edges, causal=True)
        assert_close(ring.unshard(out, plan), want, want.float(), name=f"{lengths} on {ring}")
        assert stats["transport"]["bytes_sent"] - before <= stats["bytes_planned"]
    assert stats["bytes_sent"] == stats["bytes_planned"]


def check_ring(worker):
    with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
        assert (ring.rank, ring.world_size) == (worker.rank, worker.world_size)
        assert ring.transport == "tcp" and ring.device == torch.device("cpu")
        before = ring.stats()["transport"]["bytes_sent"]
        check_packed(ring)
        check_dense(ring)
        ring.barrier()
        assert worker.world_size == 1 or ring.stats()["transport"]["bytes_sent"] > before


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ring_matches_one_device(world_size):
    launch(check_ring, world_size, threads=1, timeout_s=120)


def check_bytes(worker):
    """The transport's own count of a call is the plan's prediction, to the byte."""
    with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
        plan = ringkern.Placement(ring.world_size).prefill({"a": 301, "b": 7})
        x = torch.zeros(plan.num_tokens(ring.rank), 2, 16)
        ring.barrier()
        before = ring.stats()
        for _ in range(3):
            ring.attn(x, x, x, plan, causal=True)
        after = ring.stats()
    moved = after["transport"]["bytes_sent"] - before["transport"]["bytes_sent"]
    assert moved == after["bytes_planned"] - before["bytes_planned"] > 0
    return moved


@pytest.mark.parametrize("lanes, checksum", [("1", "0"), ("4", "1")])
def test_bytes_moved_are_bytes_planned(monkeypatch, lanes, checksum):
    monkeypatch.setenv("RINGKERN_LANES", lanes)
    monkeypatch.setenv("RINGKERN_CHECKSUM", checksum)
    launch(check_bytes, 3, threads=1, timeout_s=60)


def check_large(worker):
    """Payloads far larger than the socket buffers, both ways at once."""
    with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
        x = torch.arange(12 << 20, dtype=torch.int32) + ring.rank  # 48 MiB
        y = torch.empty_like(x)
        next_rank, prev_rank = (ring.rank + 1) % ring.world_size, (ring.rank - 1) % ring.world_size
        for _ in range(2):
            ring._link.exchange([(next_rank, x)], [(prev_rank, y)]).wait()
            assert torch.equal(y, x - ring.rank + prev_rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_payloads_ten_times_the_socket_buffers(world_size):
    launch(check_large, world_size, threads=1, timeout_s=60)
