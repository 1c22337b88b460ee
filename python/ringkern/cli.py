"""The command ringkern."""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys

import ringkern
from ringkern import env
from ringkern.errors import ArgumentError, RingkernError, UnsupportedError, check


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; tests freeze what it accepts."""
    parser = argparse.ArgumentParser(
        prog="ringkern",
        description="Exact attention over sequences that are sharded across ranks.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad arguments. Errors go to stderr.",
    )
    parser.add_argument("--version", action="version", version=f"ringkern {ringkern.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="run a long text and two turns through a ring of processes, and check every token",
        description="Run a session of two turns through a small decoder stack, its attention "
        "sharded over processes on this host: a long prompt, decoding, a follow-up prompt on the "
        "persistent cache, decoding. Compare every decoded token and every hidden state with a run "
        "of one process.",
    )
    demo.add_argument("file", nargs="?", help="text to read; default: Python's standard library")
    demo.add_argument(
        "--tokens", type=int, default=8192, help="bytes of it, the first prompt (default: 8192)"
    )
    demo.add_argument(
        "--follow-up",
        type=int,
        default=200,
        metavar="N",
        help="bytes after them, the second prompt (default: 200)",
    )
    demo.add_argument(
        "--decode",
        type=int,
        default=32,
        metavar="N",
        help="tokens to decode per turn (default: 32)",
    )
    demo.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    demo.add_argument(
        "--picture",
        default="ringkern-demo.png",
        metavar="PNG",
        help="where to draw the timeline (default: ringkern-demo.png)",
    )
    demo.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that an exchange may take (default: 60)",
    )

    calibrate = commands.add_parser(
        "calibrate",
        help="measure a ring and write its profile",
        description="Measure attention, merges and exchanges of a ring, and write the profile that "
        "the choice of method is made from: of the ranks that torchrun started, on however many "
        "hosts (torchrun ... --no-python ringkern calibrate), else of processes on this host. In a "
        "program of your own, ringkern.calibrate.measure(ring) measures the ring that it runs on.",
    )
    calibrate.add_argument("--ranks", type=int, help="processes (default: torchrun's, or 4)")
    calibrate.add_argument("--threads", type=int, help="per process (default: torchrun's, or 1)")
    calibrate.add_argument(
        "--device",
        help="cpu, cuda (a GPU for each process), cuda:0 (default: what init_ring() takes under "
        "torchrun, else cpu)",
    )
    calibrate.add_argument("--seconds", type=float, default=3.0, help="to measure (default: 3)")
    calibrate.add_argument(
        "--out",
        default="ringkern-profile.json",
        metavar="JSON",
        help="where to write (default: ringkern-profile.json)",
    )

    doctor = commands.add_parser(
        "doctor",
        help="print what this machine has and what a ring here would use",
        description="Print interfaces, socket limits, torch, triton, CUDA and NCCL as found here, "
        "and what a ring would use and why.",
    )

    plan = commands.add_parser(
        "plan",
        help="print who holds what, and every step of a prefill",
        description="Print how a packed batch is sharded, and what each rank does at each step of "
        "a method. Needs no torch.",
    )
    plan.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks")
    plan.add_argument(
        "--lengths",
        required=True,
        type=_ints,
        metavar="L[,L...]",
        help="tokens per sequence, comma-separated",
    )
    plan.add_argument("--layout", default="zigzag", help="zigzag (default), contiguous or striped")
    plan.add_argument(
        "--method", default="pass_kv", help="pass_kv (default), pass_q, gather_kv or gather_q"
    )
    plan.add_argument("--nheads", type=int, default=32, help="query heads (default: 32)")
    plan.add_argument("--rank", type=int, help="print this rank's runs and spans in full")
    plan.add_argument(
        "--no-causal", dest="causal", action="store_false", help="let every query see every key"
    )
    plan.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="positions seen before and after; -1: no bound (default)",
    )
    plan.add_argument("--nheads-k", type=int, default=8, help="key heads (default: 8)")
    plan.add_argument("--headdim", type=int, default=128, help="(default: 128)")
    plan.add_argument(
        "--itemsize",
        type=int,
        default=2,
        metavar="BYTES",
        help="bytes per element (default: 2, bfloat16)",
    )
    bench = commands.add_parser(
        "bench",
        help="run the benchmarks of the checkout that this is started in",
        description="Run benchmarks and append what they measured to bench/results/. With `tune` "
        "first: measure configurations of the kernels that follow, as `step/16/*`, on this GPU and "
        "write the best into kernels/configs.py. Needs a checkout of ringkern as the current "
        "directory.",
    )
    bench.add_argument("cases", nargs="*", metavar="CASE", help="ids or globs; default: all")
    bench.add_argument("--list", action="store_true", help="print the ids and stop")
    bench.add_argument("--quick", action="store_true", help="tiny sizes; records nothing")
    bench.add_argument(
        "--dry-run", action="store_true", help="of tune: print the table, write nothing"
    )
    trace = _add_trace(commands)
    for command in (demo, calibrate, doctor, plan, bench, trace):
        command.add_argument("--json", action="store_true", help="print one JSON object per line")
    return parser


def _add_trace(commands) -> argparse.ArgumentParser:
    trace = commands.add_parser(
        "trace",
        help="run prefills and decode on a ring of processes and write a trace of all ranks",
        description="Run a prefill, a prefill on top of its cache and decode steps, attention only "
        "and on random tensors, on a ring of processes on this host, and write what every rank did "
        "when as a Chrome trace. For a program of your own set RINGKERN_TRACE.",
    )
    sizes = (
        ("cached", 8192, "tokens of the first prefill; 0: none"),
        ("new", 4096, "tokens of the second, on top of the cache; 0: none"),
        ("decode", 4, "steps of one token"),
        ("layers", 2, "attention layers"),
        ("nheads", 8, "query heads"),
        ("nheads-k", 2, "key heads"),
        ("headdim", 64, "size of a head"),
        ("ranks", 4, "processes"),
        ("threads", 1, "per process"),
    )
    for name, size, text in sizes:
        trace.add_argument(
            f"--{name}", type=int, default=size, metavar="N", help=f"{text} (default: {size})"
        )
    trace.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    trace.add_argument(
        "--method", default="auto", help="auto (default), pass_kv, pass_q, gather_kv or gather_q"
    )
    trace.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="positions seen before and after; -1: no bound (default)",
    )
    trace.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that an exchange may take (default: 60)",
    )
    trace.add_argument(
        "--out",
        default="ringkern-trace.json",
        metavar="JSON",
        help="where to write (default: ringkern-trace.json)",
    )
    return trace


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    args = make_parser().parse_args(argv)
    try:
        commands = {
            "demo": _demo,
            "calibrate": _calibrate,
            "doctor": _doctor,
            "plan": _plan,
            "bench": _bench,
            "trace": _trace,
        }
        return commands[args.command](args)
    except ArgumentError as error:
        print(f"ringkern {args.command}: {error}", file=sys.stderr)
        return 2
    except (RingkernError, RuntimeError, OSError) as error:
        print(f"ringkern {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ringkern {args.command}: interrupted", file=sys.stderr)
        return 1


def _demo(args) -> int:
    from ringkern import demo

    return demo.run(
        args.file,
        args.tokens,
        args.follow_up,
        args.decode,
        args.ranks,
        args.picture,
        args.json,
        args.timeout,
    )


def measure_rank(worker, seconds: float, device: str | None):
    """Return the profile of the ring of all ranks, and whether this is the rank to write it."""
    from ringkern import api, calibrate

    with api.init_ring(device=device) as ring:
        return calibrate.measure(ring, seconds), ring.rank == 0


def _measure_ring(args):
    """Return what measure_rank() does, of torchrun's ranks or of processes started here."""
    from ringkern import gpu, launch

    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _, world_size, *_ = env.torchrun()
        ok = args.ranks in (None, world_size)
        check(ok, "ranks", f"{world_size}, as torchrun started, or none given", args.ranks)
        want, hint = "none under torchrun", "Set OMP_NUM_THREADS."
        check(args.threads is None, "threads", want, args.threads, hint)
        return measure_rank(None, args.seconds, args.device)
    ranks = 4 if args.ranks is None else args.ranks
    check(ranks >= 1, "ranks", "at least 1", ranks)
    device = args.device or "cpu"
    gpu.pick_device(device, "auto")  # here, where a device that cannot be is the user's error
    threads = 1 if args.threads is None else args.threads
    check(threads >= 1, "threads", "at least 1", threads)
    return launch.launch(measure_rank, ranks, args.seconds, device, threads=threads)[0]


