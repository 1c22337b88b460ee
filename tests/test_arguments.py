"""Bad input: a clear error of the right class, before anything is computed or sent."""

import pytest
import ringkern
import torch
from threads import run_threads


def good(**changes):
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
    return dict(q=q, k=k, v=v) | changes


BAD_TENSORS = [
    (dict(q=[1.0]), "q: want a torch.Tensor, got list"),
    (dict(q=torch.zeros(6, 4)), r"q: want \[batch, seqlen.*got \(6, 4\)"),
    (dict(k=torch.zeros(6, 2, 8)), r"k: want .*got \(6, 2, 8\)"),
    (dict(v=torch.zeros(2, 5, 2, 8)), r"v: want \(2, 6, 2\).*got \(2, 5, 2, 8\)"),
    (dict(k=torch.zeros(2, 6, 2, 9)), "k: want headdim 8, as q"),
    (dict(k=torch.zeros(2, 6, 3, 8), v=torch.zeros(2, 6, 3, 8)), "multiple of nheads_k = 3, got 4"),
    (dict(k=torch.zeros(1, 6, 2, 8), v=torch.zeros(1, 6, 2, 8)), "k: want batch 2, as q"),
    (dict(q=torch.zeros(2, 6, 4, 8, dtype=torch.float64)), "q: want float16.*got float64"),
    (dict(k=torch.zeros(2, 6, 2, 8, dtype=torch.float16)), "k: want float32, as q, got float16"),
    (dict(v=torch.zeros(2, 6, 2, 8, device="meta")), "v: want a tensor on cpu, got meta"),
    (dict(q=torch.zeros(2, 6, 4, 16)[..., ::2]), r"contiguous head dimension.*Call .contiguous"),
    (dict(q=torch.zeros(2, 0, 4, 8)), "q: want seqlen of at least 1"),
    (dict(q=torch.zeros(0, 6, 4, 8)), "batch of at least 1"),
    (dict(q=torch.zeros(2, 6, 0, 8)), "nheads of at least 1"),
    (dict(q=torch.zeros(2, 6, 4, 0), k=torch.zeros(2, 6, 2, 0)), "headdim of at least 1"),
    (dict(q=torch.zeros(2, 6, 4, 8).to_sparse()), "a dense tensor"),
]
BAD_OPTIONS = [
    (dict(causal=1), "causal: want True or False, got 1"),
    (dict(window_size=5), "window_size: want two ints.*got 5"),
    (dict(window_size=(1, -2)), r"window_size: want two ints"),
    (dict(window_size=(1.0, 2)), "window_size"),
    (dict(softcap=-1.0), "softcap: want 0.0"),
    (dict(softcap=float("nan")), "softcap"),
    (dict(softmax_scale="x"), "softmax_scale: want a finite number or None, got 'x'"),
    (dict(softmax_scale=float("inf")), "softmax_scale"),
    (
        dict(softmax_scale=1e39),
        "softmax_scale: want a finite number.*got 1e.39. Scores are float32",
    ),
    (dict(softmax_scale=10**400), "softmax_scale"),
    (dict(softcap=1e300), "softcap: want .*got 1e.300. Scores"),
    (dict(sinks=torch.zeros(3)), r"sinks: want \[nheads\] = \[4\], got \[3\]"),
    (dict(sinks=[0.0] * 4), "sinks: want a floating tensor or None, got list"),
    (dict(backend="cuda"), "backend: want one of auto, triton, hopper, torch, got 'cuda'"),
]


@pytest.mark.parametrize("changes, match", BAD_TENSORS + BAD_OPTIONS)
def test_attn_func_refuses(changes, match):
    with pytest.raises(ringkern.ArgumentError, match=match) as caught:
        ringkern.attn_func(**good(**changes))
    assert isinstance(caught.value, ValueError)


def test_a_backend_that_is_not_there():
    with pytest.raises(ringkern.UnsupportedError, match='"hopper".*Use "torch"'):
        ringkern.attn_func(**good(), backend="hopper")


def test_gradients_are_refused_not_dropped():
    q = torch.zeros(2, 6, 4, 8, requires_grad=True)
    with pytest.raises(ringkern.UnsupportedError, match="gradients.*no_grad"):
        ringkern.attn_func(**good(q=q))
    sinks = torch.zeros(4, requires_grad=True)
    with pytest.raises(ringkern.UnsupportedError, match="gradients"):
        ringkern.attn_func(**good(), sinks=sinks)
    with torch.no_grad():
        ringkern.attn_func(**good(q=q), sinks=sinks)
    with ringkern.init_ring(transport="local") as ring:
        plan = ringkern.Plan(1, (3,))
        with pytest.raises(ringkern.UnsupportedError, match="unshard.. has no backward"):
            ring.unshard(torch.zeros(3, requires_grad=True), plan)
        with pytest.raises(ringkern.ArgumentError, match="x_local: want a tensor on cpu, got meta"):
            ring.unshard(torch.zeros(3, device="meta"), plan)
        with pytest.raises(ringkern.ArgumentError, match="plan: want a Plan, got None"):
            ring.unshard(torch.zeros(3), None)


