"""Decode steps as CUDA graphs."""

import atexit
import weakref

import torch

from ringkern.cache import KVCache
from ringkern.errors import UnsupportedError, check
from ringkern.plan import Plan
from ringkern.programs import Fixed
from ringkern.ring import Ring
from ringkern.room import Room
from ringkern.schedule import MOVE_KV, visibility
from ringkern.tiles import UNBOUNDED


class _Shape:
    """Plans that one graph can run: they differ in lengths and slots alone."""

    def __init__(self):
        self.fixed = Fixed({}, {}, room=None)
        self.slots = None  # of the new tokens, where the graph reads them
        self.replay = self.result = None

    def holds(self, pages: int, wire_pages: int) -> bool:
        """Whether there is room for as many pages, on the wire where K and V travel.

        Where no program was made, as by a first step that failed, they may.
        """
        programs, room = self.fixed.programs, self.fixed.room
        if room is None or pages > room.pages:
            return False
        stay = programs and not any(method in MOVE_KV for method, *_ in programs)
        return bool(stay) or wire_pages <= room.wire_pages

    def begin(self, pages: int, wire_pages: int) -> None:
        """Forget the graph; have room for so many pages, and for more."""
        self.fixed = Fixed({}, self.fixed.methods, Room.over(pages, wire_pages))
        self.replay = self.result = None


class DecodeGraphs:
    """Runs decode steps as CUDA graphs, so that the host has next to nothing to do for a layer.

        def step(plan):  # all layers, on tensors that stay where they are
            ...
            x = ring.attn(q, k, v, plan, cache=cache, layer=layer, method="gather_q")
            ...
            return tokens

        graphs = ringkern.DecodeGraphs(ring, cache, step)
        for _ in range(128):
            tokens = graphs.run(placement.decode(ids))

    New tokens go to the ranks in turn, so world_size graphs serve a batch that stays as it is: the
    first step of each kind runs as it is, the second is captured, and the others replay it with
    their lengths and pages in its tables. Every rank must run the same plans.

    A graph has room for sequences twice as long as those of its first step, at least; when one is
    longer, the step is captured anew. By pass_kv and gather_kv every rank sends as many pages of K
    and V, whole ones: those of the rank that has most, up to the next power of two, beyond which a
    step is captured anew too.

    Args:
        ring: over NCCL, for plans that run.
        cache: which every ring.attn() of a step is given; page_size divides 256.
        step: step(plan) does a step in every layer of the cache: queues work on the current stream,
            reads its inputs from tensors that are the same in every call, of which this rank has
            plan.num_tokens(rank) rows, and returns tensors. Without windows; "auto" takes what is
            best for the first plan.
    """

    def __init__(self, ring: Ring, cache: KVCache, step):
        check(isinstance(ring, Ring), "ring", "what init_ring() returned", type(ring).__name__)
        if ring.transport != "nccl":
            raise UnsupportedError(
                f"DecodeGraphs: want a ring over NCCL, got one over {ring.transport}."
            )
        check(isinstance(cache, KVCache), "cache", "a KVCache", type(cache).__name__)
        check(cache.ring is ring, "cache", "one that was made for this ring", "another's")
        check(callable(step), "step", "a function of a plan", type(step).__name__)
        self._ring, self._cache, self._step = ring, cache, step
        self._shapes: dict[tuple, _Shape] = {}
        # The graphs', which run one after another.
        self._memory = self._stream = None
        ring.graphs.add(self)
        # Before the ring's link closes, which was to be closed at exit before this.
        atexit.register(_clear, weakref.ref(self))

    def run(self, plan: Plan):
        """Return what step(plan) returns; tensors of a graph hold it until the next run.

        Raises:
            ArgumentError: the plan is no decode, or not the next one of its sequences, or pages run
                out; nothing was changed.
            UnsupportedError: a call of the step is not such as a graph can run with other lengths.
            TransportError: a rank is gone or late.
        """
        self._ring.check_open()
        check(isinstance(plan, Plan), "plan", "a Plan", type(plan).__name__)
        ok = set(plan.lengths) == {1}
        check(ok, "plan", "one new token per sequence, as decode() plans", plan.lengths)
        shape = self._shapes.setdefault(self._key(plan), _Shape())
        shape.slots = self._cache.reserve(plan, shape.slots)
        programs, fixed = self._ring.programs, shape.fixed
        pages = self._cache.most_pages(plan)
        if self._ring.world_size == 1:  # nothing travels
            pages = pages[0], 1
        if not shape.holds(*pages):
            programs.release(fixed.programs)
            shape.begin(*pages)
            fixed = shape.fixed
        programs.retarget(fixed.programs, plan, self._cache)
        with programs.fixed(fixed):
            if not fixed.programs:
                return self._step(plan)
            if shape.replay is None:
                shape.result, shape.replay = self.capture(lambda: self._step(plan))
            else:
                self._cache.ran(plan)
        with self._ring.watch():
            shape.replay()
        return shape.result

    def capture(self, step):
        """Return (what step() returns, a function that does its work again) without doing it."""
        device = self._ring.device
        with torch.cuda.device(device):
            if self._stream is None:
                # torch's own is of whatever device captured first.
                self._stream = torch.cuda.Stream(device)
            if not any(shape.replay for shape in self._shapes.values()):
                # torch has ended a pool whose graphs are gone, and takes it for no new one.
                self._memory = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # NCCL and the watching thread do on other threads what "global" forbids these.
            options = dict(stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.graph(graph, pool=self._memory, **options):
                result = step()
        return result, graph.replay

    def clear(self) -> None:
        """Forget all graphs: a communicator does not end while one has its exchanges.

        At exit, and when the ring closes, it is done for you.
        """
        for shape in self._shapes.values():
            self._ring.programs.release(shape.fixed.programs)
        self._shapes.clear()
        self._memory = self._stream = None

    def _key(self, plan: Plan) -> tuple:
        """Return what is the same of plans of a shape, on every rank."""
        counts = plan.all_counts().sum(axis=0).tobytes()
        return counts, visibility(plan, UNBOUNDED, 0).tobytes()


def _clear(graphs: weakref.ref) -> None:
    alive = graphs()
    if alive is not None:
        alive.clear()
