"""Runs the tests of kernels on this machine's GPU and records what came of them.

python -m bench.gpu_tests [--out JSONL] [PYTEST ARGUMENTS]. Files and tests that these name run
instead of all. The record is one of bench/record.py; its calls are tests.
"""

import argparse
import datetime
import pathlib
import re
import secrets
import shlex
import sys
from types import SimpleNamespace

import pytest

from bench import gpu, machine, record, summary
from bench.measurement import Measurement
from bench.operation import Operation, nothing

TESTS = machine.ROOT / "tests"


class Tally:
    """A pytest plugin: what came of each test, how long it took, and of how many files they were."""

    def __init__(self):
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.times_s: list[float] = []
        self.reasons: list[str] = []
        self.files: set[str] = set()

    def pytest_load_initial_conftests(self, early_config, args):
        """Run files() where the command line names no tests: only pytest can tell them from values."""
        if not early_config.known_args_namespace.file_or_dir:
            args += map(str, files())

    def pytest_runtest_logreport(self, report):
        """Count a test once: by its call, or by the step before or after that went wrong."""
        self.files.add(report.nodeid.partition("::")[0])
        if report.when == "call":
            self.times_s.append(max(report.duration, 1e-6))
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            self.reasons.append(str(report.longrepr[2]))

    def pytest_collectreport(self, report):
        """Count a file that cannot be read, or is skipped as a whole."""
        if not report.passed:
            self.files.add(report.nodeid.partition("::")[0])
            self.counts[report.outcome] += 1


def files() -> list[pathlib.Path]:
    """Return the tests that run on a GPU where there is one."""
    marked = re.compile(r"^(from|import) (accelerator|step_case)\b", re.M)
    every = sorted(TESTS.glob("test_*.py"))
    return [one for one in every if "triton" in one.stem or marked.search(one.read_text())]


def main(argv: list[str] | None = None) -> int:
    """Run the tests and append a record; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, metavar="JSONL", help="append to this file")
    args, others = parser.parse_known_args(argv)
    reason = gpu.why_not()
    if reason:
        print(f"bench.gpu_tests: {reason}: no test was run", file=sys.stderr)
        return 1
    began, tally = datetime.datetime.now(datetime.timezone.utc), Tally()
    code = pytest.main(others, plugins=[tally])
    if code or not tally.counts["passed"]:
        print(f"bench.gpu_tests: {tally.counts}: not recorded", file=sys.stderr)
        return int(code) or 1
    out = args.out or machine.ROOT / "bench/results" / f"{gpu.name()}-{began:%Y-%m-%d}.jsonl"
    one = make_record(tally, others)
    record.append(out, [one])
    print(f"{one['machine']['gpu']}: {tally.counts}; recorded in {out.name}")
    return 0


def make_record(tally: Tally, args: list[str]) -> dict:
    """Return the record of a run of the tests. args: pytest's."""
    counts, times = tally.counts, [[time] for time in tally.times_s]
    case = SimpleNamespace(
        id="gpu_tests",
        operation=Operation("gpu_tests", *[None] * 3, nothing, nothing),
        shape={"files": len(tally.files)},
        dtype=None,
        impls=("ringkern",),
        peer=None,
        targets={},
        warmup=0,
        world_size=1,
        in_ranks=False,
        alone=None,
        layout=None,
        transport=None,
    )
    found = Measurement(times, ok=counts["failed"] == 0, details=[counts] * len(times))
    found.facts = {
        "machine": gpu.describe(),
        "versions": gpu.versions(),
        "cmd": _public(shlex.join(["python", "-m", "bench.gpu_tests", *args])),
        "detail": {"skipped_because": sorted(set(tally.reasons))},
        "samples_us": [],
    }
    facts = {
        "run": secrets.token_hex(4),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "env": machine.environment(),
        "host": machine.host(),
        "note": "",
    }
    return summary.make_records(case, {"ringkern": found}, facts)[0]


def _public(cmd):
    """Return a command without where things lie on this machine."""
    return record.A_PATH.sub(r"\1...", cmd.replace(f"{machine.ROOT}/", ""))


if __name__ == "__main__":
    sys.exit(main())
