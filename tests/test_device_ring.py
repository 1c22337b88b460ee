"""A whole ring of GPUs without one: the extension, the links and the ring, over stubs.

Over NCCL, and over TCP by way of pinned memory.
"""

import pathlib
import subprocess
import sys
import threading
import time
import weakref

import pytest
import ringkern
import torch
from close import assert_close, assert_lse_close
from ringkern import _C
from ringkern.errors import ArgumentError, TransportError, UnsupportedError
from ringkern.kernels import reference
from stub_gpu import LIMIT_S, run_stub, stubs, why_no_stubs

BOTH = pytest.mark.parametrize("transport", ["nccl", "tcp"])
METHODS = "pass_kv", "pass_q", "gather_kv", "gather_q"


pytestmark = pytest.mark.skipif(bool(why_no_stubs()), reason=why_no_stubs() or "none")


def make(total, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(total, n, 16, generator=draw).to(dtype) for n in (4, 2, 2)]


def prefill_and_decode(ring, dtype, transport):
    """Return this rank's results of a prefill of an odd length and two tokens more, by method."""
    found = {}
    for method in METHODS:
        placement = ringkern.Placement(ring.world_size)
        cache = ringkern.KVCache(ring, placement, num_layers=1, nheads_k=2, headdim=16, dtype=dtype,
                                 num_pages=16, page_size=4)  # fmt: skip
        for step, new in enumerate((13, 1, 1)):
            plan = placement.prefill({"a": new}) if step == 0 else placement.decode(["a"])
            mine = [plan.shard(x, ring.rank) for x in make(new, dtype, step)]
            out = ring.attn(*mine, plan, cache=cache, method=method)
            found[method, step] = ring.unshard(out, plan)
        cache.close()
    stats = ring.stats()
    assert stats["bytes_sent"] == stats["bytes_planned"]
    assert stats["transport"]["bytes_sent"] >= stats["bytes_sent"]
    assert ring.transport == transport
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_every_method_is_exact(world_size, dtype, transport):
    qkv = [torch.cat(parts) for parts in zip(*(make(n, dtype, i) for i, n in enumerate((13, 1, 1))),
                                             strict=True)]  # fmt: skip
    dense = [x[None] for x in qkv]
    want, _ = reference.attn(*dense, causal=True)
    base, _ = reference.attn(*dense, causal=True, dtype=dtype)
    edges = (0, 13), (13, 14), (14, 15)
    each = run_stub(prefill_and_decode, world_size, dtype, transport, transport=transport)
    for found in each:
        for (method, step), out in found.items():
            lo, hi = edges[step]
            name = f"{transport=} {world_size=} {dtype=} {method} step {step}"
            assert_close(out[None], want[:, lo:hi], base[:, lo:hi], name=name)


def talk_on_both_planes(ring):
    """Exchange on the host's plane between exchanges of device memory."""
    ring.barrier()
    told = ring.gather_bytes(f"rank {ring.rank}".encode())
    assert told == [f"rank {rank}".encode() for rank in range(ring.world_size)]
    x, y = torch.full((5,), float(ring.rank)), torch.empty(5)
    after, before = ((ring.rank + way) % ring.world_size for way in (1, -1))
    ring._link.exchange([(after, x)], [(before, y)]).wait()
    assert y.tolist() == [float(before)] * 5
    assert ring.gather_int(ring.rank) == list(range(ring.world_size))
    with pytest.raises(ArgumentError, match="tensor: want on cpu"):
        ring.post([(after, x), (after, torch.empty(2, device="meta"))], [])


@BOTH
def test_host_messages_travel_beside_device_messages(transport):
    run_stub(talk_on_both_planes, 3, transport=transport)


def keep_until_over(ring, posted, checked):
    """Rank 0's buffers live until rank 1 has come to the exchange, whoever forgets the ticket."""
    link = ring._link
    if ring.rank == 1:
        posted.wait()
        checked.wait()
        x = torch.empty(7)
        link.exchange([], [(0, x)]).wait()
        assert x.tolist() == [3.0] * 7
        return
    x = torch.full((7,), 3.0)
    seen = weakref.ref(x.untyped_storage())
    ticket = link.exchange([(1, x)], [])
    del x, ticket
    posted.set()
    link.exchange([], []).wait()
    assert seen() is not None
    checked.set()
    end = time.monotonic() + LIMIT_S
    while seen() is not None:
        assert time.monotonic() < end, "the buffers were never let go"
        stubs().call.stub_drained(link.stream())  # the stub works while somebody asks
        link.exchange([], []).wait()


