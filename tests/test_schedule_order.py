"""Schedules whose ring goes round in another order than by rank."""

import itertools

import pytest
import ringkern
import torch
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import schedule, topology
from ringkern.errors import ArgumentError
from ringkern.kernels import reference
from ringkern.launch import launch
from ringkern.plan import Plan
from ringkern.schedule import METHODS, make_schedule
from ringkern.transport_local import LocalTransport
from strategies import LAYOUTS, LENGTHS, WINDOWS
from test_schedule import computed_pairs, visible_pairs
from threads import HARDWARE, run_threads

ORDERS = st.sampled_from([1, 2, 3, 5, 8]).flatmap(lambda n: st.permutations(range(n))).map(tuple)


def schedules(plan, order, method="pass_kv", causal=True, window_size=(-1, -1)):
    mask = method, causal, window_size
    return [make_schedule(plan, r, *mask, order=order) for r in range(plan.world_size)]


def moves(steps, side):
    return [move for step in steps for move in getattr(step, side)]


@given(ORDERS, LAYOUTS, LENGTHS, st.booleans(), WINDOWS, st.sampled_from(METHODS))
@settings(max_examples=200)
def test_every_visible_pair_is_computed_once(order, layout, lengths, causal, window_size, method):
    plan = Plan(len(order), lengths, layout)
    each = schedules(plan, order, method, causal, window_size)
    assert computed_pairs(plan, each) == visible_pairs(lengths, causal, window_size)


@given(ORDERS, LAYOUTS, LENGTHS, st.booleans(), WINDOWS, st.sampled_from(METHODS))
@settings(max_examples=200)
def test_what_is_sent_is_what_is_received(order, layout, lengths, causal, window_size, method):
    """Step by step, and in the same order between two ranks: messages match by that alone."""
    plan = Plan(len(order), lengths, layout)
    each = schedules(plan, order, method, causal, window_size)
    for together in zip(*each, strict=True):
        sent = {(rank, move.peer): [] for rank in order for move in together[rank].sends}
        received = {(move.peer, rank): [] for rank in order for move in together[rank].recvs}
        for rank, step in enumerate(together):
            for move in step.sends:
                sent[rank, move.peer].append(move[1:])
            for move in step.recvs:
                received[move.peer, rank].append(move[1:])
        assert sent == received


@given(ORDERS, LENGTHS, st.sampled_from(METHODS))
@settings(max_examples=100)
def test_what_is_needed_is_at_hand_and_dropped_once(order, lengths, method):
    plan = Plan(len(order), lengths)
    for rank, steps in enumerate(schedules(plan, order, method)):
        held = {("kv", rank), ("q", rank)}
        for step in steps:
            used = {(move.kind, move.rank) for move in step.sends if move.kind != "part"}
            used |= {("kv", work.kv_rank) for work in step.work}
            used |= {("q", work.q_rank) for work in step.work}
            assert used <= held
            held |= {(move.kind, move.rank) for move in step.recvs if move.kind != "part"}
            held -= set(step.drops)


@given(ORDERS, LAYOUTS, LENGTHS, st.booleans(), WINDOWS, st.sampled_from(METHODS))
@settings(max_examples=60)
def test_no_order_is_the_order_of_ranks(order, layout, lengths, causal, window_size, method):
    plan = Plan(len(order), lengths, layout)
    asked = method, causal, window_size
    for rank in order:
        plain = make_schedule(plan, rank, *asked)
        named = make_schedule(plan, rank, *asked, order=tuple(range(len(order))))
        assert list(map(comparable, plain)) == list(map(comparable, named))


def comparable(step):
    works = [(work.q_rank, work.kv_rank, work.spans.tolist()) for work in step.work]
    return step.sends, step.recvs, works, step.drops, step.index


@given(ORDERS, st.integers(1, 200))
def test_an_order_moves_the_same_bytes(order, length):
    """Where all see all, a block goes to every rank but its own whatever the way."""
    plan = Plan(len(order), (length, 2 * len(order)))
    for method, kind in (("pass_kv", "kv"), ("pass_q", "q"), ("pass_q", "part")):
        totals = [
            sum(
                move.tokens
                for steps in schedules(plan, way, method, causal=False)
                for move in moves(steps, "sends")
                if move.kind == kind
            )
            for way in (None, order)
        ]
        assert totals[0] == totals[1] == (len(order) - 1) * plan.total


