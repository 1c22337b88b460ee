"""Decode steps as graphs: tables that are overwritten in place give what a new call gives.

Without a GPU a graph is stood in for by making the captured calls again: with the plan, the program
and the slots of the capture, whose contents alone have changed since.
"""

import itertools

import accelerator  # noqa: F401  so that threads take turns in Triton's interpreter
import pytest
import ringkern
import torch
from close import assert_close
from ringkern.cost import Choice
from ringkern.errors import ArgumentError, UnsupportedError
from ringkern.graphs import DecodeGraphs
from ringkern.kernels import reference
from ringkern.schedule import METHODS, MOVE_KV
from stub_gpu import run_stub, why_no_stubs

pytestmark = pytest.mark.skipif(bool(why_no_stubs()), reason=why_no_stubs() or "none")

HEADS = 4, 2, 2  # of q, k and v
HEADDIM = 16
LENGTHS = {"a": 9, "b": 2, "c": 5}  # of three ranks some hold no key of b


class Again(DecodeGraphs):
    """DecodeGraphs whose graphs are the calls themselves."""

    def __init__(self, ring, cache, step):
        super().__init__(ring, cache, step)
        self.replays = 0

    def capture(self, step):
        fixed, result = self._ring.programs._fixed, []

        def replay():
            self.replays += 1
            cache = self._cache
            cache.check_call = lambda *given: None  # Python does not run in a replay
            with self._ring.programs.fixed(fixed):
                result[:] = [step()]
            del cache.check_call

        return result, replay


class Session:
    """A cache with three sequences in it, and their keys so far."""

    def __init__(self, ring, method="gather_q", num_pages=32, num_layers=1):
        self.ring, self.options, self.layers = ring, dict(method=method), range(num_layers)
        self.placement = ringkern.Placement(ring.world_size)
        self.cache = ringkern.KVCache(
            ring, self.placement, num_layers=num_layers, nheads_k=2, headdim=HEADDIM, dtype=torch.float32,
            num_pages=num_pages, page_size=4,
        )  # fmt: skip
        self.draw = torch.Generator().manual_seed(1)
        self.whole = {name: [] for name in LENGTHS}
        plan = self.placement.prefill(LENGTHS)
        self.feed(plan)
        for layer in self.layers:
            ring.attn(*self.mine, plan, cache=self.cache, layer=layer, method="pass_kv")

    def feed(self, plan) -> None:
        """Draw the plan's tokens; keep this rank's where steps read them."""
        new = [torch.randn(plan.total, n, HEADDIM, generator=self.draw) for n in HEADS]
        rows = zip(*(x.split(plan.lengths) for x in new), strict=True)
        for name, qkv in zip(plan.sequences, rows, strict=True):
            self.whole[name].append(qkv)
        self.mine = [plan.shard(x, self.ring.rank) for x in new]

    def step(self, plan):
        given = dict(cache=self.cache) | self.options
        return [self.ring.attn(*self.mine, plan, layer=layer, **given) for layer in self.layers]

    def want(self, plan) -> torch.Tensor:
        """Return the new tokens' attention to all keys of their sequences, in packed order."""
        found = []
        for name in plan.sequences:
            q, k, v = (torch.cat(parts)[None] for parts in zip(*self.whole[name], strict=True))
            found.append(reference.attn(q[:, -1:], k, v)[0][0])
        return torch.cat(found)


def _layers(result):
    """Return the outputs of a step that ran, or of one that was run again."""
    return result[0] if isinstance(result[0], list) else result


def decode(ring, method, steps):
    session = Session(ring, method=method)
    graphs = Again(ring, session.cache, session.step)
    for number in range(steps):
        names = list(LENGTHS) if number != 4 else ["c", "a"]  # a batch of another shape between
        plan = session.placement.decode(names)
        session.feed(plan)
        result = graphs.run(plan)
        for out in _layers(result):
            got = ring.unshard(out, plan)
            want = session.want(plan)
            assert_close(got, want, want.float(), name=f"{method} step {number} rank {ring.rank}")
    assert session.cache.stats()["tokens"] > 0
    return graphs.replays


