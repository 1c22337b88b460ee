"""Rings of GPUs, on a host with one: alone over NCCL, several processes by TCP and by NCCL."""

import os
import signal

import pytest
import ringkern
import torch
from accelerator import ON_GPU
from close import assert_close, assert_lse_close
from ringkern import _C
from ringkern.gpu import nccl_path
from ringkern.kernels import reference
from ringkern.launch import launch, run_ranks
from test_faults import regroup
from threads import HARDWARE

pytestmark = pytest.mark.skipif(not ON_GPU, reason="no GPU here")

METHODS = "pass_kv", "pass_q", "gather_kv", "gather_q"
LENGTHS = {"a": 1021, "b": 3, "c": 130}
HEADS, HEADDIM = (8, 2, 2), 128
FAULT_TIMEOUT_S = 10.0


class Session:
    """Sequences in a cache on the GPU, and all that was fed so far, packed by sequence."""

    def __init__(self, ring, dtype, method):
        self.ring, self.method = ring, method
        self.placement = ringkern.Placement(ring.world_size)
        self.cache = ringkern.KVCache(
            ring, self.placement, num_layers=2, nheads_k=2, headdim=HEADDIM, dtype=dtype,
            num_pages=64, page_size=64,
        )  # fmt: skip
        self.dtype, self.whole = dtype, {}
        self.draw = torch.Generator().manual_seed(0)

    def feed(self, plan):
        """Draw the plan's tokens, alike on all ranks; keep this rank's on the GPU."""
        new = [torch.randn(plan.total, n, HEADDIM, generator=self.draw) for n in HEADS]
        new = [x.to(self.dtype) for x in new]
        rows = zip(*(x.split(plan.lengths) for x in new), strict=True)
        for name, qkv in zip(plan.sequences, rows, strict=True):
            before = self.whole.get(name, [x[:0] for x in qkv])
            self.whole[name] = [torch.cat(pair) for pair in zip(before, qkv, strict=True)]
        self.mine = [plan.shard(x, self.ring.rank).to(self.ring.device) for x in new]

    def step(self, plan):
        given = dict(cache=self.cache, method=self.method, return_lse=True)
        return [self.ring.attn(*self.mine, plan, layer=layer, **given) for layer in range(2)]

    def check(self, plan, result, name):
        for number, (sequence, new) in enumerate(zip(plan.sequences, plan.lengths, strict=True)):
            dense = [x[None] for x in self.whole[sequence]]
            dense[0] = dense[0][:, -new:]
            want, want_lse = reference.attn(*dense, causal=True)
            base, _ = reference.attn(*dense, causal=True, dtype=self.dtype)
            for out, lse in result:
                lo = sum(plan.lengths[:number])
                got = self.ring.unshard(out, plan)[lo : lo + new]
                got_lse = self.ring.unshard(lse.T.contiguous(), plan)[lo : lo + new].T
                assert_close(got[None].cpu(), want, base, name=f"{name} {sequence}")
                assert_lse_close(got_lse[None].cpu(), want_lse, name=f"{name} {sequence}")


def check_methods(ring):
    for dtype in (torch.float32, torch.bfloat16):
        for method in METHODS:
            session = Session(ring, dtype, method)
            plans = [session.placement.prefill(LENGTHS), session.placement.prefill({"b": 77})]
            plans += [session.placement.decode(list(LENGTHS)) for _ in range(3)]
            for number, plan in enumerate(plans):
                session.feed(plan)
                name = f"{ring} {dtype} {method} plan {number}"
                session.check(plan, session.step(plan), name)
            session.cache.close()
    stats = ring.stats()
    assert stats["bytes_sent"] == stats["bytes_planned"]