@given(ORDERS.filter(lambda order: len(order) > 1), st.sampled_from(["pass_kv", "pass_q"]))
def test_blocks_go_to_the_next_in_the_order(order, method):
    plan = Plan(len(order), (100,))
    after = dict(zip(order, (*order[1:], order[0]), strict=True))
    for rank, steps in enumerate(schedules(plan, order, method, causal=False)):
        going = [move for move in moves(steps, "sends") if move.kind != "part"]
        assert going and {move.peer for move in going} == {after[rank]}


@given(ORDERS, LENGTHS, st.sampled_from(["gather_kv", "gather_q"]))
@settings(max_examples=60)
def test_gathers_are_the_same_in_any_order(order, lengths, method):
    plan = Plan(len(order), lengths)
    for rank in order:
        for one, other in zip(
            make_schedule(plan, rank, method),
            make_schedule(plan, rank, method, order=order),
            strict=True,
        ):
            assert set(one.sends) == set(other.sends) and set(one.recvs) == set(other.recvs)


@pytest.mark.parametrize("order", [(2, 0, 1), (3, 1, 4, 0, 2), (7, 2, 5, 0, 3, 6, 1, 4)])
def test_zigzag_balances_causal_work_in_any_order(order):
    each = schedules(Plan(len(order), (2 * len(order) * 12,)), order)
    for together in zip(*each, strict=True):
        assert len({schedule.pairs(step) for step in together}) == 1


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 3), ()])
def test_an_order_that_is_none(order):
    with pytest.raises(ArgumentError, match="order: want each of the 3 ranks once, got"):
        make_schedule(Plan(3, (9,)), 0, order=order)


LENGTHS_OF_RINGS = (23, 3)


def attend(ring):
    """Return each method's results of a prefill, and of one on top of its cache."""
    sizes = dict(num_layers=1, nheads_k=2, headdim=8, dtype=torch.float32, num_pages=40)
    after = dict(zip(ring.order, (*ring.order[1:], ring.order[0]), strict=True))
    found = {}
    for method in METHODS:
        placement = ringkern.Placement(ring.world_size)
        cache = ringkern.KVCache(ring, placement, page_size=8, **sizes)
        found[method] = []
        for seed in (0, 1):
            plan = placement.prefill(dict(enumerate(LENGTHS_OF_RINGS)))
            mine = [plan.shard(x, ring.rank) for x in make(plan.total, seed)]
            with_peers = watch_peers(ring)
            out = ring.attn(*mine, plan, cache=cache, method=method)
            assert method != "pass_kv" or with_peers == {after[ring.rank]}
            del ring._link.post
            found[method].append(ring.unshard(out, plan))
        cache.close()
    stats = ring.stats()
    assert stats["bytes_sent"] == stats["bytes_planned"]
    return found


def watch_peers(ring):
    """Return a set that gets the ranks to which the ring sends from now on."""
    peers, post = set(), ring._link.post

    def watched(sends, *rest):
        peers.update(peer for peer, *_ in sends)
        return post(sends, *rest)

    ring._link.post = watched
    return peers


def make(total, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads, 8, generator=draw) for heads in (4, 2, 2)]


def check_exact(found, order):
    turns = [[x.split(LENGTHS_OF_RINGS) for x in make(sum(LENGTHS_OF_RINGS), s)] for s in (0, 1)]
    for method, turn, number in itertools.product(METHODS, (0, 1), (0, 1)):
        q = turns[turn][0][number]
        k, v = (torch.cat([past[i][number] for past in turns[: turn + 1]]) for i in (1, 2))
        want, _ = reference.attn(q[None], k[None], v[None], causal=True)
        out = found[method][turn].split(LENGTHS_OF_RINGS)[number]
        name = f"{method}, turn {turn}, sequence {number}, {order=}"
        assert_close(out[None], want, want.float(), name=name)


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (3, 1, 4, 0, 2)])
def test_a_ring_in_another_order_is_exact(monkeypatch, order):
    monkeypatch.setattr(LocalTransport, "order", order)
    for found in run_threads(attend, len(order)):
        check_exact(found, order)


def over_tcp(worker):
    """Rings whose next rank is not rank + 1, to which init_ring() has connected."""
    for order in ((0, 2, 4, 1, 3), (3, 1, 4, 0, 2)):
        topology.ring_order = lambda places, order=order: order  # of this process
        with ringkern.init_ring(timeout_s=60, profile=HARDWARE) as ring:
            assert ring.order == order
            check_exact(attend(ring), order)
    return True


def test_rings_in_another_order_over_tcp():
    assert launch(over_tcp, 5, threads=1, timeout_s=90) == [True] * 5
