"""The choice of method: the model's arithmetic, the paper's rules, profiles as files."""

import dataclasses
import gc
import json
import os

import pytest
import ringkern
import torch
from ringkern import calibrate, cost, profile, schedule
from ringkern.launch import launch
from ringkern.types import Hardware, Problem
from threads import HARDWARE, run_threads

# Llama 3 405B on one GPU of a node, as paper.md section 1 gives it: 16 query heads, 1 key head.
PAPER = Problem(1, 16, 1, 128, 128, "bfloat16", True, 128**-0.5, (-1, -1), 0.0)
GTT = Hardware(((1, 1.0), (64, 100.0), (1024, 510.0)), 1.0, 1500.0, 26.0, 20.0)


def plan_of(world_size, cached, new):
    placement = ringkern.Placement(world_size)
    if cached:
        placement.prefill({"a": cached})
    return placement.prefill({"a": new})


def test_bytes_by_hand():
    assert cost.block_bytes("kv", 32000, PAPER) == 32000 * 2 * 128 * 2
    assert cost.block_bytes("q", 800, PAPER) == 800 * 16 * 128 * 2
    assert cost.block_bytes("part", 800, PAPER) == 800 * 16 * (128 * 4 + 4)


def test_the_paper_s_ring_iteration():
    """paper.md table 5, 10 % new: 1608 us of attention, 631 us for K and V, at CP4."""
    plan = plan_of(4, 115200, 12800)
    attend, exchange = cost.steps_us(plan, PAPER, GTT)["pass_kv"][1, 0]
    assert attend == pytest.approx(1608, rel=0.1)
    assert exchange == pytest.approx(631, rel=0.1)


@pytest.mark.parametrize("method", schedule.METHODS)
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 7), (2,), (40, 3)])
def test_messages_take_what_the_schedule_says(method, lengths):
    """An exchange is as long as its larger side; what is merged are the parts that came."""
    size, order = 3, (2, 0, 1)
    plan = ringkern.Plan(size, lengths, "contiguous")  # causal: who is asked and asks differ
    no_work = Hardware(((1, 1e30),), 0.0, merge_gb_s=2.0, link_gb_s=5.0, latency_us=3.0)
    steps = cost.steps_us(plan, PAPER, no_work, order=order)[method]
    for rank in range(size):
        schedule_of_rank = schedule.make_schedule(plan, rank, method, order=order)
        assert len(steps) == len(schedule_of_rank)
        for step, (attend, exchange) in zip(schedule_of_rank, steps[:, rank], strict=True):
            sent, received, parts = (
                sum(cost.block_bytes(move.kind, move.tokens, PAPER) for move in moves)
                for moves in (step.sends, step.recvs, [m for m in step.recvs if m.kind == "part"])
            )
            talks = bool(step.sends or step.recvs)
            assert exchange == pytest.approx(3.0 * talks + max(sent, received) / 5e3)
            assert attend == pytest.approx(parts / 2e3)


def test_the_choice_follows_the_miss_rate():
    full = cost.choose(plan_of(4, 0, 128000), PAPER, GTT)
    little = cost.choose(plan_of(4, 126720, 1280), PAPER, GTT)
    assert full.predicted_us["pass_kv"] < full.predicted_us["pass_q"]
    assert little.predicted_us["pass_q"] < little.predicted_us["pass_kv"]
    assert little.method in ("pass_q", "gather_q") and little.method in little.reason


def test_steps_and_contention_by_hand():
    """Messages take a share of their time from attention; ranks that work fall out of step."""
    plan = plan_of(4, 16384, 1024)
    steps = cost.steps_us(plan, PAPER, GTT)["pass_kv"]
    busy = dataclasses.replace(GTT, step_us=7.0, contention=0.25)
    want = 0.0
    for attend, exchange in steps.max(axis=1):  # ranks are alike here
        want += max(exchange, attend + 0.25 * exchange + min(7.0, attend))
    assert cost.predict_us(plan, PAPER, busy)["pass_kv"] == pytest.approx(want, rel=0.01)
    assert cost.predict_us(plan, PAPER, GTT)["pass_kv"] == pytest.approx(
        steps.max(axis=(1, 2)).sum(), rel=1e-6
    )


def test_many_steps_that_cost_time_lose_to_few():
    plan = plan_of(4, 126720, 1280)
    busy = dataclasses.replace(GTT, step_us=200.0)
    assert cost.choose(plan, PAPER, GTT).method == "pass_q"
    assert cost.choose(plan, PAPER, busy).method in ("gather_q", "gather_kv")


@pytest.mark.parametrize("new, held, gain", [(1024, 0.5, 0), (4096, 2, 4), (1 << 20, 512, 20)])
def test_a_gather_must_be_worth_the_memory_that_it_holds(monkeypatch, new, held, gain):
    """K and V of a token are 512 bytes. Each doubling from 1 MiB on asks for 2 % more."""
    for less, method in ((0.01, "gather_kv"), (-0.01, "pass_kv")):
        ring_us = 100.0 + gain + less
        times = dict(pass_kv=ring_us, pass_q=200.0, gather_kv=100.0, gather_q=300.0)
        monkeypatch.setattr(cost, "predict_us", lambda *_, now=times, **options: now)
        choice = cost.choose(plan_of(4, 0, new), PAPER, GTT)
        told = f"gather_kv holds {held:.1f} MiB, and is to save {gain}% for it"
        assert choice.method == method
        assert (told in choice.reason) == (method == "pass_kv" and gain > 0)


