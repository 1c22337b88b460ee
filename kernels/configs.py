"""How kernels are cut for a GPU: block sizes, warps and pipeline stages, as a table.

Pure: no torch, no device. What a row must hold is no spills and shared memory within SHARED_BYTES:
tests/compile_report.py proves it of every row that a launch can reach, in each phase, where heads
are a multiple of 16 bytes and K's are as wide as V's, or 192 and 128. Of other pairs some spill in
16 bits.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

PHASES = ("first", "middle", "last", "only")  # of the step kernel
DTYPES = {"float16": 16, "bfloat16": 16, "float32": 32}
MAX_HEADDIM = 256
# Family of architectures -> bytes of shared memory that one block may have.
SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}
FAMILIES = {80: "sm_80", 87: "sm_80", 90: "sm_90"}
FAMILIES |= dict.fromkeys((100, 101, 103, 110), "sm_100")

# The first row that fits is taken. family and phase: * is any. bits: of the dtype. headdim: the
# larger of headdim and headdim_v, up to this. rows: * is any; a number, which is its block_m: of a
# tile that has use for no more, instead of a row * with a larger block_m. A kernel without blocks
# of keys has block_n 0. registers: that a thread may have; * is as many as the compiler likes. Left
# alone, it spills some where that fits one more program on an SM; given a number, it keeps more
# values at hand, and spills some of those. Which is right of a row, only compiling it tells.
TABLE = """
kernel  family  bits  headdim  phase   rows  block_m  block_n  num_warps  num_stages  registers
step    sm_90   16    64       *       *     128      128      8          3           *
step    sm_90   16    128      first   *     128      128      8          2           *
step    sm_90   16    128      middle  *     128      128      8          2           *
step    sm_90   16    128      *       *     128      64       8          3           *
step    sm_90   16    256      *       *     64       32       8          2           *
step    sm_100  16    128      *       *     128      64       8          3           *
step    sm_100  16    256      *       *     64       32       8          2           *
step    sm_80   16    64       *       *     128      64       8          3           *
step    sm_80   16    128      first   *     128      64       8          3           *
step    sm_80   16    128      middle  *     128      64       8          3           *
step    sm_80   16    128      *       *     64       64       8          3           *
step    sm_80   16    256      *       *     32       64       8          2           *
step    *       16    64       *       *     128      64       8          2           *
step    *       16    128      first   *     128      64       8          2           *
step    *       16    128      middle  *     128      64       8          2           *
step    *       16    128      *       *     128      32       8          2           *
step    *       16    256      *       *     32       32       4          2           255
step    sm_90   32    64       *       *     32       32       8          2           255
step    sm_100  32    64       *       *     64       16       8          2           255
step    *       32    64       *       *     64       32       8          2           255
step    sm_90   32    128      *       *     16       32       8          2           255
step    sm_100  32    128      *       *     16       32       8          2           255
step    sm_80   32    128      *       *     32       16       4          2           255
step    *       32    128      *       *     32       16       8          2           255
step    *       32    256      *       *     16       16       8          2           255
step    *       16    128      *       16    16       64       4          2           255
step    *       16    128      *       32    32       64       4          2           255
step    *       16    128      *       64    64       64       8          3           255
step    *       16    256      *       16    16       32       4          2           255
step    *       16    256      *       32    32       32       4          2           255
step    sm_100  32    64       *       16    16       32       8          2           255
step    *       32    64       *       16    16       32       4          2           255
step    sm_80   32    64       *       32    32       32       4          2           255
step    sm_100  32    64       *       32    32       16       4          2           255
step    *       32    64       *       32    32       32       8          2           255
step    *       32    128      *       16    16       16       4          2           255
decode  *       16    128      *       *     32       64       4          3           255
decode  *       16    256      *       *     16       32       8          2           128
decode  *       32    128      *       *     16       16       4          2           255
decode  *       32    256      *       *     16       16       8          2           255
merge   *       16    128      *       *     16       0        4          1           *
merge   *       16    256      *       *     8        0        4          1           *
merge   *       32    128      *       *     16       0        4          1           *
merge   *       32    256      *       *     8        0        4          1           *
pack    *       32    256      *       *     4        0        4          1           *
"""


class Config(NamedTuple):
    """What a launch adds to a kernel's arguments."""

    block_m: int  # query rows, or rows where there are no queries
    block_n: int  # keys; 0 where there are none
    num_warps: int
    num_stages: int
    registers: int | None = None  # that a thread may have; None: as many as the compiler likes


