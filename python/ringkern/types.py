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

    Query row q0 + i sees key row k0 + j iff lo <= j - i <= hi. Causality, windows, offsets and
    strides all come down to these two numbers. They are clipped to what the rows can reach, so a
    span is full, every pair visible, iff lo == 1 - (q1 - q0) and hi == k1 - k0 - 1.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What one rank does while the K and V of one rank are at hand."""

    index: int  # 0 .. world_size - 1
    kv_rank: int  # whose K and V these are
    spans: np.ndarray  # [n, 6], columns as in Span; empty where the mask hides everything
    send_tokens: int  # of kv_rank's tokens, passed on to the next rank; all or none
    recv_tokens: int  # that arrive from the previous rank for the next step


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
