"""The offline proof of the kernels: their machine code for GPUs that need not be there.

    python -m tests.compile_report           check all; exit code 1 with what is wrong
    python -m tests.compile_report --write   renew compile_report.jsonl for this triton

The report has one line per kernel, variant, architecture and triton. Its figures are exact: the
compiler, ptxas included, comes with triton's wheel. Answers are kept in build/ by kernel source,
configuration and triton, so that only what changed is compiled again.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading

from ringkern.kernels import configs

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPORT = pathlib.Path(__file__).with_suffix(".jsonl")
CACHE = ROOT / "build/compile"
ARCHS = (80, 86, 90, 100)
LIMIT_S = 300.0  # for one variant; the slowest takes some seconds
KEY = ("kernel", "variant", "arch", "triton")


def kernel_modules():
    """Return the names of the modules that hold kernels, not only functions of such."""
    paths = sorted((ROOT / "kernels").glob("*.py"))
    return [f"ringkern.kernels.{p.stem}" for p in paths if "tl.program_id(" in p.read_text()]


class Child:
    """A compile_worker. When the compiler takes it down, the next job starts another."""

    def __init__(self, cache=CACHE):
        self._cache, self._process = cache, None
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()

    def ask(self, job):
        """Return the worker's answer, {"error"} where it died of the job."""
        if not self._process:
            self._start()
        late = threading.Timer(LIMIT_S, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        late.cancel()
        if reply:
            return json.loads(reply)
        self._process.communicate()
        code, self._process = self._process.returncode, None
        words = self._stderr().read_text()[-2000:]
        return {"error": f"the compiler's process ended with {code}: {words}"}

    def _stderr(self):
        return pathlib.Path(self._folder.name, "stderr")

    def _start(self):
        env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        # Triton's own cache would keep ptxas' log from us.
        env |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
        env |= {"TRITON_CACHE_DIR": self._folder.name}
        command = [sys.executable, "-m", "tests.compile_worker"]
        command += [str(self._cache)] if self._cache else []
        with self._stderr().open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )


def ask_all(jobs, workers=None, cache=CACHE):
    """Return the answers to all jobs, in order, from as many children as there are cores."""
    workers = min(workers or os.cpu_count(), len(jobs))
    children = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            children.put(stack.enter_context(Child(cache)))

        def ask(job):
            child = children.get()
            try:
                return child.ask(job)
            finally:
                children.put(child)

        return list(pool.map(ask, jobs))


def listing(modules=None, archs=ARCHS):
    """Return {"triton", "jobs", "unproven"}: see compile_worker.listing."""
    with Child() as child:
        found = child.ask({"list": modules or kernel_modules(), "archs": archs})
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def faults(job, facts):
    """Return what is wrong with a variant's machine code, whatever the report says."""
    if "error" in facts:
        return [facts["error"]]
    limit = configs.SHARED_BYTES[configs.family(job["arch"])]
    mma = facts["mma_sync"] + facts["wgmma"] + facts["tcgen05"]
    met = {"wgmma": facts["wgmma"], "mma": mma, "pipelined": facts["cp_async"] + facts["tma"]}
    found = [f"expects {what}, has none" for what in job["expects"] if not met[what]]
    most = {"spill_bytes": 0, "local": 0, "serialized": 0, "shared_bytes": limit}
    if "pipelined" in job["expects"]:
        most["unpipelined"] = 0
    if "wgmma" in job["expects"]:
        most["mma_sync"] = 0
    for name, limit in most.items():
        if facts[name] > limit:
            found.append(f"{name} = {facts[name]}, want at most {limit}")
    return found


def line_of(job, facts, triton):
    kernel = job["module"].rpartition(".")[2]
    return {
        "kernel": kernel,
        "variant": job["variant"],
        "arch": job["arch"],
        "triton": triton,
    } | facts


def read(path=REPORT):
    """Return the report: {key: line}, keys as KEY."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {tuple(line[name] for name in KEY): line for line in lines}


def write(lines, triton, path=REPORT):
    """Put the lines in the place of all of this triton."""
    kept = [line for line in read(path).values() if line["triton"] != triton]
    lines = sorted(kept + lines, key=lambda line: tuple(line[name] for name in KEY))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def differences(line, report):
    """Return how a line differs from the report; nothing where the report lacks this triton."""
    key = tuple(line[name] for name in KEY)
    if key[-1] not in {known[-1] for known in report}:
        return []
    if key not in report:
        return ["is not in the report"]
    was = report[key]
    return [
        f"{name} = {line.get(name)}, the report says {was.get(name)}"
        for name in sorted(line.keys() | was.keys())
        if line.get(name) != was.get(name)
    ]


def check(jobs, triton, report):
    """Compile the jobs; return (lines of the report, faults by variant)."""
    lines, wrong = [], collections.defaultdict(list)
    for job, facts in zip(jobs, ask_all(jobs), strict=True):
        name = f"{job['module'].rpartition('.')[2]} {job['variant']} sm_{job['arch']}"
        wrong[name] += faults(job, facts)
        if "error" not in facts:
            lines.append(line_of(job, facts, triton))
            wrong[name] += differences(lines[-1], report)
    return lines, {name: found for name, found in wrong.items() if found}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="renew the report for this triton")
    args = parser.parse_args(argv)
    found = listing()
    triton, report = found["triton"], {} if args.write else read()
    lines, wrong = check(found["jobs"], triton, report)
    for row in found["unproven"]:
        wrong[row] = ["no variant compiles this row of the table"]
    for key in report.keys() - {tuple(line[name] for name in KEY) for line in lines}:
        if key[-1] == triton:
            wrong[f"{key[0]} {key[1]} sm_{key[2]}"] = ["is in the report, but no variant is"]
    if args.write:
        write(lines, triton)
    for name, what in wrong.items():
        print(f"{name}: {'; '.join(what)}")
    print(f"triton {triton}: {len(found['jobs'])} compiled, {len(wrong)} at fault")
    if wrong and not args.write:
        print("If a change is meant: make compile-report, and commit what it writes.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
