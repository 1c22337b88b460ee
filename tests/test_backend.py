"""backend="triton" through the public functions and the ring; what cannot run says why."""

import builtins
import collections
import warnings

import numpy as np
import pytest
import ringkern
import torch
from accelerator import DEVICE, EACH_DTYPE, ON_GPU
from close import assert_close, assert_lse_close
from ringkern import backend, local
from ringkern.errors import ArgumentError, UnsupportedError
from ringkern.kernels import decode, merge, pack, reference, step, target
from ringkern.launch import launch
from ringkern.types import Problem

OPTIONS = [
    dict(),
    dict(causal=True, window_size=(7, -1)),
    dict(window_size=(3, 2), softcap=4.0),
    dict(causal=True, sinks=True, softmax_scale=-0.3),
]


@pytest.fixture(autouse=True)
def forget():
    """No test sees what another one made the backends believe."""
    yield
    backend.why_not_triton.cache_clear()
    backend._warn.cache_clear()


def draw(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def assert_agree(found, oracle, baseline, name):
    assert_close(found[0].cpu(), oracle[0].cpu(), baseline[0].cpu(), name=name)
    assert_lse_close(found[1].cpu(), oracle[1].cpu(), name=name)


@EACH_DTYPE
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: " ".join(x) or "full")
def test_dense_calls_match_the_oracle(dtype, options):
    # More queries than keys: with a causal mask the first ones see none.
    for seqlens, heads, dims in (((23, 37), (4, 2), (16, 24)), ((41, 19), (3, 3), (40, 40))):
        shapes = [(2, n, h, d) for n, h, d in zip((*seqlens, seqlens[1]), (heads[0], heads[1], heads[1]), (dims[0], *dims), strict=True)]  # fmt: skip
        q, k, v = draw(*shapes, dtype=dtype)
        asked = dict(options)
        if "sinks" in asked:
            sinks = torch.linspace(-2, 2, heads[0], dtype=torch.float64, device=DEVICE)
            asked["sinks"] = sinks.repeat_interleave(2)[::2]
        found = ringkern.attn_func(q, k, v, **asked, backend="triton")
        assert found[0].dtype == dtype
        baseline = reference.attn(q, k, v, **asked, dtype=dtype)
        assert_agree(found, reference.attn(q, k, v, **asked), baseline, f"{seqlens}")


def test_packed_calls_match_the_oracle():
    q, k, v = draw((60, 4, 16), (70, 1, 16), (70, 1, 16))
    edges = [0, 1, 1, 40, 60], [0, 5, 12, 12, 70]  # empty on either side, and neither
    for options in (dict(causal=True), dict(window_size=(4, -1))):
        found = ringkern.attn_varlen_func(q, k, v, *edges, **options, backend="triton")
        oracle = reference.attn_varlen(q, k, v, *edges, **options)
        assert_agree(found, oracle, oracle, f"{options}")
    assert found[1].isneginf().any(), "some rows should see no key"


def test_views_and_empty_calls():
    (whole,) = draw((1, 33, 3, 4, 16))
    q, k, v = whole[:, ::2, 0], whole[:, 1::2, 1, :2], whole[:, 1::2, 2, :2]  # no copies
    found = ringkern.attn_func(q, k, v, causal=True, backend="triton")
    oracle = reference.attn(q, k, v, causal=True)
    assert_agree(found, oracle, oracle, "views")
    out, lse = ringkern.attn_func(q, k[:, :0], v[:, :0], backend="triton")
    assert not out.any() and lse.isneginf().all()


def count_launches(replace=setattr):
    """Return a count by kernel, which grows as they are made ready; steps by their phase too."""
    launched = collections.Counter()

    def count(module, name_of):
        prepare = module.prepare

        def counting(*args, **options):
            launched[name_of(options)] += 1
            return prepare(*args, **options)

        replace(module, "prepare", counting)

    count(step, lambda options: f"step {options['phase']}")
    count(decode, lambda options: "decode")
    count(merge, lambda options: "merge_" if options["seeded"] else "merge")
    count(pack, lambda options: "gather" if options["gather"] else "scatter")
    return launched


