"""The README's tables, each made from records and nothing else."""

import statistics

from bench import regret
from bench.paper import UNPADDED


def transport(records: list[dict]) -> list[str]:
    """ringkern's TCP against gloo, all ranks exchanging with all others at once."""
    rows = [["each pair exchanges", "ranks", "ringkern, p50", "gloo, p50", "speed", "asked for"]]
    for one in _of(records, "ringkern"):
        peer = _find(records, one["case"], "gloo")
        target = one["targets"].get("ratio")
        rows.append(
            [
                _bytes(one["shape"]["nbytes"]),
                one["world_size"],
                _time_and_rate(one),
                _time_and_rate(peer),
                f"{1 / one['ratio']:.2f} x gloo",
                "" if target is None else f"{1 / target:.2f} x{_verdict(one)}",
            ]
        )
    return _table(rows)


def ring(records: list[dict]) -> list[str]:
    """Two ranks with one thread each against one process with two."""
    heads = ["seqlen", "dtype", "ring, p50", "drop-in, p50", "one process, p50"]
    rows = [heads + ["ring's time", "drop-in's", "asked for"]]
    for one in _of(records, "ringkern"):
        peer = _find(records, one["case"], "torch_sdpa")
        func = _find(records, one["case"], "ringkern_func")
        target = one["targets"].get("ratio")
        rows.append(
            [
                one["shape"]["seqlen"],
                one["dtype"],
                _time(one["time_us"]["p50"]),
                _time(func["time_us"]["p50"]),
                _time(peer["time_us"]["p50"]),
                f"{one['ratio']:.2f} x",
                f"{func['ratio']:.2f} x",
                "" if target is None else f"{target:.2f} x{_verdict(one)}",
            ]
        )
    return _table(rows)


def cost(records: list[dict]) -> list[str]:
    """What the messages of the ring cost: how much of the time is exposed waiting."""
    heads = ["seqlen", "dtype", "a rank sends", "under way", "exposed", "share of the call"]
    rows = [heads]
    for one in _of(records, "ringkern"):
        rows.append(
            [
                one["shape"]["seqlen"],
                one["dtype"],
                _bytes(one["bytes_sent"]),
                _time(one["detail"]["exchange_ms"] * 1e3),
                _time(one["detail"]["wait_ms"] * 1e3),
                f"{one['exposed_comm']:.2%}",
            ]
        )
    return _table(rows)


def memory(records: list[dict]) -> list[str]:
    """A rank's peak above its inputs while the ring grows and its share stays as long."""
    heads = ["ranks", "tokens per rank", "dtype", "peak above inputs"]
    rows = [heads + ["wires + accumulator + block", "and with the C library's heap"]]
    for one in _of(records, "ringkern"):
        if one["case"].endswith("/heap"):
            continue
        heap = _find(records, one["case"] + "/heap", "ringkern")
        parts = ("wires", "accumulator", "block")
        rows.append(
            [
                one["world_size"],
                one["shape"]["seqlen"] // one["world_size"],
                one["dtype"],
                _mb(one["peak_mem_bytes"]) + _verdict(one),
                " + ".join(f"{one['detail'][p + '_bytes'] / 1e6:.1f}" for p in parts) + " MB",
                _mb(heap["peak_mem_bytes"]) if heap else "",
            ]
        )
    return _table(rows)


def planning(records: list[dict]) -> list[str]:
    """Placement, plan and schedule for 128 ranks, in a process without torch."""
    rows = [
        ["tokens", "ranks", "schedules made", "p50", "p99", "peak memory", "of it for planning"]
    ]
    for one in _of(records, "ringkern"):
        shape = one["shape"]
        planned = shape["ranks_planned"]
        rows.append(
            [
                f"{shape['batch']} x {shape['seqlen']}"
                + (f" on {shape['cached']}, {shape['turns']} turns" if "turns" in shape else ""),
                one["world_size"],
                f"{planned} rank{'s' * (planned > 1)}",
                _time(one["time_us"]["p50"]),
                _time(one["time_us"]["p99"]),
                _mb(one["peak_mem_bytes"]) + _verdict(one),
                _mb(one["detail"]["rss_growth_bytes"]),
            ]
        )
    return _table(rows)


def options(records: list[dict]) -> list[str]:
    """What lanes and checksums cost against the plain ring of the same run."""
    rows = [["64 MiB each way, 2 ranks", "p50", "time"]]
    for one in records:
        name = one["impl"].partition("+")[2] or "1 lane, no checksum"
        ratio = "1" if one["ratio"] is None else f"{one['ratio']:.2f} x"
        rows.append([name, _time_and_rate(one), ratio])
    return _table(rows)


