"""Tuning: which configuration is chosen, what becomes of the table, and what is dropped."""

import itertools
import json
import os
import pathlib
import sys

import accelerator  # noqa: F401, which skips where there is no triton
import pytest
import torch
from ringkern import cli
from ringkern.kernels import configs
from ringkern.kernels.configs import Config
from ringkern.kernels.cut import choose_cut

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the package

from bench import gpu, tune, tune_table  # noqa: E402
from bench.tune_table import Key, Trial  # noqa: E402

SM_90 = """\
kernel  family  bits  headdim  phase   rows  block_m  block_n  num_warps  num_stages  registers
step    sm_90   16    64       *       *     128      128      8          3           *
step    sm_80   16    128      *       *     128      64       8          3           *
step    *       16    128      *       *     64       32       4          2           255
step    sm_90   16    128      *       16    16       32       4          2           255
step    *       16    128      *       16    16       64       4          2           255
step    *       16    128      *       32    32       64       4          2           255
step    *       16    128      *       64    64       64       8          3           *
decode  *       16    128      *       *     32       64       4          3           255
decode  *       16    256      *       *     32       32       4          3           255
"""
D64, D128 = Key("step", 16, 64, "*"), Key("step", 16, 128, "*")
ROWS_16, ROWS_32, ROWS_64 = (D128._replace(rows=rows) for rows in (16, 32, 64))
DECODE_128, DECODE_256 = Key("decode", 16, 128, "*"), Key("decode", 16, 256, "*")
KEYS = [D64, D128, ROWS_16, ROWS_32, ROWS_64, DECODE_128, DECODE_256]
ARCHS = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100}


def test_the_table_is_renewed_for_one_family_only():
    assert tune_table.keys(SM_90, "sm_90") == KEYS
    found = {
        D64: Config(64, 64, 4, 2, 255),
        D128: Config(128, 64, 8, 2),
        ROWS_16: Config(16, 128, 4, 2),
        ROWS_32: Config(32, 32, 4, 4, 255),
        DECODE_256: Config(16, 32, 2, 4, 128),
    }
    renewed = tune_table.renew(SM_90, "sm_90", found)
    assert renewed.splitlines() == [
        "kernel  family  bits  headdim  phase   rows  block_m  block_n  num_warps  num_stages  registers",
        "step    sm_90   16    64       *       *     64       64       4          2           255",
        "step    sm_80   16    128      *       *     128      64       8          3           *",
        "step    sm_90   16    128      *       *     128      64       8          2           *",
        "step    *       16    128      *       *     64       32       4          2           255",
        "step    sm_90   16    128      *       16    16       128      4          2           *",
        "step    *       16    128      *       16    16       64       4          2           255",
        "step    sm_90   16    128      *       32    32       32       4          4           255",
        "step    *       16    128      *       32    32       64       4          2           255",
        "step    *       16    128      *       64    64       64       8          3           *",
        "decode  *       16    128      *       *     32       64       4          3           255",
        "decode  sm_90   16    256      *       *     16       32       2          4           128",
        "decode  *       16    256      *       *     32       32       4          3           255",
    ]
    for key, config in found.items():
        assert tune_table.taken(renewed, "sm_90", key) == config
    for family in ("sm_80", "sm_100"):
        for key in KEYS:
            assert tune_table.taken(renewed, family, key) == tune_table.taken(SM_90, family, key)
    again = tune_table.renew(renewed, "sm_90", found)
    assert again == renewed, "the same figures give the same text"
    same = {D128: tune_table.taken(SM_90, "sm_90", D128)}
    assert tune_table.renew(SM_90, "sm_90", same) == SM_90, "what applies already needs no row"


def test_tiles_of_few_rows_are_keys_where_others_have_more():
    assert tune_table.keys(SM_90, "sm_80") == [k for k in KEYS if k != D64]
    assert tune_table.keys(SM_90, "sm_100") == [k for k in KEYS if k not in (D64, ROWS_64)]
    assert [str(key) for key in KEYS[1:4]] == [
        "step/16/128",
        "step/16/128/rows16",
        "step/16/128/rows32",
    ]
    assert str(ROWS_16._replace(phase="last")) == "step/16/128/last/rows16"


