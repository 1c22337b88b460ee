"""Measures kernel configurations on this GPU and writes the best into kernels/configs.py.

Only rows for this family of architectures change; what is found is written key by key, so that a
run that is cut off keeps it. python -m bench.tune --help.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import itertools
import json
import multiprocessing
import statistics
import sys

import torch
from ringkern.kernels import configs
from ringkern.kernels.configs import Config

from bench import gpu, gpu_cases, machine, tune_table
from bench.case import Case, tiny
from bench.tune_table import Key, Trial

SOURCE = machine.ROOT / "kernels" / "configs.py"
REPETITIONS = 7
TIMEOUT_S = 300.0  # for one configuration: some never finish compiling
# What is tried: the fields of Config, by kernel and bits of the dtype.
SPACE = {
    ("step", 16): ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (None, 255)),
    ("step", 32): ((16, 32, 64), (16, 32), (4, 8), (2,), (None, 128, 255)),
    ("decode", 16): ((16, 32), (32, 64, 128), (2, 4, 8), (2, 3, 4), (None, 255)),
    ("decode", 32): ((16,), (16, 32), (2, 4), (2, 3), (None, 128, 255)),
    ("merge", 16): ((4, 8, 16, 32), (0,), (2, 4, 8), (1,), (None,)),
    ("merge", 32): ((4, 8, 16, 32), (0,), (2, 4, 8), (1,), (None,)),
    ("pack", 32): ((2, 4, 8, 16), (0,), (2, 4, 8), (1,), (None,)),
}
SHORT_KEYS = {16: 65536, 32: 16384}  # that few queries are measured against, by bits of the dtype
# What is measured for a phase: of one that is not here, as "last", what starts from the same.
IMPLS = {"*": "ringkern", "only": "ringkern", "first": "ringkern+first"}
IMPLS |= dict.fromkeys(("middle", "last"), "ringkern+middle")
KERNELS = {
    "step": ("step", "_step"),
    "decode": ("decode", "_decode"),
    "merge": ("merge", "_merge"),
    "pack": ("pack", "_copy_rows"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="globs, as 'step/16/*'; all")
    parser.add_argument("--list", action="store_true", help="print the keys and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--json", action="store_true", help="print trials as JSON lines")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Tune what the command line asks for; return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        for key in dict.fromkeys(k for f in configs.SHARED_BYTES for k in _chosen(args.keys, f)):
            print(json.dumps({"key": str(key)}) if args.json else key)
        return 0
    reason = gpu.why_not(args.quick)
    if reason:
        print(f"bench.tune: {reason}", file=sys.stderr)
        return 1
    family = here()
    chosen = _chosen(args.keys, family)
    if not chosen:
        parser.error(f"KEY: want globs that --list shows, got {', '.join(args.keys)}")
    writes, before, found = not (args.dry_run or args.quick), SOURCE.read_text(), {}
    for key in chosen:
        jobs = [(key, config, args.quick) for config in candidates(key, family, args.quick)]
        trials = []
        for trial in in_children(jobs, measure):
            trials.append(trial)
            print(_line(key, trial, args.json), flush=True)
        best = tune_table.choose(trials, tune_table.taken(_table(), family, key))
        if best is not None:
            found[key] = best
        if writes:
            _write(family, found)
    _tell(before, family, found, args)
    return 0


def here() -> str:
    """Return the family of this machine's GPU; of the interpreter, the oldest."""
    from ringkern.kernels import target

    return configs.family(target.arch(gpu.device()))


def _table():
    return configs.TABLE.lstrip("\n")


def _chosen(patterns, family):
    every = tune_table.keys(_table(), family)
    return [
        key
        for key in every
        if not patterns or any(fnmatch.fnmatchcase(str(key), one) for one in patterns)
    ]


def _write(family, found):
    source = SOURCE.read_text()
    renewed = tune_table.renew_source(source, family, found)
    if renewed != source:
        SOURCE.write_text(renewed)


def _tell(before, family, found, args):
    if args.dry_run or args.quick:
        table = tune_table.TABLE.search(tune_table.renew_source(before, family, found))[0]
        print(table, end="", file=sys.stderr if args.json else sys.stdout)
    elif SOURCE.read_text() != before:
        print("kernels/configs.py written; now `make compile-report`", file=sys.stderr)
    else:
        print("kernels/configs.py has the best already", file=sys.stderr)


def _line(key, trial, as_json):
    if as_json:
        return json.dumps({"key": str(key)} | trial._asdict() | {"config": trial.config._asdict()})
    cut = f"{trial.config.block_m} x {trial.config.block_n}"
    what = f"{key}: {cut}, {trial.config.num_warps} warps, {trial.config.num_stages} stages"
    if trial.config.registers is not None:
        what += f", {trial.config.registers} registers"
    if trial.dropped:
        return f"{what}: dropped: {trial.dropped}"
    return f"{what}: {', '.join(f'{1e6 * time:.1f} us' for time in trial.times_s)}"


# ---- what is tried


def candidates(key: Key, family: str, quick: bool = False) -> list[Config]:
    """Return the configurations to try, the present one first; of quick, two."""
    rows, *others = SPACE[key.kernel, key.bits]
    if key.rows is not None:
        rows = (key.rows,)
    every = itertools.starmap(Config, itertools.product(rows, *others))
    found = list(dict.fromkeys([tune_table.taken(_table(), family, key), *every]))
    return found[:2] if quick else found