def test_decode_takes_two_latencies():
    slow = dataclasses.replace(GTT, latency_us=1000.0)
    placement = ringkern.Placement(8)
    placement.prefill({"a": 131072})
    choice = cost.choose(placement.decode(["a"]), PAPER, slow)
    assert choice.method == "gather_q"
    assert 2000 < choice.predicted_us["gather_q"] < 2500
    assert choice.predicted_us["pass_q"] > 7000


def test_one_rank_has_nothing_to_choose():
    choice = cost.choose(plan_of(1, 0, 10), PAPER, GTT)
    assert choice.method == "pass_kv" and "one rank" in choice.reason


@pytest.mark.parametrize(
    "cached, new, one, five",
    [(0, 128000, "pass_kv", "pass_kv"), (126720, 1280, "pass_q", "pass_q")],
)
def test_the_paper_s_rules(cached, new, one, five):
    plan = plan_of(4, cached, new)
    assert cost.RULES["algorithm_1"](plan, PAPER, GTT) == one
    assert cost.RULES["algorithm_5"](plan, PAPER, GTT) == five


def test_the_fitted_rule_by_hand():
    """Appendix D: h = -1.059 ln(T) + 1.145 ln(T / (T + P)) + 12.112 > 0 means pass-KV."""
    assert cost.RULES["fitted_rule"](plan_of(4, 0, 60000), PAPER, GTT) == "pass_kv"
    assert cost.RULES["fitted_rule"](plan_of(4, 0, 128000), PAPER, GTT) == "pass_q"


def test_a_profile_is_a_file(tmp_path):
    path = tmp_path / "profile.json"
    profile.save(GTT, str(path))
    assert profile.load(path) == profile.load(str(path)) == GTT
    assert profile.load(json.loads(path.read_text())) == GTT


@pytest.mark.parametrize(
    "content, match",
    [
        ("nonsense", "want a file that"),
        ("{}", "want the keys"),
        ("[]", "want a path or a Hardware"),
        (json.dumps(dataclasses.asdict(GTT) | {"link_gb_s": 0}), "want numbers above 0"),
    ],
)
def test_a_profile_that_is_none(tmp_path, content, match):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ringkern.ArgumentError, match=f"profile: {match}"):
        profile.load(str(path))
    with pytest.raises(ringkern.ArgumentError, match="profile"):
        profile.load(str(tmp_path / "missing"))


def test_ranks_choose_alike():
    def pick(ring):
        placement = ringkern.Placement(ring.world_size)
        shape = dict(nheads=4, nheads_k=2, headdim=16, dtype=torch.float32)
        plans = placement.prefill({"a": 500}), placement.decode(["a"])
        return [ring.choose(plan, **shape) for plan in plans], ring.hardware

    (choices, hardware), *others = run_threads(pick, 3)
    assert hardware == HARDWARE
    assert all(other == (choices, hardware) for other in others)
    assert choices[0].reason.startswith(choices[0].method)


def test_smaller_parts_are_predicted_as_such():
    def pick(ring):
        plan = ringkern.Placement(ring.world_size).prefill({"a": 500})
        shape = dict(nheads=4, nheads_k=2, headdim=64, dtype=torch.bfloat16)
        full = ring.choose(plan, **shape).predicted_us
        half = ring.choose(plan, **shape, partial_dtype=torch.bfloat16).predicted_us
        asked, given = [], ring._choose
        ring._choose = lambda plan, problem, dtype: (
            asked.append(dtype) or given(plan, problem, dtype)
        )
        x = torch.zeros(plan.num_tokens(ring.rank), 4, 64, dtype=torch.bfloat16)
        ring.attn(x, x[:, :2], x[:, :2], plan, partial_dtype=torch.bfloat16)
        return full, half, asked

    full, half, asked = run_threads(pick, 3)[0]
    for method in ("pass_kv", "gather_kv"):
        assert half[method] == full[method]
    for method in ("pass_q", "gather_q"):
        assert half[method] < full[method]
    assert asked == [torch.bfloat16]