class Row(NamedTuple):
    """One line of TABLE."""

    kernel: str
    family: str
    bits: int
    headdim: int
    phase: str
    rows: int | None  # None: *
    config: Config


def _number(cell: str) -> int | None:
    return None if cell == "*" else int(cell)


def parse(table: str) -> tuple[Row, ...]:
    """Return the rows of a table, whose first line is its head."""
    return tuple(_parse(*line.split()) for line in table.strip().splitlines()[1:])


def _parse(kernel, family, bits, headdim, phase, rows, *config):
    return Row(
        kernel, family, int(bits), int(headdim), phase, _number(rows), Config(*map(_number, config))
    )


ROWS = parse(TABLE)


def family(arch: int) -> str:
    """Return the family of a compute capability, as 90: the row "sm_90".

    What is unknown and 8.0 or later is taken to have the least shared memory.
    """
    if arch < 80:
        raise ValueError(f"arch: want compute capability 80 (8.0) or later, got {arch}")
    return FAMILIES.get(arch, "sm_86")


@functools.cache
def find(
    kernel: str, arch: int, headdim: int, headdim_v: int, dtype: str, phase: str = "*",
    rows: int | None = None,
) -> Row:  # fmt: skip
    """Return the row of the table that applies; arguments as for pick()."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: want one of {', '.join(DTYPES)}, got {dtype!r}")
    if phase not in (*PHASES, "*"):
        raise ValueError(f"phase: want * or one of {', '.join(PHASES)}, got {phase!r}")
    widest = max(headdim, headdim_v)
    if not 0 < min(headdim, headdim_v) <= widest <= MAX_HEADDIM:
        raise ValueError(f"headdim: want 1 to {MAX_HEADDIM}, got {headdim} and {headdim_v}")
    found = find_in(ROWS, kernel, family(arch), DTYPES[dtype], widest, phase, rows)
    if found is None:
        kernels = sorted({row.kernel for row in ROWS if row.bits == DTYPES[dtype]})
        raise ValueError(f"kernel: want one of {', '.join(kernels)} for {dtype}, got {kernel!r}")
    return found


def find_in(
    table: Sequence[Row], kernel: str, family: str, bits: int, headdim: int, phase: str,
    rows: int | None,
) -> Row | None:  # fmt: skip
    """Return the row of a table that applies; None where none does."""

    def fits(row):
        where = row.family in (family, "*") and row.phase in (phase, "*")
        return where and (row.kernel, row.bits) == (kernel, bits) and headdim <= row.headdim

    fitting = [row for row in table if fits(row)]
    full = next((row for row in fitting if row.rows is None), None)
    if full is None or rows is None:
        return full
    short = (row for row in fitting if row.rows is not None)
    return next((row for row in short if rows <= row.rows < full.config.block_m), full)


def pick(
    kernel: str, arch: int, headdim: int, headdim_v: int, dtype: str, phase: str = "*",
    rows: int | None = None,
) -> Config:  # fmt: skip
    """Return how to cut a kernel.

    Args:
        kernel: "step", "decode", "merge" or "pack".
        arch: compute capability times ten, 80 and up.
        headdim, headdim_v: 1 to 256.
        dtype: "float16", "bfloat16" or "float32".
        phase: of the step kernel: "first", "middle", "last", "only"; "*" is right for any.
        rows: that a tile has use for, of the step kernel; None: any number.

    Raises:
        ValueError: no row applies.
    """
    return find(kernel, arch, headdim, headdim_v, dtype, phase, rows).config


def explain(
    kernel: str, arch: int, headdim: int, headdim_v: int, dtype: str, phase: str = "*",
    rows: int | None = None,
) -> str:  # fmt: skip
    """Return one line: which row of the table was taken, and why. Arguments as for pick()."""
    row = find(kernel, arch, headdim, headdim_v, dtype, phase, rows)
    block_m, block_n, num_warps, num_stages, registers = row.config
    cut = f"{block_m} x {block_n}" if block_n else f"{block_m} rows"
    asked = f"sm_{arch} {dtype} headdim {headdim}, {headdim_v} phase {phase}"
    taken = f"{row.family} {row.bits} bits headdim <= {row.headdim} phase {row.phase}"
    if rows is not None:
        asked += f" rows {rows}"
    if row.rows is not None:
        taken += f" rows <= {row.rows}"
    launch = f"{num_warps} warps, {num_stages} stages"
    if registers is not None:
        launch += f", {registers} registers"
    return f"{kernel} {cut}, {launch}: {asked} is row {taken}"
