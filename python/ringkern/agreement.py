"""Whether all ranks were asked the same: RINGKERN_CHECK=1."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from ringkern.errors import ArgumentError, RingkernError
from ringkern.plan import Plan
from ringkern.types import Problem

RECORD_BYTES = 2048  # of a rank's arguments, as they are compared


def agree(ring, accept: Callable[[], Problem], **more) -> Problem:
    """Return what accept() makes of a call's arguments, checked.

    With RINGKERN_CHECK=1 the ranks first compare what they were asked, so that a call that one rank
    refuses, or that differs between ranks, is an ArgumentError on every rank.

    Args:
        more: further arguments to compare: plans and tensors by a digest, others as they are.
    """
    ring.check_open()
    if not ring.compares_arguments:
        return accept()
    try:
        problem, refused = accept(), None
        mine = asdict(problem) | {name: _comparable(value) for name, value in more.items()}
    except RingkernError as error:
        words = str(error).encode("ascii", "replace").decode()
        mine, refused = {"refused": words[: RECORD_BYTES // 2]}, error
    records = [json.loads(x) for x in ring.gather_bytes(json.dumps(mine).encode())]
    if refused:
        raise refused
    for rank, record in enumerate(records):
        if "refused" in record:
            raise ArgumentError(f"rank {rank} refused the call: {record['refused']}")
    _check_same(records)
    return problem


def _comparable(value):
    """Return what stands for a value in a record of bounded size."""
    if isinstance(value, Plan):  # without the ids, which only this process can read
        shape = value.lengths[:4], len(value.lengths), value.layout, value.serial
        starts = None if value.starts is None else value.starts.tolist()
        return f"{shape} {_digest((value.world_size, value.lengths, value.layout, starts))}"
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {_digest(value.detach().cpu().double().tolist())}"
    return value if isinstance(value, (bool, int, float)) else str(value)[:100]


def _digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _check_same(records: list[dict]) -> None:
    for key in records[0]:
        values: dict = {}
        for rank, record in enumerate(records):
            values.setdefault(json.dumps(record[key]), []).append(rank)
        told = "; ".join(f"{value}: ranks {ranks}" for value, ranks in values.items())
        if len(values) > 1:
            raise ArgumentError(f"{key} differs between ranks: {told}. Call all ranks alike.")
