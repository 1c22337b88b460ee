"""Draws the choice of method over the grid from the newest records: python -m bench.plot."""

import argparse
import pathlib

import matplotlib
from ringkern.schedule import METHODS

from bench import machine, regret, report

COLOURS = dict(zip(METHODS, ("#9ecae1", "#fdd0a2", "#6baed6", "#fdae6b"), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Write the picture; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=machine.ROOT / "docs/choice.svg")
    args = parser.parse_args(argv)
    records = [one for _, one in report.newest(report.load_all(machine.ROOT / "bench/results"))]
    draw(regret.points([one for one in records if one["case"].startswith("stage/")]), args.out)
    return 0


def draw(points: list[regret.Point], path: pathlib.Path) -> None:
    """Draw a panel for each link: what auto takes and where that changes; below it, what is faster."""
    matplotlib.use("Agg")
    # The same file from the same records, its text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "ringkern", "svg.fonttype": "none"})
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    links = list(dict.fromkeys(point.link for point in points))
    figure, axes = pyplot.subplots(
        1, len(links), figsize=(6.6 * len(links), 4.2), layout="constrained", squeeze=False
    )
    for link, panel in zip(links, axes[0], strict=True):
        _panel(panel, link, [point for point in points if point.link == link])
    handles = [Patch(color=COLOURS[method], label=method) for method in METHODS]
    handles.append(
        pyplot.Line2D([], [], color="black", linewidth=2.5, label="Q or K, V: crossover")
    )
    handles.append(pyplot.Line2D([], [], color="black", linestyle=":", label="equation (1)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel, link, points):
    news, cacheds = (sorted({getattr(p, name) for p in points}) for name in ("new", "cached"))
    cells = {(news.index(p.new), cacheds.index(p.cached)): p for p in points}
    for (x, y), point in cells.items():
        took = point.taken["auto"]
        panel.add_patch(_square(x, y, COLOURS[took]))
        text = f"{took}\n{_time(point.us[took])}"
        if point.fastest != took:
            text += f"\n{point.fastest}\n{_time(point.us[point.fastest])}"
        panel.text(x, y, text, ha="center", va="center", fontsize=6.5)
        # The next points to the right and above; some rows and columns have few.
        beside = min((i for i, j in cells if j == y and i > x), default=None)
        above = min((j for i, j in cells if i == x and j > y), default=None)
        line = dict(color="black", linewidth=2.5)
        if beside is not None and _changes(point, cells[beside, y]):
            panel.plot([(x + beside) / 2] * 2, [y - 0.5, y + 0.5], **line)
        if above is not None and _changes(point, cells[x, above]):
            panel.plot([x - 0.5, x + 0.5], [(y + above) / 2] * 2, **line)
    # Equation (1): Q is the smaller message where T / (T + P) <= 2 * nheads_k / nheads = 1 / 8.
    curve = [(x, _place(7 * new, cacheds)) for x, new in enumerate(news)]
    panel.plot(*zip(*[c for c in curve if c[1] is not None], strict=True), ":", color="black")
    panel.set_xticks(range(len(news)), news)
    panel.set_yticks(range(len(cacheds)), cacheds)
    panel.set_xlim(-0.5, len(news) - 0.5)
    panel.set_ylim(-0.5, len(cacheds) - 0.5)
    panel.set(xlabel="new tokens", ylabel="cached tokens", title=f"what auto takes, link {link}")


def _changes(one, other) -> bool:
    """Return whether auto sends K and V at one point, and Q at the other."""
    return ("kv" in one.taken["auto"]) != ("kv" in other.taken["auto"])


def _time(us: float) -> str:
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1e3:.3g} ms"


def _square(x, y, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white")


def _place(value, ticks):
    """Return where a value lies on an axis whose ticks are evenly spaced; None beyond it."""
    for index, (low, high) in enumerate(zip(ticks, ticks[1:], strict=False)):
        if low <= value <= high:
            return index + (value - low) / (high - low)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
