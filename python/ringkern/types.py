"""The nouns: immutable, made of ints and strings, so that they print, compare and travel.

A list of runs or spans is an int64 table with one row each; the fields of Run and Span name its
columns, in order. Tables keep planning free of Python work per run.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """Positions start, start + stride, ... of one sequence; `length` of them."""

    start: int
    length: int
    stride: int = 1


class Run(NamedTuple):
    """A chunk and where it lies: rows [offset, offset + length) of a rank's packed tensor."""

    seq: int  # index of the sequence in the call
    offset: int
    start: int
    length: int
    stride: int


class Span(NamedTuple):
    """Query rows [q0, q1) against key rows [k0, k1), all of one sequence.

    Query row q0 + i sees key row k0 + j iff lo <= j * k_stride - i * q_stride <= hi. Causality,
    windows, offsets and strides all come down to these numbers. Where both sides have the same
    stride it is divided out, and both are 1. lo and hi are clipped to what the rows can reach, so
    a span is full, every pair visible, iff lo == 1 - (q1 - q0) and hi == k1 - k0 - 1.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int
    q_stride: int = 1
    k_stride: int = 1


class Move(NamedTuple):
    """One message of a step, to or from a peer."""

    peer: int
    kind: (
        str  # "kv": K and V; "q": queries; "part": (out, lse) of queries against the sender's keys
    )
    rank: int  # whose K and V, or whose queries
    tokens: int


WHOLE, FIRST_HALF, SECOND_HALF = range(3)


class Work(NamedTuple):
    """One local computation: queries of one rank against K and V of one rank."""

    q_rank: int
    kv_rank: int
    spans: np.ndarray  # [n, 8], columns as in Span
    half: int = WHOLE  # of what the one sees of the other: WHOLE, FIRST_HALF or SECOND_HALF


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What one rank does between two waits: post the messages, work under them, wait.

    Parts that have arrived are merged then; `drops` names the blocks not needed after this step.
    """

    index: int
    sends: tuple[Move, ...]
    recvs: tuple[Move, ...]
    work: tuple[Work, ...]
    drops: tuple[tuple[str, int], ...]  # (kind, rank)


@dataclass(frozen=True, slots=True)
class Problem:
    """What one attention call asks for, on one rank."""

    batch: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    dtype: str
    causal: bool
    softmax_scale: float
    window_size: tuple[int, int]
    softcap: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """A ring's profile: what `ringkern calibrate` measures, and what predictions are made from.

    Per rank, with all ranks busy where nothing else is said.
    """

    attend_tflops: tuple[tuple[int, float], ...]  # (query rows, 1e12 FLOP/s) of spans, ascending
    span_us: float  # fixed cost of one span
    merge_gb_s: float  # parts merged, 1e9 bytes/s
    link_gb_s: float  # between neighbours, both ways at once, each way
    latency_us: float  # of an exchange of nothing much
    step_us: float = 0.0  # by how much ranks fall out of step in one that works so long
    contention: float = 0.0  # how much of the time that messages travel they take from work
    # Like attend_tflops, of one busy rank: more where ranks share cores or memory. (): as much.
    alone_tflops: tuple[tuple[int, float], ...] = ()
