"""Fills the README's tables from the newest records: python -m bench.report [--check].

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->; NAME as in bench/tables.py.
"""

import argparse
import difflib
import pathlib
import re
import sys

from bench import machine, record
from bench.tables import TABLES

MARKER = re.compile(r"<!-- (/?)bench:(\S+) -->")
SECTION = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench:\2 -->)", re.S)


class ReportError(Exception):
    """The README or the records are not as they must be; says which and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if they differ")
    parser.add_argument("--print", choices=sorted(TABLES), help="print one table and stop")
    parser.add_argument("--readme", type=pathlib.Path, default=machine.ROOT / "README.md")
    parser.add_argument("--results", type=pathlib.Path, default=machine.ROOT / "bench/results")
    args = parser.parse_args(argv)
    try:
        records = newest(load_all(args.results))
        if args.print:
            print(section(args.print, records), end="")
            return 0
        before = args.readme.read_text()
        after = fill(before, records)
    except (ReportError, ValueError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    if args.check:
        lines = (text.splitlines(keepends=True) for text in (before, after))
        sys.stderr.writelines(difflib.unified_diff(*lines, "README", "records"))
        return int(before != after)
    if before != after:
        args.readme.write_text(after)
    return 0


def load_all(results: pathlib.Path) -> list[tuple[str, dict]]:
    """Return (file name, record) of every record, checked."""
    files = sorted(results.glob("*.jsonl"))
    return [(file.name, one) for file in files for one in record.load(file)]


def newest(found: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Return the records of the latest run of each case, in the order of the cases.

    All of a case's records come from one run, so that every ratio is between records of that run.
    """
    from bench.cases import CASES  # here: it loads torch

    chosen = []
    for case in CASES:
        mine = [(name, one) for name, one in found if one["case"] == case.id]
        if mine:
            run = max(mine, key=lambda pair: pair[1]["time_utc"])[1]["run"]
            mine = [pair for pair in mine if pair[1]["run"] == run]
            check_run([one for _, one in mine])
            chosen += mine
    return chosen


def check_run(records: list[dict]) -> None:
    """Raise unless the ratios of a case's records are those of their times."""
    by_impl = {one["impl"]: one for one in records}
    for one in records:
        if not one["ok"]:
            raise ReportError(f"{one['case']}: {one['impl']} is a wrong result; take it out")
        if one["peer"] is None:
            continue
        if one["peer"] not in by_impl:
            raise ReportError(f"{one['case']}: no record of {one['peer']} in run {one['run']}")
        want = one["time_us"]["p50"] / by_impl[one["peer"]]["time_us"]["p50"]
        if abs(one["ratio"] - want) > 1e-4:
            raise ReportError(f"{one['case']}: ratio: want {want:.4f}, got {one['ratio']}")


def fill(text: str, records: list[tuple[str, dict]]) -> str:
    """Return the text with every section made anew."""
    marks = [("/" if close else "") + name for close, name in MARKER.findall(text)]
    for name in dict.fromkeys(mark.lstrip("/") for mark in marks):
        if name not in TABLES:
            raise ReportError(f"bench:{name}: want one of {', '.join(TABLES)}")
    opened = marks[::2]
    if not marks or marks[1::2] != ["/" + name for name in opened]:
        form = "<!-- bench:NAME --> and <!-- /bench:NAME -->, one pair after the other"
        raise ReportError(f"README: want {form}, got {', '.join(marks) or 'none'}")
    return SECTION.sub(lambda found: found[1] + section(found[2], records) + found[3], text)


def section(name: str, records: list[tuple[str, dict]]) -> str:
    """Return a table and where its records are."""
    prefix, make_table = TABLES[name]
    mine = [(file, one) for file, one in records if one["case"].startswith(prefix)]
    lines = make_table([one for _, one in mine])
    if not lines:
        raise ReportError(f"bench:{name}: no record; run `python -m bench.run '{prefix}*'`")
    return "\n".join([*lines, "", *captions(mine), ""])


def captions(records: list[tuple[str, dict]]) -> list[str]:
    """Return one line for each machine, version and day that the records are of."""
    lines = {}
    for file, one in records:
        versions = one["versions"]
        lines[
            f"{_where(one)}; ringkern {versions['ringkern']}, torch {versions['torch']}; "
            f"{one['time_utc'][:10]}; "
            f"records: `bench/results/{file}`."
        ] = None
    return list(lines)


def _where(one: dict) -> str:
    on = one["machine"]
    if "gpu" in on:
        return f"{on['gpu']}, driver {on.get('driver_version', 'unknown')}"
    return f"{on['cpu']}, {on['cores']} cores, {_network(one)}"


def _network(one: dict) -> str:
    if one["link"] == "loopback":
        return f"loopback, {one['machine']['congestion_control']}"
    return "shaped links" if one["link"] else "no network"


if __name__ == "__main__":
    sys.exit(main())