@pytest.mark.parametrize("family", configs.SHARED_BYTES)
def test_the_shipped_table_can_be_renewed(family):
    source = tune.SOURCE.read_text()
    table = configs.TABLE.lstrip("\n")
    assert tune_table.renew_source(source, family, {}) == source
    every = tune_table.keys(table, family)
    assert {key.kernel for key in every} == {"step", "decode", "merge", "pack"}
    assert {(key.kernel, key.rows) for key in every if key.rows} >= {("step", 16), ("step", 32)}
    found = {key: Config(key.rows or 48, key.headdim, 4, 9, 77) for key in every}
    renewed = tune_table.renew(table, family, found)
    scope = {"__name__": "renewed"}
    exec(tune_table.renew_source(source, family, found), scope)
    assert scope["TABLE"].lstrip("\n") == renewed
    for key in every:
        assert tune_table.taken(table, family, key) == tune.candidates(key, family)[0]
        assert tune_table.taken(renewed, family, key) == found[key]
    for other in set(configs.SHARED_BYTES) - {family}:
        for key in tune_table.keys(table, other):
            assert tune_table.taken(renewed, other, key) == tune_table.taken(table, other, key)
    with pytest.raises(ValueError, match="want one TABLE"):
        tune_table.renew_source("x = 1\n", family, found)


def test_the_fastest_is_chosen_but_not_for_noise():
    present, other, third = Config(1, 1, 1, 1), Config(2, 2, 2, 2), Config(3, 3, 3, 3)

    def chosen(**times):
        names = dict(present=present, other=other, third=third)
        return tune_table.choose(
            [Trial(names[n], t) if t else Trial(names[n], dropped="x") for n, t in times.items()],
            present,
        )

    assert chosen(present=(1.0, 1.0), other=(0.5, 1.5)) == other, "by the geometric mean"
    assert chosen(present=(1.0,), other=(0.995,)) == present, "that is noise"
    assert chosen(present=(1.0,), other=(0.9,), third=(0.9,)) == other, "the first of equals"
    assert chosen(present=None, other=(9.0,), third=(8.0,)) == third
    assert chosen(present=None, other=None) is None


def answer(job):
    """A measurement that dies for one configuration, as a compiler does that aborts."""
    key, config, _ = job
    if config.block_m == 2:
        os._exit(134)
    return Trial(config, (float(config.block_m),))


def test_a_child_that_dies_costs_one_configuration():
    jobs = [(D64, Config(m, 16, 4, 2), True) for m in (1, 2, 3)]
    trials = list(tune.in_children(jobs, answer))
    assert [one.config.block_m for one in trials] == [1, 2, 3]
    assert [one.dropped for one in trials] == [None, "died, exit code 134", None]


def test_forced_configurations_are_taken_and_given_back():
    key = D128
    before = configs.pick("step", 80, 128, 128, "bfloat16")
    config = Config(16, 32, 2, 5)
    with tune.forced(key, config):
        assert configs.pick("step", tune_arch(), 128, 128, "bfloat16") == config
        assert configs.pick("step", tune_arch(), 256, 256, "bfloat16") != config
        assert configs.pick("decode", tune_arch(), 128, 128, "bfloat16") != config
    assert configs.pick("step", 80, 128, 128, "bfloat16") == before


@pytest.mark.parametrize("family", ARCHS)
def test_tiles_of_few_rows_are_what_is_launched(family, monkeypatch):
    """With the workloads of a key with rows, whatever the table gives to other steps."""
    monkeypatch.setattr(tune, "here", lambda: family)
    short = [key for key in tune_table.keys(configs.TABLE, family) if key.rows]
    assert short
    for key in short:
        every = tune.candidates(key, family)
        assert len(every) > 3 and {config.block_m for config in every} == {key.rows}
        for config, quick in itertools.product(every, (False, True)):
            for case in tune.workloads(key, quick):
                x, d = case.shape, case.shape["headdim"]
                group = x["nheads"] // x["nheads_k"]
                assert quick or x["seqlen_q"] * group == key.rows
                shape = x["nheads"], x["nheads_k"], d, d, case.dtype, ARCHS[family], x["seqlen_q"]
                for phase in configs.PHASES:
                    with tune.forced(key, config):
                        cut = choose_cut(*shape, phase)
                    name = f"{key} {case.id} {phase}: {cut}"
                    assert (cut.block_m, cut.group) == (key.rows, group), name
                    assert Config(cut.block_m, cut.block_n, *cut[3:]) == config, name


