"""From what the ranks measured to records, and to a line for the terminal."""

import datetime
import statistics

import numpy as np

from bench import record
from bench.measurement import Measurement, detail


def make_records(case, found: dict[str, Measurement], facts: dict) -> list[dict]:
    """Return one record per implementation of a case, of those that could be measured.

    facts: fields that the run knows.
    """
    impls = [impl for impl in case.impls if impl in found]
    records = [_make_record(case, impl, found[impl], facts) for impl in impls]
    peer = next((one for one in records if one["impl"] == case.peer), None)
    for one in records:
        if peer and one is not peer:
            one["peer"] = peer["impl"]
            one["ratio"] = ratio(one, peer)
            if peer["detail"].get("tail_ms"):
                tails = one["detail"]["tail_ms"], peer["detail"]["tail_ms"]
                one["detail"]["tail_ratio"] = round(tails[0] / tails[1], 4)
        one["met"] = record.met(one)
    return records


def ratio(one: dict, peer: dict) -> float:
    """Return how long a call takes, as a multiple of the peer's."""
    return round(one["time_us"]["p50"] / peer["time_us"]["p50"], 4)


def _make_record(case, impl: str, found: Measurement, facts: dict) -> dict:
    times = time_us(found.times_s)
    setting = _setting(case, impl)
    flops, sent = case.operation.flops(case), case.operation.bytes_sent(case)
    sent = sent if setting["transport"] else None
    rank_flops = None if flops is None else flops / setting["world_size"]
    values = setting | {
        "v": record.VERSION,
        "case": case.id,
        "op": case.operation.name,
        "impl": impl,
        "shape": case.shape,
        "dtype": case.dtype,
        "time_us": times,
        "samples_us": [round(statistics.median(calls) * 1e6, 2) for calls in found.times_s],
        "iters": sum(len(calls) for calls in found.times_s),
        "warmup": case.warmup,
        "timer": "wall",
        "flops": flops,
        "bytes_sent": sent,
        "tflops": rank_flops and round(rank_flops / times["p50"] / 1e6, 5),
        "busbw_gb_s": sent and round(sent / times["p50"] / 1e3, 5),
        "exposed_comm": exposed(found),
        "peak_mem_bytes": found.peak_mem_bytes,
        "max_err": found.max_err,
        "ok": found.ok,
        "targets": case.targets.get(impl, {}),
        "detail": detail(found),
        "cmd": f"python -m bench.run {case.id}",
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    values |= facts
    for name, fact in found.facts.items():
        values[name] = values[name] | fact if isinstance(fact, dict) else fact
    return {name: values.get(name) for name in record.FIELDS}


def _setting(case, impl: str) -> dict:
    """Return the fields that say how many ranks there were, and what was between them."""
    alone = impl == case.alone
    return {
        "world_size": 1 if alone else case.world_size,
        "ranks_per_node": case.world_size if case.in_ranks and not alone else None,
        "threads": case.world_size if alone else 1,
        "layout": None if alone else case.layout,
        "transport": None if alone else case.transport,
        "link": None if alone or not case.transport else _link(case),
    }


def _link(case) -> str:
    return f"shaped to {case.link_mbit} Mbit/s" if case.link_mbit else "loopback"


def time_us(times_s: list[list[float]]) -> dict[str, float]:
    """Return the quantiles of all timed calls, in microseconds."""
    times = np.concatenate([np.asarray(calls) for calls in times_s]) * 1e6
    levels = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(times, levels[name])), 2) for name in record.QUANTILES}


def exposed(found: Measurement) -> float | None:
    """Return the share of a call that the rank that waited most stood waiting, median."""
    shares = [
        spent["wait_ms"] / 1e3 / statistics.fmean(calls)
        for spent, calls in zip(found.details, found.times_s, strict=True)
        if "wait_ms" in spent
    ]
    return round(statistics.median(shares), 6) if shares else None


def line(one: dict) -> str:
    """Return a record in one line."""
    words = [f"{one['case']}  {one['impl']}:", f"p50 {_time(one['time_us']['p50'])}"]
    if one["busbw_gb_s"] is not None:
        words.append(f"{one['busbw_gb_s']:.3g} GB/s")
    if one["exposed_comm"] is not None:
        words.append(f"exposed {one['exposed_comm']:.2%}")
    if "over_floor" in one["detail"]:
        words.append(f"{1 / one['detail']['over_floor']:.1%} of {one['detail']['bound']}")
    if one["peak_mem_bytes"] is not None:
        words.append(f"peak {one['peak_mem_bytes'] / 1e6:.1f} MB")
    if one["ratio"] is not None:
        words.append(f"{one['ratio']:.3f} of {one['peer']}'s time")
    words += [f"[{name} <= {most:g}]" for name, most in one["targets"].items()]
    words += {True: ["met"], False: ["MISSED"], None: []}[one["met"]]
    return " ".join(words + ([] if one["ok"] else [f"WRONG, max_err {one['max_err']:g}"]))


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 1e3 else f"{us / 1e3:.2f} ms" if us < 1e6 else f"{us / 1e6:.3f} s"
