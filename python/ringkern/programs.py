"""The programs of a ring: each made once, for all layers of a plan, or for all plans of a shape."""

import contextlib
import functools
from typing import NamedTuple

import torch

from ringkern.blocks import Pool
from ringkern.errors import UnsupportedError, check
from ringkern.plan import Plan
from ringkern.program import Program
from ringkern.room import Room
from ringkern.schedule import make_schedule
from ringkern.tiles import CUT_ROWS
from ringkern.types import Problem


class Fixed(NamedTuple):
    """The programs of a graph, for any plan of a shape, by what find() finds them by."""

    programs: dict[tuple, Program]
    methods: dict[Problem, str]  # that "auto" takes, whatever the plan is
    room: Room | None  # None: for no plan yet


class Programs:
    """Finds a call's program, or makes it.

    Args:
        rank: whose programs.
        device: where they compute.
        backend: backend(problem) -> what computes it there.
        order: the ranks as the ring goes round.
    """

    def __init__(self, rank: int, device: torch.device, backend, order: tuple[int, ...]):
        self._rank, self._device, self._backend, self._order = rank, device, backend, order
        self._pool = Pool()
        self._latest: list[tuple[Plan, dict[tuple, Program]]] = []  # by plan, the latest one last
        self._fixed: Fixed | None = None
        self._captured: list[Program] = []  # graphs use their buffers

    def pin(self, problem: Problem, method: str) -> str:
        """Return the method of calls that leave it to the ring, which takes `method` for this one."""
        return method if self._fixed is None else self._fixed.methods.setdefault(problem, method)

    def check_capture(self, captured: bool, cache) -> None:
        """Raise, before anything is stored, where a captured call could not be replayed."""
        if captured and cache is not None and self._fixed is None:
            raise UnsupportedError(
                "a call with a cache in a CUDA graph: want one of DecodeGraphs, as a replay needs "
                "the lengths and pages of its own plan. Use ringkern.DecodeGraphs."
            )

    def find(self, plan, method, problem, cache, dtype, partial_dtype, captured) -> Program:
        """Return the program of such a call: the one of the layer before, or a new one.

        captured: whether the call becomes part of a CUDA graph.
        """
        programs = self._programs_of(plan, captured)
        key = method, problem, getattr(cache, "number", None), partial_dtype
        program = programs.get(key)
        if program is None:
            hint = "Make the same call with this plan just before the capture."
            check(not captured, "plan", "one that has run, for a CUDA graph", "a new one", hint)
            program = self._make(plan, method, problem, cache, dtype, partial_dtype)
            programs[key] = program
        if captured and program not in self._captured:
            self._captured.append(program)
        return program

    def _programs_of(self, plan, captured) -> dict[tuple, Program]:
        if self._fixed is not None:
            return self._fixed.programs
        for at, (known, programs) in enumerate(self._latest):
            if known is plan:
                self._latest.append(self._latest.pop(at))
                return programs
        if captured:  # a new plan, which will be refused
            return {}
        # Two batches may go through the layers side by side; plans before will hardly run again.
        del self._latest[:-1]
        self._latest.append((plan, {}))
        return self._latest[-1][1]

    def _make(self, plan, method, problem, cache, dtype, partial_dtype):
        fixed, backend = self._fixed, self._backend(problem)
        if fixed is not None:
            _check_fixed(problem, cache, backend)
        schedule = self._schedule(plan, method, problem, cache, fixed is not None)
        sizes = plan, problem, self._rank, dtype, self._device, partial_dtype
        if fixed is None:
            page_size = getattr(cache, "page_size", None)
            return Program(schedule, *sizes, self._pool, backend, page_size)
        # What a graph uses is nobody else's: a program of another plan may run between its runs.
        program = Program(schedule, *sizes, Pool(), backend, cache.page_size, fixed.room)
        self.retarget({None: program}, plan, cache)
        return program

    def _schedule(self, plan, method, problem, cache, fixed=False):
        mask = problem.causal, problem.window_size
        number = getattr(cache, "number", None)
        key = "schedule", self._rank, method, *mask, number, fixed, self._order
        if key not in plan.memo:
            own = cache.runs(plan) if cache else None
            plan.memo[key] = make_schedule(plan, self._rank, method, *mask, own, fixed, self._order)
        return plan.memo[key]

    # ---- for graphs

    @contextlib.contextmanager
    def fixed(self, fixed: Fixed):
        """Have calls find and leave their programs there, made for any plan of a shape."""
        self._fixed = fixed
        try:
            yield
        finally:
            self._fixed = None

    def retarget(self, programs: dict[tuple, Program], plan: Plan, cache) -> None:
        """Let fixed programs compute another plan of their shape, in place."""
        held = functools.cache(functools.partial(cache.held, plan))
        for program in programs.values():
            program.retarget(plan, held)

    def release(self, programs: dict[tuple, Program]) -> None:
        """Forget what a graph used that will not run again."""
        gone = list(programs.values())
        self._captured = [program for program in self._captured if program not in gone]

    def clear(self) -> None:
        """Forget the programs and their buffers, but for what graphs use."""
        self._latest.clear()
        self._pool.clear()


def _check_fixed(problem, cache, backend: str) -> None:
    """Raise unless a graph can run such a call with other lengths; alike on every rank."""
    check(cache is not None, "cache", "one, in a step of DecodeGraphs", "None")
    size = cache.page_size
    for name, ok, want, got in (
        ("window_size", problem.window_size == (-1, -1), "no window", problem.window_size),
        ("page_size", CUT_ROWS % size == 0, f"a page_size that divides {CUT_ROWS}", size),
        ("backend", backend == "triton", "Triton's kernels", backend),
    ):
        if not ok:
            raise UnsupportedError(f"{name} in a step of DecodeGraphs: want {want}, got {got}.")