def ring_calls(worker):
    """Return this rank's answers by each method, and how often each kernel was launched."""
    launched, found = count_launches(), []
    local._warn_copy = lambda name: launched.update([f"copy {name}"])
    with ringkern.init_ring() as ring:
        for dtype in (torch.float32, torch.float16):
            found += ring_history(ring, dtype)
    with ringkern.init_ring(ringkern.LocalGroup(1)[0], transport="local") as alone:
        found += ring_history(alone, torch.float16)
    return found, launched


def misaligned(x):
    """Return a copy of x whose rows do not begin where a vector can."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def ring_history(ring, dtype):
    """Return (out, lse) of each call: two prefills and two decodes, by each method."""
    torch.manual_seed(0)
    lengths = {"a": 29, "b": 2}
    whole = [torch.randn(31, heads, 16).to(dtype) for heads in (4, 2, 2)]
    sinks = torch.tensor([0.5, -3.0, float("-inf"), 2.0])
    sinks = sinks.double().repeat_interleave(2)[::2]  # of another dtype, and apart
    placement = ringkern.Placement(ring.world_size)
    cache = ringkern.KVCache(
        ring, placement, num_layers=4, nheads_k=2, headdim=16, dtype=dtype,
        num_pages=40, page_size=4,
    )  # fmt: skip
    found = []
    for turn in (placement.prefill, placement.prefill, placement.decode, placement.decode):
        lengths = {"a": 5, "b": 7} if found else lengths
        # Without a mask, few queries of other ranks would go to the decode kernel.
        window = (9, -1) if turn == placement.prefill and found else (-1, -1)
        plan = turn(lengths if turn == placement.prefill else list(lengths))
        mine = [plan.shard(x[: plan.total], ring.rank) for x in whole]
        if not found:
            mine[0] = misaligned(mine[0])
        for layer, method in enumerate(("pass_kv", "pass_q", "gather_kv", "gather_q")):
            out, lse = ring.attn(
                *mine, plan, cache=cache, layer=layer, method=method, window_size=window,
                sinks=sinks if layer % 2 else None, return_lse=True,
            )  # fmt: skip
            found.append((out, lse))
    return found


def test_a_ring_computes_with_triton(monkeypatch):
    if ON_GPU:
        pytest.skip("is about a ring on the CPU, by the interpreter; test_ring_gpu.py has GPUs")
    found = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("RINGKERN_BACKEND", name)
        found[name] = launch(ring_calls, 3, threads=1, timeout_s=300)
    for rank, (ours, theirs) in enumerate(zip(found["triton"], found["torch"], strict=True)):
        (ours, launched), (theirs, none) = ours, theirs
        assert len(ours) == len(theirs) == 48 and not none
        each = "step first", "step middle", "step last", "step only", "decode", "merge_"
        each += "gather", "scatter"
        assert all(launched[kernel] for kernel in each), f"{rank=} {launched}"
        assert launched["copy q"] == 12, "once in each of the calls of three first turns"
        for call, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            most = 2e-6 if call < 16 else 2e-3  # of float16, to which the kernels round weights
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=most, atol=most, msg=f"{rank=} {call=}")


# ---- what cannot run


def problem(headdim=16, dtype="float32"):
    return Problem(1, 1, 1, headdim, headdim, dtype, False, 1.0, (-1, -1), 0.0)


def test_unsupported_calls_are_refused():
    for asked, error, words in (
        ("hopper", UnsupportedError, "no such kernels"),
        ("cuda", ArgumentError, "backend: want one of auto, triton, hopper, torch, got 'cuda'"),
    ):
        with pytest.raises(error, match=words):
            backend.pick_backend(asked, DEVICE, problem())
    with pytest.raises(UnsupportedError, match="headdim of at most 256, got 257"):
        backend.pick_backend("triton", DEVICE, problem(257))
    with pytest.raises(UnsupportedError, match="attention on meta"):
        backend.pick_backend("auto", torch.device("meta"), problem())


@pytest.mark.skipif(ON_GPU, reason="is about machines without a GPU")
def test_the_cpu_needs_the_interpreter_and_it_no_bfloat16(monkeypatch):
    q = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="interpreter computes bfloat16 wrongly"):
        ringkern.attn_func(q, q, q, backend="triton")
    backend.why_not_triton.cache_clear()
    monkeypatch.setattr(target, "INTERPRET", False)
    with pytest.raises(UnsupportedError, match='CUDA device, got cpu. Use "torch"'):
        ringkern.attn_func(q.float(), q.float(), q.float(), backend="triton")


@pytest.mark.skipif(ON_GPU, reason="is about machines without a GPU")
def test_a_ring_refuses_before_it_stores(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    with ringkern.init_ring(ringkern.LocalGroup(1)[0], transport="local") as ring:
        placement = ringkern.Placement(1)
        sizes = dict(num_layers=1, nheads_k=1, headdim=16, num_pages=4)
        cache = ringkern.KVCache(ring, placement, **sizes, dtype=torch.bfloat16)
        x = torch.zeros(3, 1, 16, dtype=torch.bfloat16)
        plan = placement.prefill({"a": 3})
        with pytest.raises(UnsupportedError, match="interpreter computes bfloat16 wrongly"):
            ring.attn(x, x, x, plan, cache=cache)
        with pytest.raises(UnsupportedError, match="interpreter computes bfloat16 wrongly"):
            ringkern.ring_attn_func(x[None], x[None], x[None], ring=ring)
        assert cache.stats()["tokens"] == 0
        monkeypatch.setenv("RINGKERN_BACKEND", "torch")
        assert ring.attn(x, x, x, plan, cache=cache).shape == (3, 1, 16)


def test_a_missing_or_old_triton_is_named(monkeypatch):
    imports = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ringkern.kernels":
            raise ImportError("triton: want 3.6 or later, got 3.5.1")
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match="want 3.6 or later, got 3.5.1"):
        backend.pick_backend("triton", DEVICE, problem())
    # On a GPU, "auto" goes the slower way, and says so once.
    with pytest.warns(RuntimeWarning, match="slower, as Triton cannot: triton: want 3.6"):
        assert backend.pick_backend("auto", torch.device("cuda"), problem()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.pick_backend("auto", torch.device("cuda"), problem()) == "torch"


def test_the_variable_decides_where_a_call_says_auto(monkeypatch):
    on_cpu = torch.device("cpu")
    assert backend.pick_backend("auto", on_cpu, problem()) == "torch"
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    if not ON_GPU:
        assert backend.pick_backend("auto", on_cpu, problem()) == "triton"
    assert backend.pick_backend("torch", on_cpu, problem()) == "torch"
    monkeypatch.setenv("RINGKERN_BACKEND", "fast")
    with pytest.raises(ArgumentError, match="RINGKERN_BACKEND: want auto, triton or torch"):
        backend.pick_backend("auto", on_cpu, problem())


def test_float32_products_are_exact_unless_asked(monkeypatch):
    """By the step kernel, in a call and in a ring, and by the decode kernel."""
    asked = []

    def prepare(*_, allow_tf32, **__):
        return lambda *_: asked.append(allow_tf32)

    for module in (step, decode):
        monkeypatch.setattr(module, "prepare", prepare)
    q, k = draw((1, 1, 1, 16), (1, 4, 1, 16))
    spans = np.array([[0, 1, 0, 4, 0, 3, 1, 1]])  # a query that sees a page of keys

    def call():
        ringkern.attn_func(q, k, k, backend="triton")
        for page_size, kind in ((None, "_Tiles"), (4, "_Decode")):
            given = dict(rows=1, page_size=page_size)
            work = local.prepare(spans, problem(), DEVICE, "triton", **given)
            assert type(work).__name__ == kind
            local.step(q, k, k, *local.make_state(q, 16), work, problem())

    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            call()
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == [False] * 3 + [True] * 6


@pytest.mark.parametrize("page_size", [4, None], ids=["decode", "step"])
def test_phases_of_a_state(page_size):
    """first, middle and last are only, over poison; most queries, more than a tile, see no key."""
    q, k, v = draw((1, 12, 8, 16), (1, 16, 1, 16), (1, 16, 1, 16), dtype=torch.float16)
    sinks = torch.linspace(-1, 0.5, 8, device=DEVICE)
    keys = (0, 4), (4, 12), (12, 15)
    spans = np.array([[0, 2, k0, k1, -1, k1 - k0 - 1, 1, 1] for k0, k1 in keys])
    given = Problem(1, 8, 1, 16, 16, "float16", False, 0.25, (-1, -1), 0.0)
    found = {}
    for phases in (["only"], ["first", "middle", "last"]):
        out = torch.full((1, 12, 8, 16), float("nan"), device=DEVICE)
        result, lse = out.half(), out[..., 0].mT.clone()
        for phase, some in zip(phases, np.array_split(spans, len(phases)), strict=True):
            options = dict(rows=12, page_size=page_size, phase=phase)
            work = local.prepare(some, given, DEVICE, "triton", **options)
            begins = sinks if phase in ("first", "only") else None
            local.step(q, k, v, out, lse, work, given, sinks=begins, result=result)
        found[len(phases)] = result, lse
    seen = reference.attn(q[:, :2], k[:, :15], v[:, :15], softmax_scale=0.25, sinks=sinks)
    for result, lse in found.values():
        torch.testing.assert_close(result[:, :2].double(), seen[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[..., :2].double(), seen[1], rtol=2e-3, atol=2e-3)
        assert not result[:, 2:].any()
        assert torch.equal(lse[0, :, 2:], sinks[:, None].expand(8, 10))


def test_tensors_that_lie_otherwise_in_each_layer(monkeypatch):
    """Kernels are made ready for one layout: the next call's may be another."""
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    plan = ringkern.Placement(1).prefill({"a": 29, "b": 2})
    fused = torch.randn(31, 8, 16, device=DEVICE).half()
    whole = [x.contiguous() for x in fused.split((4, 2, 2), 1)]
    sinks = torch.tensor([0.5, -3.0, 0.0, 2.0], device=DEVICE)
    ways = [
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        misaligned,
        lambda x: x,
    ]
    with ringkern.init_ring(ringkern.LocalGroup(1)[0], transport="local") as ring:
        for other in (None, sinks, sinks.double(), sinks.repeat_interleave(2)[::2]):
            want = None
            for way in ways:
                found = ring.attn(
                    *map(way, whole), plan, sinks=other, method="pass_kv", return_lse=True
                )
                want = want or found
                for got, expected in zip(found, want, strict=True):
                    assert torch.equal(got, expected)
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


