"""Histories: positions are held once, evenly, and every method covers the mask exactly once."""

import collections
import random

import numpy as np
import pytest
import ringkern
from hypothesis import given, settings
from hypothesis import strategies as st
from ringkern import schedule, tiles
from ringkern.schedule import METHODS, make_schedule
from strategies import WINDOWS, WORLD_SIZES

WHICH = st.integers(0, 9)  # of the sequences that there are then, forks as well
NEW = st.one_of(st.integers(1, 14), st.integers(1, 60))
CHANGES = st.lists(
    st.one_of(
        st.tuples(
            st.just("prefill"), st.dictionaries(st.sampled_from([*"abc", 0, 1, 2]), NEW, min_size=1)
        ),
        st.tuples(st.just("decode"), st.integers(1, 9), WHICH),
        st.tuples(st.just("truncate"), WHICH, NEW),
        st.tuples(st.just("fork"), WHICH),
        st.tuples(st.just("free"), WHICH),
    ),
    min_size=1,
    max_size=8,
)


def grown(placement, changes, most_decodes=9):
    """Apply the changes; yield each plan when it is made. Sequences are named, or numbered."""
    alive: list[str] = []

    def name(which):
        return which if isinstance(which, str) or not alive else alive[which % len(alive)]

    for number, (what, *args) in enumerate(changes):
        if what == "prefill":
            lengths = {str(name(which)): length for which, length in args[0].items()}
            alive += [one for one in lengths if one not in alive]
            yield placement.prefill(lengths)
        elif what == "decode" and alive:
            some = alive[: 1 + args[1] % len(alive)]
            for _ in range(min(args[0], most_decodes)):
                yield placement.decode(some)
        elif what == "truncate" and alive:
            one = name(args[0])
            placement.truncate(one, max(0, placement.length(one) - args[1]))
        elif what == "fork" and alive:
            placement.fork(name(args[0]), f"fork {number}")
            alive.append(f"fork {number}")
        elif what == "free" and alive:
            one = name(args[0])
            placement.free(one)
            alive.remove(one)


def positions_of(table):
    """Return (sequence, position) of every row of a table of runs."""
    rows = []
    for seq, offset, start, length, stride in table.tolist():
        assert offset == len(rows)
        rows += [(seq, start + i * stride) for i in range(length)]
    return rows


@given(WORLD_SIZES, CHANGES)
@settings(max_examples=150)
def test_every_position_is_held_once(world_size, changes):
    placement = ringkern.Placement(world_size)
    for plan in grown(placement, changes):
        held = [row for rank in range(world_size) for row in positions_of(plan.kv_runs(rank))]
        lengths = [placement.length(sequence) for sequence in plan.sequences]
        want = [(seq, p) for seq, length in enumerate(lengths) for p in range(length)]
        assert sorted(held) == want
        for rank in range(world_size):
            assert plan.kv_tokens(rank) == len(positions_of(plan.kv_runs(rank)))
            assert plan.num_tokens(rank) == len(plan.positions(rank))


@given(WORLD_SIZES, CHANGES, st.booleans(), WINDOWS)
@settings(max_examples=120)
def test_every_method_covers_the_mask_once(world_size, changes, causal, window_size):
    for plan in grown(ringkern.Placement(world_size), changes):
        left, right = tiles.bounds(causal, window_size)
        want = {
            (seq, q, k)
            for seq, (start, new) in enumerate(zip(plan.starts.tolist(), plan.lengths, strict=True))
            for q in range(start, start + new)
            for k in range(start + new)
            if q - left <= k <= q + right
        }
        for method in METHODS:
            steps = [
                make_schedule(plan, rank, method, causal, window_size) for rank in range(world_size)
            ]
            assert computed(plan, steps) == want, method
            assert sum(schedule.pairs(s) for one in steps for s in one) == len(want), method
            assert_messages_match(steps)


def computed(plan, schedules):
    triples = set()
    for work in (work for steps in schedules for step in steps for work in step.work):
        mine, theirs = (
            positions_of(plan.runs(work.q_rank)),
            positions_of(plan.kv_runs(work.kv_rank)),
        )
        for q0, q1, k0, k1, lo, hi, q_stride, k_stride in work.spans.tolist():
            for i in range(q1 - q0):
                for j in range(k1 - k0):
                    if lo <= j * k_stride - i * q_stride <= hi:
                        (seq, q), (other, k) = mine[q0 + i], theirs[k0 + j]
                        assert seq == other and (seq, q, k) not in triples
                        triples.add((seq, q, k))
    return triples


