"""The paged cache: pages, copy-on-write, and calls that are refused before anything changes."""

import random

import pytest
import ringkern
import torch
from hypothesis import given
from hypothesis import strategies as st
from ringkern.pages import PageTable
from threads import run_threads

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.just("truncate"), st.integers(0, 3), st.integers(0, 12)),
        st.tuples(st.just("fork"), st.integers(0, 3), st.integers(4, 7)),
        st.tuples(st.just("free"), st.integers(0, 7)),
    ),
    max_size=25,
)


@given(st.integers(1, 5), CHANGES)
def test_pages_hold_what_was_written(page_size, changes):
    """Against a table that copies everything: what a sequence reads is what it wrote."""
    table, memory, want, stamp = PageTable(200, page_size), {}, {}, 0
    for what, number, *args in changes:
        if what == "append":
            need = table.pages_for([(number, args[0])])
            free = table.num_free
            start = len(want.setdefault(number, []))
            for source, target in table.append(number, args[0]):
                for slot in range(page_size):
                    memory[target * page_size + slot] = memory.get(source * page_size + slot)
            assert free - table.num_free == need
            slots = [slot + i for slot, n in table.slots(number) for i in range(n)]
            for slot in slots[start:]:
                stamp += 1
                memory[slot] = stamp
                want[number].append(stamp)
        elif what == "truncate":
            table.truncate(number, args[0])
            want[number] = want.get(number, [])[: args[0]]
        elif what == "fork" and args[0] not in want:
            table.fork(number, args[0])
            want[args[0]] = list(want.get(number, []))
        elif what == "free":
            table.free(number)
            want.pop(number, None)
        for other, stamps in want.items():
            slots = [slot + i for slot, n in table.slots(other) for i in range(n)]
            assert [memory[slot] for slot in slots] == stamps
    for number in list(want):
        table.free(number)
    assert table.num_free == 200


@given(st.integers(1, 5), CHANGES, st.dictionaries(st.integers(0, 7), st.integers(1, 6)))
def test_pages_for_many_is_what_appending_takes(page_size, changes, new):
    """Where all that share a page write, the last of them keeps it."""
    table, known = PageTable(400, page_size), set()
    for what, number, *args in changes:
        if what == "append":
            table.append(number, args[0])
            known.add(number)
        elif what == "fork" and args[0] not in known:
            table.fork(number, args[0])
            known.add(args[0])
    need, free = table.pages_for(list(new.items())), table.num_free
    for number, tokens in new.items():
        copies = table.must_copy(number)
        assert bool(table.append(number, tokens)) == copies
    assert free - table.num_free == need


def make_cache(ring, placement, **changes):
    sizes = dict(num_layers=2, nheads_k=1, headdim=8, dtype=torch.float32, num_pages=8, page_size=4)
    return ringkern.KVCache(ring, placement, **sizes | changes)


def attend(ring, plan, cache, layer=0, **changes):
    x = torch.ones(plan.num_tokens(ring.rank), 1, 8)
    return ring.attn(x, x, x, plan, cache=cache, layer=layer, **changes)