# ---- merges


def test_merges_go_by_the_backend(monkeypatch):
    outs, lses = draw((3, 7, 2, 16), (3, 2, 7))
    parts = outs[1:, None].bfloat16(), lses[1:, None]
    found = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("RINGKERN_BACKEND", name)
        with monkeypatch.context() as patch:
            launched = count_launches(patch.setattr)
            state = outs[None, 0].clone(), lses[None, 0].clone()
            local.Merge(*parts)(*state)
            found[name] = *ringkern.merge(outs, lses), *state
        assert launched == ({"merge": 1, "merge_": 1} if name == "triton" else {})
    torch.testing.assert_close(found["triton"], found["torch"], rtol=2e-6, atol=2e-6)


def test_a_merge_that_triton_cannot_do_is_said_or_refused(monkeypatch):
    """As on a GPU, whose place the CPU takes here where there is none."""

    def pick(asked, device, *more):
        return backend.pick_backend(asked, torch.device("cuda"), *more)

    monkeypatch.setattr(local, "pick_backend", pick)
    launched = count_launches(monkeypatch.setattr)
    lses = draw((2, 1, 3))[0]
    for headdim, dtype, words in (
        (300, torch.float32, "headdim of at most 256, got 300"),
        (16, torch.float64, "want float16, bfloat16, float32, got float64"),
    ):
        (outs,) = draw((2, 3, 1, headdim), dtype=dtype)
        with pytest.warns(RuntimeWarning, match=f"merge computes with torch, .*: .*{words}"):
            out, _ = ringkern.merge(outs, lses)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ringkern.merge(outs, lses)
        torch.testing.assert_close(out, reference.merge(outs, lses.double())[0].to(dtype))
        with monkeypatch.context() as patch:
            patch.setenv("RINGKERN_BACKEND", "triton")
            with pytest.raises(UnsupportedError, match=words):
                ringkern.merge(outs, lses)
    assert not launched