def assert_messages_match(schedules):
    """Between two ranks messages match in the order posted, in kind, owner and size."""
    sent, received = (collections.defaultdict(list) for _ in range(2))
    for rank, steps in enumerate(schedules):
        for step in steps:
            for move in step.sends:
                sent[rank, move.peer].append((step.index, move.kind, move.rank, move.tokens))
            for move in step.recvs:
                received[move.peer, rank].append((step.index, move.kind, move.rank, move.tokens))
    assert sent == received
    assert all(tokens > 0 for edge in sent.values() for *_, tokens in edge)


@given(WORLD_SIZES, st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=40))
def test_a_sequence_is_held_evenly(world_size, lengths):
    placement = ringkern.Placement(world_size)
    for length in lengths:
        plan = (
            placement.decode(["a"])
            if length == 1 and plan_exists(placement)
            else (placement.prefill({"a": length}))
        )
        held = [plan.kv_tokens(rank) for rank in range(world_size)]
        assert max(held) - min(held) <= 1, held


def plan_exists(placement):
    return "a" in placement._records


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_capacity_stays_even_over_thousands_of_decodes(world_size):
    placement = ringkern.Placement(world_size)
    names = [f"s{i}" for i in range(16)]
    placement.prefill({name: 3 + 5 * i for i, name in enumerate(names)})
    for _ in range(2000):
        plan = placement.decode(names)
        owners = [plan.num_tokens(rank) for rank in range(world_size)]
        assert max(owners) <= len(names) // 2, "owners bunch up"
    held = [plan.kv_tokens(rank) for rank in range(world_size)]
    assert max(held) - min(held) <= len(names)
    runs = [len(plan.kv_runs(rank)) for rank in range(world_size)]
    assert max(runs) <= 4 * len(names), "decoded tokens must join into runs"


def test_sequences_of_one_length_decode_on_different_ranks():
    placement = ringkern.Placement(4)
    placement.prefill({i: 8 for i in range(16)})
    plan = placement.decode(range(16))
    assert [plan.num_tokens(rank) for rank in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_many_short_sequences_fill_the_ranks_evenly(world_size):
    """Prompts of a few tokens, alone and in batches, some of which end: no rank runs out first."""
    draw, placement = random.Random(world_size), ringkern.Placement(world_size)
    placement.prefill({i: 1 for i in range(12)})  # the first ones are dealt as drop-ins want them
    assert placement._load.tolist() == [12] + [0] * (world_size - 1)
    placement.prefill({f"first {i}": 1 for i in range(12 * (world_size - 1))})
    for number in range(120):
        names = [f"{number} {i}" for i in range(draw.choice([1, 1, 7]))]
        placement.prefill({name: draw.randint(1, 2 * world_size + 3) for name in names})
        held = placement._load.tolist()
        assert held == [sum(tokens_of(placement, rank)) for rank in range(world_size)]
        assert max(held) - min(held) <= 1
    for name in [name for name in placement._records if draw.random() < 0.5]:
        if draw.random() < 0.5:
            placement.free(name)
        else:
            placement.truncate(name, placement.length(name) // 2)
    held = [sum(tokens_of(placement, rank)) for rank in range(world_size)]
    assert placement._load.tolist() == held
    uneven = max(placement._load) - min(placement._load)
    for number in range(40 * uneven):
        placement.prefill({f"later {number}": 1})
    assert max(placement._load) - min(placement._load) <= 1


def test_sequences_of_one_length_are_not_sharded_alike():
    """Each begins where there are fewest tokens: one does not stand for all that are as long."""
    placement = ringkern.Placement(2)
    placement.prefill({"x": 1})
    plan = placement.prefill({"a": 1, "b": 1, "c": 1})
    assert plan.all_counts().tolist() == [[0, 1], [1, 0], [0, 1]]
    assert schedule.visibility(plan, tiles.UNBOUNDED, tiles.UNBOUNDED).tolist() == [
        [True, False],
        [False, True],
    ]


def tokens_of(placement, rank):
    """Yield how many tokens of each sequence the rank holds."""
    for record in placement._records.values():
        yield sum(chunk.length for chunk in placement._history.chunks(record.row, rank))


def test_after_truncate_new_tokens_go_where_there_are_fewest():
    placement = ringkern.Placement(2)
    placement.prefill({"a": 16})  # rank 0 holds 0..3 and 12..15
    placement.truncate("a", 12)
    plans = [placement.decode(["a"]) for _ in range(4)]
    assert [plan.num_tokens(0) for plan in plans] == [1, 1, 1, 1]
    assert plans[-1].kv_tokens(0) == plans[-1].kv_tokens(1) == 8


def test_a_million_tokens_plan_in_few_runs():
    placement = ringkern.Placement(8)
    placement.prefill({"a": 1_000_000})
    plan = placement.prefill({"a": 1000})
    assert sum(len(plan.kv_runs(rank)) for rank in range(8)) <= 32
    assert plan.positions(3).min() >= 1_000_000


def test_ids_can_be_used_again():
    placement = ringkern.Placement(3)
    placement.prefill({"a": 5})
    placement.free("a")
    plan = placement.prefill({"a": 2})
    assert plan.starts.tolist() == [0] and placement.length("a") == 2


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p: p.prefill({}), "lengths: want at least one sequence"),
        (lambda p: p.prefill({"b": 1, "c": 0}), "length of 'c': want an int above 0, got 0"),
        (lambda p: p.prefill({"a": -1}), "length of 'a'"),
        (lambda p: p.prefill({"b": 2**63}), "length of 'b': want less than 2.48"),
        (lambda p: p.prefill({"a": 1.0}), "length of 'a'"),
        (lambda p: p.prefill({"a": True}), "length of 'a'"),
        (lambda p: p.decode([]), "sequences: want at least one"),
        (lambda p: p.decode(["a", "a"]), "sequences: want each once"),
        (lambda p: p.decode("a"), "sequences: want a list of sequence ids, got 'a'"),
        (lambda p: p.decode(5), "sequences: want a list"),
        (lambda p: p.decode({"a"}), "sequences: want a list"),
        (lambda p: p.decode({"a": 5}), "sequences: want a list"),
        (lambda p: p.decode([["a"]]), "sequence: want an id that was prefilled"),
        (lambda p: p.fork("a", ["b"]), "new: want an id"),
        (lambda p: p.decode(["a", "x"]), "sequence: want an id that was prefilled.*'x'"),
        (lambda p: p.truncate("a", 6), "length: want 0 to 5"),
        (lambda p: p.truncate("a", -1), "length: want 0 to 5"),
        (lambda p: p.truncate("x", 1), "sequence: want"),
        (lambda p: p.fork("x", "y"), "sequence: want"),
        (lambda p: p.fork("a", "a"), "new: want an id that is not in use"),
        (lambda p: p.free("x"), "sequence: want"),
        (lambda p: p.length("x"), "sequence: want"),
    ],
)
def test_refusals_change_nothing(call, match):
    placement = ringkern.Placement(3)
    placement.prefill({"a": 5})
    keys = placement._keys.copy()
    with pytest.raises(ringkern.ArgumentError, match=match):
        call(placement)
    assert (placement._keys == keys).all() and list(placement._records) == ["a"]
    assert placement.length("a") == 5