@pytest.mark.parametrize(
    "cu_seqlens, match",
    [
        ([0], r"cu_seqlens_q: want int32 \[batch \+ 1\]"),
        ([1, 12], "0 first"),
        ([0, 7, 5, 12], "no step down"),
        ([0, 5, 11], "12 last, the number of rows, got 11"),
        ([0.0, 12.0], "cu_seqlens_q: want int32"),
        ([[0, 12]], "cu_seqlens_q: want int32"),
        ("x", "cu_seqlens_q"),
        ([0, 6, 12], "cu_seqlens_k: want 3 entries"),
    ],
)
def test_varlen_refuses(cu_seqlens, match):
    qkv = [x.flatten(0, 1) for x in good().values()]
    with pytest.raises(ringkern.ArgumentError, match=match):
        ringkern.attn_varlen_func(*qkv, cu_seqlens, [0, 12])


RING_CALLS = [
    (dict(k=torch.zeros(2, 5, 2, 8), v=torch.zeros(2, 5, 2, 8)), "k: want seqlen_local 6, as q"),
    (dict(layout="spiral"), "layout: want one of"),
    (dict(method="teleport"), "method: want auto or one of"),
    *BAD_TENSORS[:5],
    *BAD_OPTIONS[:4],
]


@pytest.mark.parametrize("changes, match", RING_CALLS)
def test_ring_attn_func_refuses_and_sends_nothing(changes, match):
    def refuse(ring):
        before = ring.stats()["transport"]
        with pytest.raises(ringkern.ArgumentError, match=match):
            ringkern.ring_attn_func(**good(**changes), ring=ring)
        assert ring.stats()["transport"] == before

    run_threads(refuse, 3)


def test_shards_that_do_not_fit_the_layout_are_refused_on_every_rank():
    def refuse(ring):
        x = torch.zeros(1, 3 + (ring.rank == 1), 2, 8)
        for call in (
            lambda: ringkern.ring_attn_func(x, x, x, ring=ring),
            lambda: ringkern.unshard_sequence(x, ring),
        ):
            with pytest.raises(ringkern.ArgumentError, match=r"\[3, 3, 4\].*got \[3, 4, 3\]"):
                call()
        with pytest.raises(ringkern.ArgumentError, match="at least one position on some rank"):
            ringkern.ring_attn_func(x[:, :0], x[:, :0], x[:, :0], ring=ring)

    run_threads(refuse, 3)


def test_ring_attn_refuses_and_sends_nothing():
    x = torch.zeros(4, 2, 8)

    def refuse(ring):
        plan = ringkern.Placement(2).prefill({"a": 8})
        for options, match in [
            (dict(method="teleport"), "method: want auto or one of pass_kv"),
            (dict(cache=object()), "cache: want a KVCache or None, got object"),
            (dict(layer=1), "layer: want 0 without a cache, got 1"),
            (dict(partial_dtype=torch.int8), "partial_dtype: want .*float32.*got torch.int8"),
        ]:
            with pytest.raises(ringkern.ArgumentError, match=match):
                ring.attn(x, x, x, plan, **options)
        for args, match in [
            ((x, x, x, "plan"), "plan: want a Plan, got str"),
            ((x, x, x, ringkern.Placement(3).prefill({"a": 8})), "plan: want world_size 2"),
            ((x[:3], x, x, plan), "q: want 4 rows, rank . of 2's share|q: want 4 rows"),
            ((x, x[:3], x[:3], plan), "k: want 4 rows"),
            ((x[None], x, x, plan), r"q: want packed"),
        ]:
            with pytest.raises(ringkern.ArgumentError, match=match):
                ring.attn(*args)
        with pytest.raises(ringkern.ArgumentError, match="x_local: want 4 rows"):
            ring.unshard(x[:2], plan)
        with pytest.raises(ringkern.ArgumentError, match="seqlen: want an int above 0"):
            ringkern.unshard_sequence(x, ring, dim=0, seqlen=0)
        with pytest.raises(ringkern.ArgumentError, match="x_local: want 5 positions, rank"):
            ringkern.unshard_sequence(x, ring, dim=0, seqlen=10)
        with pytest.raises(ringkern.ArgumentError, match="dim: want a dimension of x"):
            ringkern.shard_sequence(x, ring, dim=3)
        assert ring.stats()["transport"]["bytes_sent"] == 0

    run_threads(refuse, 2)


def test_a_closed_ring_is_refused():
    with ringkern.init_ring(transport="local") as ring:
        pass
    x = torch.zeros(1, 2, 2, 8)
    with pytest.raises(ringkern.ArgumentError, match="open ring, got a closed one"):
        ringkern.ring_attn_func(x, x, x, ring=ring)
    ring.close()  # again: nothing happens


