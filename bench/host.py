"""What a call costs on the host: a decode step's plan, a layer's call, the replay of all layers.

Kernels and messages are replaced by nothing, so what is left is Python: what a GPU would wait for.
Or launches are made, up to the driver.
"""

import contextlib
import statistics
from types import SimpleNamespace

import ringkern
import torch
from ringkern import local
from ringkern.cost import choose
from ringkern.graphs import DecodeGraphs
from ringkern.ring import Ring
from ringkern.schedule import make_schedule
from ringkern.types import Hardware, Problem

from bench.measurement import Measurement
from bench.operation import Operation, nothing, timed

RANK = 1
HARDWARE = Hardware(((1, 0.01), (512, 0.05)), 50.0, 4.0, 1.0, 100.0)  # any
LAYERS = 32  # of a decode step as a graph: as many as a model of 8 billion parameters has


def _names(case):
    return [f"sequence {i}" for i in range(case.shape["batch"])]


# ---- placement, plan, schedule with its spans, and beside them the choice


def measure_plan(session, case) -> dict[str, Measurement]:
    """Return the times of decode steps, each planned anew, by method."""
    placement = ringkern.Placement(case.world_size)
    names = _names(case)
    placement.prefill({name: case.shape["cached"] + 37 * i for i, name in enumerate(names)})
    state = SimpleNamespace(placement=placement, names=names, plan=None)
    found = {impl: Measurement([]) for impl in case.impls}
    problem = Problem(1, 16, 4, 128, 128, "bfloat16", True, 0.1, (-1, -1), 0.0)
    for repetition in range(-case.warmup, case.repetitions):
        for impl in case.impls:
            times, chosen = [], []
            for _ in range(case.calls):
                times.append(timed(_plan, state, impl))
                chosen.append(timed(choose, state.plan, problem, HARDWARE))
            if repetition >= 0:
                found[impl].times_s.append(times)
                details = {"choice_us": 1e6 * sorted(chosen)[len(chosen) // 2]}
                found[impl].add({"ok": state.plan.total == len(names)} | details)
    return found


def _plan(state, method):
    state.plan = state.placement.decode(state.names)
    make_schedule(state.plan, RANK, method)


# ---- a layer's call


class NoLink:
    """A transport that moves nothing, at once."""

    name, rank, order = "none", RANK, None

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._ticket = SimpleNamespace(wait=lambda: (0, 0))

    @property
    def host(self):
        return self

    def post(self, sends, recvs, keep):
        return self._ticket

    def exchange(self, sends, recvs):
        return self._ticket

    def abort(self, reason):
        raise RuntimeError(reason)

    def run_of_graph(self):
        return contextlib.nullcontext()

    def stats(self):
        return {}

    def close(self):
        pass


@contextlib.contextmanager
def _no_work():
    """Replace kernels, and the copies between cache and wire, by nothing."""

    def skip(*_, **__):
        return None

    places = (local, "step"), (local.Merge, "__call__")
    places += (ringkern.KVCache, "gather"), (ringkern.KVCache, "store")
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, skip)
    try:
        yield
    finally:
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, function)


def measure_layer(session, case) -> dict[str, Measurement]:
    """Return the times of a layer's call in a decode step that other layers have begun."""
    with _no_work():
        return _measure_layer(case)


def measure_launches(session, case) -> dict[str, Measurement]:
    """Return the same with launches of Triton's kernels, but for what the driver does."""
    from tests.stub_triton import stub_triton

    with stub_triton():
        return _measure_layer(case)


def _measure_layer(case):
    ring = Ring(NoLink(case.world_size), torch.device("cpu"))
    placement = ringkern.Placement(case.world_size)
    heads = dict(nheads_k=4, headdim=64)
    layers = case.calls + 1
    pages = dict(num_layers=layers, dtype=torch.bfloat16, num_pages=2 * case.shape["batch"])
    cache = ringkern.KVCache(ring, placement, **heads, **pages, page_size=64)
    found = {impl: Measurement([]) for impl in case.impls}
    names = _names(case)
    with torch.inference_mode():
        plan = placement.prefill(dict.fromkeys(names, case.shape["cached"]))
        for layer in range(layers):
            _attend(ring, cache, plan, layer, "pass_kv")
        for repetition in range(-case.warmup, case.repetitions):
            for impl in case.impls:
                plan = placement.decode(names)
                inputs = _inputs(plan)
                times = [
                    timed(_attend, ring, cache, plan, layer, impl, inputs)
                    for layer in range(layers)
                ]
                for name in names:
                    placement.truncate(name, case.shape["cached"])
                if repetition >= 0:
                    found[impl].times_s.append(times[1:])
                    found[impl].add({"first_us": 1e6 * times[0]})
    cache.close()
    return found


# ---- all layers of a decode step, as a graph


def measure_graph(session, case) -> dict[str, Measurement]:
    """Return the times of DecodeGraphs.run() where replaying a graph is nothing, by method.

    layer_us: the median of a repetition, by layer. plan_us: likewise of planning the step.
    """
    found = {impl: Measurement([]) for impl in case.impls}
    with torch.inference_mode(), _no_work():
        states = {impl: _graph_state(case, impl) for impl in case.impls}
        for repetition in range(-case.warmup, case.repetitions):
            for impl, state in states.items():
                times, planned = [], []
                for _ in range(case.calls):
                    planned.append(timed(_plan_step, state))
                    times.append(timed(state.graphs.run, state.plan))
                if repetition >= 0:
                    layer_us = 1e6 * statistics.median(times) / LAYERS
                    plan_us = 1e6 * statistics.median(planned)
                    found[impl].times_s.append(times)
                    found[impl].add({"layer_us": layer_us, "plan_us": plan_us})
    return found


def _graph_state(case, method):
    link = NoLink(case.world_size)
    link.name = "nccl"
    ring = Ring(link, torch.device("cpu"))
    placement, names = ringkern.Placement(case.world_size), _names(case)
    cache = ringkern.KVCache(
        ring, placement, num_layers=LAYERS, nheads_k=1, headdim=16, dtype=torch.bfloat16,
        num_pages=4 * case.shape["batch"], page_size=64,
    )  # fmt: skip

    def step(plan, method=method):
        n = plan.num_tokens(RANK)
        inputs = [torch.zeros(n, heads, 16, dtype=torch.bfloat16) for heads in (4, 1, 1)]
        for layer in range(LAYERS):
            _attend(ring, cache, plan, layer, method, inputs)

    step(placement.prefill(dict.fromkeys(names, case.shape["cached"])), "pass_kv")
    ring.programs._backend = lambda problem: "triton"  # as graphs want it, from here on
    graphs = DecodeGraphs(ring, cache, step)
    graphs.capture = lambda run: (run(), lambda: None)
    return SimpleNamespace(placement=placement, names=names, graphs=graphs, plan=None)


def _plan_step(state):
    state.plan = state.placement.decode(state.names)


def _inputs(plan):
    n = plan.num_tokens(RANK)
    return [torch.zeros(n, heads, 64, dtype=torch.bfloat16) for heads in (16, 4, 4)]


def _attend(ring, cache, plan, layer, method, inputs=None):
    ring.attn(*(inputs or _inputs(plan)), plan, cache=cache, layer=layer, method=method)


def _never(*_):
    raise NotImplementedError("measured by its own function")


HOST_PLAN = Operation("host_plan", _never, _never, _never, nothing, nothing)
HOST_GRAPH = Operation("host_graph", _never, _never, _never, nothing, nothing)
HOST_LAYER = Operation("host_layer", _never, _never, _never, nothing, nothing)
