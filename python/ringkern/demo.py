"""ringkern demo: a long real text and two turns over it, on a ring of processes, all checked."""

import os
import pathlib

from ringkern import launch
from ringkern.demo_session import Session, run_alone, run_rank
from ringkern.errors import UnsupportedError, check
from ringkern.model import Shape


def read_text(path: str | None, nbytes: int) -> tuple[bytes, str]:
    """Return text of nbytes or more and where it is from; by default Python's own library.

    A file is returned whole, also where it is shorter.
    """
    if path is not None:
        source = pathlib.Path(path)
        check(source.is_file(), "file", "a readable file", path)
        return source.read_bytes(), source.name
    text, used = b"", 0
    for source in sorted(pathlib.Path(os.__file__).parent.glob("*.py")):
        text += source.read_bytes()
        used += 1
        if len(text) >= nbytes:
            break
    return text, f"{used} files of Python's standard library"


def make_session(
    text: bytes, name: str, tokens: int, follow_up: int, decode: int, shape: Shape | None = None
) -> Session:
    """Return the session whose prompts are the text's first bytes and the bytes after them.

    Where the text ends it is followed up from its beginning.
    """
    for what, count in (("tokens", tokens), ("follow_up", follow_up), ("decode", decode)):
        check(count >= 1, what, "at least 1", count)
    check(len(text) >= tokens, "tokens", f"at most {len(text)}, the length of {name}", tokens)
    rest = text[tokens:] + text * (follow_up // len(text) + 1)
    return Session(text[:tokens], rest[:follow_up], decode, shape or Shape())


def run(
    path: str | None,
    tokens: int,
    follow_up: int,
    decode: int,
    ranks: int,
    picture: str,
    as_json: bool,
    timeout_s: float,
) -> int:
    """Run the demo; return the exit code: 0 if everything agrees, else 1."""
    check(ranks >= 1, "ranks", "at least 1", ranks)
    text, name = read_text(path, tokens + follow_up)
    session = make_session(text, name, tokens, follow_up, decode)
    ok = pathlib.Path(picture).resolve().parent.is_dir()
    check(ok, "picture", "a file in a folder that exists", picture)
    check(timeout_s > 0, "timeout", "more than 0", timeout_s)
    try:
        import matplotlib  # noqa: F401, as the picture needs it at the end
        from rich.console import Console

        from ringkern import demo_check, demo_picture, demo_report
    except ImportError as error:
        raise UnsupportedError(
            "demo: needs rich and matplotlib, and one is missing. pip install 'ringkern[demo]'"
        ) from error
    console = Console(stderr=as_json)
    console.print(_heading(session, name, ranks), highlight=False)
    alone, runs = _run_both(console, session, ranks, timeout_s)
    findings = demo_check.compare(session, alone, runs)
    if as_json:
        demo_report.print_json(findings)
    else:
        demo_report.print_tables(findings, console)
    demo_picture.draw(session, runs, picture)
    console.print(demo_report.verdict(findings), highlight=False)
    console.print(f"Timeline of all ranks: {picture}", highlight=False)
    return 0 if findings.totals["ok"] else 1


def _heading(session, name, ranks):
    shape = session.shape
    return (
        f"Turn 1: {len(session.prompt)} bytes of {name} as tokens, then {session.decode} decoded; "
        f"turn 2: {len(session.follow_up)} bytes more, then {session.decode} decoded.\n"
        f"{shape.layers} layers with random weights, {shape.nheads} heads ({shape.nheads_k} for k "
        f"and v), headdim {shape.headdim}, float32. Ranks: {ranks}, each a process with 1 "
        "thread, over TCP."
    )


def _run_both(console, session, ranks, timeout_s):
    """Return what one process and what every rank did, under progress bars."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    stages = session.stages
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(),
        TextColumn("{task.fields[stage]:14}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def add(description):
            return progress.add_task(description, total=len(stages), start=False, stage="")

        def show(task, said):
            number, share = said
            progress.start_task(task)
            progress.update(task, completed=number + share, stage=stages[number].name)

        task = add("one process, torch's SDPA")
        alone = run_alone(session, lambda said: show(task, said))
        tasks = [add(f"rank {rank} of {ranks}") for rank in range(ranks)]
        runs = launch.launch(
            run_rank,
            ranks,
            session,
            [stage.tokens for stage in alone],
            timeout_s,
            threads=1,
            on_message=lambda rank, said: show(tasks[rank], said),
        )
    return alone, runs
