"""Traces of rings that fail, or of ranks that do not come: what is left, and how soon."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import ringkern
from ringkern import tracer
from ringkern.launch import launch, run_ranks
from ringkern.tracer import Tracer
from threads import HARDWARE, run_threads
from traces import METHODS, assert_nested, assert_whole, attend, slices_of


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the rings of a test write their trace."""
    monkeypatch.setenv("RINGKERN_TRACE", str(tmp_path / "trace.json"))
    return tmp_path / "trace.json"


def read_parts(path, ranks):
    """Return what each rank left by itself, where there is no whole trace."""
    want = sorted(f"trace.json.rank{rank}" for rank in ranks)
    assert sorted(os.listdir(path.parent)) == want
    texts = [(path.parent / name).read_text() for name in want]
    for rank, text in zip(ranks, texts, strict=True):
        assert_nested(slices_of(text))
        about = json.loads(text)["otherData"]
        assert [facts["rank"] for facts in about["ranks"]] == [rank]
    assert len({json.loads(text)["otherData"]["ring"] for text in texts}) == 1
    return texts


def test_a_ring_that_failed_leaves_a_part_per_rank(path):
    def fail(ring):
        attend(ring)
        if ring.rank == 1:
            raise ValueError("out of luck")
        with pytest.raises(ringkern.TransportError):
            attend(ring)

    with pytest.warns(RuntimeWarning, match="part alone"), pytest.raises(AssertionError):
        run_threads(fail, 3)
    for text in read_parts(path, [0, 1, 2]):
        assert "out of luck" in json.loads(text)["otherData"]["failure"]
        calls = [
            e for *_, e in slices_of(text)[json.loads(text)["otherData"]["ranks"][0]["rank"], 0]
        ]
        assert [e["name"] for e in calls if e["cat"] == "call"] == list(METHODS)


@pytest.mark.parametrize("missing", [0, 2])
def test_close_does_not_wait_for_a_rank_beyond_the_timeout(path, missing):
    gone, took = threading.Barrier(3), [0.0] * 3

    def leave(ring):
        attend(ring)
        if ring.rank != missing:
            start = time.monotonic()
            ring.close()
            took[ring.rank] = time.monotonic() - start
        gone.wait(20)

    with pytest.warns(RuntimeWarning, match="TransportTimeoutError"):
        run_threads(leave, 3, timeout_s=0.5)
    assert max(took) < 0.5 * 2 + 1
    read_parts(path, [0, 1, 2])


def test_a_rank_lost_after_its_part_was_taken(path, monkeypatch):
    """Rank 0 has everything by then, and writes it."""
    taken = threading.Event()
    exchange, split = Tracer._exchange, tracer._split

    def lose(self, sends, recvs):
        if self._link.rank == 2 and not sends:
            taken.wait(20)
            raise ringkern.TransportError("lost")
        exchange(self, sends, recvs)

    def tell(part):
        taken.set()
        return split(part)

    monkeypatch.setattr(Tracer, "_exchange", lose)
    monkeypatch.setattr(tracer, "_split", tell)
    with pytest.warns(RuntimeWarning, match="TransportError"):
        found = run_threads(attend, 3)
    assert_whole(path.read_text(), found)


def test_a_part_that_is_too_large_is_refused(path, monkeypatch):
    monkeypatch.setattr(tracer, "PART_BYTES", 100)
    with pytest.warns(RuntimeWarning, match="ProtocolError: rank 1 sent what is no message"):
        run_threads(attend, 3)
    for text in read_parts(path, [0, 1, 2]):
        assert "ProtocolError" in json.loads(text)["otherData"]["failure"], "told, all of them"


def test_a_folder_that_went_away_is_a_warning(path, monkeypatch):
    folder = path.parent / "sub"
    folder.mkdir()
    monkeypatch.setenv("RINGKERN_TRACE", str(folder / "trace.json"))

    def remove(ring):
        ring.barrier()
        if ring.rank == 0:
            folder.rmdir()
        ring.barrier()

    with pytest.warns(RuntimeWarning, match="no trace written"):
        run_threads(remove, 3)


@pytest.mark.parametrize("where", ["no/such/folder/trace.json", "."])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch, where):
    monkeypatch.setenv("RINGKERN_TRACE", str(tmp_path / where))
    group = ringkern.LocalGroup(2)
    for options in (dict(group=group[0], transport="local"), dict(transport="tcp")):
        with pytest.raises(ringkern.ArgumentError, match="RINGKERN_TRACE: want a file in a folder"):
            ringkern.init_ring(**options)
    assert not any(group.posted.values()), "a message was sent"


def disagree(worker, path):
    if worker.rank == 1:
        os.environ["RINGKERN_TRACE"] = path
    try:
        ringkern.init_ring(timeout_s=20)
    except ringkern.ArgumentError as error:
        return str(error)


def test_ranks_that_disagree_are_told(tmp_path):
    told = launch(disagree, 3, str(tmp_path / "trace.json"), threads=1, timeout_s=60)
    want = "RINGKERN_TRACE differs between ranks: False: ranks [0, 2]; True: ranks [1]."
    assert all(text.startswith(want) for text in told), told
    assert not os.listdir(tmp_path)


def die(worker):
    ring = ringkern.init_ring(timeout_s=20, profile=HARDWARE)
    attend(ring)
    ring.barrier()
    if worker.rank == 1:
        os._exit(3)
    start = time.monotonic()
    ring.close()
    return time.monotonic() - start


def test_a_rank_that_died_is_not_waited_for(path):
    answers = run_ranks(die, 3, threads=1, timeout_s=60, lost=(1,))
    assert all(answers[rank].value < 5 for rank in (0, 2)), answers
    read_parts(path, [0, 2])


PROGRAM = """
import os, sys, torch, ringkern
folder, ports = sys.argv[1], sys.argv[2:]
how, rank = "well", 0  # two rings of two ranks; each rank a process that has imported torch before
for other in (("well", 1), ("fail", 0), ("fail", 1)):
    if os.fork() == 0:
        how, rank = other
        break
os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
os.environ["MASTER_PORT"] = ports[how == "fail"]
os.environ["RINGKERN_TRACE"] = f"{folder}/{how}.json"
ring = ringkern.init_ring(timeout_s=20)
plan = ringkern.Placement(2).prefill({"a": 9})
x = torch.zeros(plan.num_tokens(ring.rank), 2, 8)
ring.attn(x, x, x, plan, method="pass_kv")
if how == "fail" and rank == 1:
    raise ValueError("out of luck")
if how == "fail":
    ring.barrier()
elif rank == 1 and os.fork() == 0:
    sys.exit()  # a child has no part in the ring, nor in its trace
"""


def test_programs_that_end_without_close(tmp_path):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *ports]
    errors = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60).stderr
    assert "rank 1 ended with ValueError: out of luck" in errors
    want = ["fail.json.rank0", "fail.json.rank1", "well.json"]
    assert sorted(os.listdir(tmp_path)) == want, errors
    assert {pid for pid, _ in slices_of((tmp_path / "well.json").read_text())} == {0, 1}
    for name in want[:2]:
        about = json.loads((tmp_path / name).read_text())["otherData"]
        assert "out of luck" in about["failure"]
