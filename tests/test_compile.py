"""The kernels compile for GPUs that are not here, into the machine code that the report names.

Compiles one variant of each kernel; `make compile-check` compiles all of them, for every
architecture and under the oldest triton too.
"""

import importlib.util
import itertools
import json
import re

import compile_report
import compile_worker
import pytest
from ringkern.kernels import configs

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

RENEW = "if the change is meant: make compile-report, and commit what it writes"


def versions(*names):
    """Return the tritons that the Makefile gives these names."""
    text = (compile_report.ROOT / "Makefile").read_text()
    return [re.search(rf"^{name} := ([\d.]+)$", text, re.MULTILINE)[1] for name in names]


def key_of(job):
    return job["module"].rpartition(".")[2], job["variant"], job["arch"]


@pytest.fixture(scope="module")
def found():
    return compile_report.listing()


def jobs_of(found, kernel):
    return [job for job in found["jobs"] if job["module"].endswith(f".{kernel}")]


def test_every_kernel_module_has_variants(found):
    for module in compile_report.kernel_modules():
        archs = {job["arch"] for job in jobs_of(found, module.rpartition(".")[2])}
        assert archs == set(compile_report.ARCHS), f"{module}.variants() lacks an architecture"


def test_variants_cover_what_is_launched(found):
    assert not found["unproven"], "no variant is cut like this"


def test_what_no_variant_covers_is_named():
    found = compile_report.listing(["ringkern.kernels.merge"], [90])
    for words in ("phase middle", "softcap True", "split", "kernel='decode'"):
        assert any(words in line for line in found["unproven"]), words
    assert not any("kernel='merge'" in line for line in found["unproven"])


def test_full_tiles_expect_warpgroups_on_sm_90(found):
    jobs = [job for job in jobs_of(found, "step") if job["arch"] == 90]
    for job in jobs:
        full = not re.search("float32|rows", job["variant"])
        assert ("wgmma" in job["expects"]) == full, job["variant"]
    for d, phase in itertools.product((64, 128, 256), configs.PHASES):
        assert any(job["variant"].startswith(f"bfloat16-d{d}-{phase}") for job in jobs)


def test_attention_expects_a_pipeline_and_tensor_cores(found):
    for job in [job for kernel in ("step", "decode") for job in jobs_of(found, kernel)]:
        assert "pipelined" in job["expects"], job
        exact = "float32" in job["variant"] and "tf32" not in job["variant"]
        assert ("mma" in job["expects"]) != exact, job


def test_report_has_every_variant_under_both_tritons(found):
    report = compile_report.read()
    jobs = {key_of(job) for job in found["jobs"]}
    for triton in versions("TRITON", "TRITON_OLDEST"):
        assert jobs == {key[:-1] for key in report if key[-1] == triton}, f"{triton}: {RENEW}"


def test_report_is_sound(found):
    jobs = {key_of(job): job for job in found["jobs"]}
    for key, line in compile_report.read().items():
        assert list(line) == [*compile_report.KEY, *compile_worker.FACTS]
        assert compile_report.faults(jobs[key[:-1]], line) == [], key


def test_one_variant_of_each_kernel(found):
    names = [module.rpartition(".")[2] for module in compile_report.kernel_modules()]
    jobs = [next(job for job in jobs_of(found, name) if job["arch"] == 90) for name in names]
    lines, wrong = compile_report.check(jobs, found["triton"], compile_report.read())
    assert not wrong, RENEW
    assert len(lines) == len(jobs)


FAULTS = {
    "spilling": "spill_bytes = ",
    "too much shared memory": "want at most 232448",
    "waiting": "expects pipelined, has none",
    "waiting in one of two loops": "unpipelined = 1, want at most 0",
    "small": "expects wgmma, has none",
    "not a power of two": "power of 2",
    "aborting": "the compiler's process ended with -6",
}


def test_planted_faults_are_found():
    jobs = compile_report.listing(["tests.compile_faults"], [90])["jobs"]
    answers = dict(zip((j["variant"] for j in jobs), compile_report.ask_all(jobs), strict=True))
    told = {j["variant"]: compile_report.faults(j, answers[j["variant"]]) for j in jobs}
    assert told.pop("sound") == []
    assert told.keys() == FAULTS.keys()
    for name, words in FAULTS.items():
        assert any(words in fault for fault in told[name]), f"{name}: {told[name]}"
    facts = answers["sound"]
    assert facts["wgmma"] > 0 and facts["cp_async"] > 0 and 0 < facts["loop"] < 400
    assert facts["shared_bytes"] >= 2 * 2 * 64 * 32 * 2  # at least two stages of two tiles


def test_a_child_outlives_the_compiler():
    jobs = [
        {"module": "tests.compile_faults", "variant": variant, "arch": 80}
        for variant in ("aborting", "sound", "nonsense", "sound")
    ]
    with compile_report.Child(cache=None) as child:
        answers = [child.ask(job) for job in jobs]
    assert "ended with -6" in answers[0]["error"]
    assert "nonsense" in answers[2]["error"]
    # Twice from nothing: the report's figures can be exact.
    assert answers[1] == answers[3] and answers[1]["mma_sync"] > 0


def test_report_round_trip(tmp_path):
    path = tmp_path / "report.jsonl"
    job = {"module": "ringkern.kernels.step", "variant": "b", "arch": 90}
    facts = dict.fromkeys(compile_worker.FACTS, 0)
    old = compile_report.line_of(job, facts, "3.6.0")
    compile_report.write([old], "3.6.0", path)
    new = compile_report.line_of(job, facts | {"registers": 9}, "3.7.1")
    first = compile_report.line_of(job | {"variant": "a"}, facts, "3.7.1")
    compile_report.write([new, first], "3.7.1", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [first, old, new]
    report = compile_report.read(path)
    differences = compile_report.differences
    assert differences(new, report) == []
    assert differences(new | {"loop": 7}, report) == ["loop = 7, the report says 0"]
    assert differences(new | {"arch": 80}, report) == ["is not in the report"]
    assert differences(new | {"triton": "9"}, report) == []


SASS = """
.L_x_1:
        /*0000*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0010*/              @!P3 LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
.L_x_2:
        /*0020*/                   STL [R1], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
.L_x_3:
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0060*/              @P2  BRA.U UP0, `(.L_x_3) ;
        /*0070*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*0080*/                   EXIT ;
"""


def test_the_loop_is_the_one_on_tensor_cores():
    code = compile_worker.instructions(SASS)
    assert [name for name, _, _ in code][:3] == ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "STL"]
    assert compile_worker.block_loops(code) == [(0, 5), (5, 7)]  # the wait does not multiply
    plain = compile_worker.instructions(SASS.replace("HMMA", "MOV").replace("HGMMA", "FFMA"))
    assert compile_worker.block_loops(plain) == [(5, 7)]
    log = "ptxas info    : Used 40 registers\n8 bytes spill stores, 12 bytes spill loads"
    facts = compile_worker.facts_of("wgmma.mma_async.sync cp.async.cg.shared.global", SASS, log)
    assert (facts["spill_bytes"], facts["local"], facts["registers"]) == (20, 1, 40)
    assert (facts["loop"], facts["masked_loop"], facts["unpipelined"]) == (2, 5, 1)
    assert (facts["wgmma"], facts["cp_async"], facts["mma_sync"], facts["tma"]) == (1, 1, 0, 0)
    with pytest.raises(RuntimeError, match="no register count"):
        compile_worker.facts_of("", SASS, "")
