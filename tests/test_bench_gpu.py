"""Benchmarks of kernels and the record of their tests. Not their numbers."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import accelerator  # noqa: F401, which skips where there is no triton
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the package

from bench import (  # noqa: E402
    cases,
    gpu,
    gpu_tests,
    machine,
    record,
    report,
    run,
    summary,
    tables,
)
from bench.case import tiny  # noqa: E402
from bench.measurement import Measurement  # noqa: E402

ON_GPU = torch.cuda.is_available()
no_gpu = pytest.mark.skipif(ON_GPU, reason="is about machines without a GPU")
GPU_CASES = [case for case in cases.CASES if case.on_gpu and not case.in_ranks]  # kernels
FACTS = {"run": "r1", "versions": {"ringkern": "0+g0", "torch": "0"}, "env": {}, "note": ""}
FACTS["machine"] = {"cpu": "a CPU", "cores": 2, "congestion_control": "cubic"}


def find(glob):
    return cases.select([glob])[0]


def test_every_case_runs_and_names_the_peers_that_do_not():
    before = sorted((ROOT / "bench/results").glob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--quick", "--json", "gpu/*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "bench/results").glob("*")) == before
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [fault for one in records for fault in record.check(one)] == []
    assert all(one["ok"] for one in records)
    for case in GPU_CASES:
        mine = {one["impl"]: one for one in records if one["case"] == case.id}
        if reason := case.why_not(case):
            assert not mine and f"SKIPPED {case.id}: {reason}" in done.stderr
            continue
        absent = mine["ringkern"]["detail"].get("absent", {})
        assert [*mine, *absent] == sorted(case.impls, key=[*mine, *absent].index), "each once"
        assert {impl for impl in case.impls if impl not in case.operation.peers} <= mine.keys()
        assert all(absent.values()), "with the reason"
    one = next(one for one in records if one["op"] == "attn_step")
    assert one["timer"] == ("cuda_event" if ON_GPU else "wall")
    assert one["detail"]["absent"]["flash_attn"] == "flash_attn is not installed" or ON_GPU
    assert {"triton", "torch"} <= one["versions"].keys() and one["machine"]["gpu"]


@no_gpu
def test_without_a_gpu_cases_are_skipped_by_name(monkeypatch, capsys):
    for value, why in (
        ("0", "no CUDA device"),
        ("1", "TRITON_INTERPRET=1 measures an interpreter"),
    ):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert run.main(["gpu/pack/*"]) == 0
        printed = capsys.readouterr()
        assert not printed.out
        for case in cases.select(["gpu/pack/*"]):
            assert f"SKIPPED {case.id}: {why}" in printed.err


def test_what_would_end_too_late_is_left_out_by_name(monkeypatch, capsys):
    """Each case takes 100 s, of which 4 fit 8 minutes; the last would end 20 s after."""
    clock, ran = [0.0], []

    def take_100_s(self, batch):
        ran.extend(case.id for case in batch)
        clock[0] += 100

    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "why_not", lambda case, quick: None)
    monkeypatch.setattr(run.Run, "_run_batch", take_100_s)
    chosen = [case.id for case in cases.select(["gpu/decode/*"])]
    assert len(chosen) > 5 and run.main(["gpu/decode/*", "--minutes", "8"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert ran == chosen[:4]
    why = "400 s of 8 minutes have passed, and the longest case took 100 s"
    assert printed == [f"SKIPPED {name}: {why}" for name in chosen[4:]]
    assert run.main(["gpu/decode/*"]) == 0 and ran[4:] == chosen  # without a limit


def test_the_targets_are_those_of_the_issue():
    asked = {case.id: case.targets for case in GPU_CASES if case.targets}

    def least(glob):
        (target,) = (asked[case.id]["ringkern"] for case in cases.select([glob]))
        return 1 / target["detail.over_floor"]

    assert least("gpu/step/full/b1/q16384/*") == pytest.approx(0.60, abs=1e-3)
    assert least("gpu/step/causal/b1/q16384/*") == pytest.approx(0.55, abs=1e-3)
    assert least("gpu/decode/b16/q1/P32768/page64/*") == pytest.approx(0.85, abs=1e-3)
    assert least("gpu/decode/b1/q1/P131072/*") == pytest.approx(0.80, abs=1e-3)
    for glob in ("merge/parts8", "merge/state1", "pack/gather", "pack/scatter"):
        assert least(f"gpu/{glob}/*") == pytest.approx(0.85, abs=1e-3)
    seeded = find("gpu/step/seeded/b1/q16384/*")
    assert seeded.targets == {"ringkern+middle": {"ratio": 1.03}}
    assert seeded.peer == "ringkern+first"


def test_flops_and_bytes_by_hand():
    full, causal = find("gpu/step/full/b1/q16384/*"), find("gpu/step/causal/b1/q16384/*")
    assert full.operation.flops(full) == 4 * 16384**2 * 64 * 128
    assert causal.operation.flops(causal) == 4 * (16384 * 16385 // 2) * 64 * 128
    decode = find("gpu/decode/b16/q1/P32768/page64/*")
    itemsize = gpu.dtype(decode).itemsize
    assert decode.operation.bytes_moved(decode) == 2 * 16 * 32768 * 8 * 128 * itemsize
    assert decode.operation.flops(decode) == 4 * 16 * 32768 * 64 * 128
    gather = find("gpu/pack/gather/*")
    assert gather.operation.bytes_moved(gather) == 262144 * (2 * 8 * 128 * 2 + 8)
    state = find("gpu/merge/state1/*")
    row = 128 * 2 + 4 + 2 * (128 * 4 + 4)
    assert state.operation.bytes_moved(state) == 16384 * 64 * row


def test_the_roofline_is_the_higher_of_two_floors():
    step, decode = find("gpu/step/full/b1/q16384/*"), find("gpu/decode/b1/q1/P131072/*")
    found = gpu.roofline(step, Measurement([[20e-3], [30e-3], [20e-3]]), 800.0, 4000.0)
    floor = 4 * 16384**2 * 64 * 128 / 800e12
    assert found["bound"] == "matmul" and found["floor_us"] == pytest.approx(1e6 * floor)
    assert found["over_floor"] == pytest.approx(20e-3 / floor, rel=1e-4)
    found = gpu.roofline(decode, Measurement([[200e-6]]), 800.0, 4000.0)
    assert found["bound"] == "copy" and found["over_floor"] == pytest.approx(200 / 134.2, rel=1e-3)
    assert found["gb_s"] == pytest.approx(2684.35, rel=1e-3)


# ---- a wrong kernel is seen


def spoil(glob, spoiled):
    """Measure a tiny case whose calls of ours are spoiled afterwards."""
    case = tiny(find(glob))
    inner = case.operation.call

    def call(state, impl, index):
        inner(state, impl, index)
        spoiled(state)

    operation = dataclasses.replace(case.operation, call=call, peers={})
    impls = tuple(impl for impl in case.impls if impl.startswith("ringkern"))
    more = dict(operation=operation, impls=impls, calls=2, repetitions=1)
    return gpu.measure(None, dataclasses.replace(case, **more))


@pytest.mark.parametrize(
    "glob, spoiled",
    [
        ("gpu/step/full/b1/q16384/*", lambda state: state.got[:, -1].mul_(1.05)),
        ("gpu/step/full/b1/q16384/*", lambda state: state.got[0, 3].fill_(float("nan"))),
        ("gpu/step/seeded/*", lambda state: state.lse.add_(1e-3)),
        ("gpu/decode/b16/q1/P32768/page64/*", lambda state: state.got[:, :, 3].add_(0.01)),
        ("gpu/merge/parts8/*", lambda state: state.got[0].mul_(1.05)),
        ("gpu/merge/state1/*", lambda state: state.lse.add_(1e-3)),
        ("gpu/pack/gather/*", lambda state: state.packed[7, 0, :1].add_(1)),
        ("gpu/pack/scatter/*", lambda state: state.cache[int(state.slots[3])].zero_()),
        ("gpu/pack/scatter/*", lambda state: state.cache.nan_to_num_(1.0)),
    ],
)
def test_a_wrong_result_is_seen(glob, spoiled):
    assert all(one.ok for one in spoil(glob, lambda state: None).values())
    assert not any(one.ok for one in spoil(glob, spoiled).values())


def test_a_peer_that_is_wrong_or_refuses_is_named():
    case = tiny(find("gpu/pack/gather/*"))

    def wrong(state):
        return lambda: state.packed.copy_(state.cache[state.slots] + 1)

    def refuses(state):
        raise ValueError("only on /usr/lib/some/thing\n  and Tuesdays")

    peers = {"torch": case.operation.peers["torch"], "wrong": wrong, "refuses": refuses}
    operation = dataclasses.replace(case.operation, peers=peers)
    impls = ("ringkern", *peers)
    case = dataclasses.replace(case, operation=operation, impls=impls)
    found = gpu.measure(None, case)
    assert [*found] == ["ringkern", "torch"]
    absent = found["ringkern"].facts["detail"]["absent"]
    assert absent["wrong"].startswith("a wrong result")
    assert absent["refuses"] == "ValueError: only on ... and Tuesdays"
    records = summary.make_records(case, found, FACTS)
    assert [one["impl"] for one in records] == ["ringkern", "torch"]
    assert [fault for one in records for fault in record.check(one | {"host": "x"})] == []


def test_a_kernel_that_fails_fails_its_case_alone(monkeypatch, capsys, tmp_path):
    case = tiny(find("gpu/pack/gather/*"))

    def call(state, impl, index):
        raise ValueError("slots: want int64")

    bad = dataclasses.replace(
        case, id="gpu/bad", operation=dataclasses.replace(case.operation, call=call)
    )
    one = run.Run(run.make_parser().parse_args(["--out", str(tmp_path / "x.jsonl")]))
    monkeypatch.setattr(run, "why_not", lambda case, quick: None)
    assert one.run([bad, case]) == 1
    printed = capsys.readouterr()
    assert "FAILED gpu/bad: ValueError: slots: want int64" in printed.err
    assert case.id in printed.out and len(record.load(tmp_path / "x.jsonl")) == 2


# ---- the table


def make_records(glob, times_us):
    case = find(glob)
    found = {impl: Measurement([[1e-6 * us]], details=[{}]) for impl, us in times_us.items()}
    for one in found.values():
        detail = gpu.roofline(case, one, 800.0, 4000.0)
        one.facts = {
            "machine": {"gpu": "a GPU"},
            "detail": detail | {"absent": {"flash_attn": "old"}},
        }
    return summary.make_records(case, found, FACTS)


def test_the_table_tells_rates_targets_and_who_is_absent():
    records = make_records("gpu/step/full/b1/q16384/*", dict(ringkern=18000, torch_cudnn=14000))
    records += make_records("gpu/decode/b16/q1/P32768/page64/*", dict(ringkern=700))
    records += make_records(
        "gpu/step/seeded/b1/q16384/*",
        {"ringkern+middle": 18400, "ringkern+first": 18000, "ringkern": 17000},
    )
    assert [fault for one in records for fault in record.check(one | {"host": "x"})] == []
    assert records[0]["machine"] == FACTS["machine"] | {"gpu": "a GPU"}, "added to"
    lines = tables.kernels(records)
    assert "| attn_step | 18.0 ms | 489 TFLOP/s | 61% of matmul | 60% | torch_cudnn 628" in lines[2]
    assert "flash_attn: old" in lines[2]
    assert "| decode | 700 us | 3068 GB/s | 77% of copy | 85%, **missed** |" in lines[3]
    assert "| middle | 18.4 ms |" in lines[4] and "| 1.03 x ringkern+first |" in lines[4]
    assert len(lines) == 7
    assert report.captions([("x.jsonl", records[0])])[0].startswith("a GPU, driver unknown; ")


# ---- the record of the tests


@no_gpu
def test_the_tests_of_kernels_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu_tests.main([]) == 1
    assert "bench.gpu_tests: no CUDA device: no test was run" in capsys.readouterr().err


def test_the_tests_of_kernels_are_found():
    names = {path.name for path in gpu_tests.files()}
    assert {"test_step_triton.py", "test_merge_triton.py", "test_bench_gpu.py"} <= names
    assert "test_cli.py" not in names


def test_the_tests_are_counted_and_recorded(monkeypatch, tmp_path, capsys):
    tests, out = tmp_path / "test_some.py", tmp_path / "out.jsonl"
    monkeypatch.setattr(gpu, "why_not", lambda quick=False: None)
    monkeypatch.setattr(gpu_tests, "files", lambda: [tests])
    options = ["--out", str(out), "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    text = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no fp8')\n"
    tests.write_text(text + "def test_c(): assert 0\n")
    assert gpu_tests.main(options) == 1
    assert not out.exists() and "'failed': 1" in capsys.readouterr().err
    tests = tmp_path / "test_others.py"
    tests.write_text(text)
    assert gpu_tests.main(options) == 0
    (one,) = record.load(out)
    counts = {name: one["detail"][name] for name in ("passed", "failed", "skipped")}
    assert counts == {"passed": 1, "failed": 0, "skipped": 1}
    assert one["detail"]["skipped_because"] == ["Skipped: no fp8"]
    assert one["op"] == "gpu_tests" and one["machine"]["gpu"] and one["versions"]["triton"]
    assert machine.host() == one["host"]
    assert one["shape"] == {"files": 1}


def test_tests_that_the_command_names_run_instead(monkeypatch, tmp_path):
    paths = [tmp_path / f"test_{name}.py" for name in "abc"]
    for path in paths:
        path.write_text("def test_x(): pass\ndef test_y(): pass\n")
    (tmp_path / "test_x").touch()  # the value of an option names no test, even if it is a file
    a, b, c = map(str, paths)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "why_not", lambda quick=False: None)
    monkeypatch.setattr(gpu_tests, "files", lambda: paths[:2])

    def run(*args):
        """Return how many files there were, how many tests, and the command."""
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        common = ["--out", str(out), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
        assert gpu_tests.main([*common, *args]) == 0
        (one,) = record.load(out)
        return one["shape"]["files"], one["detail"]["passed"], one["cmd"].split()[-1]

    assert run("-q")[:2] == (2, 4)
    assert run("-q", "-k", "test_x")[:2] == (2, 2)
    assert run("-k", "test_a")[:2] == (1, 2)
    assert run(a, c)[:2] == (2, 4)
    assert run("-x", c, f"{b}::test_y") == (2, 3, "test_b.py::test_y")
