"""How rings come about: torchrun, process groups, DeviceMesh, secrets, and what goes wrong."""

import os
import re
import subprocess
import sys
import time

import pytest
import ringkern
import torch
import torch.distributed as dist
from ringkern import profile, rendezvous
from ringkern.launch import launch, run_ranks
from threads import HARDWARE


def ring_sum(ring):
    """Return the sum of all ranks plus one: what every rank must get."""
    return sum(ring.gather_int(ring.rank + 1))


@pytest.mark.parametrize("backend, where", [("nccl", "cuda:3"), ("gloo", "cpu")])
def test_a_process_group_meets_on_the_ring_s_device(monkeypatch, backend, where):
    """Over NCCL the current device may be another rank's."""
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist, "get_rank", lambda group: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    meeting = rendezvous.GroupRendezvous(None, 1.0, torch.device("cuda", 3))
    assert meeting._device == torch.device(where)


SCRIPT = """
import torch, ringkern
with ringkern.init_ring() as ring:
    x = torch.arange(11.0).view(1, 11, 1, 1)
    mine = ringkern.shard_sequence(x, ring)
    out = ringkern.ring_attn_func(mine, mine, mine, ring=ring)
    whole = ringkern.unshard_sequence(out, ring)
    want, _ = ringkern.attn_func(x, x, x)
    assert torch.allclose(whole, want), (whole, want)
print(f"rank {ring.rank} of {ring.world_size} agrees")
"""


def test_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
         str(script)],
        capture_output=True, text=True, timeout=120,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sorted(re.findall(r"rank \d of 3 agrees", run.stdout)) == [
        f"rank {rank} of 3 agrees" for rank in range(3)
    ]


