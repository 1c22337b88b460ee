"""Runs a function on N ranks of this host, each a process: for the demo, benchmarks and tests.

Programs of one's own are started by torchrun; this does the same for one function, with answers.
"""

import functools
import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

GRACE_S = 2.0  # after the first failure, how long the other ranks may still answer


@dataclass
class Worker:
    """What a rank is told: fn(worker, *args)."""

    rank: int
    world_size: int
    say: Callable[[object], None]  # sends a message to launch()'s on_message


@dataclass
class Answer:
    """How one rank ended: by a value, an error's traceback, or neither (it died, or was late)."""

    rank: int
    value: object = None
    error: str | None = None
    exit_code: int | None = None  # of a rank that died without an answer; negative: the signal
    answered: bool = False


def launch(fn, world_size: int, *args, threads=None, timeout_s=600.0, on_message=None) -> list:
    """Return what fn(worker, *args) returned on each rank; raise the first failure.

    Args:
        fn: importable by name, as are its arguments and values (they are pickled).
        threads: torch threads per rank; None leaves torch's default.
        timeout_s: seconds until ranks without an answer are killed.
        on_message: called in this process with (rank, message) for each worker.say().

    Raises:
        RuntimeError: a rank failed, died or was late; ranks that died are named before ranks that
            only noticed it.
    """
    answers = run_ranks(
        fn, world_size, *args, threads=threads, timeout_s=timeout_s, on_message=on_message
    )
    faults = [
        f"rank {a.rank} died, exit code {a.exit_code}" for a in answers if a.exit_code is not None
    ]
    faults += [f"rank {a.rank} failed:\n{a.error}" for a in answers if a.error][:1]
    silent = [a.rank for a in answers if not a.answered and a.exit_code is None]
    if silent and not faults:
        faults.append(f"ranks {silent} gave no answer in {timeout_s:g} s")
    if faults:
        raise RuntimeError("\n".join([f"{world_size} ranks of {fn.__name__}:", *faults]))
    return [answer.value for answer in answers]


def run_ranks(
    fn, world_size, *args, threads=None, timeout_s=600.0, on_message=None, lost=()
) -> list[Answer]:
    """Return how each rank ended, by rank. `lost`: ranks from which no answer is expected."""
    import torch.distributed as dist  # here: importing the package must not import torch

    # What torchrun's agent does: serve the store, so that no rank has to find a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = dict(os.environ) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    # A server that has imported torch forks the ranks: milliseconds each instead of seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ringkern.api"])
    reports = context.Queue()
    ranks = [
        context.Process(
            target=_main, args=(fn, rank, world_size, variables, threads, reports, args)
        )
        for rank in range(world_size)
    ]
    answers = [Answer(rank) for rank in range(world_size)]
    try:
        for process in ranks:
            process.start()
        _collect(reports, ranks, answers, timeout_s, on_message, lost)
    finally:
        for process, answer in zip(ranks, answers, strict=True):
            if process.pid is not None:
                process.join(timeout=5 if answer.answered else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    return answers


def _main(fn, rank, world_size, variables, threads, reports, args):
    os.environ.clear()  # the fork server's: it may be older than the caller's changes
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)

    def put(kind, what):
        # By value: torch would pass tensors through memory that this process takes along when it
        # ends.
        reports.put((rank, kind, pickle.dumps(what)))

    try:
        put("value", fn(Worker(rank, world_size, functools.partial(put, "said")), *args))
    except BaseException:
        put("error", traceback.format_exc())


def _collect(reports, ranks, answers, timeout_s, on_message, lost):
    deadline = time.monotonic() + timeout_s
    waiting = set(range(len(ranks))) - set(lost)
    gone_before: set[int] = set()
    while waiting and time.monotonic() < deadline:
        try:
            rank, kind, pickled = reports.get(timeout=0.2)
        except queue.Empty:
            # Nothing in the queue for 0.2 s: a rank gone twice in a row will not answer.
            gone = {r for r in waiting if ranks[r].exitcode is not None}
            for rank in gone & gone_before:
                answers[rank].exit_code = ranks[rank].exitcode
                waiting.discard(rank)
                deadline = min(deadline, time.monotonic() + GRACE_S)
            gone_before = gone
            continue
        what = pickle.loads(pickled)
        if kind == "said":
            if on_message:
                on_message(rank, what)
            continue
        answers[rank].answered = True
        setattr(answers[rank], kind, what)
        waiting.discard(rank)
        if kind == "error" and not lost:
            deadline = min(deadline, time.monotonic() + GRACE_S)