def test_different_arguments_are_named_on_every_rank(monkeypatch):
    monkeypatch.setenv("RINGKERN_CHECK", "1")
    x = torch.zeros(1, 4, 2, 8)

    def differ(ring):
        scale = 0.125 if ring.rank == 2 else 0.5
        with pytest.raises(
            ringkern.ArgumentError, match=r"softmax_scale differs.*0.5: ranks \[0, 1\].*\[2\]"
        ):
            ringkern.ring_attn_func(x, x, x, softmax_scale=scale, ring=ring)
        y = x.bfloat16() if ring.rank == 1 else x
        with pytest.raises(ringkern.ArgumentError, match="dtype differs between ranks"):
            ringkern.ring_attn_func(y, y, y, ring=ring)
        causal = "yes" if ring.rank == 0 else True
        match = "causal: want" if ring.rank == 0 else "rank 0 refused the call: causal: want"
        with pytest.raises(ringkern.ArgumentError, match=match):
            ringkern.ring_attn_func(x, x, x, causal=causal, ring=ring)
        layout = "striped" if ring.rank else "zigzag"
        with pytest.raises(ringkern.ArgumentError, match="layout differs between ranks"):
            ringkern.ring_attn_func(x, x, x, layout=layout, ring=ring)
        plan = ringkern.Placement(3).prefill({f"\N{SNOWMAN}{i}": 9 for i in range(99)})
        y = torch.zeros(plan.num_tokens(ring.rank), 2, 8)
        sinks = torch.zeros(2) if ring.rank else None
        with pytest.raises(ringkern.ArgumentError, match="sinks differs between ranks"):
            ring.attn(y, y, y, plan, sinks=sinks)
        ring.attn(y, y, y, plan)
        plan = ringkern.Placement(3).prefill({"a": 12 if ring.rank else 13})
        y = torch.zeros(plan.num_tokens(ring.rank), 2, 8)
        with pytest.raises(ringkern.ArgumentError, match="plan differs"):
            ring.attn(y, y, y, plan)
        ringkern.ring_attn_func(x, x, x, ring=ring)  # and the ring still works

    run_threads(differ, 3)


def test_init_ring_refuses(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    cases = [
        (dict(), "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set. Start with `torchrun"),
        (dict(transport="pigeon"), "transport: want one of"),
        (dict(timeout_s="soon"), "timeout_s: want seconds"),
        (dict(timeout_s=float("inf")), "timeout_s: want seconds"),
        (dict(device=3.5), "device: want a torch device"),
        (dict(timeout_s=0), "timeout_s: want seconds, more than 0"),
        (dict(device="gpu9"), "device: want a torch device"),
        (dict(group="world"), "group: want a ProcessGroup"),
        (dict(group="world", transport="local"), "group: want a LocalGroup's member"),
        (dict(transport="local", secret="x" * 32), "secret: want None"),
        (dict(profile="h100"), "profile: want a file that"),
        (dict(secret="short"), "secret: want at least 32 bytes, got 5"),
    ]
    for options, match in cases:
        with pytest.raises(ringkern.ArgumentError, match=match):
            ringkern.init_ring(**options)
    for options, match in (
        (dict(transport="nccl"), "NCCL moves CUDA tensors only"),
        (dict(device="meta"), 'device: want "cpu" or "cuda"'),
    ):
        with pytest.raises(ringkern.UnsupportedError, match=match):
            ringkern.init_ring(**options)
    missing = tmp_path / "nothing"
    for name, value, match in [
        ("RINGKERN_SECRET", "short", "RINGKERN_SECRET: want at least 32 bytes"),
        ("RINGKERN_SECRET_FILE", str(missing), "RINGKERN_SECRET_FILE: want a readable file"),
        ("RINGKERN_LANES", "17", "RINGKERN_LANES: want 1 to 16, got '17'"),
        ("RINGKERN_CHECKSUM", "yes", "RINGKERN_CHECKSUM: want 0 or 1, got 'yes'"),
        ("RINGKERN_CHECK", "2", "RINGKERN_CHECK: want 0 or 1"),
        ("RANK", "3", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ringkern.ArgumentError, match=match):
                ringkern.init_ring()


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("RANK", "two", "RANK: want a whole number, got 'two'"),
        ("RANK", "2", "RANK: want below WORLD_SIZE = 2, got 2"),
        ("MASTER_PORT", "-1", "MASTER_PORT: want a whole number"),
        ("MASTER_PORT", "99999", "MASTER_PORT: want 1 to 65535, got 99999"),
    ],
)
def test_a_broken_torchrun_environment(monkeypatch, name, value, match):
    sound = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    for key, val in (sound | {name: value}).items():
        monkeypatch.setenv(key, val)
    with pytest.raises(ringkern.ArgumentError, match=match):
        ringkern.init_ring()
