"""Every stage of serving by every method: new tokens of a batch on top of cached ones.

The choice is judged by it: what `auto` and the paper's rules take, against the fastest of the
methods as measured in the same run.
"""

from dataclasses import dataclass, field

import ringkern
import torch
from ringkern.cost import RULES
from ringkern.schedule import METHODS
from ringkern.types import Problem

from bench import paper
from bench.operation import Operation
from bench.oracle import Sample

ROWS = 4  # of the answer that each rank checks


@dataclass
class State:
    """One rank's share."""

    ring: ringkern.Ring
    placement: ringkern.Placement
    cache: ringkern.KVCache
    shape: dict[str, int]
    problem: Problem
    whole: dict[str, torch.Tensor]  # q [new, ...]; k, v [cached + new, ...]: of every sequence
    plan: ringkern.Plan | None = None
    local: list[torch.Tensor] = field(default_factory=list)  # q, k, v of this rank
    padding: list[str] = field(default_factory=list)  # sequences of the plan beside the batch
    out: torch.Tensor | None = None
    samples: dict = field(default_factory=dict)
    before: dict = field(default_factory=dict)  # ring.stats() when the last repetition began
    facts: dict = field(default_factory=dict)


def make_inputs(session, case) -> State:
    """Return this rank's share of inputs that every rank draws alike, the cached part in place."""
    shape = case.shape
    heads = shape["nheads"], shape["nheads_k"], shape["headdim"], shape["headdim"]
    problem = Problem(1, *heads, case.dtype, True, shape["headdim"] ** -0.5, (-1, -1), 0.0)
    ring = session.ring_with_profile(problem)
    new, cached, batch = shape["new"], shape["cached"], shape["batch"]
    torch.manual_seed(0)
    sizes = {"q": (new, shape["nheads"]), "k": (cached + new, shape["nheads_k"])}
    sizes["v"] = sizes["k"]
    dtype = getattr(torch, case.dtype)
    whole = {name: torch.randn(*size, shape["headdim"]).to(dtype) for name, size in sizes.items()}
    placement = ringkern.Placement(ring.world_size)
    tokens = -(-(cached + new) // ring.world_size) + 2
    shared = 2 * ring.world_size  # padding sequences share the pages of the first but the last
    cache = ringkern.KVCache(
        ring,
        placement,
        num_layers=case.calls + 1,  # one to make ready in
        nheads_k=shape["nheads_k"],
        headdim=shape["headdim"],
        dtype=dtype,
        num_pages=batch * (-(-tokens // 64) + 1) + shared,
    )
    state = State(ring, placement, cache, shape, problem, whole)
    if cached:
        _fill(state, case.calls + 1)
    return state


def _names(state) -> list[str]:
    return [f"sequence {i}" for i in range(state.shape["batch"])]


def _fill(state, layers: int) -> None:
    """Store the cached tokens: queries that see themselves alone, so that nothing else is done."""
    plan = state.placement.prefill(dict.fromkeys(_names(state), state.shape["cached"]))
    _take(state, plan)
    for layer in range(layers):
        state.ring.attn(
            *state.local, plan, cache=state.cache, layer=layer, window_size=(0, 0), method="pass_kv"
        )


def _take(state, plan) -> None:
    """Take this rank's rows of the plan's tokens: every sequence has the same content."""
    state.plan = plan
    rows = torch.from_numpy(plan.positions(state.ring.rank))
    asks = (rows - state.shape["cached"]).clamp(min=0)  # what is cached asks for nothing here
    state.local = [state.whole["q"][asks], state.whole["k"][rows], state.whole["v"][rows]]


def prepare(state: State, impl: str) -> None:
    """Take back what the last repetition added, plan anew, make ready in a layer of its own."""
    new, cached = state.shape["new"], state.shape["cached"]
    for name in _names(state):
        if cached and state.placement.length(name) > cached:
            state.placement.truncate(name, cached)
        elif not cached and state.plan is not None:
            state.placement.free(name)
    for name in state.padding:
        state.placement.free(name)
    names, state.padding = _names(state), []
    decodes = new == 1 and cached
    if decodes:
        count = paper.padding(impl, len(names), state.ring.world_size)
        state.padding = [f"padding {i}" for i in range(count)]
        for name in state.padding:
            state.placement.fork(names[0], name)
        names += state.padding
    plan = (
        state.placement.decode(names)
        if decodes
        else state.placement.prefill(dict.fromkeys(names, new))
    )
    _take(state, plan)
    if new < 1024:  # of a longer call, making it ready is no part to speak of
        call(state, impl, -1)
    state.facts = _facts(state) if impl == "pass_kv" else state.facts
    state.before = state.ring.stats()


def _facts(state) -> dict:
    """Return what was predicted, and 1 for each method that a rule takes: "auto:pass_kv"."""
    shape = {name: state.shape[name] for name in ("nheads", "nheads_k", "headdim")}
    choice = state.ring.choose(state.plan, **shape, dtype=state.problem.dtype)
    facts = {f"predicted_us:{m}": round(us, 1) for m, us in choice.predicted_us.items()}
    rules = {
        name: rule(state.plan, state.problem, state.ring.hardware) for name, rule in RULES.items()
    }
    taken = {"auto": choice.method} | rules
    return facts | {f"{rule}:{m}": int(taken[rule] == m) for rule in taken for m in METHODS}


def call(state: State, impl: str, index: int) -> None:
    plan, cache = state.plan, state.cache
    state.out = state.ring.attn(*state.local, plan, cache=cache, layer=index + 1, method=impl)


def check(state: State, impl: str) -> dict:
    """Compare some rows of the last timed call, and say where the calls' time went."""
    before, after = state.before, state.ring.stats()
    calls = after["calls"] - before["calls"]
    spent = {key: (after[key] - before[key]) / calls for key in after if key.endswith("_ms")}
    spent["bytes_sent"] = (after["bytes_sent"] - before["bytes_sent"]) // calls
    spent |= _ends_ms(state.ring.events())
    if not len(state.out):
        return spent | state.facts
    rows = torch.linspace(0, len(state.out) - 1, min(ROWS, len(state.out))).round().long()
    positions = torch.from_numpy(state.plan.positions(state.ring.rank))[rows]
    key = tuple(positions.tolist())
    if key not in state.samples:
        whole = state.whole
        q = torch.zeros(len(whole["k"]), *whole["q"].shape[1:], dtype=whole["q"].dtype)
        q[positions] = whole["q"][positions - state.shape["cached"]]
        state.samples = {key: Sample(q, whole["k"], whole["v"], positions)}
    return state.samples[key].compare(state.out[rows]) | spent | state.facts


def _ends_ms(events) -> dict[str, float]:
    """Return when the last call attended for the last time, and when it was over."""
    last = [event for event in events if event.call == events[-1].call]
    attended = max((e.end_ns for e in last if e.name == "attend"), default=last[0].start_ns)
    ended = max(event.end_ns for event in last)
    return {"attended_at_ms": attended / 1e6, "ended_at_ms": ended / 1e6}


def flops(case) -> int:
    """Two products of 2 * headdim FLOPs per visible pair and head."""
    shape = case.shape
    pairs = shape["new"] * shape["cached"] + shape["new"] * (shape["new"] + 1) // 2
    return 4 * shape["headdim"] * shape["nheads"] * pairs * shape["batch"]


def bytes_sent(case) -> None:
    """Depends on the method: in the details."""


STAGE = Operation("stage", make_inputs, call, check, flops, bytes_sent, prepare)
