"""The demo's picture: what every rank did when, over the session and close up in each stage."""

from ringkern.demo_session import RankRun, Session

# name in stats.Event: (label, colour, top, height), in rows from the rank's middle downwards
BARS = {
    "exchange": ("exchange under way", "#8fbf8f", -0.34, 0.2),
    "attend": ("attend", "#3b75af", -0.1, 0.42),
    "merge": ("merge", "#8064a2", -0.1, 0.42),
    "wait": ("exposed wait", "#c44e52", -0.1, 0.42),
}


def draw(session: Session, runs: list[RankRun], path: str) -> None:
    """Write the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = range(len(session.stages))
    figure, axes = pyplot.subplot_mosaic(
        [["all"] * len(numbers), list(numbers)],
        figsize=(15, 2.6 + 0.9 * len(runs)),
        layout="constrained",
    )
    _draw_session(axes["all"], session, runs)
    for number in numbers:
        _draw_close_up(axes[number], session.stages[number], number, runs)
        if number:
            axes[number].set_yticklabels([])
    handles, labels = axes["all"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("ringkern demo: two turns over a ring, attention and the exchanges under it")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_session(axes, session, runs):
    """Draw all stages on one axis of time, each a numbered band."""
    windows = [_window(runs, number, slice(None)) for number in range(len(session.stages))]
    begin = windows[0][0]
    for number, (start, end) in enumerate(windows):
        left, right = (start - begin) / 1e6, (end - begin) / 1e6
        axes.axvspan(left, right, color="#f2f2f2" if number % 2 == 0 else "#e2e2e2", zorder=0)
        axes.text(
            (left + right) / 2,
            1.02,
            f"{number + 1}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            weight="bold",
        )
    events = [[event for stage in run.stages for event in stage.events] for run in runs]
    _draw_events(axes, events, begin, linewidth=0)
    axes.set_xlim(0, (windows[-1][1] - begin) / 1e6)
    axes.set_xlabel("ms; blank: projections, feed-forward and the choice of the next token")


def _draw_close_up(axes, stage, number, runs):
    """Draw the last decoded token, or a prompt's last layer: of its passes there is only one."""
    start, end = _window(runs, number, slice(-1, None))
    events = [
        [event for event in run.stages[number].events if start <= event.start_ns <= end]
        for run in runs
    ]
    what = f"token {stage.new}"
    if stage.kind == "prefill" and any(events):
        call = max(event.call for rank in events for event in rank)
        events = [[event for event in rank if event.call == call] for rank in events]
        start = min(event.start_ns for rank in events for event in rank)
        end = max(event.end_ns for rank in events for event in rank)
        what = "last layer"
    _draw_events(axes, events, start, linewidth=0.4)
    axes.set_xlim(0, (end - start) / 1e6)
    method = runs[0].stages[number].passes[-1].method
    axes.set_title(f"{number + 1}  {stage.name}, {what}: {method}", fontsize=10)
    axes.set_xlabel("ms")


def _window(runs, number, which):
    """Return (start, end) of some passes of a stage, over all ranks."""
    passes = [done for run in runs for done in run.stages[number].passes[which]]
    return min(done.start_ns for done in passes), max(done.end_ns for done in passes)


def _draw_events(axes, events_by_rank, begin, linewidth):
    for rank, events in enumerate(events_by_rank):
        for name, (label, colour, top, height) in BARS.items():
            bars = [
                ((event.start_ns - begin) / 1e6, (event.end_ns - event.start_ns) / 1e6)
                for event in events
                if event.name == name
            ]
            axes.broken_barh(
                bars,
                (rank + top, height),
                color=colour,
                edgecolor="white",
                linewidth=linewidth,
                label=label if rank == 0 else None,
            )
    axes.set_yticks(range(len(events_by_rank)), [f"rank {r}" for r in range(len(events_by_rank))])
    axes.set_ylim(len(events_by_rank) - 0.5, -0.5)
