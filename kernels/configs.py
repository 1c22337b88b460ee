"""How kernels are cut for a GPU: block sizes, warps and pipeline stages, as a table.

Pure: no torch, no device. What a row must hold is no spills and shared memory within SHARED_BYTES:
tests/compile_report.py proves it of every row that a launch can reach, in each phase.
"""

import functools
from typing import NamedTuple

PHASES = ("first", "middle", "last", "only")  # of the step kernel
DTYPES = {"float16": 16, "bfloat16": 16, "float32": 32}
MAX_HEADDIM = 256
# Family of architectures -> bytes of shared memory that one block may have.
SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}
FAMILIES = {80: "sm_80", 87: "sm_80", 90: "sm_90"}
FAMILIES |= dict.fromkeys((100, 101, 103, 110), "sm_100")

# The first row that fits is taken. family and phase: * is any. bits: of the dtype. headdim: the
# larger of headdim and headdim_v, up to this. A kernel without blocks of keys has block_n 0.
TABLE = """
kernel  family  bits  headdim  phase   block_m  block_n  num_warps  num_stages
step    sm_90   16    64       *       128      128      8          3
step    sm_90   16    128      first   128      128      8          2
step    sm_90   16    128      middle  128      128      8          2
step    sm_90   16    128      *       128      64       8          3
step    sm_90   16    256      *       64       32       8          2
step    sm_100  16    128      *       128      64       8          3
step    sm_100  16    256      *       64       32       8          2
step    sm_80   16    64       *       128      64       8          3
step    sm_80   16    128      first   128      64       8          3
step    sm_80   16    128      middle  128      64       8          3
step    sm_80   16    128      *       64       64       8          3
step    sm_80   16    256      *       32       64       8          2
step    *       16    64       *       128      64       8          2
step    *       16    128      first   128      64       8          2
step    *       16    128      middle  128      64       8          2
step    *       16    128      *       128      32       8          2
step    *       16    256      *       32       32       4          2
step    *       32    64       *       64       32       8          2
step    sm_90   32    128      *       16       32       8          2
step    sm_100  32    128      *       16       32       8          2
step    *       32    128      *       32       16       4          2
step    sm_80   32    256      *       32       32       8          2
step    sm_90   32    256      *       16       16       16         2
step    sm_100  32    256      *       16       16       8          2
step    *       32    256      *       16       32       8          2
decode  *       16    128      *       32       64       4          3
decode  *       16    256      *       16       32       8          2
decode  *       32    128      *       16       16       4          2
decode  *       32    256      *       16       16       4          2
merge   *       16    128      *       16       0        4          1
merge   *       16    256      *       8        0        4          1
merge   *       32    128      *       16       0        4          1
merge   *       32    256      *       8        0        4          1
pack    *       32    256      *       4        0        4          1
"""

# Tiles of fewer rows than TABLE's, where there are no more queries: of up to block_m.
SHORT_TABLE = """
kernel  family  bits  headdim  phase   block_m  block_n  num_warps  num_stages
step    *       16    128      *       16       64       4          2
step    *       16    128      *       32       64       4          2
step    *       16    128      *       64       64       8          3
step    *       16    256      *       16       32       4          2
step    *       16    256      *       32       32       4          2
step    *       32    64       *       16       32       4          2
step    *       32    64       *       32       32       4          2
step    *       32    128      *       16       16       4          2
step    sm_80   32    256      *       16       16       8          2
"""


# That a thread may have. Left alone, ptxas spills some where that fits one more program on a
# processor; of 4 warps, two fit with all of them.
MOST_REGISTERS = 255


class Config(NamedTuple):
    """What a launch adds to a kernel's arguments."""

    block_m: int  # query rows, or rows where there are no queries
    block_n: int  # keys; 0 where there are none
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """One line of TABLE."""

    kernel: str
    family: str
    bits: int
    headdim: int
    phase: str
    config: Config


def _parse(line):
    kernel, family, bits, headdim, phase, *config = line.split()
    return Row(kernel, family, int(bits), int(headdim), phase, Config(*map(int, config)))


def _parse_table(table):
    return tuple(_parse(line) for line in table.strip().splitlines()[1:])


ROWS, SHORT_ROWS = _parse_table(TABLE), _parse_table(SHORT_TABLE)


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
    """Return the row of the tables that applies; arguments as for pick()."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: want one of {', '.join(DTYPES)}, got {dtype!r}")
    if phase not in (*PHASES, "*"):
        raise ValueError(f"phase: want * or one of {', '.join(PHASES)}, got {phase!r}")
    widest = max(headdim, headdim_v)
    if not 0 < min(headdim, headdim_v) <= widest <= MAX_HEADDIM:
        raise ValueError(f"headdim: want 1 to {MAX_HEADDIM}, got {headdim} and {headdim_v}")
    here = family(arch)

    def fit(table):
        for row in table:
            where = row.family in (here, "*") and row.phase in (phase, "*")
            what = row.kernel == kernel and row.bits == DTYPES[dtype]
            if what and where and widest <= row.headdim:
                yield row

    found = next(fit(ROWS), None)
    if found is None:
        kernels = sorted({row.kernel for row in ROWS if row.bits == DTYPES[dtype]})
        raise ValueError(f"kernel: want one of {', '.join(kernels)} for {dtype}, got {kernel!r}")
    if rows is not None:
        for row in fit(SHORT_ROWS):
            if rows <= row.config.block_m < found.config.block_m:
                return row
    return found


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
    """Return one line: which row of the tables was taken, and why. Arguments as for pick()."""
    row = find(kernel, arch, headdim, headdim_v, dtype, phase, rows)
    block_m, block_n, num_warps, num_stages = row.config
    cut = f"{block_m} x {block_n}" if block_n else f"{block_m} rows"
    asked = f"sm_{arch} {dtype} headdim {headdim}, {headdim_v} phase {phase}"
    taken = f"{row.family} {row.bits} bits headdim <= {row.headdim} phase {row.phase}"
    if rows is not None:
        asked += f" rows {rows}"
        taken += f" rows <= {block_m}" if row in SHORT_ROWS else ""
    return f"{kernel} {cut}, {num_warps} warps, {num_stages} stages: {asked} is row {taken}"