def with_groups(worker):
    """Rings of the default group, of a subgroup and of a DeviceMesh, one after the other."""
    dist.init_process_group("gloo")
    with ringkern.init_ring(timeout_s=30) as ring:
        assert ring_sum(ring) == 10 and ring.world_size == 4
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = pairs[worker.rank % 2]
    with ringkern.init_ring(mine, timeout_s=30) as ring:
        assert (ring.rank, ring.world_size) == (worker.rank // 2, 2)
        assert ring_sum(ring) == 3
    with pytest.raises(ringkern.ArgumentError, match="group: want a group that this rank is in"):
        ringkern.init_ring(pairs[1 - worker.rank % 2], timeout_s=30)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    with ringkern.init_ring(mesh["cp"], timeout_s=30) as ring:
        assert ring.world_size == 2 and ring.rank == worker.rank // 2
        assert ring_sum(ring) == 3
    with pytest.raises(ringkern.ArgumentError, match="1-D DeviceMesh, got 2 dimensions.*mesh"):
        ringkern.init_ring(mesh, timeout_s=30)
    dist.destroy_process_group()


def test_process_groups_and_meshes():
    launch(with_groups, 4, threads=1, timeout_s=90)


def late_group(worker, done):
    """A group whose second rank does not come: the ring's own timeout holds, not the group's."""
    dist.init_process_group("gloo")
    if worker.rank == 1:
        while not done.exists():
            time.sleep(0.05)
        return None
    started = time.monotonic()
    with pytest.raises(ringkern.TransportTimeoutError, match="meeting the ranks of the process"):
        ringkern.init_ring(timeout_s=1)
    done.touch()
    return time.monotonic() - started


def test_a_group_s_rank_that_does_not_come(tmp_path):
    took = launch(late_group, 2, tmp_path / "done", threads=1, timeout_s=60)[0]
    assert took < 6


def without_agent(worker, port_file):
    """Have rank 0 serve the store, as without torchrun."""
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    if worker.rank == 0:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        port_file.with_suffix(".new").write_text(str(port))
        port_file.with_suffix(".new").rename(port_file)
    while not port_file.exists():
        time.sleep(0.02)
    os.environ["MASTER_PORT"] = port_file.read_text()


def plain_environment(worker, port_file):
    """Twice: rings do not mix."""
    without_agent(worker, port_file)
    with ringkern.init_ring(timeout_s=30) as one, ringkern.init_ring(timeout_s=30) as two:
        assert ring_sum(one) == ring_sum(two) == 6
    return True


def test_without_an_agent_rank_0_serves_the_store(tmp_path):
    assert launch(plain_environment, 3, tmp_path / "port", threads=1, timeout_s=60) == [True] * 3


def refused(worker, change, timeout_s):
    """Return the error that init_ring() raises after change(rank)."""
    mine = dict(change.get(worker.rank, {}))
    transport = mine.pop("transport", "auto")
    os.environ.update(mine)
    started = time.monotonic()
    try:
        with ringkern.init_ring(transport=transport, timeout_s=timeout_s) as ring:
            ring.barrier()
    except ringkern.RingkernError as error:
        return type(error).__name__, str(error), time.monotonic() - started


@pytest.mark.parametrize(
    "change, name, match",
    [
        (
            {r: {"RINGKERN_SECRET": ("ab"[r == 2]) * 32} for r in range(3)},
            "AuthenticationError",
            r"secret: want the same on every rank, got another than rank 0's on ranks \[2\]",
        ),
        (
            {1: {"RINGKERN_SECRET": "x" * 32}},
            "ArgumentError",
            r"own_secret differs between ranks: False: ranks \[0, 2\]; True: ranks \[1\]",
        ),
        ({2: {"RINGKERN_LANES": "2"}}, "ArgumentError", r"lanes differs between ranks"),
        ({0: {"RINGKERN_CHECKSUM": "1"}}, "ArgumentError", r"checksum differs between ranks"),
        ({1: {"RINGKERN_NCCL_MAX_CTAS": "8"}}, "ArgumentError", r"max_ctas differs between ranks"),
        (
            {1: {"transport": "tcp"}},
            "ArgumentError",
            r"transport differs between ranks: auto: ranks \[0, 2\]; tcp: ranks \[1\]",
        ),
        (
            {r: {"RINGKERN_HOST": "0.0.0.0"} for r in range(3)},
            "ArgumentError",
            r"0\.0\.0\.0",
        ),
        (
            {r: {"RINGKERN_IFNAME": "nosuch0"} for r in range(3)},
            "ArgumentError",
            r"RINGKERN_IFNAME: want an interface that is up \(.*lo.*\), got nosuch0",
        ),
        (
            {r: {"RINGKERN_HOST": "192.0.2.1"} for r in range(3)},
            "UnsupportedError",
            r"192\.0\.2\.1",
        ),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused_alike(change, name, match):
    for kind, text, took in launch(refused, 3, change, 10, threads=1, timeout_s=40):
        assert re.fullmatch(name, kind), text
        assert re.search(match, text), text
        assert took < 8


def refused_without_agent(worker, port_file, change, timeout_s):
    """The store ends with rank 0's init_ring(); rank 2 reads slowly."""
    without_agent(worker, port_file)
    get = dist.TCPStore.get

    def slow_get(store, key):
        time.sleep(0.2)
        return get(store, key)

    if worker.rank == 2:
        dist.TCPStore.get = slow_get
    return refused(worker, change, timeout_s)


def test_without_an_agent_ranks_are_refused_alike(tmp_path):
    change = {1: {"RINGKERN_LANES": "2"}}
    args = tmp_path / "port", change, 10
    answers = launch(refused_without_agent, 3, *args, threads=1, timeout_s=40)
    want = "lanes differs between ranks: 1: ranks [0, 2]; 2: ranks [1]"
    assert [kind for kind, *_ in answers] == ["ArgumentError"] * 3, answers
    assert all(want in text for _, text, _ in answers), answers


def test_ranks_with_different_profiles_are_refused(tmp_path):
    """They would choose different methods."""
    path = tmp_path / "profile.json"
    profile.save(HARDWARE, str(path))
    change = {1: {"RINGKERN_PROFILE": str(path)}}
    for kind, text, _ in launch(refused, 3, change, 10, threads=1, timeout_s=40):
        assert kind == "ArgumentError" and "profile differs between ranks" in text, text


def test_a_world_size_that_does_not_match():
    answers = run_ranks(refused, 2, {1: {"WORLD_SIZE": "3"}}, 5, threads=1, timeout_s=30)
    for answer in answers:
        kind, text, took = answer.value
        assert kind == "ArgumentError" and "WORLD_SIZE: want" in text, text
        assert took < 5


def test_a_rank_that_never_starts():
    answers = run_ranks(refused, 2, {r: {"WORLD_SIZE": "3"} for r in (0, 1)}, 2, threads=1)
    for answer in answers:
        kind, text, took = answer.value
        assert kind == "TransportTimeoutError", text
        assert "waiting for rank 2 at the store" in text
        assert "Have all ranks started?" in text and took < 4


def test_a_store_that_cannot_be_reached():
    change = {1: {"MASTER_PORT": "1"}}
    answers = run_ranks(refused, 2, change, 2, threads=1, timeout_s=30)
    kind, text, took = answers[1].value
    assert kind == "TransportTimeoutError", text
    assert "MASTER_PORT = 1" in text and 1.9 < took < 3


def with_secret_file(worker, path):
    os.environ["RINGKERN_SECRET_FILE"] = path
    os.environ["RINGKERN_IFNAME"] = "lo"
    with ringkern.init_ring(timeout_s=20) as ring:
        return ring_sum(ring)


def test_a_secret_from_a_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("s" * 40 + "\n")
    assert launch(with_secret_file, 3, str(path), threads=1, timeout_s=40) == [6] * 3


def test_local_rings_are_torch_free_of_groups():
    with ringkern.init_ring(transport="local") as ring:
        assert (ring.rank, ring.world_size, ring.transport) == (0, 1, "local")
        x = torch.randn(1, 3, 2, 4)
        want, _ = ringkern.attn_func(x, x, x)
        assert torch.equal(ringkern.ring_attn_func(x, x, x, ring=ring), want)