def choice(records: list[dict]) -> list[str]:
    """By how much the method that each rule takes misses the fastest, mean and worst."""
    points = regret.points(records)
    rows = [["link", "points", *regret.RULES.values()]]
    links = list(dict.fromkeys(point.link for point in points))
    for link in [*links, None]:
        some = [point for point in points if link in (None, point.link)]
        cells = [_mean_and_worst([p.regret(rule) for p in some]) for rule in regret.RULES]
        rows.append([link or "all", len(some), *cells])
    if points:
        everywhere = [point.regret("auto") for point in points]
        met = statistics.fmean(everywhere) <= 0.02 and max(everywhere) <= 0.08
        rows.append(
            ["asked for", "", "2 %, worst 8 %" + ("" if met else ", **missed**"), "", "", ""]
        )
    return _table(rows)


def _mean_and_worst(shares: list[float]) -> str:
    return f"{statistics.fmean(shares):.1%}, worst {max(shares):.1%}"


def order(records: list[dict]) -> list[str]:
    """pass_q against the paper's order, which returns all partial outputs at the end."""
    heads = ["link", "new", "cached", "pass_q, p50", "paper's order, p50", "time"]
    rows = [heads + ["after the last attention", "in the paper's order", "asked for"]]
    for one in _of(records, "pass_q"):
        peer = _find(records, one["case"], one["peer"])
        rows.append(
            [
                one["link"],
                one["shape"]["new"],
                one["shape"]["cached"],
                _time(one["time_us"]["p50"]),
                _time(peer["time_us"]["p50"]),
                f"{one['ratio']:.2f} x",
                f"{_time(one['detail']['tail_ms'] * 1e3)}, {one['detail']['tail_ratio']:.2f} x",
                _time(peer["detail"]["tail_ms"] * 1e3),
                f"1 x, 0.5 x{_verdict(one)}",
            ]
        )
    return _table(rows)


def decode(records: list[dict]) -> list[str]:
    """One token of each sequence, against the paper's ring decode, and that without padding."""
    heads = ["batch", "cached", "gather_q, p50", "paper's ring decode, p50", "time", "asked for"]
    rows = [[*heads, "without padding", "time"]]
    for one in _of(records, "gather_q"):
        peer = _find(records, one["case"], one["peer"])
        kinder = _find(records, one["case"], UNPADDED)
        target = one["targets"].get("ratio")
        rows.append(
            [
                one["shape"]["batch"],
                one["shape"]["cached"],
                _time(one["time_us"]["p50"]),
                _time(peer["time_us"]["p50"]),
                f"{one['ratio']:.2f} x",
                "" if target is None else f"{target:.2f} x{_verdict(one)}",
                _time(kinder["time_us"]["p50"]),
                f"{one['time_us']['p50'] / kinder['time_us']['p50']:.2f} x",
            ]
        )
    return _table(rows)


def hidden(records: list[dict]) -> list[str]:
    """pass_kv where equation (2) says that K and V travel under attention."""
    rows = [["link", "new", "cached", "pass_kv, p50", "under way", "exposed", "asked for"]]
    for one in _of(records, "pass_kv"):
        if "exposed_comm" in one["targets"]:
            rows.append(
                [
                    one["link"],
                    one["shape"]["new"],
                    one["shape"]["cached"],
                    _time(one["time_us"]["p50"]),
                    _time(one["detail"]["exchange_ms"] * 1e3),
                    f"{one['exposed_comm']:.2%}",
                    f"{one['targets']['exposed_comm']:.0%}{_verdict(one)}",
                ]
            )
    return _table(rows)


def overlap(records: list[dict]) -> list[str]:
    """A ring step against its attention and its messages alone, and against others' messages."""
    others = {"sockets_step": "by plain sockets", "gloo_step": "by gloo"}
    others = {impl: head for impl, head in others.items() if _of(records, impl)}
    rows = [
        ["over", "ranks", "attention", "messages", "both, as a step", "of the longer", "asked for"]
    ]
    rows[0] += others.values()
    for one in _of(records, "step"):
        every = ["compute", "transfer", "step", *others]
        times = {i: _find(records, one["case"], i)["time_us"]["p50"] for i in every}
        longer = max(times["compute"], times["transfer"])
        rows.append(
            [
                one["link"] if "shaped" in one["link"] else f"{one['transport']}, {one['link']}",
                one["world_size"],
                *(_time(times[impl]) for impl in every[:3]),
                f"{times['step'] / longer:.2f} x",
                f"1.05 x{_verdict(one)}",
                *(f"{times[impl] / longer:.2f} x" for impl in others),
            ]
        )
    return _table(rows)


