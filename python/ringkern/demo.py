"""ringkern demo: a long real text through a decoder stack, sharded over ranks, checked by token."""

import json
import os
import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ringkern import api, launch
from ringkern.errors import UnsupportedError, check
from ringkern.model import Decoder, Shape
from ringkern.placement import Placement
from ringkern.schedule import make_schedule

TOLERANCE = 1e-4  # largest difference of a hidden state; they are normalised to a mean square of 1


@dataclass(frozen=True)
class RankReport:
    """What one rank saw of the ring run."""

    rank: int
    tokens: int
    bytes_sent: int
    stats: dict
    events: list
    hidden: torch.Tensor  # [tokens, hidden]


def read_text(path: str | None, tokens: int) -> tuple[bytes, str]:
    """Return `tokens` bytes of text and where they are from; by default Python's own library."""
    if path is not None:
        source = pathlib.Path(path)
        check(source.is_file(), "file", "a readable file", path)
        text, name = source.read_bytes(), source.name
    else:
        library = pathlib.Path(os.__file__).parent
        text, used = b"", 0
        for source in sorted(library.glob("*.py")):
            text += source.read_bytes()
            used += 1
            if len(text) >= tokens:
                break
        name = f"{used} files of Python's standard library"
    check(len(text) >= tokens, "tokens", f"at most {len(text)}, the length of {name}", tokens)
    return text[:tokens], name


def run_rank(worker, text: bytes, shape: Shape, timeout_s: float) -> RankReport:
    """Run this rank's share of the text through the stack, attention over the ring."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    with api.init_ring(timeout_s=timeout_s) as ring:
        plan = Placement(ring.world_size).prefill({"text": len(tokens)})
        model = Decoder(shape)
        ring.barrier()
        before = ring.stats()["transport"]["bytes_sent"]
        hidden = model.hidden_states(
            plan.shard(tokens, ring.rank),
            torch.from_numpy(plan.positions(ring.rank)),
            lambda q, k, v: ring.attn(q, k, v, plan, method="pass_kv"),
            worker.say,
        )
        stats = ring.stats()
        moved = stats["transport"]["bytes_sent"] - before  # as the transport counted them
        return RankReport(ring.rank, len(hidden), moved, stats, ring.events(), hidden)


def run_alone(text: bytes, shape: Shape, progress) -> torch.Tensor:
    """Return the hidden states of the whole text by one process and torch's own attention."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return Decoder(shape).hidden_states(tokens, torch.arange(len(tokens)), attend, progress)


def run(path, tokens: int, ranks: int, picture: str, as_json: bool, timeout_s: float) -> int:
    """Run the demo; return the exit code: 0 if every token agrees, else 1."""
    check(ranks >= 1, "ranks", "at least 1", ranks)
    check(tokens >= 1, "tokens", "at least 1", tokens)
    text, name = read_text(path, tokens)
    ok = pathlib.Path(picture).resolve().parent.is_dir()
    check(ok, "picture", "a file in a folder that exists", picture)
    check(timeout_s > 0, "timeout", "more than 0", timeout_s)
    try:
        import matplotlib  # noqa: F401, as draw() needs it at the end
        from rich.console import Console
    except ImportError as error:
        raise UnsupportedError(
            "demo: needs rich and matplotlib, and one is missing. pip install 'ringkern[demo]'"
        ) from error
    shape = Shape()
    console = Console(stderr=as_json)
    console.print(
        f"{tokens} bytes of {name} as tokens, {shape.layers} layers, {shape.nheads} heads "
        f"({shape.nheads_k} for k and v), headdim {shape.headdim}, float32\n"
        f"{ranks} ranks, each a process with 1 thread: pass-KV over TCP, zigzag, causal",
        highlight=False,
    )
    alone, reports = _run_both(console, text, shape, ranks, timeout_s)
    rows = _rows(alone, reports, shape, tokens, ranks)
    worst = max(row["largest_error"] for row in rows)
    ok = worst <= TOLERANCE and all(row["bytes_sent"] == row["bytes_planned"] for row in rows)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        print(json.dumps({"ok": ok, "largest_error": worst, "tolerance": TOLERANCE}))
    else:
        console.print(_table(rows))
    draw(reports, picture)
    console.print(
        f"{'Every' if ok else 'NOT every'} token's hidden state agrees with the run of one "
        f"process: largest difference {worst:.2g}, tolerance {TOLERANCE:g}.\n"
        f"Timeline of all ranks: {picture}",
        highlight=False,
    )
    return 0 if ok else 1


