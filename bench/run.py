"""Runs cases and appends what they measured to bench/results/: python -m bench.run --help."""

import argparse
import datetime
import importlib.util
import json
import multiprocessing.forkserver
import pathlib
import secrets
import sys
import time

from ringkern.errors import ArgumentError
from ringkern.launch import launch

from bench import cases, gpu, links, machine, record, summary
from bench.case import Case, tiny
from bench.measurement import combine
from bench.session import Session

RESULTS = machine.ROOT / "bench" / "results"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `ringkern bench` passes on what it takes of this."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="ids or globs; default: all")
    parser.add_argument("--list", action="store_true", help="print the ids and stop")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; records nothing")
    parser.add_argument("--json", action="store_true", help="print records as JSON lines")
    parser.add_argument("--out", type=pathlib.Path, metavar="JSONL", help="append to this file")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="leave out by name what would end after N minutes",
    )
    parser.add_argument("--note", default="", help="free text for the records")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.quick and args.out:
        parser.error("--quick records nothing: leave out --out")
    try:
        chosen = cases.select(args.cases)
    except ArgumentError as error:
        parser.error(str(error))
    if args.list:
        for case in chosen:
            print(json.dumps({"case": case.id}) if args.json else case.id)
        return 0
    return Run(args).run(chosen)


def why_not(case: Case, quick: bool) -> str | None:
    """Return why a case cannot run on this machine; None where it can."""
    if case.link_mbit:
        return links.why_not()
    if case.needs and importlib.util.find_spec(case.needs) is None:
        return f"no {case.needs} here: pip install {case.needs}"
    return (case.on_gpu and gpu.why_not(quick)) or case.why_not(case)


def run_rank(worker, chosen: list[Case], shaped: links.Links | None, quick: bool) -> None:
    """Measure cases on this rank, and say what each measured as soon as it is done."""
    if shaped:
        shaped.join(worker.rank)
    session = Session(worker.rank, worker.world_size, quick)
    try:
        for case in chosen:
            worker.say((case.id, case.measure(session, case)))
    finally:
        session.close()


class Run:
    """One run: its records share an id, the versions and the machine."""

    def __init__(self, args):
        self.args = args
        now = datetime.datetime.now(datetime.timezone.utc)
        self.facts = {
            "run": secrets.token_hex(4),
            "versions": machine.versions(),
            "env": machine.environment(),
            "host": machine.host(),
            "note": args.note,
        }
        self.day = f"{now:%Y-%m-%d}"
        self.failed = 0
        self._began = time.monotonic()
        self._longest_s = 0.0  # of what has run

    def run(self, chosen: list[Case]) -> int:
        """Run the cases; return 1 if any failed."""
        chosen = [tiny(case) for case in chosen] if self.args.quick else chosen
        for batch in self._batches(chosen):
            reason = why_not(batch[0], self.args.quick) or self._why_no_time()
            if reason:
                for case in batch:
                    print(f"SKIPPED {case.id}: {reason}", file=sys.stderr, flush=True)
                continue
            began = time.monotonic()
            try:
                self._run_batch(batch)
            except (RuntimeError, OSError) as error:
                self._fail(", ".join(case.id for case in batch), str(error))
            self._longest_s = max(self._longest_s, time.monotonic() - began)
        if self.failed:
            print(f"{self.failed} FAILED, and not recorded", file=sys.stderr)
        return 1 if self.failed else 0

    def _why_no_time(self) -> str | None:
        """Return why a case is left out that may take as long as the longest so far; else None."""
        minutes, passed_s = self.args.minutes, time.monotonic() - self._began
        if minutes is None or passed_s + self._longest_s <= 60 * minutes:
            return None
        longest = f"the longest case took {self._longest_s:.0f} s"
        return f"{passed_s:.0f} s of {minutes:g} minutes have passed, and {longest}"

    def _batches(self, chosen):
        """Return lists of cases that share processes: each its own, but in sessions and --quick."""
        together: dict[tuple, list] = {}
        for case in chosen:
            alone = None if self.args.quick else case.session or case.id
            why = why_not(case, self.args.quick)
            key = case.in_ranks, case.world_size, case.link_mbit, case.on_gpu, why, alone
            together.setdefault(key, []).append(case)
        return list(together.values())

    def _run_batch(self, batch) -> None:
        self.facts["machine"] = machine.describe()
        if not batch[0].in_ranks:
            for case in batch:
                self._finish(case, case.measure(None, case))
            return
        by_id = {case.id: case for case in batch}
        said: dict[str, list] = {}

        def on_message(rank, message):
            case = by_id[message[0]]
            heard = said.setdefault(case.id, [])
            heard.append(message[1])
            if len(heard) == case.world_size:
                self._finish(case, {i: combine([one[i] for one in heard]) for i in case.impls})

        world_size, mbit = batch[0].world_size, batch[0].link_mbit
        options = dict(threads=1, timeout_s=3600, on_message=on_message)
        if mbit is None:
            launch(run_rank, world_size, batch, None, self.args.quick, **options)
            return
        multiprocessing.forkserver.ensure_running()  # here: it keeps the namespace it begins in
        with links.Links(world_size, mbit) as shaped, shaped.hub():
            launch(run_rank, world_size, batch, shaped, self.args.quick, **options)

    def _finish(self, case, found) -> None:
        """Print a case's records, and append them if all of them are right."""
        records = summary.make_records(case, found, self.facts)
        for one in records:
            print(json.dumps(one) if self.args.json else summary.line(one), flush=True)
        faults = [fault for one in records for fault in record.check(one)]
        if faults:
            self._fail(case.id, "; ".join(faults))
        elif not all(one["ok"] for one in records):
            self._fail(case.id, "a result is wrong")
        elif not self.args.quick:
            out = self.args.out or RESULTS / self._file_name(case)
            out.parent.mkdir(parents=True, exist_ok=True)
            record.append(out, records)

    def _file_name(self, case) -> str:
        name = gpu.name() if case.on_gpu else machine.name()
        return f"{name}-{self.day}.jsonl"

    def _fail(self, what: str, why: str) -> None:
        self.failed += 1
        print(f"FAILED {what}: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