def test_each_phase_is_tuned_by_what_runs_it():
    for phase, impl in (
        ("*", "ringkern"),
        ("first", "ringkern+first"),
        ("last", "ringkern+middle"),
    ):
        for case in tune.workloads(Key("step", 16, 128, phase), quick=True):
            assert case.impls == (impl,)
    for key in (Key("step", 16, 64, "middle"), Key("step", 16, 64, "*", 32)):
        assert tune.measure((key, Config(32, 32, 4, 2), True)).dropped is None


def tune_arch():
    from ringkern.kernels import target

    return target.arch(gpu.device())


def test_what_cannot_run_is_dropped_with_the_reason(monkeypatch):
    monkeypatch.setattr(tune, "_measure", lambda *_: 1 / 0)
    assert tune.measure((D128, Config(128, 64, 8, 3), True)).dropped.startswith("ZeroDivisionError")
    too_much = tune.measure((D128, Config(128, 256, 8, 4), True))
    assert too_much.dropped.endswith("bytes of shared memory too many")


def test_tuning_through_the_command(monkeypatch, capsys):
    """Every kernel, in tiny sizes; the table is printed and the file stays."""
    monkeypatch.chdir(ROOT)
    before = tune.SOURCE.read_text()
    monkeypatch.setattr(tune, "in_children", lambda jobs, work: map(work, jobs))
    every = tune_table.keys(configs.TABLE.lstrip("\n"), tune.here())
    # The last of each kernel, and the last that is for few rows.
    keys = list({(key.kernel, key.rows is None): str(key) for key in every}.values())
    assert cli.main(["bench", "tune", *keys, "--quick", "--json"]) == 0
    printed = capsys.readouterr()
    trials = [json.loads(line) for line in printed.out.splitlines()]
    assert [one["key"] for one in trials[::2]] == keys and len(keys) == 5
    assert all(one["dropped"] is None for one in trials), trials
    assert printed.err.startswith("kernel  family"), "the table"
    assert tune.SOURCE.read_text() == before
    assert cli.main(["bench", "--list", "tune", "pack/*"]) == 0
    assert capsys.readouterr().out == "pack/32/256\n"
    assert cli.main(["bench", "--dry-run", "plan/*"]) == 2
    assert "dry_run: want `ringkern bench tune`" in capsys.readouterr().err


class CutOffError(Exception):
    """What ends a run from outside."""


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["", "dry run"])
def test_a_run_that_is_cut_off_keeps_what_it_found(options, monkeypatch, tmp_path, capsys):
    source, before, best = tmp_path / "configs.py", tune.SOURCE.read_text(), {}
    source.write_text(before)
    keys = tune_table.keys(configs.TABLE.lstrip("\n"), tune.here())[:3]

    def in_children(jobs, work):
        (key, present, _), *_, (_, last, _) = jobs
        if key == cut_off_at:
            raise CutOffError
        best[key] = last
        return [Trial(present, (2.0,)), Trial(last, (1.0,))]

    def written():
        return before if options else tune_table.renew_source(before, tune.here(), best)

    monkeypatch.setattr(tune, "SOURCE", source)
    monkeypatch.setattr(tune, "in_children", in_children)
    monkeypatch.setattr(gpu, "why_not", lambda quick=False: None)
    cut_off_at = keys[2]
    with pytest.raises(CutOffError):
        tune.main([*map(str, keys), *options])
    assert len(best) == 2 and source.read_text() == written()
    cut_off_at = None
    assert tune.main([*map(str, keys), *options]) == 0
    assert len(best) == 3 and source.read_text() == written()
    printed = capsys.readouterr()
    assert printed.out.count("kernel  family") == len(options), "once, at the end"
    assert printed.err.count("kernels/configs.py written") == 1 - len(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tune.main(["--dry-run"]) == 1
    assert "bench.tune: no CUDA device" in capsys.readouterr().err
