"""The benchmarks: their records, their report, and that every case runs. Not their numbers."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from ringkern import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the package

from bench import (  # noqa: E402
    cases,
    links,
    oracle,
    record,
    regret,
    report,
    run,
    summary,
    tables,
    transport,
)
from bench.measurement import Measurement, combine  # noqa: E402

FACTS = {"run": "r1", "versions": {"ringkern": "0+g0", "torch": "0"}, "env": {}, "note": ""}
FACTS["machine"] = {"cpu": "a CPU", "cores": 2, "congestion_control": "cubic"}
EXCHANGE = cases.select(["exchange/tcp/w2/64MiB"])[0]


def measured(ms, ok=True, **detail):
    return Measurement([[1e-3 * ms]] * 3, ok=ok, details=[detail] * 3)


def make_records(ms=20.0, peer_ms=50.0, **facts):
    found = {"ringkern": measured(ms, wait_ms=1.0), "gloo": measured(peer_ms)}
    return summary.make_records(EXCHANGE, found, FACTS | facts)


def test_a_record_follows_from_what_was_measured():
    one, peer = make_records()
    assert record.check(one) == record.check(peer) == []
    assert (one["peer"], one["ratio"], one["met"]) == ("gloo", 0.4, True)
    assert (peer["peer"], peer["ratio"], peer["met"]) == (None, None, None)
    assert one["time_us"]["p50"] == 20_000 and one["iters"] == 3
    assert one["exposed_comm"] == 0.05
    assert one["busbw_gb_s"] == pytest.approx((64 << 20) / 0.020 / 1e9, rel=1e-4)
    assert make_records(ms=30.0)[0]["met"] is False


def test_ranks_together_are_the_slowest_in_each_call():
    fast = Measurement([[1.0, 4.0], [2.0, 2.0]], max_err=0.1, details=[{"a": 1}, {"a": 5}])
    slow = Measurement([[3.0, 2.0], [1.0, 9.0]], ok=False, max_err=0.2, details=[{"a": 2}, {}])
    both = combine([fast, slow])
    assert both.times_s == [[3.0, 4.0], [2.0, 9.0]]
    assert (both.ok, both.max_err, both.details) == (False, 0.2, [{"a": 2}, {"a": 5}])


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"peer": None}, "ratio and peer"),
        ({"iters": 3.0}, "iters: want int, got float"),
        ({"op": None}, "op is null"),
        ({"speed": 1}, "unknown speed"),
        ({"max_err": float("nan")}, "max_err is nan"),
        ({"met": False}, "met: want True"),
        ({"v": 0}, "v: want 1"),
        ({"note": "as in /srv/someone/x"}, "note holds a path"),
        ({"env": {"A": "/srv/secret/file"}}, "env holds a path"),
        ({"time_us": {"p50": 1.0}}, "time_us: want min, p5"),
        ({"time_us": dict.fromkeys(record.QUANTILES, 0.0)}, "above 0 that rise"),
    ],
)
def test_faults_of_a_record_are_found(change, fault):
    faults = record.check(make_records()[0] | change)
    assert len(faults) == 1 and fault in faults[0]


def test_a_missing_field_is_found_and_a_wrong_result_is_not_appended(tmp_path):
    one, peer = make_records()
    without = {key: value for key, value in one.items() if key != "host"}
    assert record.check(without) == ["missing host"]
    for bad in (without, one | {"ok": False}):
        with pytest.raises(ValueError, match="exchange/tcp/w2/64MiB"):
            record.append(tmp_path / "x.jsonl", [peer, bad])
    assert not (tmp_path / "x.jsonl").exists()


def test_a_wrong_element_and_a_call_that_did_nothing_are_seen():
    small = dataclasses.replace(EXCHANGE, shape={"nbytes": 64}, calls=3, impls=())
    state = transport.make_inputs(SimpleNamespace(rank=0, world_size=3), small)

    def receive():
        for peer, rows in state.recv.items():
            rows.copy_(state.want[peer])

    receive()
    assert transport.check(state, "ringkern") == {"ok": True, "max_err": 0.0}
    assert not transport.check(state, "ringkern")["ok"], "nothing has come since"
    receive()
    state.recv[2][1, 5] += 7
    assert transport.check(state, "ringkern") == {"ok": False, "max_err": 7.0}


STAGE = cases.select(["stage/tcp/w4/280mbit/b1/T16/P2048/*"])[0]


def make_stage_records(auto="gather_q", **ms):
    """Return records of a grid point where auto takes a method, and all other rules pass_kv."""
    taken = {"auto": auto} | dict.fromkeys(list(regret.RULES)[1:], "pass_kv")
    chosen = {f"{rule}:{m}": int(taken[rule] == m) for rule in taken for m in STAGE.impls}
    ends = {"attended_at_ms": 1.0, "ended_at_ms": 3.0}
    found = {m: combine([measured(ms[m], **chosen, **ends)]) for m in STAGE.impls}
    return summary.make_records(STAGE, found, FACTS)


def test_regret_by_hand():
    times = dict(pass_kv=30.0, pass_q=11.0, gather_kv=33.0, gather_q=10.0)
    records = make_stage_records(**times)
    assert [fault for one in records for fault in record.check(one)] == []
    (point,) = regret.points(records)
    assert (point.fastest, point.new, point.cached) == ("gather_q", 16, 2048)
    assert point.regret("auto") == 0 and point.regret("algorithm_1") == pytest.approx(2.0)
    assert regret.points(records[:3]) == [], "a point needs all four methods"
    lines = tables.choice(records)
    assert "| all | 1 | 0.0%, worst 0.0% | 200.0%, worst 200.0% |" in lines[-2]
    assert "missed" not in lines[-1]
    assert "missed" in tables.choice(make_stage_records("pass_q", **times))[-1], "10 % is too much"


def test_a_tail_is_from_the_last_attention_of_all_ranks():
    """A rank that waits for a slower one has no tail."""
    early = measured(1.0, attended_at_ms=10.0, ended_at_ms=31.0)
    late = measured(1.0, attended_at_ms=28.0, ended_at_ms=30.0)
    assert combine([early, late]).details == [{"tail_ms": 3.0}] * 3


def test_one_percent_too_large_is_seen():
    q, k, v = torch.randn(3, 64, 2, 32, generator=torch.Generator().manual_seed(0))
    sample = oracle.Sample(q, k, v, torch.arange(0, 64, 7))
    assert sample.compare(sample.want.float())["ok"]
    assert not sample.compare(sample.want.float() * 1.01)["ok"]
    assert not sample.compare(sample.want.float() / 0)["ok"]


@pytest.fixture
def readme(tmp_path):
    record.append(tmp_path / "a-machine.jsonl", make_records())
    path = tmp_path / "README.md"
    path.write_text("# x\n\n<!-- bench:transport -->\n<!-- /bench:transport -->\n\nend\n")
    return path


def run_report(readme, *flags):
    return report.main(["--readme", str(readme), "--results", str(readme.parent), *flags])


def test_report_fills_the_readme_and_notices_a_changed_number(readme, capsys):
    assert run_report(readme, "--check") == 1, "the table is not there yet"
    assert run_report(readme) == 0
    text = readme.read_text()
    assert "| 64 MiB | 2 | 20.0 ms, 3.36 GB/s | 50.0 ms, 1.34 GB/s | 2.50 x gloo | 2.00 x |" in text
    assert text.startswith("# x\n\n") and text.endswith("\n\nend\n")
    assert "a-machine.jsonl" in text
    assert run_report(readme, "--check") == 0
    readme.write_text(text.replace("2.50 x", "2.60 x"))
    capsys.readouterr()
    assert run_report(readme, "--check") == 1
    assert "2.60 x" in capsys.readouterr().err


def test_report_takes_the_newest_run_and_all_of_it(readme):
    later = [
        one | {"time_utc": "2999-01-01T00:00:00+00:00"} for one in make_records(30.0, run="r2")
    ]
    record.append(readme.parent / "b.jsonl", later)
    assert run_report(readme) == 0
    assert "| 30.0 ms, 2.24 GB/s | 50.0 ms, 1.34 GB/s | 1.67 x gloo | 2.00 x, **missed** |" in (
        readme.read_text()
    )
    record.append(readme.parent / "b.jsonl", [later[0] | {"run": "r3", "time_utc": "3999"}])
    assert run_report(readme) == 1, "run r3 has no gloo: its ratio cannot be checked"


@pytest.mark.parametrize(
    "text",
    ["none", "<!-- bench:speed -->\n<!-- /bench:speed -->", "<!-- bench:transport -->\n",
     "<!-- bench:planning -->\n<!-- /bench:planning -->\n"],
)  # fmt: skip
def test_report_refuses_markers_that_it_cannot_fill(readme, text):
    readme.write_text(text)
    assert run_report(readme) == run_report(readme, "--check") == 1
    assert readme.read_text() == text


def test_a_wrong_result_is_told_and_not_recorded(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    args = run.make_parser().parse_args(["--out", str(out)])
    one = run.Run(args)
    one.facts["machine"] = FACTS["machine"]
    found = {"ringkern": measured(1.0), "gloo": measured(1.0, ok=False)}
    one._finish(EXCHANGE, found)
    assert one.failed == 1 and not out.exists()
    assert "FAILED exchange/tcp/w2/64MiB" in capsys.readouterr().err


def test_a_case_without_its_package_is_skipped_by_name(tmp_path, capsys):
    args = run.make_parser().parse_args(["--out", str(tmp_path / "records"), "--quick"])
    host = [one for one in cases.CASES if one.id.startswith("host/")]
    lacking = [
        dataclasses.replace(one, needs="no_such_thing") if one.needs else one for one in host
    ]
    assert run.Run(args).run(lacking) == 0
    printed = capsys.readouterr()
    why = "no no_such_thing here: pip install no_such_thing"
    want = [f"SKIPPED host/{what}/w8/b64: {why}" for what in ("launch", "graph")]
    assert printed.err.splitlines() == want
    assert "host/plan/w4/b64" in printed.out and "w8" not in printed.out


def test_every_case_runs():
    """Through the command, in tiny sizes; a record of each is well formed, and none is kept."""
    before = sorted((ROOT / "bench/results").glob("*"))
    code = "import sys; from ringkern.cli import main; sys.exit(main(['bench','--quick','--json']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        # Cases on a GPU have a test of their own.
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench/results").glob("*")) == before
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [fault for one in records for fault in record.check(one)] == []
    assert all(one["ok"] for one in records)
    skipped = [case for case in cases.CASES if case.link_mbit and links.why_not()]
    skipped += [case for case in cases.CASES if case.on_gpu and not torch.cuda.is_available()]
    skipped += [one for one in cases.CASES if one.needs and not find_spec(one.needs)]
    skipped += [one for one in cases.CASES if one.why_not(one) and one not in skipped]
    assert done.stderr.count("SKIPPED") == len(skipped), "skipped by name"
    assert all(f"SKIPPED {case.id}: " in done.stderr for case in skipped)
    chosen = [case for case in cases.CASES if not (case.on_gpu or case in skipped)]
    records = [one for one in records if not one["case"].startswith("gpu/")]
    want = sorted((case.id, impl) for case in chosen for impl in case.impls)
    assert sorted((one["case"], one["impl"]) for one in records) == want
    assert len(set(want)) == len(want), "two cases have one id"


def test_the_command_lists_chooses_and_refuses(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert cli.main(["bench", "--list", "plan/*"]) == 0
    assert capsys.readouterr().out.splitlines() == [c.id for c in cases.select(["plan/*"])]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "no/such/case"])
    assert stop.value.code == 2
    assert "CASE: want an id or a glob that --list shows, got 'no/such/case'" in (
        capsys.readouterr().err
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--list"]) == 1
    assert "need a checkout of ringkern" in capsys.readouterr().err