@pytest.mark.parametrize("method", METHODS)
def test_replays_match_new_calls(monkeypatch, method):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    replays = run_stub(decode, 3, method, 17 if method in MOVE_KV else 11)
    assert len(set(replays)) == 1 and replays[0] >= 3


def grow(ring, method):
    """Keys need more and more room: a step is captured anew when they have none."""
    session = Session(ring, method=method, num_pages=24)
    graphs, rooms = Again(ring, session.cache, session.step), []
    captured, capture = [], graphs.capture
    graphs.capture = lambda step: captured.append(session.placement.length("a")) or capture(step)
    for _ in range(36):
        plan = session.placement.decode(["a"])
        session.feed(plan)
        result = graphs.run(plan)
        rooms.append(max(tuple(shape.fixed.room) for shape in graphs._shapes.values()))
        for out in _layers(result):
            want = session.want(plan)
            got = ring.unshard(out, plan)
            assert_close(got, want, want.float(), name=f"{method} at {len(session.whole['a'])}")
    sent = ring.stats()["bytes_sent"], ring.stats()["bytes_planned"]
    return rooms, captured, graphs.replays, sent


@pytest.mark.parametrize("method", ["pass_kv", "gather_kv", "gather_q"])
def test_keys_have_room_to_grow(monkeypatch, method):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    ranks = run_stub(grow, 2, method)
    rooms, captured, replays, _ = ranks[0]
    assert all(rank[:3] == ranks[0][:3] for rank in ranks), "every rank captures alike"
    assert all(sent == planned for *_, (sent, planned) in ranks)
    # 9 tokens and 36 more on 2 ranks: 2 pages of 4 tokens, then 3 to 6.
    assert rooms[0] == (4, 2) and rooms[-1] == (16, 8)
    # In each of two graphs: from 2 pages on; from 3 and 5 on if they travel, else from 5 on.
    assert len(captured) == (4 if method == "gather_q" else 6)
    assert replays == 36 - len(captured), "runs that are not replayed are captured next"


@pytest.mark.parametrize("method", ["pass_kv", "gather_q"])
def test_one_rank_needs_no_room_on_the_wire(monkeypatch, method):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    rooms, captured, _, _ = run_stub(grow, 1, method)[0]
    assert {wire_pages for _, wire_pages in rooms} == {1}
    assert len(captured) == 2, "from 3 pages on and from 9"


def fail_first(ring):
    """What a first step that failed had room for is not enough for longer sequences."""
    session = Session(ring, method="pass_kv", num_pages=64)
    graphs = Again(ring, session.cache, session.step)
    before = session.whole["a"][:]
    session.feed(plan := session.placement.decode(["a"]))
    session.options["cache"] = None
    with pytest.raises(ArgumentError, match="cache"):
        graphs.run(plan)
    (shape,) = graphs._shapes.values()
    assert tuple(shape.fixed.room) == (4, 2)
    del session.options["cache"]
    session.placement.truncate("a", 9)
    session.whole["a"] = before
    session.feed(plan := session.placement.prefill({"a": 16}))  # 4 pages of a rank
    session.step(plan)
    for _ in range(2 * ring.world_size):
        session.feed(plan := session.placement.decode(["a"]))
        out = graphs.run(plan)
        want = session.want(plan)
        assert_close(ring.unshard(_layers(out)[0], plan), want, want.float(), name="after")