def _run_both(console, text, shape, ranks, timeout_s):
    """Return the hidden states of one process, and the reports of a ring, under progress bars."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        TextColumn("layer {task.completed} of {task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("one process, torch's SDPA", total=shape.layers)
        alone = run_alone(text, shape, lambda layer: progress.update(task, completed=layer))
        tasks = [
            progress.add_task(f"rank {r} of {ranks}", total=shape.layers, start=False)
            for r in range(ranks)
        ]

        def on_message(rank, layer):
            progress.start_task(tasks[rank])
            progress.update(tasks[rank], completed=layer)

        reports = launch.launch(
            run_rank, ranks, text, shape, timeout_s, threads=1, on_message=on_message
        )
    return alone, reports


def _rows(alone, reports, shape, tokens, ranks):
    """Return the table's rows: what each rank did against what the plan said."""
    plan = Placement(ranks).prefill({"text": tokens})
    rows = []
    for report in reports:
        steps = make_schedule(plan, report.rank, "pass_kv")
        token_bytes = 2 * shape.nheads_k * shape.headdim * 4
        sent = sum(move.tokens for step in steps for move in step.sends)
        planned = shape.layers * token_bytes * sent
        want = alone[torch.from_numpy(plan.indices(report.rank))]
        error = (report.hidden - want).abs().max().item() if report.tokens else 0.0
        rows.append(
            {
                "rank": report.rank,
                "tokens": report.tokens,
                "steps": report.stats["steps"],
                "attend_ms": round(report.stats["attend_ms"], 1),
                "exchange_ms": round(report.stats["exchange_ms"], 1),
                "wait_ms": round(report.stats["wait_ms"], 1),
                "bytes_sent": report.bytes_sent,
                "bytes_planned": planned,
                "largest_error": error,
            }
        )
    return rows


def _table(rows):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("rank", "tokens", "steps", "attend\nms", "exchange\nms", "exposed\nwait ms")
    names += ("bytes\nsent", "bytes\nplanned", "largest\nerror")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        *counts, error = row.values()
        table.add_row(*(f"{count}" for count in counts), f"{error:.2g}")
    return table


def draw(reports: list[RankReport], path: str) -> None:
    """Draw what every rank did when: attention, and exchanges below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"attend": "#3b75af", "wait": "#c44e52", "exchange": "#8fbf8f"}
    labels = {
        "attend": "attend",
        "exchange": "exchange under way",
        "wait": "exposed wait",
    }
    begin = min(event.start_ns for report in reports for event in report.events)
    figure, axes = pyplot.subplots(figsize=(14, 1 + 0.8 * len(reports)), layout="constrained")
    for report in reports:
        for name, height, base in (
            ("attend", 0.4, 0.0),
            ("wait", 0.4, 0.0),
            ("exchange", 0.2, -0.25),
        ):
            bars = [
                ((e.start_ns - begin) / 1e6, (e.end_ns - e.start_ns) / 1e6)
                for e in report.events
                if e.name == name
            ]
            axes.broken_barh(
                bars,
                (report.rank + base, height),
                color=colours[name],
                edgecolor="white",
                linewidth=0.4,
                label=labels[name] if report.rank == 0 else None,
            )
    axes.set_yticks([r.rank + 0.1 for r in reports], [f"rank {r.rank}" for r in reports])
    axes.invert_yaxis()
    axes.set_xlabel("ms since the first rank began to attend; white: projections and feed-forward")
    axes.set_title("ringkern demo: K and V travel round the ring under attention")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
