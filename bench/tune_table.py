"""The table of kernel configurations, renewed from what was measured: text in, text out."""

import itertools
import math
import re
from typing import NamedTuple

from ringkern.kernels.configs import PHASES, Config, Row, find_in, parse

WORTH = 0.99  # of the present configuration's time: what is not faster than this is noise
TABLE = re.compile(r'(?<=^TABLE = """\n)(.*?)(?=^"""$)', re.S | re.M)


class Key(NamedTuple):
    """What a configuration is chosen by, on one family of architectures."""

    kernel: str
    bits: int  # of the dtype
    headdim: int  # up to this
    phase: str
    rows: int | None = None  # of queries that a tile is for; None: any

    def __str__(self) -> str:
        """Return the key as the command line takes it."""
        name = f"{self.kernel}/{self.bits}/{self.headdim}"
        name += "" if self.phase == "*" else f"/{self.phase}"
        return name if self.rows is None else f"{name}/rows{self.rows}"


class Trial(NamedTuple):
    """What came of one configuration."""

    config: Config
    times_s: tuple[float, ...] = ()  # the medians of its workloads
    dropped: str | None = None  # why it cannot be taken
    registers: int | None = None
    shared_bytes: int | None = None


def choose(trials: list[Trial], present: Config) -> Config | None:
    """Return the configuration with the smallest geometric mean of times.

    The present one stays unless another is faster by more than noise; of equals the first is taken.
    None where all were dropped.
    """
    means = {
        one.config: math.exp(sum(map(math.log, one.times_s)) / len(one.times_s))
        for one in trials
        if one.dropped is None
    }
    if not means:
        return None
    best = min(means, key=means.get)
    return present if means[best] >= WORTH * means.get(present, math.inf) else best


def keys(table: str, family: str) -> list[Key]:
    """Return what the table tells apart on this family, in its order.

    Tiles of few rows are among them where some launch can take them.
    """
    rows = [row for row in parse(table) if row.family in (family, "*")]
    asked = list(itertools.product({row.headdim for row in rows}, (*PHASES, "*")))
    short = [row for row in rows if row.rows is not None]
    reached = {
        find_in(rows, row.kernel, family, row.bits, *some, row.rows)
        for row, some in itertools.product(short, asked)
    }
    found = [
        Key(row.kernel, row.bits, row.headdim, row.phase, row.rows)
        for row in rows
        if row.rows is None or row in reached
    ]
    return list(dict.fromkeys(found))


def taken(table: str, family: str, key: Key) -> Config:
    """Return the configuration that the table gives."""
    rows = parse(table)
    return rows[_find(rows, family, key)].config


def renew(table: str, family: str, found: dict[Key, Config]) -> str:
    """Return the table with these configurations for one family.

    A row of this family and key is replaced. Where a row of all families applies, one of this
    family comes before it; no line of another family changes.
    """
    lines = table.splitlines()
    for key in keys(table, family):
        rows = parse("\n".join(lines))
        index = _find(rows, family, key)
        row = rows[index]
        config = found.get(key)
        if config is None or config == row.config:
            continue
        mine = Row(key.kernel, family, key.bits, key.headdim, key.phase, key.rows, config)
        same = row._replace(config=config) == mine
        lines[index + 1 : index + 1 + same] = [_line(lines[0], mine)]
    return "\n".join(lines) + "\n"


def renew_source(source: str, family: str, found: dict[Key, Config]) -> str:
    """Return the text of kernels/configs.py with its table renewed.

    Raises:
        ValueError: it has no table, or several.
    """
    tables = TABLE.findall(source)
    if len(tables) != 1:
        raise ValueError(f'want one TABLE = """...""", got {len(tables)}')
    return TABLE.sub(lambda match: renew(match[1], family, found), source)


def _find(rows, family, key):
    """Return the index of the row that applies, as configs.find() takes the first that fits."""
    for index, row in enumerate(rows):
        here = row.family in (family, "*") and row.phase in (key.phase, "*")
        same = (row.kernel, row.bits, row.rows) == (key.kernel, key.bits, key.rows)
        if here and same and key.headdim <= row.headdim:
            return index
    raise ValueError(f"no row of the table applies to {key} on {family}")


def _line(heads, row):
    """Return a row as text, each cell under its head."""
    cells = ["*" if cell is None else str(cell) for cell in (*row[:-1], *row.config)]
    starts = [match.start() for match in re.finditer(r"\S+", heads)]
    widths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    return "".join(map(str.ljust, cells, [*widths, 0]))