def check_no_synchronisation(ring):
    """The second layer of a plan, whose tables are there, never waits for the GPU."""
    for method in METHODS:
        session = Session(ring, torch.bfloat16, method)
        plan = session.placement.prefill(LENGTHS)
        session.feed(plan)
        session.ring.attn(*session.mine, plan, cache=session.cache, layer=0, method=method)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            given = dict(cache=session.cache, layer=1, method=method, return_lse=True)
            result = session.ring.attn(*session.mine, plan, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        session.check(plan, [result], f"{ring} {method} without synchronisation")


def check_freed_memory(ring):
    """What is freed after a call, and handed out again at once, was not needed any more."""
    session = Session(ring, torch.bfloat16, "pass_kv")
    plan = session.placement.prefill(LENGTHS)
    session.feed(plan)
    results = []
    for layer in range(2):
        copies = [x.clone() for x in session.mine]
        given = dict(cache=session.cache, layer=layer, method="pass_kv", return_lse=True)
        results.append(ring.attn(*copies, plan, **given))
        sizes = [x.numel() for x in copies]
        del copies
        for size in sizes:
            torch.full((size,), float("nan"), dtype=torch.bfloat16, device=ring.device)
    session.check(plan, results, f"{ring} freed memory")


def check_graphs(ring, method):
    session = Session(ring, torch.bfloat16, method)
    plan = session.placement.prefill(LENGTHS)
    session.feed(plan)
    session.step(plan)
    inputs: dict = {}
    eye = torch.eye(HEADDIM, dtype=torch.bfloat16, device=ring.device)

    def step(plan):
        q, k, v = inputs[tuple(x.shape for x in session.mine)]
        session.mine = [q @ eye, k, v]  # cuBLAS leaves a workspace in the graphs' memory
        return session.step(plan)

    graphs = ringkern.DecodeGraphs(ring, session.cache, step)
    for grown in (0, 900):  # then K and V need more room on the wire: all graphs are made anew
        if grown:
            session.feed(plan := session.placement.prefill({"c": grown}))
            session.check(plan, session.step(plan), f"{ring} {method} between graphs")
        for number in range(4 * ring.world_size):
            plan = session.placement.decode(list(LENGTHS))
            session.feed(plan)
            key = tuple(x.shape for x in session.mine)
            for held, new in zip(inputs.setdefault(key, session.mine), session.mine, strict=True):
                held.copy_(new)
            name = f"{ring} {method} graph, {grown} more, step {number}"
            session.check(plan, graphs.run(plan), name)


def check_refused_capture(ring):
    """A call with a cache in a capture by hand: refused before anything is stored."""
    session = Session(ring, torch.bfloat16, "pass_kv")
    session.feed(plan := session.placement.prefill(LENGTHS))
    capture = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
    with pytest.raises(ringkern.UnsupportedError, match="DecodeGraphs"), capture:
        session.step(plan)
    session.check(plan, session.step(plan), f"{ring} after a capture that was refused")


def check_two_streams(ring):
    """Calls share buffers, also those that are made on streams of their own."""
    plan = ringkern.Placement(ring.world_size).prefill(LENGTHS)
    draw = torch.Generator().manual_seed(3)
    streams = [torch.cuda.Stream() for _ in range(2)]
    given = []
    for _ in streams:
        new = [torch.randn(plan.total, n, HEADDIM, generator=draw).bfloat16() for n in HEADS]
        given.append([plan.shard(x, ring.rank).to(ring.device) for x in new])
    for method in METHODS:
        want = [ring.attn(*qkv, plan, method=method) for qkv in given]
        torch.cuda.synchronize()
        got = []
        for _ in range(4):
            for stream, qkv in zip(streams, given, strict=True):
                with torch.cuda.stream(stream):
                    got.append(ring.attn(*qkv, plan, method=method))
        torch.cuda.synchronize()
        for number, out in enumerate(got):
            assert torch.equal(out, want[number % 2]), f"{ring} {method} call {number}"


def check_captured_passes(ring):
    """One pass of each method as a graph, without a cache, gives what a new call gives."""
    plan = ringkern.Placement(ring.world_size).prefill(LENGTHS)
    draw = torch.Generator().manual_seed(2)

    def draw_inputs():
        new = [torch.randn(plan.total, n, HEADDIM, generator=draw).bfloat16() for n in HEADS]
        return [plan.shard(x, ring.rank).to(ring.device) for x in new]

    static = draw_inputs()
    for method in METHODS:
        ring.attn(*static, plan, method=method)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = ring.attn(*static, plan, method=method)
        for number in range(3):
            for held, new in zip(static, draw_inputs(), strict=True):
                held.copy_(new)
            want = ring.attn(*static, plan, method=method).clone()
            with ring.watch():
                graph.replay()
            assert torch.equal(out, want), f"{ring} {method} replay {number}"
        del graph, out


def suffer(worker, transport, number, victim):
    """A rank dies or stops while others' kernels wait for it; who is left makes a new ring."""
    if transport == "nccl":
        several_on_one_gpu(worker.rank)
    given = dict(transport=transport, device="cuda:0", profile=HARDWARE)
    ring = ringkern.init_ring(timeout_s=FAULT_TIMEOUT_S, **given)
    session = Session(ring, torch.bfloat16, "pass_kv")
    session.feed(plan := session.placement.prefill(LENGTHS))
    session.check(plan, session.step(plan), "before the fault")
    theirs = torch.arange(1 << 20, device=ring.device)
    if ring.rank == victim:
        os.kill(os.getpid(), number)
    with pytest.raises(ringkern.TransportError) as first:
        while True:
            session.feed(plan := session.placement.decode(list(LENGTHS)))
            session.step(plan)
            torch.cuda.synchronize()  # which ends: kernels do not wait for ever
    with pytest.raises(ringkern.TransportError) as later:
        ring.barrier()
    ring.close()
    torch.cuda.synchronize()
    assert torch.equal(theirs.cpu(), torch.arange(1 << 20)), "memory of others was touched"
    with regroup(ring.rank, ring.world_size, victim, **given) as again:
        check_freed_memory(again)
    return first.value.origin, str(first.value), str(later.value)


@pytest.mark.parametrize("transport", ["tcp", "nccl"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_survivors_of_a_rank_that_broke_under_kernels(transport, number):
    if transport == "nccl":
        need_nccl()
    answers = run_ranks(suffer, 3, transport, number, 2, timeout_s=200, lost=(2,))
    for answer in answers[:2]:
        assert answer.answered and not answer.error, f"rank {answer.rank}: {answer}"
        origin, text, later = answer.value
        assert origin == 2 and "rank 2" in text and later == text


def need_nccl():
    """Skip the test where no NCCL will do."""
    try:
        _C.nccl_library(nccl_path())
    except ringkern.UnsupportedError as error:
        pytest.skip(f"no NCCL here: {error}")


def several_on_one_gpu(rank):
    """Let NCCL put several ranks on one GPU: they look like hosts of their own."""
    os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}
    os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    os.environ |= {"NCCL_MAX_CTAS": "1"}


def alone(worker):
    with ringkern.init_ring(transport="nccl", device="cuda:0", profile=HARDWARE) as ring:
        check_methods(ring)
        check_no_synchronisation(ring)
        check_freed_memory(ring)
        for method in METHODS:
            check_graphs(ring, method)
        check_captured_passes(ring)
        check_refused_capture(ring)
        check_two_streams(ring)
        # A world of one sends nothing in a call; the transport itself does.
        x, y = torch.arange(1 << 20, device="cuda:0"), torch.empty(1 << 20, device="cuda:0").long()
        ring._link.exchange([(0, x)], [(0, y)]).wait()
        assert torch.equal(x, y)


def test_one_rank_over_nccl():
    need_nccl()
    launch(alone, 1, timeout_s=300)


def by_tcp(worker):
    with ringkern.init_ring(transport="tcp", device="cuda:0", profile=HARDWARE) as ring:
        assert ring.transport == "tcp" and ring.device.type == "cuda"
        check_methods(ring)
        check_freed_memory(ring)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_on_one_gpu_over_tcp(world_size):
    launch(by_tcp, world_size, timeout_s=300)


def by_nccl(worker):
    several_on_one_gpu(worker.rank)
    with ringkern.init_ring(transport="nccl", device="cuda:0", profile=HARDWARE) as ring:
        check_methods(ring)
        check_no_synchronisation(ring)
        check_freed_memory(ring)
        for method in METHODS:
            check_graphs(ring, method)
        check_captured_passes(ring)
        check_refused_capture(ring)
        check_two_streams(ring)


def test_ranks_on_one_gpu_over_nccl():
    need_nccl()
    launch(by_nccl, 2, timeout_s=500)


def claimed(worker):
    with pytest.raises(ringkern.ArgumentError, match=r"on ranks \[0, 1\]"):
        ringkern.init_ring(transport="nccl", device="cuda:0")


def test_a_gpu_that_two_ranks_claim_is_refused():
    need_nccl()
    launch(claimed, 2, timeout_s=100)
