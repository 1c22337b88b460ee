"""The demo: its session on rings of threads and of processes, and what it takes for a fault."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from ringkern import cli, demo, demo_check, demo_picture, demo_report
from ringkern.demo_session import run_alone, run_ring
from ringkern.model import Shape
from threads import run_threads

SHAPE = Shape(layers=2, hidden=64, ffn_hidden=64, nheads=4, nheads_k=2, headdim=16)
TEXT = bytes(range(32, 127)) * 4


def make_session(tokens=61, follow_up=7, decode=5):
    return demo.make_session(TEXT, "a text", tokens, follow_up, decode, SHAPE)


def run_session(session, world_size, alone):
    expected = [stage.tokens for stage in alone]
    return run_threads(run_ring, world_size, session, expected, lambda said: None)


@pytest.fixture(scope="module")
def ran():
    """A session, the run of one process, and the runs of three ranks."""
    session = make_session()
    alone = run_alone(session, lambda said: None)
    return session, alone, run_session(session, 3, alone)


@pytest.mark.parametrize("world_size, tokens, follow_up", [(1, 5, 1), (2, 1, 3), (5, 130, 2)])
def test_every_stage_agrees(world_size, tokens, follow_up):
    """Also where ranks have no tokens of a pass: two new tokens, or one, over five ranks."""
    session = make_session(tokens, follow_up, decode=6)
    alone = run_alone(session, lambda said: None)
    found = demo_check.compare(session, alone, run_session(session, world_size, alone))
    assert not found.faults and found.totals["ok"]
    assert found.totals["equal"] == found.totals["decoded"] == 12
    assert found.totals["largest_error"] < 1e-5
    assert sum(row["tokens"] for row in found.ranks) == tokens + follow_up + 12
    assert [row["cached_tokens"] for row in found.stages] == [
        0,
        tokens,
        tokens + 6,
        tokens + 6 + follow_up,
    ]


def test_stages_are_predicted_and_told(ran):
    session, alone, runs = ran
    found = demo_check.compare(session, alone, runs)
    assert [row["stage"] for row in found.stages] == [
        "turn 1 prefill",
        "turn 1 decode",
        "turn 2 prefill",
        "turn 2 decode",
    ]
    assert [sum(row["methods"].values()) for row in found.stages] == [1, 5, 1, 5]
    for row in found.stages:
        assert row["reason"].split()[0] in row["methods"]
        assert row["bytes_sent"] == row["bytes_planned"] > 0
    for stage in (stage for run in runs for stage in run.stages):
        begin, end = stage.passes[0].start_ns, stage.passes[-1].end_ns
        assert any(event.name == "attend" for event in stage.events)
        assert all(begin <= event.start_ns <= end for event in stage.events)
    # Random weights, yet no stutter: tokens that follow each other differ.
    decoded = [token for stage in alone for token in stage.tokens]
    assert len(set(decoded)) > len(decoded) // 2


def test_one_process_computes_the_same_in_one_pass_as_in_many(ran):
    """The reference: its cache and its masks against one causal pass over the whole text."""
    session, alone, _ = ran
    whole = bytes(
        token
        for stage, done in zip(session.stages, alone, strict=True)
        for token in (stage.prompt or done.tokens)
    )
    longer = dataclasses.replace(session, prompt=whole)
    at_once = run_alone(longer, lambda said: None)[0].hidden
    torch.testing.assert_close(
        torch.cat([stage.hidden for stage in alone]), at_once, rtol=0, atol=1e-5
    )


def with_pass(runs, rank, number, index, **changes):
    """Return the runs with another pass in one place."""
    runs = list(runs)
    stages = list(runs[rank].stages)
    passes = list(stages[number].passes)
    passes[index] = dataclasses.replace(passes[index], **changes)
    stages[number] = dataclasses.replace(stages[number], passes=passes)
    runs[rank] = dataclasses.replace(runs[rank], stages=stages)
    return runs


def with_cache(runs, rank, **changes):
    runs = list(runs)
    runs[rank] = dataclasses.replace(runs[rank], cache=runs[rank].cache | changes)
    return runs


def hidden_off_by(runs, rank, number, by):
    hidden = runs[rank].stages[number].passes[0].hidden.clone()
    hidden[-1, -1] += by
    return with_pass(runs, rank, number, 0, hidden=hidden)


def bytes_off(runs, rank, number):
    sent = runs[rank].stages[number].passes[0].bytes_sent
    return with_pass(runs, rank, number, 0, bytes_sent=sent + 1)


def other_method(runs, rank, number):
    return with_pass(runs, rank, number, -1, method="pass_q")


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda runs: hidden_off_by(runs, 1, 0, 2e-4), "turn 1 prefill: rank 1's hidden states"),
        (lambda runs: hidden_off_by(runs, 2, 2, float("nan")), "turn 2 prefill: rank 2's hidden"),
        (
            lambda runs: with_pass(runs, 0, 0, 0, hidden=torch.zeros(3, 64)),
            "turn 1 prefill: rank 0's hidden states are off by inf",
        ),
        (
            lambda runs: with_pass(runs, 2, 1, 1, following=0),
            "turn 1 decode: rank 2 chose 0 as token 2, one process",
        ),
        (
            lambda runs: with_pass(runs, 0, 2, 0, following=0),
            "turn 2 decode: rank 0 chose 0 as token 0, one process",
        ),
        (lambda runs: bytes_off(runs, 1, 3), "turn 2 decode: rank 1 sent"),
        (lambda runs: other_method(runs, 2, 1), "turn 1 decode: the ranks did not all choose"),
        (lambda runs: with_cache(runs, 1, tokens=99), "capacity: two ranks differ by more than"),
        (lambda runs: with_cache(runs, 1, tokens=27), "rank 1 holds 27 tokens, planned 26"),
    ],
)
def test_every_fault_is_found(ran, spoil, fault):
    session, alone, runs = ran
    assert not demo_check.compare(session, alone, runs).faults
    found = demo_check.compare(session, alone, spoil(runs))
    assert not found.totals["ok"]
    assert any(told.startswith(fault) for told in found.faults), found.faults
    verdict = demo_report.verdict(found)
    assert "NOT every" in verdict and found.faults[0] in verdict


def test_json_has_no_number_for_what_is_none(ran, capsys):
    """NaN is an error without bound, and JSON has neither."""
    session, alone, runs = ran
    found = demo_check.compare(session, alone, hidden_off_by(runs, 1, 0, float("nan")))
    assert found.totals["largest_error"] == float("inf")
    demo_report.print_json(found)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["largest_error"] is None for row in rows] == [
        *(True, False, False, False),  # stages
        *(False, True, False),  # ranks
        True,
    ]
    assert rows[-1]["ok"] is False and rows[-1]["faults"] == found.faults


def test_a_tie_is_told_and_no_fault(ran):
    """The second best token, once by a hair and once by a mile."""
    session, alone, runs = ran
    best, second = alone[1].logits[2].topk(2).indices.tolist()
    for by, ok in ((1e-4, True), (1.0, False)):
        logits = alone[1].logits.clone()
        logits[2, second] = logits[2, best] - by
        near = [*alone[:1], dataclasses.replace(alone[1], logits=logits), *alone[2:]]
        for rank in range(3):
            runs = with_pass(runs, rank, 1, 1, following=second)
        found = demo_check.compare(session, near, runs)
        assert found.totals["ok"] is ok
        assert (found.totals["equal"], found.totals["ties"]) == (9, int(ok))
        assert found.totals["closest"] == pytest.approx(min(by, found.totals["closest"]), rel=0.1)
        assert ("differ by a tie" in demo_report.verdict(found)) is ok


def test_a_ring_that_errs_goes_on_with_the_tokens_of_one_process(ran):
    """So that what comes after a wrong token can still be compared."""
    session, alone, _ = ran
    expected = [list(stage.tokens) for stage in alone]
    expected[1][1] = (expected[1][1] + 1) % 256
    runs = run_threads(run_ring, 3, session, expected, lambda said: None)
    assert runs[0].chosen(1)[1] == alone[1].tokens[1] != expected[1][1]  # its own choice is told
    found = demo_check.compare(session, alone, runs)
    assert any("hidden states" in fault for fault in found.faults)  # and what was fed is used


def test_tables_fit_80_columns(ran, capsys):
    session, alone, runs = ran
    found = demo_check.compare(session, alone, runs)
    rows = [row | dict(bytes_sent=10**8, bytes_planned=10**8) for row in found.stages]
    rows[0] |= dict(new_tokens=131072, time_ms=123456.0, methods={"gather_kv": 1})
    rows[1] |= dict(methods={"gather_q": 120, "gather_kv": 8}, cached_tokens=131072)
    demo_report.print_tables(dataclasses.replace(found, stages=rows), Console(width=80))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "gather_q x120" in printed and "gather_kv x8" in printed
    for row in rows:
        assert row["reason"].split(";")[0] in printed


def test_the_picture_stands_events_that_were_dropped(ran, tmp_path):
    """A ring keeps the latest events: of a long stage only the end is left, or nothing."""
    session, _, runs = ran
    for kept in (1, 0):
        cut = [
            dataclasses.replace(
                run,
                stages=[
                    dataclasses.replace(stage, events=stage.events[len(stage.events) - kept :])
                    for stage in run.stages
                ],
            )
            for run in runs
        ]
        picture = tmp_path / f"{kept}.png"
        demo_picture.draw(session, cut, str(picture))
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_follow_up_goes_on_where_the_prompt_ends():
    session = demo.make_session(b"abcdef", "a text", 4, 9, 1)
    assert (session.prompt, session.follow_up) == (b"abcd", b"efabcdefa")
    assert demo.make_session(b"abcd", "a text", 4, 1, 1).follow_up == b"a"
    assert session.total == 4 + 9 + 2


def run(capsys, *argv):
    code = cli.main(["demo", *argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_demo_on_processes_agrees_and_draws(capsys, tmp_path, monkeypatch):
    """On the ring's own profile, by TCP; with RINGKERN_CHECK, whose records are bytes too."""
    monkeypatch.setenv("RINGKERN_CHECK", "1")
    picture = tmp_path / "timeline.png"
    sizes = ["--tokens", "301", "--follow-up", "20", "--decode", "4", "--ranks", "3"]
    code, out, err = run(capsys, __file__, *sizes, "--json", "--picture", str(picture))
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    stages, ranks, last = rows[:4], rows[4:7], rows[7]
    assert [row["new_tokens"] for row in stages] == [301, 4, 20, 4]
    assert sorted(row["tokens"] for row in ranks) == [109, 110, 110]
    assert all(row["bytes_sent"] == row["bytes_planned"] > 0 for row in stages + ranks)
    assert last["ok"] and not last["faults"] and last["largest_error"] < 1e-4
    assert last["equal"] + last["ties"] == last["decoded"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_where_runs_differ(capsys, tmp_path, monkeypatch):
    """A reference that is off by one token: exit code 1, not a picture of success."""

    def rolled(session, say):
        return [
            dataclasses.replace(stage, hidden=stage.hidden.roll(1, 0))
            for stage in run_alone(session, say)
        ]

    monkeypatch.setattr(demo, "run_alone", rolled)
    sizes = ["--tokens", "64", "--follow-up", "2", "--decode", "2", "--ranks", "2"]
    code, out, _ = run(capsys, __file__, *sizes, "--picture", str(tmp_path / "timeline.png"))
    assert code == 1 and "NOT every token" in out
    assert "turn 1 prefill: rank 0's hidden states are off by" in out