def test_a_first_step_that_failed_leaves_no_room_too_small(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    run_stub(fail_first, 2)


def choose_anew(ring):
    """A graph keeps the method that "auto" took for its first plan."""
    session = Session(ring, method="auto")
    turns = itertools.cycle(["gather_q", "pass_kv"])
    ring._choose = lambda *asked: Choice(next(turns), "in turn", {})
    graphs = Again(ring, session.cache, session.step)
    for _ in range(3 * ring.world_size):
        plan = session.placement.decode(["a"])
        session.feed(plan)
        result = graphs.run(plan)
        want = session.want(plan)
        assert_close(ring.unshard(_layers(result)[0], plan), want, want.float(), name="auto")
    fixed = [shape.fixed for shape in graphs._shapes.values()]
    return [({key[0] for key in one.programs}, set(one.methods.values())) for one in fixed]


def test_auto_is_chosen_once_for_a_graph(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    ranks = run_stub(choose_anew, 2)
    assert ranks[0] == ranks[1] and len(ranks[0]) == 2
    assert all(ran == pinned and len(pinned) == 1 for ran, pinned in ranks[0])


def slots_of_both_modes(ring):
    """Slots that a step under inference_mode() made are overwritten by one outside."""
    session = Session(ring)
    graphs = Again(ring, session.cache, session.step)
    for number in range(4):
        with torch.inference_mode(number == 0):
            session.feed(plan := session.placement.decode(list(LENGTHS)))
            out = graphs.run(plan)
        got, want = ring.unshard(_layers(out)[0], plan), session.want(plan)
        assert_close(got, want, want.float(), name=f"step {number}")
    return graphs.replays


def test_steps_inside_inference_mode_and_outside(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    assert run_stub(slots_of_both_modes, 1) == [3]


def refuse(ring):
    session = Session(ring)
    graphs = Again(ring, session.cache, session.step)
    plan = session.placement.prefill({"a": 2})
    with pytest.raises(ArgumentError, match="one new token per sequence"):
        graphs.run(plan)
    session.placement.truncate("a", 9)
    for options, match in (
        (dict(window_size=(3, 0)), "window_size.*want no window"),
        (dict(cache=None), "cache"),
    ):
        plan = session.placement.decode(["a"])
        session.feed(plan)
        session.options = dict(method="gather_q") | options
        with pytest.raises((UnsupportedError, ArgumentError), match=match):
            graphs.run(plan)
        session.placement.truncate("a", 9)
    for bad in (dict(step=None), dict(cache=None), dict(ring=None)):
        given = dict(ring=ring, cache=session.cache, step=session.step) | bad
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            DecodeGraphs(**given)


def test_what_a_graph_cannot_do_is_refused(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    run_stub(refuse, 2)


def skip_a_layer(ring):
    """A replay would attend to keys that nobody wrote: it is refused, and nothing has changed."""
    session = Session(ring, num_layers=2)
    graphs = Again(ring, session.cache, session.step)
    for _ in range(3 * ring.world_size):
        plan = session.placement.decode(["a"])
        session.feed(plan)
        graphs.run(plan)
    assert graphs.replays
    follow_up = session.placement.prefill({"a": 3})
    session.feed(follow_up)
    given, mine = dict(cache=session.cache, method="pass_kv"), session.mine
    ring.attn(*mine, follow_up, layer=0, **given)
    plan, before = session.placement.decode(["a"]), session.cache.stats()
    with pytest.raises(ArgumentError, match=f"Run plan {follow_up.serial} in every layer first"):
        graphs.run(plan)
    assert session.cache.stats() == before
    ring.attn(*mine, follow_up, layer=1, **given)
    session.feed(plan)
    want, out = session.want(plan), _layers(graphs.run(plan))[1]
    assert_close(ring.unshard(out, plan), want, want.float(), name="after the follow-up")


def test_a_graph_runs_on_top_of_whole_plans(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    run_stub(skip_a_layer, 2)


def over_tcp(ring):
    session = Session(ring)
    with pytest.raises(UnsupportedError, match="want a ring over NCCL, got one over tcp"):
        DecodeGraphs(ring, session.cache, session.step)


def test_a_ring_over_tcp_has_no_graphs():
    run_stub(over_tcp, 2, transport="tcp")


def run_out(ring):
    """A plan for which pages run out changes nothing: it runs after a sequence was freed."""
    session = Session(ring, num_pages=5)
    graphs = Again(ring, session.cache, session.step)
    for _ in range(40):
        plan = session.placement.decode(["a"])
        session.feed(plan)
        before = session.cache.stats()
        try:
            graphs.run(plan)
        except ArgumentError as error:
            assert "num_pages: want 1 free pages" in str(error)
            break
    assert session.cache.stats() == before
    session.placement.free("c")
    result = graphs.run(plan)
    out = _layers(result)[0]
    want = session.want(plan)
    assert_close(ring.unshard(out, plan), want, want.float(), name="after the free")


def test_pages_that_run_out_change_nothing(monkeypatch):
    monkeypatch.setenv("RINGKERN_BACKEND", "triton")
    run_stub(run_out, 2)