def _calibrate(args) -> int:
    from ringkern import profile

    check(args.seconds > 0, "seconds", "more than 0", args.seconds)
    hardware, writes = _measure_ring(args)
    if not writes:
        return 0
    profile.save(hardware, args.out)
    found = dataclasses.asdict(hardware)
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"  {name:16}  {value}")
        print(f"written to {args.out}: use it by RINGKERN_PROFILE or init_ring(profile=...)")
    return 0


def _doctor(args) -> int:
    from ringkern import doctor

    for section, findings in doctor.report().items():
        if args.json:
            print(json.dumps({"section": section} | findings))
            continue
        print(section)
        for name, value in findings.items():
            print(f"  {name:36}  {value}")
    return 0


def _plan(args) -> int:
    from ringkern import plan_printer

    for line in plan_printer.lines(args):
        print(line)
    return 0


def _bench(args) -> int:
    here = pathlib.Path.cwd()
    if not all((here / part).is_file() for part in ("bench/run.py", "python/ringkern/cli.py")):
        raise UnsupportedError(
            "benchmarks: need a checkout of ringkern, and the current directory is none. Clone it, "
            "change to its top and run `ringkern bench` there."
        )
    sys.path.insert(0, str(here))
    flags = [f"--{name}" for name in ("list", "quick", "json") if getattr(args, name)]
    if args.cases[:1] == ["tune"]:
        flags += ["--dry-run"] * args.dry_run
        return importlib.import_module("bench.tune").main([*flags, *args.cases[1:]])
    check(not args.dry_run, "dry_run", "`ringkern bench tune`", "a benchmark")
    return importlib.import_module("bench.run").main([*flags, *args.cases])


def _trace(args) -> int:
    from ringkern import workload

    names = [field.name for field in dataclasses.fields(workload.Workload)]
    options = {name: getattr(args, name) for name in names}
    work = workload.Workload(**options | {"window": tuple(args.window)})
    stages = workload.run(work, args.ranks, args.threads, args.timeout, args.out)
    if args.json:
        for stage in stages:
            print(json.dumps(stage))
        print(json.dumps({"trace": args.out, "ranks": args.ranks, **dataclasses.asdict(work)}))
        return 0
    print(f"{'stage':18}{'tokens':>8}  {'method':12}{'ms':>10}{'MB sent':>10}{'exposed':>9}")
    for stage in stages:
        print(
            f"{stage['stage']:18}{stage['tokens']:8}  {stage['method']:12}{stage['ms']:10.1f}"
            f"{stage['bytes_sent'] / 1e6:10.2f}{stage['exposed']:9.1%}"
        )
    for stage in stages:
        print(f"{stage['stage']}: {stage['reason']}")
    print(f"written to {args.out}: open it in ui.perfetto.dev")
    return 0


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"want ints, comma-separated, got {text!r}") from None
