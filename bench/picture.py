"""Draws the methods' steps, as schedule.py outlines them: python -m bench.picture."""

import argparse
import pathlib
from typing import NamedTuple

import matplotlib
import numpy as np
from ringkern import schedule

from bench import machine

RANKS = 4
SHADES = ("#1f4e79", "#2e75b6", "#7fb0de", "#c6dcf0")  # by rank
PART, WAIT = "#5b9b5b", "#e8793a"


class Scene(NamedTuple):
    """A method in the case it is for. Times in units of one rank's work on another's block."""

    method: str
    title: str
    note: str
    own: float  # work on the rank's own block
    latency: float
    nbytes: dict[str, float]  # time on the link, by kind of block


SCENES = (
    Scene("pass_kv", "K, V go round; Q and out stay",
          "full prefill: a step of work hides the next K, V", 1.0, 0.1, {"kv": 0.65}),
    Scene("pass_q", "Q goes round; (out, lse) comes straight back",
          "few new tokens on a long cache: own work is left for the last return",
          1.0, 0.08, {"q": 0.15, "part": 0.3}),
    Scene("gather_kv", "K, V to all in one exchange",
          "short sequences: one latency instead of three, nothing comes back",
          0.35, 0.8, {"kv": 0.13}),
    Scene("gather_q", "Q to all, (out, lse) back: two exchanges",
          "decode: a token's Q is tiny, the long K, V stay; two latencies",
          0.5, 0.7, {"q": 0.07, "part": 0.1}),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Write the picture; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=machine.ROOT / "docs/methods.svg")
    draw(parser.parse_args(argv).out)
    return 0


def draw(path: pathlib.Path) -> None:
    """Draw a panel for each method, a row for each rank: its work, and below it what arrives."""
    matplotlib.use("Agg")
    # The same file from the same schedules, its text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "ringkern", "svg.fonttype": "none"})
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    for scene, panel in zip(SCENES, axes.flat, strict=True):
        _panel(panel, scene)
    handles = [
        Patch(color=SHADES[1], label="attends; the number: whose K, V (left) or Q (right)"),
        Patch(color=WAIT, label="waits: what no work hides"),
        Patch(color=SHADES[2], label="below: K, V or Q of a rank arrive, a latency and the bytes"),
        Patch(color=PART, label="(out, lse) of this rank's Q arrive; by whom"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{RANKS} ranks; time runs to the right, each method in the case it is for")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel, scene):
    sees = np.ones((RANKS, RANKS), dtype=bool)
    outlines = [schedule.outline(scene.method, rank, sees) for rank in range(RANKS)]
    start = 0.0
    for index, steps in enumerate(zip(*outlines, strict=True)):
        ends = [_step(panel, scene, rank, step, start) for rank, step in enumerate(steps)]
        for rank, (_, busy) in enumerate(ends):
            late = max(end for end, _ in ends) - busy
            if late > 1e-9:
                _bar(panel, rank, busy, late, WAIT, "waits" if late > 0.3 else "")
        panel.text(start + 0.02, -0.62, f"step {index}", fontsize=7, color="#666")
        start = max(end for end, _ in ends)
        panel.axvline(start, color="#bbb", linestyle=":", linewidth=0.8)
    panel.set_xlim(0, start)
    panel.set_ylim(RANKS - 0.2, -0.8)
    panel.set_yticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)])
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title(f"{scene.method}: {scene.title}", loc="left", fontsize=10)
    panel.set_xlabel(scene.note, loc="left")


def _step(panel, scene, rank, step, start):
    """Draw one step of one rank; return when all of it is over, and when its work is."""
    busy = start
    for q_rank, kv_rank, half in step.work:
        takes = 1.0 if q_rank != kv_rank else scene.own / (2 if half else 1)
        takes *= scene.own if "gather" in scene.method and q_rank != kv_rank else 1.0
        other = kv_rank if q_rank == rank else q_rank
        _bar(panel, rank, busy, takes, SHADES[other], str(other))
        busy += takes
    came = start + scene.latency if step.recvs else start
    for peer, kind, whose in step.recvs:
        colour, whose = (PART, peer) if kind == "part" else (SHADES[whose], whose)
        _bar(panel, rank + 0.33, came, scene.nbytes[kind], colour, str(whose), 0.2)
        came += scene.nbytes[kind]
    if step.recvs:
        panel.plot([start, start + scene.latency], [rank + 0.33] * 2, color="#666", linewidth=1)
    return max(busy, came), busy


def _bar(panel, y, start, width, colour, text, height=0.4):
    panel.barh(y, width, height, start, color=colour, edgecolor="white", linewidth=0.5)
    dark = colour in SHADES[:2]
    size = 8 if height > 0.3 else 6
    at = start + width / 2
    panel.text(at, y, text, ha="center", va="center", fontsize=size, color="w" if dark else "k")


if __name__ == "__main__":
    raise SystemExit(main())
