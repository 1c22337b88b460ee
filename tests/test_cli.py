"""The commands: what they accept, print and return."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
from ringkern import cli, profile
from ringkern.launch import launch


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
    "bench": ["--dry-run", "--json", "--list", "--quick", "-h", "cases"],
    "calibrate": ["--device", "--json", "--out", "--ranks", "--seconds", "--threads", "-h"],
    "demo": [
        "--decode",
        "--follow-up",
        "--json",
        "--picture",
        "--ranks",
        "--timeout",
        "--tokens",
        "-h",
        "file",
    ],
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
    "trace": [
        "--cached",
        "--decode",
        "--dtype",
        "--headdim",
        "--json",
        "--layers",
        "--method",
        "--new",
        "--nheads",
        "--nheads-k",
        "--out",
        "--ranks",
        "--threads",
        "--timeout",
        "--window",
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


def calibrate_here(worker, path, *more):
    """Run the command as torchrun would, on every rank; return (code, what it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(["calibrate", "--seconds", "0.2", "--out", path, "--json", *more])
    return code, out.getvalue()


def test_calibrate_measures_torchrun_s_ranks(tmp_path):
    path = tmp_path / "profile.json"
    (code, out), *others = launch(calibrate_here, 3, str(path), threads=1, timeout_s=60)
    assert code == 0 and others == [(0, "")] * 2, "one rank writes, and says so"
    assert profile.load(str(path)) == profile.load(json.loads(out))
    for more, match in (
        (("--ranks", "2"), "ranks: want 3, as torchrun started, or none given, got 2"),
        (("--threads", "2"), "threads: want none under torchrun, got 2. Set OMP_NUM_THREADS."),
    ):
        for code, out in launch(calibrate_here, 3, str(path), *more, threads=1, timeout_s=60):
            assert code == 2 and match in out


def test_trace_runs_every_stage_and_writes_a_trace(capsys, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    argv = ["trace", "--ranks", "3", "--cached", "90", "--new", "40", "--decode", "2"]
    argv += ["--window", "50", "0", "--dtype", "bfloat16", "--out", str(path), "--json"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    *stages, last = [json.loads(line) for line in out.splitlines()]
    assert [(s["stage"], s["tokens"], s["calls"]) for s in stages] == [
        ("prefill", 90, 2),
        ("prefill on cache", 40, 2),
        ("decode", 2, 4),
    ]
    assert all("predicted" in stage["reason"] for stage in stages)
    assert all(len(stage["rank_ms"]) == 3 for stage in stages)
    assert all(0 <= stage["exposed"] <= 1 and stage["bytes_sent"] > 0 for stage in stages)
    assert last["trace"] == str(path) and last["window"] == [50, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    events = json.loads(path.read_text())["traceEvents"]
    calls = [event["name"] for event in events if event.get("cat") == "call"]
    assert len(calls) == 3 * 8
    assert set(calls) == {m for stage in stages for m in stage["method"].split(", ")}
    sent = sum(event["args"].get("bytes", 0) for event in events)
    assert sent == sum(stage["bytes_sent"] for stage in stages)


def test_trace_prints_a_table(capsys, tmp_path):
    path = tmp_path / "trace.json"
    argv = ["trace", "--ranks", "2", "--cached", "0", "--new", "20", "--decode", "1"]
    code, out, err = run(
        capsys, *argv, "--method", "pass_q", "--window", "0", "0", "--out", str(path)
    )
    lines = out.splitlines()
    assert code == 0, err
    assert lines[0].split() == ["stage", "tokens", "method", "ms", "MB", "sent", "exposed"]
    assert [line.split()[:-3] for line in lines[1:3]] == [
        ["prefill", "on", "cache", "20", "pass_q"],
        ["decode", "1", "pass_q"],
    ]
    assert lines[1].split()[-2] == "0.00", "a token that sees itself alone needs nothing sent"
    assert lines[3] == "prefill on cache: as asked" and "ui.perfetto.dev" in lines[-1]


def test_a_trace_that_fails_leaves_the_older_one(capsys, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    argv = ["trace", "--ranks", "2", "--cached", "90", "--timeout", "1e-9", "--out", str(path)]
    code, out, err = run(capsys, *argv)
    assert code == 1 and not out and "ranks of run_rank" in err
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    assert path.read_text() == "an older one"


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
        (["calibrate", "--threads", "0"], "threads: want at least 1"),
        (["calibrate", "--device", "gpu"], "device: want a torch device, got 'gpu'"),
        (["trace", "--ranks", "0"], "ranks: want at least 1"),
        (["trace", "--threads", "0"], "threads: want at least 1"),
        (["trace", "--new", "-1"], "new: want at least 0"),
        (["trace", "--new", "0", "--cached", "0"], "new: want at least 1 token"),
        (["trace", "--layers", "0"], "layers: want at least 1"),
        (["trace", "--nheads", "3"], "nheads: want a multiple of nheads_k = 2"),
        (["trace", "--headdim", "0"], "headdim: want at least 1"),
        (["trace", "--dtype", "int8"], "dtype: want float16, bfloat16, float32"),
        (["trace", "--method", "x"], "method: want auto or one of"),
        (["trace", "--window", "-2", "0"], "window_size: want two ints"),
        (["trace", "--timeout", "0"], "timeout: want seconds"),
        (["trace", "--out", "no/such/folder/x"], "out: want a file in a folder"),
        (["demo", "no/such/file"], "file: want a readable file, got no/such/file"),
        (["demo", "--ranks", "0"], "ranks: want at least 1"),
        (["demo", "--tokens", "0"], "tokens: want at least 1"),
        (["demo", "--decode", "0"], "decode: want at least 1"),
        (["demo", "--follow-up", "-1"], "follow_up: want at least 1"),
        (["demo", "--timeout", "0"], "timeout: want more than 0"),
        (["demo", "--picture", "no/such/folder/a.png"], "picture: want a file in a folder"),
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