def refuse_to_choose(ring):
    plan = ringkern.Placement(ring.world_size).prefill({"a": 5})
    shape = dict(nheads=4, nheads_k=2, headdim=64, dtype=torch.bfloat16)
    sent = ring.stats()["transport"]["bytes_sent"]
    for changes, match in (
        (dict(nheads=0), "nheads: want an int of at least 1, got 0"),
        (dict(nheads=3), "nheads: want a multiple of nheads_k = 2, got 3"),
        (dict(headdim=True), "headdim: want an int"),
        (dict(headdim_v=0), "headdim_v: want an int of at least 1, got 0"),
        (dict(dtype=torch.int8), "dtype: want float16, bfloat16, float32, got int8"),
        (dict(causal=1), "causal: want True or False"),
        (dict(window_size=3), "window_size: want two ints"),
        (dict(partial_dtype=torch.int8), "partial_dtype: want"),
    ):
        with pytest.raises(ringkern.ArgumentError, match=match):
            ring.choose(plan, **shape | changes)
    for other, match in ((None, "plan: want a Plan"), (ringkern.Plan(2, (5,)), "world_size 3")):
        with pytest.raises(ringkern.ArgumentError, match=match):
            ring.choose(other, **shape)
    assert ring.stats()["transport"]["bytes_sent"] == sent


def test_what_is_no_call_has_no_choice():
    run_threads(refuse_to_choose, 3)


def test_calibration_gives_every_rank_the_same():
    profiles = run_threads(lambda ring: calibrate.measure(ring, 0.1), 3)
    assert profiles[0] == profiles[1] == profiles[2]
    assert profiles[0].link_gb_s > 0 and len(profiles[0].attend_tflops) == len(calibrate.SHAPES)


def test_small_heads_are_not_millions_of_tensors():
    """K and V that are in no cache are many where each is small: 4 million of one element."""
    smallest = Problem(1, 1, 1, 1, 1, "float32", False, 1.0, (-1, -1), 0.0)

    def count(ring):
        before = len(gc.get_objects())
        attend = calibrate._attention(ring, 1, 1, smallest)
        attend()
        return len(gc.get_objects()) - before

    (made,) = run_threads(count, 1)
    assert made < 1000


def meet_elsewhere(ring):
    with torch.device("meta"):
        return ring.gather_int(ring.rank), calibrate.measure(ring, 0.1).link_gb_s


def test_the_host_s_tables_are_the_host_s_whatever_the_default_device():
    for ranks, link_gb_s in run_threads(meet_elsewhere, 3):
        assert ranks == [0, 1, 2] and link_gb_s > 0


def test_a_rank_alone_is_not_slowed_by_others():
    """Ranks that share cores: who works while the others have nothing to do is faster."""
    crowded = Hardware(((1, 1.0), (4096, 100.0)), 1e-6, 1e9, 26.0, 20.0)
    shared = dataclasses.replace(crowded, alone_tflops=((1, 4.0), (4096, 200.0)))

    def attend(plan, method):
        return [cost.steps_us(plan, PAPER, p)[method][..., 0] for p in (crowded, shared)]

    placement = ringkern.Placement(4)
    placement.prefill({"a": 8192})
    decode = placement.decode(["a"])
    # In each step of pass_q one rank has work.
    before, after = attend(decode, "pass_q")
    assert ((before > 1e-3).sum(axis=1) <= 1).all()
    assert before.sum() > 0
    assert after == pytest.approx(before / 4, rel=1e-3, abs=1e-3)
    # A full prefill keeps all busy for as long.
    before, after = attend(plan_of(4, 0, 8192), "gather_kv")
    assert after == pytest.approx(before, rel=0.05)
    # Three ranks attend for the fourth: two others are busy, of three.
    before, after = (us[1] for us in attend(decode, "gather_q"))
    assert after == pytest.approx(before * (1 / 4 + 2 / 3 * 3 / 4), rel=1e-2)


def profiled(worker, given, variable):
    """Return the profile of a ring made with these, before and after its first choice."""
    if variable:
        os.environ["RINGKERN_PROFILE"] = variable
    with ringkern.init_ring(profile=given, timeout_s=60) as ring:
        plan = ringkern.Placement(ring.world_size).prefill({"a": 90})
        before = ring.hardware
        shape = dict(nheads=2, nheads_k=1, headdim=16, dtype=torch.float32)
        choice = ring.choose(plan, **shape)
        x = torch.zeros(plan.num_tokens(ring.rank), 2, 16)
        ring.attn(x, x[:, :1], x[:, :1], plan)
        return before, ring.hardware, choice, list(ring.stats()["methods"])


def test_a_ring_takes_its_profile_from_where_it_is_given(tmp_path):
    """An argument, else the variable, else what a first choice measures; alike on all ranks."""
    paths = [str(tmp_path / name) for name in ("given", "variable")]
    slow = dataclasses.replace(HARDWARE, link_gb_s=HARDWARE.link_gb_s / 4)
    for path, hardware in zip(paths, (HARDWARE, slow), strict=True):
        with open(path, "w") as file:
            json.dump(dataclasses.asdict(hardware), file)
    cases = [
        ((paths[0], None), HARDWARE),
        ((slow, None), slow),
        ((None, paths[1]), slow),
        ((paths[0], paths[1]), HARDWARE),
    ]
    for arguments, want in cases:
        for before, after, choice, ran in launch(profiled, 2, *arguments, threads=1, timeout_s=60):
            assert before == after == want and ran == [choice.method]
    first, second = launch(profiled, 2, None, None, threads=1, timeout_s=60)
    assert first == second and first[0] is None and first[1] is not None