def run_out_and_retry(ring):
    placement = ringkern.Placement(ring.world_size)
    cache = make_cache(ring, placement)
    room = 8 * 4 * ring.world_size
    for name, length in (("a", room // 2), ("b", room // 4)):
        plan = placement.prefill({name: length})
        for layer in range(2):
            attend(ring, plan, cache, layer)
    plan = placement.prefill({"c": room // 2})
    before = cache.stats(), ring.stats()["transport"]
    with pytest.raises(
        ringkern.ArgumentError, match="num_pages: want 4 free pages on rank 0.*got 2"
    ):
        attend(ring, plan, cache)
    assert (cache.stats(), ring.stats()["transport"]) == before
    placement.free("a")
    assert cache.stats()["pages_free"] == 6
    for layer in range(2):
        attend(ring, plan, cache, layer)  # the same plan, again
    assert cache.stats()["pages_free"] == 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_out_of_pages_changes_nothing_and_can_be_retried(world_size):
    run_threads(run_out_and_retry, world_size)


def count_pages(ring, seed):
    """Return for each plan of a random history the most pages by the cache, and those held here."""
    rng, placement, known, found = random.Random(seed), ringkern.Placement(ring.world_size), [], []
    cache = make_cache(ring, placement, num_layers=1, num_pages=500, page_size=2)
    for new in range(30):
        some = rng.sample(known, min(len(known), rng.randint(1, 4)))
        change = rng.choice(("prefill", "decode", "fork", "free")) if some else "prefill"
        if change == "fork":
            placement.fork(some[0], new)
            placement.truncate(some[0], rng.randint(0, placement.length(some[0])))
            known.append(new)
        elif change == "free":
            placement.free(some[0])
            known.remove(some[0])
        else:
            lengths = {name: rng.randint(1, 12) for name in [*some, new]}
            decodes = change == "decode"
            plan = placement.decode(some) if decodes else placement.prefill(lengths)
            known += [] if decodes else [new]
            attend(ring, plan, cache)
            here = [len(cache.page_table(name)) for name in plan.sequences]
            found.append((cache.most_pages(plan), here))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_most_pages_of_a_plan_are_those_of_the_rank_that_has_most(seed):
    world_size = (1, 2, 3, 5)[seed % 4]
    plans = 0
    for ranks in zip(*run_threads(count_pages, world_size, seed), strict=True):
        held = [pages for _, pages in ranks]
        want = max(map(max, held)), max(map(sum, held))
        assert [most for most, _ in ranks] == [want] * world_size
        plans += 1
    assert plans > 8


def state(ring, placement, cache):
    """Return what a refused call must leave as it is."""
    history, ranks = placement._history, range(ring.world_size)
    held = {
        name: [history.chunks(record.row, rank) for rank in ranks]
        for name, record in placement._records.items()
    }
    books = [{n: (x.pages[:], x.tokens) for n, x in table._held.items()} for table in cache._tables]
    counts = {name: count for name, count in ring.stats().items() if name != "methods"}
    return held, placement._keys.tolist(), books, cache.stats(), counts, cache._k.sum().item()


def check_refusals(ring, placement, cache, cases):
    for call, match in cases:
        before = state(ring, placement, cache)
        with pytest.raises(ringkern.ArgumentError, match=match):
            call()
        assert state(ring, placement, cache) == before, match


def refuse(ring):
    placement, other = (ringkern.Placement(ring.world_size) for _ in range(2))
    cache = make_cache(ring, placement)
    cache._k.zero_()
    plan = placement.prefill({"a": 7})
    foreign = other.prefill({"a": 7})
    one = torch.ones(plan.num_tokens(ring.rank), 1, 8)
    cases = [
        (lambda: attend(ring, plan, cache, 2), "layer: want 0 to 1, got 2"),
        (lambda: attend(ring, plan, cache, "x"), "layer: want 0 to 1"),
        (lambda: attend(ring, foreign, cache), "plan: want one of the cache's placement"),
        (lambda: attend(ring, plan, object()), "cache: want a KVCache or None, got object"),
        (lambda: ring.attn(*[one.bfloat16()] * 3, plan, cache=cache), "dtype: want float32"),
        (lambda: ring.attn(*[one[..., :4].contiguous()] * 3, plan, cache=cache), "headdim: want 8"),
        (lambda: attend(ring, plan, cache, method="x"), "method: want auto or one of"),
        (lambda: attend(ring, plan, cache, partial_dtype=torch.int8), "partial_dtype: want"),
        (lambda: ring.attn(*[one.expand(-1, 2, 8)] * 3, plan, cache=cache), "nheads_k: want 1"),
        (lambda: ring.attn(one, one, one[..., :4], plan, cache=cache), "headdim_v: want 8"),
        (lambda: ring.attn(*[one[1:]] * 3, plan, cache=cache), "q: want . rows"),
    ]
    check_refusals(ring, placement, cache, cases)
    attend(ring, plan, cache, 0)
    later = placement.decode(["a"])
    latest = placement.decode(["a"])
    cases = [
        (lambda: attend(ring, plan, cache, 0), "plan: want one that has not run.*again"),
        (lambda: attend(ring, latest, cache, 0), "plan: want one for the 7 tokens.*on top of 8"),
        (lambda: attend(ring, later, cache, 1), "layer: want one in which plan 1 has run"),
        (lambda: attend(ring, later, None), "cache: want one, as the plan is on top of cached"),
    ]
    check_refusals(ring, placement, cache, cases)
    attend(ring, plan, cache, 1)
    attend(ring, later, cache, 0)
    placement.truncate("a", 8)
    cases = [
        (lambda: attend(ring, latest, cache, 0), "'a' changed since by truncate, fork or free")
    ]
    check_refusals(ring, placement, cache, cases)
    placement.free("a")
    gone = placement.prefill({"b": 1})
    placement.free("b")
    cases = [(lambda: attend(ring, gone, cache, 0), "'b' changed since")]
    check_refusals(ring, placement, cache, cases)
    assert cache.stats()["pages_used"] == 0


def test_calls_that_do_not_fit_are_refused():
    run_threads(refuse, 3)


def test_another_ring_s_cache():
    with ringkern.init_ring(transport="local") as one, ringkern.init_ring(transport="local") as two:
        placement = ringkern.Placement(1)
        cache = make_cache(one, placement)
        plan = placement.prefill({"a": 3})
        with pytest.raises(ringkern.ArgumentError, match="cache: want one that was made for this"):
            attend(two, plan, cache)
        attend(one, plan, cache)
        assert cache.page_table("a").tolist() == [0]
        assert cache.stats()["tokens"] == 3
        assert cache.stats()["bytes"] == 2 * 2 * 8 * 4 * 8 * 4


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(num_pages=0), "num_pages: want an int of at least 1, got 0"),
        (dict(page_size=-1), "page_size"),
        (dict(headdim_v=0), "headdim_v"),
        (dict(num_layers=True), "num_layers"),
        (dict(dtype="float32"), "dtype: want float16.*got 'float32'. Give one of torch"),
        (dict(dtype=torch.float64), "dtype: want float16"),
    ],
)
def test_a_cache_that_cannot_be(changes, match):
    with (
        ringkern.init_ring(transport="local") as ring,
        pytest.raises(ringkern.ArgumentError, match=match),
    ):
        make_cache(ring, ringkern.Placement(1), **changes)


def test_a_cache_needs_a_placement_of_the_ring_s_size():
    with ringkern.init_ring(transport="local") as ring:
        with pytest.raises(ringkern.ArgumentError, match="placement: want a Placement, got dict"):
            make_cache(ring, {})
        with pytest.raises(ringkern.ArgumentError, match="ring: want what init_ring.*NoneType"):
            make_cache(None, ringkern.Placement(1))
        with pytest.raises(ringkern.ArgumentError, match="placement: want world_size 1"):
            make_cache(ring, ringkern.Placement(2))


def change_between_layers(ring):
    """What a plan wrote in one layer is gone before it comes to the next."""
    placement = ringkern.Placement(ring.world_size)
    cache = make_cache(ring, placement, num_pages=40)
    cache._k.zero_()
    for change in (lambda: placement.free("a"), lambda: placement.truncate("a", 4)):
        plan = placement.prefill({"a": 7, "b": 3})
        attend(ring, plan, cache, 0)
        change()
        other = placement.prefill({"c": 9})  # takes the pages
        attend(ring, other, cache, 0)
        attend(ring, other, cache, 1)
        cases = [(lambda plan=plan: attend(ring, plan, cache, 1), "were truncated or freed since")]
        check_refusals(ring, placement, cache, cases)
        for name in set("abc") & set(placement._records):
            placement.free(name)
    # A plan that was begun is taken back, and planned again.
    attend(ring, placement.prefill({"a": 7}), cache, 0)
    placement.truncate("a", 4)
    stuck = placement.decode(["a"])
    attend(ring, stuck, cache, 0)
    cases = [(lambda: attend(ring, stuck, cache, 1), "layer: want.*Truncate all tokens of plan")]
    check_refusals(ring, placement, cache, cases)
    placement.truncate("a", 0)
    again = placement.prefill({"a": 7})
    attend(ring, again, cache, 0)
    attend(ring, again, cache, 1)


def test_a_plan_whose_tokens_are_gone_runs_in_no_further_layer():
    run_threads(change_between_layers, 3)


def skip_layers(ring):
    """Plans of other sequences do not stand in for one that skipped a layer."""
    placement = ringkern.Placement(ring.world_size)
    cache = make_cache(ring, placement, num_pages=40)
    cache._k.zero_()
    first = placement.prefill({"a": 7})
    attend(ring, first, cache, 0)
    second = placement.prefill({"b": 5})
    for layer in range(2):
        attend(ring, second, cache, layer)
    later = placement.decode(["a", "b"])
    attend(ring, later, cache, 0)
    last = placement.decode(["b"])
    attend(ring, last, cache, 0)
    cases = [
        (
            lambda: attend(ring, later, cache, 1),
            f"layer: want one in which plan {first.serial} has",
        ),
        (lambda: attend(ring, last, cache, 1), f"layer: want one in which plan {later.serial} has"),
    ]
    check_refusals(ring, placement, cache, cases)
    # A copy of a page would miss what is not written yet.
    placement.fork("b", "fork")
    forked = placement.decode(["fork", "b"])
    cases = [
        (lambda: attend(ring, forked, cache, 0), f"Run plan {last.serial} in every layer first")
    ]
    check_refusals(ring, placement, cache, cases)
    for plan in (first, later, last):
        attend(ring, plan, cache, 1)
    # What becomes of a fork is nothing to the plan that it was made on top of.
    plan = placement.prefill({"whole": 5})
    attend(ring, plan, cache, 0)
    for name in ("freed", "cut"):
        placement.fork("whole", name)
    placement.free("freed")
    placement.truncate("cut", 2)
    attend(ring, plan, cache, 1)
    # Full pages are not copied, and a fork needs its layers all the same.
    full = placement.prefill({"full": 4 * ring.world_size})
    attend(ring, full, cache, 0)
    placement.fork("full", "more")
    more = placement.decode(["more"])
    attend(ring, more, cache, 0)
    cases = [
        (lambda: attend(ring, more, cache, 1), f"layer: want one in which plan {full.serial} ")
    ]
    check_refusals(ring, placement, cache, cases)
    for layer in range(2):
        attend(ring, forked, cache, layer)


def test_every_plan_runs_in_every_layer():
    run_threads(skip_layers, 3)
