"""One ring for each share of the heads, beside tensor parallelism."""

import itertools

import pytest
import ringkern
import torch
import torch.distributed as dist
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st
from ringkern.errors import ArgumentError
from ringkern.kernels import reference
from ringkern.launch import launch
from ringkern.mesh import arrange, head_range, make_mesh
from ringkern.topology import Place
from threads import HARDWARE


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))
def test_every_head_has_its_key_head(tp, groups, ratio, copies):
    """As many key heads as ranks, more, and fewer: each query head once, with its key head."""
    nheads_k = tp * groups
    many = nheads_k * copies
    cases = [(tp, nheads_k, nheads_k * ratio), (many, nheads_k, many * ratio)]
    for ranks, nheads_k, nheads in cases:
        shares = [head_range(nheads, nheads_k, ranks, rank) for rank in range(ranks)]
        heads = [list(range(nheads))[q] for q, _ in shares]
        assert list(itertools.chain(*heads)) == list(range(nheads))
        assert len({len(mine) for mine in heads}) == 1
        for mine, (_, keys) in zip(heads, shares, strict=True):
            mine_k = list(range(nheads_k))[keys]
            assert len(mine) % len(mine_k) == 0
            # As attention counts them: each key head serves as many query heads in a row.
            share = len(mine) // len(mine_k)
            for i, head in enumerate(mine):
                assert mine_k[i // share] == head // (nheads // nheads_k)


@pytest.mark.parametrize(
    "sizes, want",
    [
        ((128, 8, 8, 3), (slice(48, 64), slice(3, 4))),  # the paper's: a ring for each key head
        ((128, 8, 4, 3), (slice(96, 128), slice(6, 8))),
        ((128, 8, 16, 3), (slice(24, 32), slice(1, 2))),
        ((9, 3, 3, 2), (slice(6, 9), slice(2, 3))),
        ((15, 5, 1, 0), (slice(0, 15), slice(0, 5))),
        ((15, 1, 5, 4), (slice(12, 15), slice(0, 1))),
        ((7, 7, 7, 6), (slice(6, 7), slice(6, 7))),
    ],
)
def test_head_ranges(sizes, want):
    assert head_range(*sizes) == want


@pytest.mark.parametrize(
    "sizes, match",
    [
        ((9, 2, 1, 0), "nheads: want a multiple of nheads_k = 2, got 9"),
        ((12, 6, 4, 0), "tp: want a divisor or a multiple of nheads_k = 6, got 4"),
        ((12, 3, 2, 0), "tp: want a divisor or a multiple of nheads_k = 3, got 2"),
        ((6, 2, 4, 0), "tp: want a divisor of nheads = 6, got 4"),
        ((8, 8, 8, 8), "tp_rank: want 0 to 7, got 8"),
        ((8, 8, 8, -1), "tp_rank: want 0 to 7, got -1"),
        ((8, 0, 8, 0), "nheads_k: want an int of at least 1, got 0"),
        ((8, 8, 2.0, 0), "tp: want an int of at least 1, got 2.0"),
    ],
)
def test_heads_that_do_not_divide(sizes, match):
    with pytest.raises(ArgumentError, match=match):
        head_range(*sizes)


def on_hosts(hosts):
    return [Place(host) for host in hosts]


@pytest.mark.parametrize(
    "hosts, tp, want",
    [
        ("aaaa", 2, [[0, 1], [2, 3]]),
        ("aabb", 2, [[0, 1], [2, 3]]),
        ("aabb", 1, [[0], [1], [2], [3]]),
        ("abab", 2, [[0, 2], [1, 3]]),
        ("abab", 1, [[0], [1], [2], [3]]),
        ("abcabc", 2, [[0, 3], [1, 4], [2, 5]]),
        ("aaaabb", 2, [[0, 1], [2, 3], [4, 5]]),
        ("aaabbb", 3, [[0, 1, 2], [3, 4, 5]]),
        ("aaaaaa", 6, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_rows_of_a_mesh(hosts, tp, want):
    assert arrange(on_hosts(hosts), tp) == want


def test_rows_share_a_numa_node_where_they_can():
    gpus = [Place("a", numa, f"0000:0{i}:00.0", str(i)) for i, numa in enumerate((0, 1, 0, 1))]
    assert arrange(gpus, 2) == [[0, 2], [1, 3]]
    # Of these, such columns would not ascend: then by number.
    gpus = [Place("a", numa, f"0000:0{i}:00.0", str(i)) for i, numa in enumerate((0, 1, 1, 0))]
    assert arrange(gpus, 2) == [[0, 1], [2, 3]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4))
def test_a_mesh_is_of_rows_on_one_host_or_refused(hosts, tp):
    places = on_hosts(map(str, hosts))
    divides = all(hosts.count(host) % tp == 0 for host in hosts)
    try:
        rows = arrange(places, tp)
    except ArgumentError as error:
        assert str(error).startswith("places: want hosts that follow" if divides else "tp: want")
        return
    assert divides
    assert sorted(itertools.chain(*rows)) == list(range(len(hosts)))
    for row in rows:
        assert len(row) == tp and len({hosts[rank] for rank in row}) == 1
        assert row == sorted(row)
    for column in zip(*rows, strict=True):
        assert list(column) == sorted(column)


def test_meshes_that_cannot_be():
    with pytest.raises(ArgumentError, match=r"tp: want a divisor of the ranks.*\[2, 4\], got 4"):
        arrange(on_hosts("aaaabb"), 4)
    with pytest.raises(ArgumentError, match=r"places: want hosts.*hosts \[0, 1, 1, 0\]. Start"):
        arrange(on_hosts("abba"), 2)
    for tp in (0, -1, 2.0, True, "2"):
        with pytest.raises(ArgumentError, match="tp: want an int of at least 1"):
            arrange(on_hosts("aa"), tp)
    with pytest.raises(ArgumentError, match="group: want a default process group.*init_process"):
        make_mesh(1)


LENGTHS = (37, 2)
HEADDIM, WIDTH = 8, 5


def check_layers(mesh, nheads, nheads_k):
    """Run two layers, heads over mesh["tp"] and tokens over mesh["cp"]; each is compared."""
    tp = mesh["tp"].size()
    mine_q, mine_k = head_range(nheads, nheads_k, tp, mesh["tp"].get_local_rank())
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    with ringkern.init_ring(mesh["cp"], timeout_s=60, profile=HARDWARE) as ring:
        assert ring.world_size == mesh["cp"].size()
        assert ring.rank == mesh["cp"].get_local_rank()
        placement = ringkern.Placement(ring.world_size)
        plan = placement.prefill(dict(enumerate(LENGTHS)))
        dist.barrier()  # so that the rings run at the same time
        for layer, method in enumerate(("pass_kv", "pass_q")):
            draw = torch.Generator().manual_seed(layer)
            q, k, v = (
                torch.randn(plan.total, heads, HEADDIM, generator=draw)
                for heads in (nheads, nheads_k, nheads_k)
            )
            weight = torch.randn(nheads, HEADDIM, WIDTH, generator=draw)
            local = (x[:, heads] for x, heads in ((q, mine_q), (k, mine_k), (v, mine_k)))
            out = ring.attn(*(plan.shard(x, ring.rank) for x in local), plan, method=method)
            want, _ = reference.attn_varlen(q, k, v, edges, edges, causal=True)
            name = f"{tuple(mesh.shape)} {nheads=} {nheads_k=} {method}"
            part = want[:, mine_q]
            assert_close(ring.unshard(out, plan), part, part.float(), name=f"out, {name}")
            # What tensor parallelism does next: the rows are of the same tokens on its ranks.
            summed = torch.einsum("thd,hdw->tw", out, weight[mine_q])
            dist.all_reduce(summed, group=mesh["tp"].get_group())
            whole = torch.einsum("thd,hdw->tw", want, weight.double())
            assert_close(
                ring.unshard(summed, plan), whole, whole.float(), name=f"sum, {name}", floor=1e-4
            )


CASES = {
    4: [("aabb", 2), ("abab", 2), ("aaaa", 4), ("abab", 1)],
    6: [("aaabbb", 3), ("aaaabb", 2), ("abcabc", 2)],
}
HEADS = {1: [(4, 2)], 2: [(6, 2), (4, 1)], 3: [(9, 3), (6, 1)], 4: [(4, 4), (8, 2)]}


def rings_beside_tensor_parallelism(worker):
    dist.init_process_group("gloo")
    for hosts, tp in CASES[worker.world_size]:
        mesh = make_mesh(tp, places=on_hosts(hosts))
        assert mesh.mesh_dim_names == ("cp", "tp")
        assert mesh.mesh.tolist() == arrange(on_hosts(hosts), tp)
        for nheads, nheads_k in HEADS[tp]:
            check_layers(mesh, nheads, nheads_k)
    # And of where the ranks really are, which they tell each other: all on this host.
    mesh = make_mesh(2)
    assert mesh.mesh.tolist() == [[i, i + 1] for i in range(0, worker.world_size, 2)]
    with pytest.raises(ArgumentError, match="tp: want a divisor of the ranks on each host"):
        make_mesh(5)
    with pytest.raises(ArgumentError, match="places: want one for each of"):
        make_mesh(1, places=[Place("a")])
    dist.destroy_process_group()
    return mesh.shape


@pytest.mark.parametrize("world_size", [4, 6])
def test_rings_beside_tensor_parallelism(world_size):
    shapes = launch(rings_beside_tensor_parallelism, world_size, threads=1, timeout_s=120)
    assert shapes == [(world_size // 2, 2)] * world_size