@given(WORLD_SIZES, CHANGES)
@settings(max_examples=60)
def test_blocks_are_the_same_rows(world_size, changes):
    """What is cached of a sequence as one run: as many rows, in the same order, before the new."""
    for plan in grown(ringkern.Placement(world_size), changes):
        ranks = list(range(world_size))
        plan.kv_blocks(ranks[:1])  # some first, then all
        for rank, blocks in zip(ranks, plan.kv_blocks(ranks), strict=True):
            runs = plan.kv_runs(rank)
            assert blocks[:, 1].tolist() == (np.cumsum(blocks[:, 3]) - blocks[:, 3]).tolist()
            for table in (blocks, runs):
                assert (np.diff(table[:, 0]) >= 0).all()
            for seq, start in enumerate(plan.starts.tolist()):
                mine, whole = (table[table[:, 0] == seq] for table in (blocks, runs))
                assert mine[:, 3].sum() == whole[:, 3].sum()
                new = [row[1:].tolist() for row in mine if row[2] >= start]
                assert new == [row[1:].tolist() for row in whole if row[2] >= start]
                assert sum(row[2] < start for row in mine) <= 1


def test_a_plan_is_current_while_others_change():
    placement = ringkern.Placement(3)
    placement.prefill({"a": 5, "b": 5})
    plan = placement.decode(["a"])
    placement.truncate("b", 2)
    assert placement.changed_since(plan) == []
    placement.truncate("a", 5)
    assert placement.changed_since(plan) == ["a"]
    placement.free("a")
    placement.prefill({"a": 6})
    assert placement.changed_since(plan) == ["a"], "another one of that name"


def test_what_is_no_world_size_no_rank_and_no_tensor():
    with pytest.raises(ringkern.ArgumentError, match="world_size: want an int"):
        ringkern.Placement(True)
    plan = ringkern.Placement(2).prefill({"a": 3})
    with pytest.raises(ringkern.ArgumentError, match="rank: want 0 to 1, got True"):
        plan.indices(True)
    for x in (5, None, [1, 2, 3], np.zeros(())):
        with pytest.raises(ringkern.ArgumentError, match=r"x: want a tensor or an array \[total"):
            plan.shard(x, 0)
    with pytest.raises(ringkern.ArgumentError, match="x: want 3 rows"):
        plan.shard(np.zeros((2, 3)), 0)
