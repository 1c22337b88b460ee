"""Ranks that die, stop, or speak wrongly: survivors raise in time, name it, and go on without."""

import os
import re
import signal
import socket
import time

import pytest
import ringkern
import torch
from ringkern.launch import launch, run_ranks

TIMEOUT_S = 3.0
SLACK_S = 1.0  # what a busy machine of two cores may add


def regroup(rank, world_size, victim, **options):
    """Return a new ring of the ranks that are left, numbered anew, by the store that they had."""
    left = [other for other in range(world_size) if other != victim]
    os.environ |= {"RANK": str(left.index(rank)), "WORLD_SIZE": str(len(left))}
    return ringkern.init_ring(timeout_s=20, **options)


def suffer(worker, phase, number, victim):
    """Exchange round the ring; the victim sends itself a signal before, during or after one."""
    ring = ringkern.init_ring(timeout_s=TIMEOUT_S)
    x = torch.zeros(48 << 20, dtype=torch.uint8)  # far more than the sockets hold
    y = torch.empty_like(x)
    next_rank, prev_rank = ((ring.rank + way) % ring.world_size for way in (1, -1))

    def post():
        return ring._link.exchange([(next_rank, x)], [(prev_rank, y)])

    if phase == "after":
        post().wait()
        ring.barrier()
    if ring.rank == victim:
        if phase == "during":
            post()
        os.kill(os.getpid(), number)
    started = time.monotonic()
    with pytest.raises(ringkern.TransportError) as first:
        for _ in range(ring.world_size):
            post().wait()
    took = time.monotonic() - started
    later = []
    for call in (post, ring.barrier):
        with pytest.raises(ringkern.TransportError) as again:
            call()
        later.append(str(again.value))
    ring.close()
    closed = time.monotonic() - started
    with regroup(ring.rank, ring.world_size, victim) as again:
        assert again.gather_int(again.rank) == list(range(ring.world_size - 1))
    error = first.value
    return type(error).__name__, error.origin, str(error), later, took, closed