def workloads(key: Key, quick: bool = False) -> list[Case]:
    """Return the cases by whose times a configuration is chosen."""
    heads = dict(nheads=32, nheads_k=8, headdim=key.headdim)
    dtype = "float32" if key.bits == 32 else "bfloat16"
    length = 4096 if key.bits == 32 else 8192
    if key.kernel == "step" and key.rows is not None:
        queries = key.rows * heads["nheads_k"] // heads["nheads"]
        found = [gpu_cases.gpu_step("full", 1, queries, SHORT_KEYS[key.bits], **heads)]
    elif key.kernel == "step":
        found = [
            gpu_cases.gpu_step(kind, 1, length, length, **heads) for kind in ("full", "causal")
        ]
    elif key.kernel == "decode":
        sizes = ((16, 8192, 1), (1, 65536, 1), (16, 8192, 4))
        found = [gpu_cases.gpu_decode(*some, page_size=64, **heads) for some in sizes]
    elif key.kernel == "merge":
        sizes = dict(tokens=8192, nheads=32, headdim=key.headdim)
        found = [gpu_cases.gpu_merge(1, seeded=True, **sizes), gpu_cases.gpu_merge(8, **sizes)]
    else:
        found = [gpu_cases.gpu_pack(kind, 65536) for kind in ("gather", "scatter")]
    if key.kernel == "pack":  # which moves words, whatever they are
        dtype = "bfloat16"
    changes = dict(dtype=dtype, impls=(IMPLS[key.phase],))
    found = [dataclasses.replace(case, **changes) for case in found]
    return [tiny(case) for case in found] if quick else found


@contextlib.contextmanager
def forced(key: Key, config: Config):
    """Let configs.pick() return this configuration, in any phase.

    Of a key with rows: to those that ask for up to so many; to others, a tile of twice as many.
    """
    before = configs.ROWS
    row = configs.Row(key.kernel, here(), key.bits, key.headdim, "*", key.rows, config)
    made = [row]
    if key.rows is not None:
        made.append(row._replace(rows=None, config=config._replace(block_m=2 * key.rows)))
    configs.ROWS = (*made, *before)
    configs.find.cache_clear()
    try:
        yield
    finally:
        configs.ROWS = before
        configs.find.cache_clear()


# ---- in a child process: compilers abort, and kernels may spoil the device for their process

_states: dict = {}  # the inputs of the last key


def measure(job) -> Trial:
    """Return what comes of one (key, configuration, quick)."""
    key, config, quick = job
    lacking = _shared_at_least(key, config) - configs.SHARED_BYTES[here()]
    if lacking > 0:
        return Trial(config, dropped=f"{lacking} bytes of shared memory too many")
    try:
        with forced(key, config):
            return _measure(key, config, quick)
    except Exception as error:
        return Trial(config, dropped=gpu.reason(error))


def _measure(key, config, quick):
    if (key, quick) not in _states:
        _states.clear()
        loads = workloads(key, quick)
        _states[key, quick] = [(case, case.operation.make_inputs(None, case)) for case in loads]
    kernel, clock, times = _kernel(key.kernel), gpu.Clock(), []
    if not gpu.interpreted():
        kernel.device_caches.clear()
    for case, state in _states[key, quick]:
        (impl,) = case.impls
        if not gpu.once(case, state, impl)["ok"]:
            return Trial(config, dropped=f"a wrong result of {case.id}")
        spilled = max((one.n_spills for one in _compiled(kernel)), default=0)
        if spilled:
            return Trial(config, dropped=f"{spilled} registers spilled")
        calls = [
            clock.timed(case.operation.call, state, impl, 0)
            for _ in range(1 if quick else REPETITIONS)
        ]
        times.append(statistics.median(calls))
    registers = max((one.n_regs for one in _compiled(kernel)), default=None)
    shared = max((one.metadata.shared for one in _compiled(kernel)), default=None)
    return Trial(config, tuple(times), None, registers, shared)


def _kernel(name):
    from ringkern.kernels import decode, merge, pack, step

    module, function = KERNELS[name]
    return getattr(dict(step=step, decode=decode, merge=merge, pack=pack)[module], function)


def _compiled(kernel):
    """Return what was compiled of a kernel since its caches were cleared."""
    if gpu.interpreted():
        return []
    return kernel.device_caches[torch.cuda.current_device()][0].values()


def _shared_at_least(key, config):
    """Return bytes of shared memory without which the pipeline cannot be: K and V, by stage."""
    return config.num_stages * config.block_n * 2 * key.headdim * key.bits // 8


def in_children(jobs: list, work):
    """Yield work(job) of each, in a child process; one that dies costs its own job alone."""
    context, todo = multiprocessing.get_context("spawn"), list(jobs)
    while todo:
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs, work, todo), daemon=True)
        child.start()
        theirs.close()
        for job in list(todo):
            try:
                if not ours.poll(TIMEOUT_S):
                    child.kill()
                answer, lives = ours.recv()
            except (EOFError, OSError):
                child.join()
                answer, lives = Trial(job[1], dropped=f"died, exit code {child.exitcode}"), False
            todo.pop(0)
            yield answer
            if not lives:
                break
        ours.close()
        child.join()


def _serve(pipe, work, jobs):
    for job in jobs:
        answer = work(job)
        lives = _device_lives()
        pipe.send((answer, lives))
        if not lives:
            return


def _device_lives() -> bool:
    try:
        gpu.synchronize()
    except Exception:  # after a fault, every call fails until the process ends
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
