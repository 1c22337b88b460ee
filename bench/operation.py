"""An operation is a table of functions (after nccl-tests): to add one is to fill the table."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.measurement import Measurement


@dataclass(frozen=True)
class Operation:
    """What is measured. A state is what make_inputs() returned: one case's data on one rank."""

    name: str
    make_inputs: Callable  # (session, case) -> state
    call: Callable  # (state, impl, index of the call in its repetition): what is timed
    check: Callable  # (state, impl) -> {ok, max_err, details}; spoils what it has looked at
    flops: Callable  # (case) -> FLOPs of one call, all ranks; None where it computes nothing
    bytes_sent: Callable  # (case) -> bytes that a rank sends in one call, or None
    prepare: Callable | None = None  # (state, impl): before each repetition, not timed


def nothing(case) -> None:
    """The flops or bytes_sent of an operation that has none, or the reason against a case."""


def timed(call, *args) -> float:
    """Return the seconds that call(*args) takes."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure(session, case, timed=timed) -> dict[str, Measurement]:
    """Return what this rank measures of each implementation of the case, interleaved.

    Every repetition runs all implementations, each on the same inputs after a barrier, and checks
    the buffers that were timed. Who begins changes from repetition to repetition.
    """
    operation = case.operation
    state = operation.make_inputs(session, case)
    found = {impl: Measurement([]) for impl in case.impls}
    for repetition in range(-case.warmup, case.repetitions):
        first = repetition % len(case.impls)
        for impl in case.impls[first:] + case.impls[:first]:
            if operation.prepare:
                operation.prepare(state, impl)
            session.barrier()
            times = [timed(operation.call, state, impl, index) for index in range(case.calls)]
            finding = operation.check(state, impl)
            if repetition >= 0:
                found[impl].times_s.append(times)
                found[impl].add(finding)
    session.barrier()
    return found
