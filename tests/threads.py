"""Run a function on ranks that are threads: a ring test in milliseconds."""

import threading
import traceback

import ringkern
from ringkern.types import Hardware

# A profile, so that method="auto" needs no measuring: what two cores might be.
HARDWARE = Hardware(((1, 0.004), (64, 0.02), (2048, 0.04)), 40.0, 5.0, 2.0, 50.0)


def run_threads(fn, world_size, *args, timeout_s=30.0):
    """Return fn(ring, *args) of each rank, or raise what the first rank to fail raised."""
    group = ringkern.LocalGroup(world_size)

    def main(rank):
        with ringkern.init_ring(
            group[rank], transport="local", timeout_s=timeout_s, profile=HARDWARE
        ) as ring:
            return fn(ring, *args)

    return each_in_a_thread(main, world_size)


def each_in_a_thread(main, world_size):
    """Return main(rank) of each rank, or raise what the first rank to fail raised."""
    values, errors = [None] * world_size, []

    def run(rank):
        try:
            values[rank] = main(rank)
        except BaseException as error:
            errors.append((rank, error, traceback.format_exc()))

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}")
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error, text = errors[0]
        raise AssertionError(f"rank {rank} of {world_size}:\n{text}") from error
    return values