@pytest.mark.parametrize("world_size, victim", [(3, 0), (5, 3)])
@pytest.mark.parametrize("phase", ["before", "during", "after"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_survivors_name_the_rank_that_broke(world_size, victim, phase, number):
    answers = run_ranks(
        suffer,
        world_size,
        phase,
        number,
        victim,
        threads=1,
        timeout_s=30,
        lost=(victim,),
    )
    for answer in answers:
        if answer.rank == victim:
            continue
        assert answer.answered and not answer.error, f"rank {answer.rank}: {answer}"
        kind, origin, text, later, took, closed = answer.value
        assert origin == victim, f"rank {answer.rank} blames {origin}: {text}"
        assert re.search(rf"\brank {victim}\b", text), text
        assert later == [text, text], "later calls must raise the same first error"
        limit = TIMEOUT_S if number == signal.SIGSTOP else TIMEOUT_S / 2
        assert took < limit + SLACK_S, f"rank {answer.rank} raised after {took:.1f} s: {text}"
        assert closed - took < 2 + SLACK_S, "close() took too long"
        timed_out = kind == "TransportTimeoutError"
        assert timed_out == (number == signal.SIGSTOP), f"{kind}: {text}"


def leave_early(worker):
    """One rank leaves its `with` block by an error of its own: the others are told."""
    try:
        with ringkern.init_ring(timeout_s=20) as ring:
            if ring.rank == 1:
                raise ValueError("out of luck")
            ring.barrier()
    except ValueError:
        return None
    except ringkern.TransportError as error:
        return error.origin, str(error)


def test_an_exception_in_one_rank_reaches_the_others():
    answers = launch(leave_early, 3, threads=1, timeout_s=30)
    for rank in (0, 2):
        origin, text = answers[rank]
        assert origin == 1 and "ValueError: out of luck" in text, text


def disagree(worker):
    """Two neighbours exchange different sizes: an error on both sides, and on the third rank."""
    with ringkern.init_ring(timeout_s=10) as ring:
        sends, recvs = [], []
        if ring.rank == 0:
            sends = [(1, torch.zeros(100))]
        if ring.rank == 1:
            recvs = [(0, torch.zeros(99))]
        if ring.rank == 2:
            recvs = [(0, torch.zeros(1))]
        started = time.monotonic()
        try:
            ring._link.exchange(sends, recvs).wait()
            ring.barrier()
        except ringkern.TransportError as error:
            return type(error).__name__, str(error), time.monotonic() - started


def test_a_size_mismatch_is_an_error_on_both_sides():
    for name, text, took in launch(disagree, 3, threads=1, timeout_s=30):
        assert name == "ProtocolError", text
        assert "400" in text and "396" in text, text
        assert took < 5


def never_call(worker):
    """Rank 2 is alive and well but does not come: the others say so, and do not call it dead."""
    with ringkern.init_ring(timeout_s=2) as ring:
        if ring.rank == 2:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:  # until told: then a call raises
                try:
                    ring._link.exchange([], [])
                except ringkern.TransportError as error:
                    return type(error).__name__, error.origin, str(error)
                time.sleep(0.05)
            return None
        try:
            ring.barrier()
        except ringkern.TransportError as error:
            return type(error).__name__, error.origin, str(error)


def test_a_rank_that_does_not_call_is_named():
    for name, origin, text in launch(never_call, 3, threads=1, timeout_s=30):
        assert (name, origin) == ("TransportTimeoutError", 2), text
        assert "alive" in text, text


def annoy(worker):
    """Strangers at the port: garbage, silence, half a hello, a hundred idle connections."""
    with ringkern.init_ring(timeout_s=20) as ring:
        strangers = []
        if ring.rank == 0:
            for address in ring._link.addresses:
                host, port = address.rsplit(":", 1)
                for number in range(100):
                    stranger = socket.create_connection((host, int(port)), timeout=5)
                    if number % 3 == 1:
                        stranger.sendall(os.urandom(200))
                    if number % 3 == 2:
                        stranger.sendall(b"GET / HTTP/1.1\r\n")
                    strangers.append(stranger)
        ring.barrier()  # makes the links between ranks that are no neighbours, past the strangers
        x = torch.full((1 << 20,), float(ring.rank))
        whole = ring.unshard(
            x, ringkern.Plan(ring.world_size, (ring.world_size << 20,), "contiguous")
        )
        for rank in range(ring.world_size):
            assert (whole[rank << 20 : (rank + 1) << 20] == rank).all()
        rejected = ring.stats()["transport"]["rejected_connections"]
        ring.barrier()
        for stranger in strangers:
            stranger.close()
    return rejected


def test_strangers_at_the_port_do_no_harm():
    rejected = launch(annoy, 5, threads=1, timeout_s=60)
    assert all(count >= 30 for count in rejected), rejected


def interrupt(worker):
    """Ctrl-C while waiting: KeyboardInterrupt at once, and the other rank is told."""
    ring = ringkern.init_ring(timeout_s=20)
    x = torch.zeros(8)
    started = time.monotonic()
    try:
        if ring.rank == 0:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        ring._link.exchange([], [(1 - ring.rank, x)]).wait()
    except KeyboardInterrupt:
        return "interrupted", time.monotonic() - started
    except ringkern.TransportError as error:
        return str(error), time.monotonic() - started
    finally:
        ring.close()


def test_ctrl_c_works_while_waiting():
    (mine, took), (theirs, told) = launch(interrupt, 2, threads=1, timeout_s=30)
    assert mine == "interrupted" and took < 3
    assert "rank 0 was interrupted" in theirs and told < 5


def fork_after(worker):
    """A forked child may not use the parent's ring, and does not disturb it."""
    with ringkern.init_ring(timeout_s=20) as ring:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ring.barrier()
                text = "worked"
            except ringkern.TransportError as error:
                text = str(error)
            os.write(write_end, text.encode())
            os._exit(0)
        text = os.read(read_end, 1000).decode()
        os.waitpid(child, 0)
        ring.barrier()
        return text


def test_a_forked_child_is_refused():
    for text in launch(fork_after, 2, threads=1, timeout_s=30):
        assert "fork" in text
