"""What the demo prints: tables of the stages and the ranks, and the verdict."""

import json
import math

from rich import box
from rich.table import Table

from ringkern.demo_check import TOLERANCE, Findings

SHOWN = 8  # faults that are printed; --json has all


def print_json(findings: Findings) -> None:
    """Print one object per stage, one per rank, then {"ok": ...}."""
    last = findings.totals | {"faults": findings.faults}
    for row in (*findings.stages, *findings.ranks, last):
        print(json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False))


def print_tables(findings: Findings, console) -> None:
    """Print the stages, why each took its method, and the ranks."""
    console.print(_stage_table(findings.stages))
    console.print(
        "Why, for one layer (a gather has to be clearly faster, as it holds the blocks of all ranks"
        " at once):",
        highlight=False,
    )
    console.print(_reason_table(findings.stages))
    console.print(_rank_table(findings.ranks))


def verdict(findings: Findings) -> str:
    """Return the sentences that say whether all agrees."""
    totals = findings.totals
    lines = [
        f"{'Every' if totals['ok'] else 'NOT every'} token and hidden state agrees with the run of "
        f"one process: {totals['equal']} of {totals['decoded']} decoded tokens equal, largest "
        f"difference of a hidden state {totals['largest_error']:.2g}, tolerance {TOLERANCE:g}. The "
        f"closest choice of a token was by {totals['closest']:.2g} in logits."
    ]
    if totals["ties"]:
        lines.append(
            f"{totals['ties']} tokens differ by a tie: logits closer than {totals['tie']:.2g}, the "
            "tolerance's worth; the token of one process was fed."
        )
    lines += findings.faults[:SHOWN]
    if len(findings.faults) > SHOWN:
        lines.append(f"and {len(findings.faults) - SHOWN} faults more")
    return "\n".join(lines)


def _finite(value):
    """Return the value; None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(*names, left=0):
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _stage_table(rows):
    table = _table(
        "stage",
        "method",
        "new\ntokens",
        "cached\nbefore",
        "time\nms",
        "exposed\nwait ms",
        "bytes sent,\nas planned",
        "largest\nerror",
        left=2,
    )
    for row in rows:
        table.add_row(
            row["stage"],
            _counts(row["methods"]),
            f"{row['new_tokens']}",
            f"{row['cached_tokens']}",
            f"{row['time_ms']:.0f}",
            f"{row['wait_ms']:.1f}",
            _bytes(row),
            f"{row['largest_error']:.1e}",
        )
    return table


def _counts(methods):
    if sum(methods.values()) == 1:
        return next(iter(methods))
    return "\n".join(f"{method} x{count}" for method, count in methods.items())


def _bytes(row):
    sent, planned = row["bytes_sent"], row["bytes_planned"]
    return f"{sent}" if sent == planned else f"{sent}\nNOT {planned}"


def _reason_table(rows):
    table = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(f"  {row['stage']}", row["reason"])
    return table


def _rank_table(rows):
    table = _table(
        "rank",
        "tokens\ncached",
        "pages\nof cache",
        "attend\nms",
        "exchange\nms",
        "exposed\nwait ms",
        "bytes sent,\nas planned",
        "largest\nerror",
    )
    for row in rows:
        table.add_row(
            f"{row['rank']}",
            f"{row['tokens']}",
            f"{row['pages_used']} of {row['pages']}",
            f"{row['attend_ms']:.1f}",
            f"{row['exchange_ms']:.1f}",
            f"{row['wait_ms']:.1f}",
            _bytes(row),
            f"{row['largest_error']:.1e}",
        )
    return table