def host(records: list[dict]) -> list[str]:
    """What a decode step and a layer's call cost the host, by method.

    On 8 ranks with its launches, and in a graph.
    """
    rows = [
        ["method", "a decode step of 64, planned", "its choice", "the first layer's call"]
        + ["another's", "on 8 ranks, with launches", "in a graph"]
    ]
    for plan in records:
        layer = _find(records, plan["case"].replace("/plan/", "/layer/"), plan["impl"])
        if plan["op"] == "host_plan" and layer:
            times = [_time(one["time_us"]["p50"]) + _verdict(one) for one in (plan, layer)]
            choice_us = _time(plan["detail"]["choice_us"])
            graph = _find(records, "host/graph/w8/b64", plan["impl"])
            replayed = _time(graph["detail"]["layer_us"]) + _verdict(graph) if graph else "none"
            first = _time(layer["detail"]["first_us"])
            launch = _find(records, "host/launch/w8/b64", plan["impl"])
            launched = _time(launch["time_us"]["p50"]) + _verdict(launch) if launch else "none"
            rows.append(
                [f"`{plan['impl']}`", times[0], choice_us, first, times[1], launched, replayed]
            )
    return _table(rows)


def kernels(records: list[dict]) -> list[str]:
    """Kernels on a GPU against what the card does at best, and others' in the same run."""
    rows = [["case", "kernel", "p50", "rate", "of the ceiling", "asked for", "others' rate"]]
    for one in records:
        if not one["impl"].startswith("ringkern") or "over_floor" not in one["detail"]:
            continue
        others = [r for r in records if r["case"] == one["case"] and r is not one]
        rows.append(
            [
                one["case"].removeprefix("gpu/"),
                one["impl"].partition("+")[2] or one["op"],
                _time(one["time_us"]["p50"]),
                _gpu_rate(one),
                f"{1 / one['detail']['over_floor']:.0%} of {one['detail']['bound']}",
                _asked_of_kernel(one),
                ", ".join(
                    [f"{r['impl']} {_gpu_rate(r)}" for r in others]
                    + [f"{impl}: {why}" for impl, why in one["detail"].get("absent", {}).items()]
                ),
            ]
        )
    return _table(rows)


def _gpu_rate(one: dict) -> str:
    if one["detail"]["bound"] == "matmul":
        return f"{one['tflops']:.0f} TFLOP/s"
    return f"{one['detail']['gb_s']:.0f} GB/s"


def _asked_of_kernel(one: dict) -> str:
    words = []
    for name, most in one["targets"].items():
        most = f"{most:.2f} x {one['peer']}" if name == "ratio" else f"{1 / most:.0%}"
        words.append(most)
    return ", ".join(words) + _verdict(one)


# name -> (what the ids of its cases begin with, the function that makes it)
TABLES = {
    "transport": ("exchange/", transport),
    "ring": ("ring_attn_fwd/", ring),
    "cost": ("ring_attn_fwd/", cost),
    "memory": ("memory/", memory),
    "planning": ("plan/", planning),
    "options": ("exchange_options/", options),
    "choice": ("stage/", choice),
    "hidden": ("stage/", hidden),
    "order": ("order/", order),
    "decode": ("decode/", decode),
    "host": ("host/", host),
    "kernels": ("gpu/", kernels),
    "overlap": ("overlap/", overlap),
    "overlap_gpu": ("gpu/overlap/", overlap),
}


def _of(records, impl: str) -> list[dict]:
    return [one for one in records if one["impl"] == impl]


def _find(records, case: str, impl: str) -> dict | None:
    return next((r for r in records if (r["case"], r["impl"]) == (case, impl)), None)


def _table(rows: list[list]) -> list[str]:
    """Return markdown; an empty list where there is no row but the heads."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]] if len(rows) > 1 else []


def _verdict(one: dict) -> str:
    return ", **missed**" if one["met"] is False else ""


def _time_and_rate(one: dict) -> str:
    """Return the time of a call, and the rate where it is bytes and not latency that count."""
    time, nbytes = _time(one["time_us"]["p50"]), one["shape"]["nbytes"]
    return time if nbytes < 4096 else f"{time}, {one['busbw_gb_s']:.2f} GB/s"


def _time(us: float) -> str:
    if us < 1e3:
        return f"{us:.0f} us" if us >= 10 else f"{us:.1f} us"
    return f"{us / 1e3:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count} bytes"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