@BOTH
def test_buffers_live_until_the_gpu_is_done_with_them(transport):
    run_stub(keep_until_over, 2, threading.Event(), threading.Event(), transport=transport)


# What is registered first runs last: when the links have been closed.
PROGRAM = """
import atexit, sys

@atexit.register
def report():
    closed = 0
    for link in links:
        try:
            link.exchange([], [])
        except Exception:
            closed += 1
    kept = sum(len(link._kept) for link in links)
    print(closed, "closed", kept, "kept", stub_gpu.stubs().call.stub_violations(), "violations")

sys.path.insert(0, sys.argv[1])
import threading
import torch
import stub_gpu
from ringkern.link import close_at_exit
from threads import each_in_a_thread

listeners, links, joined = stub_gpu.listen(3), [], threading.Barrier(3)

def main(rank):
    link = stub_gpu.join_stub(listeners, rank, sys.argv[2], 10.0)
    links.append(link)
    close_at_exit(link)
    joined.wait()
    if sys.argv[3] == "failed" and rank == 1:
        link.abort("out of luck")
        return
    try:
        link.exchange([((rank + 1) % 3, torch.ones(99))], [((rank + 1) % 3, torch.ones(99))])
        while sys.argv[3] == "failed":
            link.exchange([], [])
    except Exception as error:
        assert "out of luck" in str(error), error

each_in_a_thread(main, 3)
print(sum(len(link._kept) for link in links), "open")
"""


@BOTH
@pytest.mark.parametrize("how", ["open", "failed"])
def test_programs_that_end_with_exchanges_open(transport, how):
    """And without close(): what no peer has sent, and what a failed ring has left behind."""
    command = [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parent), transport, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * LIMIT_S)
    assert done.returncode == 0 and not done.stderr, done
    opened, ended = done.stdout.splitlines()
    assert ended == "3 closed 0 kept 0 violations", done
    assert how == "failed" or opened == "3 open", done


def fail_on_rank_one(ring):
    plan = ringkern.Placement(ring.world_size).prefill({"a": 9})
    mine = [plan.shard(x, ring.rank) for x in make(9, torch.float32, 0)]
    ring.attn(*mine, plan, method="pass_kv")
    if ring.rank == 1:
        ring._link.abort("rank 1 was told to stop")
    with pytest.raises(TransportError, match="rank 1 was told to stop") as first:
        for _ in range(100):
            ring.attn(*mine, plan, method="pass_kv")
            ring.barrier()
    assert first.value.origin == 1
    with pytest.raises(TransportError) as again:
        ring.barrier()
    assert again.value.origin == 1


@BOTH
def test_a_failure_is_everybodys_and_a_new_ring_works(transport):
    run_stub(fail_on_rank_one, 3, transport=transport)
    run_stub(talk_on_both_planes, 3, transport=transport)


def test_the_library_says_which_it_is_and_what_it_lacks():
    call, path = stubs()
    call.stub_reset()
    assert _C.nccl_library(path) == (path, 22809)
    assert _C.cuda_driver(path) == (path, 12040)
    call.stub_nccl_version(21602)
    with pytest.raises(UnsupportedError, match=r"2\.17\.1.*2\.16\.2"):
        _C.nccl_library(path)
    call.stub_reset()
    with pytest.raises(UnsupportedError, match="no-such-nccl"):
        _C.nccl_library("no-such-nccl.so")


@BOTH
def test_lse_of_ranks_without_queries(transport):
    def run(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 1})  # two of three have no token
        mine = [plan.shard(x, ring.rank) for x in make(1, torch.float32, 0)]
        out, lse = ring.attn(*mine, plan, method="gather_q", return_lse=True)
        return ring.unshard(out, plan), ring.unshard(lse.T.contiguous(), plan)

    want, want_lse = reference.attn(*[x[None] for x in make(1, torch.float32, 0)], causal=True)
    for out, lse in run_stub(run, 3, transport=transport):
        assert_close(out[None], want, want.float(), name="out")
        assert_lse_close(lse.T[None], want_lse, name="lse")
