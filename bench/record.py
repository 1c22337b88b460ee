"""One benchmark result = one JSON line. This file is the schema."""

import json
import math
import re

VERSION = 1

# name -> (type, unit or meaning). Every record has every key; null where not measured.
FIELDS = {
    "v": (int, "schema version"),
    "run": (str, "records with the same run were measured together, interleaved within a case"),
    "case": (str, "stable id, as bench/cases.py spells it"),
    "op": (
        str,
        "exchange | ring_attn_fwd | stage | plan | host_plan | host_layer | attn_step | decode | merge | pack | gpu_tests",
    ),
    "impl": (
        str,
        "ringkern, ringkern+OPTION, ringkern_func (the drop-in), a method | a peer: gloo, torch_sdpa, paper_pass_q, torch_cudnn, flash_attn_4",
    ),
    "shape": (dict, "sizes of the case; lengths are global, of all ranks together"),
    "dtype": (str, "bfloat16 | float16 | float32 | int64"),
    "world_size": (int, "ranks"),
    "ranks_per_node": (int, "ranks on one machine"),
    "threads": (int, "threads that compute, on each process that does"),
    "layout": (str, "contiguous | zigzag | striped"),
    "transport": (str, "tcp | nccl | local"),
    "link": (
        str,
        "what the bytes went over: loopback | shaped to N Mbit/s | eth | nvlink | pcie | ib",
    ),
    "time_us": (dict, "min, p5, p50, p95, p99, max over the timed calls, of the slowest rank"),
    "samples_us": (list, "of each repetition, the p50 of its calls, in the order they ran"),
    "iters": (int, "timed calls"),
    "warmup": (int, "untimed repetitions before"),
    "timer": (str, "wall | cuda_event"),
    "flops": (int, "model FLOPs of one call, all ranks, masked part not counted"),
    "bytes_sent": (int, "bytes that a rank sends in one call; the most that any does"),
    "tflops": (float, "flops / world_size / p50, in 1e12 per second per rank"),
    "busbw_gb_s": (float, "bytes_sent / p50, in 1e9 bytes per second per rank"),
    "exposed_comm": (float, "share of a call that the worst rank stood waiting, median; 0 to 1"),
    "peak_mem_bytes": (int, "most resident memory on the worst rank; detail says above what"),
    "max_err": (float, "max abs error against the oracle on the checked sample"),
    "ok": (bool, "max_err is within the tolerance; a wrong result is not a result"),
    "peer": (str, "impl of the same case and run that ratio is held against"),
    "ratio": (float, "p50 / the peer's p50; below 1 is faster"),
    "targets": (dict, "field -> what it should be at most; `met` says whether it is"),
    "met": (bool, "every target is met; null where there is none"),
    "detail": (
        dict,
        "more figures of this op, median over repetitions of the worst rank; absent: peers that could not take part, and why",
    ),
    "machine": (
        dict,
        "cpu, cores, kernel, congestion_control, load_1m at the start of the case; of a kernel its gpu",
    ),
    "versions": (dict, "ringkern (version+git sha, .dirty), torch, numpy, python; triton, cuda"),
    "cmd": (str, "the command that makes this record again"),
    "env": (dict, "variables that change what is measured, as set"),
    "host": (str, "short hash of the host name"),
    "time_utc": (str, "ISO 8601"),
    "note": (str, "free text"),
}
NEVER_NULL = {"v", "run", "case", "op", "impl", "shape", "world_size", "time_us", "samples_us"}
NEVER_NULL |= {"iters", "ok", "targets", "detail", "machine", "versions", "cmd", "env", "time_utc"}
QUANTILES = ("min", "p5", "p50", "p95", "p99", "max")
# A record is public: it says what a machine is, not where things lie on it.
A_PATH = re.compile(r"(^|[\s'\"=:])(/[\w.-]+){2,}|[A-Z]:\\")


def check(record: dict) -> list[str]:
    """Return the record's faults as a list of lines; empty when it is well formed."""
    faults = [f"missing {key}" for key in FIELDS.keys() - record.keys()]
    faults += [f"unknown {key}" for key in record.keys() - FIELDS.keys()]
    for key in record.keys() & FIELDS.keys():
        faults += _check_value(key, record[key])
    return sorted(faults or _check_sense(record))


def _check_value(key: str, value) -> list[str]:
    kind = FIELDS[key][0]
    if value is None:
        return [f"{key} is null"] * (key in NEVER_NULL)
    if kind is float and type(value) in (int, float):
        return [f"{key} is {value}"] * (not math.isfinite(value))
    if type(value) is not kind:
        return [f"{key}: want {kind.__name__}, got {type(value).__name__}"]
    return [f"{key} holds a path: {text}" for text in _texts(value) if A_PATH.search(text)]


def _check_sense(record: dict) -> list[str]:
    faults = []
    if record["v"] != VERSION:
        faults.append(f"v: want {VERSION}, got {record['v']}")
    times = record["time_us"]
    if tuple(times) != QUANTILES:
        faults.append(f"time_us: want {', '.join(QUANTILES)}, got {', '.join(times)}")
    elif list(times.values()) != sorted(times.values()) or times["min"] <= 0:
        faults.append(f"time_us: want quantiles above 0 that rise, got {list(times.values())}")
    if (record["ratio"] is None) != (record["peer"] is None):
        faults.append("ratio and peer: want both or neither")
    if record["met"] != met(record):
        faults.append(f"met: want {met(record)}, as the targets say, got {record['met']}")
    return faults


def met(record: dict) -> bool | None:
    """Return whether every target of the record is met; None where it has none."""
    targets = record["targets"]
    return all(figure(record, name) <= most for name, most in targets.items()) if targets else None


def figure(record: dict, name: str) -> float:
    """Return the figure that a target names: a field, or one level down as in time_us.max."""
    field, _, part = name.partition(".")
    value = record[field][part] if part else record[field]
    return math.inf if value is None else value


def _texts(value):
    """Yield every string in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def append(path, records: list[dict]) -> None:
    """Add records to a .jsonl file; refuse all of them if one is malformed or wrong."""
    for record in records:
        faults = check(record)
        faults += ["ok is false: a wrong result is not a result"] * (record.get("ok") is False)
        if faults:
            raise ValueError(f"{record.get('case')}: {'; '.join(faults)}")
    with open(path, "a") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def load(path) -> list[dict]:
    """Return the records of a .jsonl file that have this version, checked."""
    records = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            record = json.loads(line)
            if record.get("v") != VERSION:
                continue
            faults = check(record)
            if faults:
                raise ValueError(f"{path}:{number}: {'; '.join(faults)}")
            records.append(record)
    return records
