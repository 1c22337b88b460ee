"""The commands: what they accept, print and return."""

import json
import subprocess
import sys

import pytest
from ringkern import cli, demo, profile


def options(parser):
    """Return what a parser accepts, command by command."""
    subparsers = next(a for a in parser._actions if hasattr(a, "choices") and a.choices)
    return {
        name: sorted(
            action.option_strings[0] if action.option_strings else action.dest
            for action in sub._actions
        )
        for name, sub in subparsers.choices.items()
    }


# Public, so frozen: a new option is a new line here, in the README's spirit and in CHANGELOG.
FROZEN = {
    "bench": ["--json", "--list", "--quick", "-h", "cases"],
    "calibrate": ["--json", "--out", "--ranks", "--seconds", "--threads", "-h"],
    "demo": ["--json", "--picture", "--ranks", "--timeout", "--tokens", "-h", "file"],
    "doctor": ["--json", "-h"],
    "plan": [
        "--headdim",
        "--itemsize",
        "--json",
        "--layout",
        "--lengths",
        "--method",
        "--nheads",
        "--nheads-k",
        "--no-causal",
        "--rank",
        "--window",
        "--world-size",
        "-h",
    ],
}


def test_the_commands_are_frozen():
    assert options(cli.make_parser()) == FROZEN


def run(capsys, *argv):
    code = cli.main(list(argv))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_plan_prints_a_line_per_rank(capsys):
    code, out, _ = run(capsys, "plan", "--world-size", "3", "--lengths", "20,7")
    assert code == 0
    assert "27 tokens in 2 sequences over 3 ranks, zigzag; pass_kv" in out
    assert len([line for line in out.splitlines() if line[:5].strip().isdigit()]) == 3


def test_plan_as_json_adds_up(capsys):
    code, out, _ = run(capsys, "plan", "--world-size", "3", "--lengths", "20,7", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and sum(row["tokens"] for row in rows) == 27
    assert sum(sum(row["pairs"]) for row in rows) == 20 * 21 // 2 + 7 * 8 // 2


def test_plan_of_one_rank(capsys):
    _, out, _ = run(capsys, "plan", "--world-size", "3", "--lengths", "20", "--rank", "1")
    assert "sequence 0, positions 4..7" in out
    assert "sends kv of rank 0, peer 2: 28672 bytes" in out
    assert "q of rank 1 x K,V of rank 0" in out
    _, out, _ = run(capsys, "plan", "--world-size", "3", "--lengths", "20", "--rank", "1", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["runs"][0] == dict(seq=0, offset=0, start=4, length=4, stride=1)
    assert [row["work"][0]["kv_rank"] for row in rows[1:]] == [1, 0, 2]


@pytest.mark.parametrize("method", ["pass_q", "gather_kv", "gather_q"])
def test_plan_of_other_methods(capsys, method):
    argv = ["plan", "--world-size", "3", "--lengths", "20,7", "--method", method, "--json"]
    code, out, _ = run(capsys, *argv)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert sum(sum(row["pairs"]) for row in rows) == 20 * 21 // 2 + 7 * 8 // 2


def test_calibrate_writes_a_profile(capsys, tmp_path):
    path = tmp_path / "profile.json"
    argv = ["calibrate", "--ranks", "2", "--seconds", "0.2", "--out", str(path), "--json"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert profile.load(str(path)) == profile.load(json.loads(out))


def test_plan_needs_no_torch():
    code = (
        "import sys; from ringkern.cli import main;"
        "main(['plan', '--world-size', '2', '--lengths', '9']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "argv, match",
    [
        (["plan", "--world-size", "0", "--lengths", "9"], "world_size: want at least 1, got 0"),
        (["plan", "--world-size", "2", "--lengths", "9,0"], "lengths: want ints above 0"),
        (["plan", "--world-size", "2", "--lengths", "9", "--layout", "x"], "layout: want one of"),
        (["plan", "--world-size", "2", "--lengths", "9", "--rank", "2"], "rank: want 0 to 1"),
        (["plan", "--world-size", "2", "--lengths", "9", "--method", "x"], "method: want one of"),
        (["calibrate", "--ranks", "0"], "ranks: want at least 1"),
        (["demo", "no/such/file"], "file: want a readable file, got no/such/file"),
        (["demo", "--ranks", "0"], "ranks: want at least 1"),
        (["demo", "--tokens", "0"], "tokens: want at least 1"),
        (["demo", __file__, "--tokens", "99999999"], "tokens: want at most"),
    ],
)
def test_bad_arguments_exit_with_2(capsys, argv, match):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out
    assert err.startswith(f"ringkern {argv[0]}: ") and match in err


@pytest.mark.parametrize("argv", [[], ["fly"], ["plan"], ["plan", "--lengths", "a"]])
def test_argparse_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: ringkern" in capsys.readouterr().err


def test_doctor_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setenv("RINGKERN_SECRET", "very secret indeed, and thirty-two")
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "very secret" not in out
    for line in ("interface lo", "congestion control", "torch", "triton", "CUDA", "NCCL", "tcp"):
        assert line in out, line
    _, out, _ = run(capsys, "doctor", "--json")
    sections = {row.pop("section"): row for row in map(json.loads, out.splitlines())}
    assert sections["environment"]["RINGKERN_SECRET"] == "set"
    assert "127.0.0.1" in sections["network"]["interface lo"]


def test_doctor_reports_a_choice_that_cannot_be_made(capsys, monkeypatch):
    monkeypatch.setenv("RINGKERN_IFNAME", "nosuch0")
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "nothing: RINGKERN_IFNAME: want an interface" in out


def test_demo_agrees_and_draws(capsys, tmp_path):
    picture = tmp_path / "timeline.png"
    argv = ["demo", __file__, "--tokens", "301", "--ranks", "3", "--json"]
    code, out, err = run(capsys, *argv, "--picture", str(picture))
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [row["tokens"] for row in rows[:3]] == [101, 100, 100]
    assert all(row["bytes_sent"] == row["bytes_planned"] > 0 for row in rows[:3])
    assert rows[3]["ok"] and rows[3]["largest_error"] < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_where_tokens_differ(capsys, tmp_path, monkeypatch):
    """A plan that is off by one token in the comparison: exit code 1, not a picture of success."""
    alone = demo.run_alone
    monkeypatch.setattr(demo, "run_alone", lambda *args: alone(*args).roll(1, 0))
    argv = ["demo", __file__, "--tokens", "64", "--ranks", "2"]
    code, out, _ = run(capsys, *argv, "--picture", str(tmp_path / "timeline.png"))
    assert code == 1 and "NOT every token" in out
