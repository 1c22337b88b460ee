"""How a step is cut into tiles, and the table of them that its kernel reads."""

from typing import NamedTuple

import numpy as np
import torch
from ringkern.kernels import configs
from ringkern.kernels.target import triton

# Heads are packed into the rows of a tile where, apart, so much less of the tiles would be used.
PACK_BELOW = 0.9


class Cut(NamedTuple):
    """How a step is cut into tiles: known from shapes alone, before its table is made."""

    block_m: int  # rows of a tile: tokens, or tokens x heads
    block_n: int  # keys of a block
    group: int  # heads packed into the rows of a tile; 1: each head has tiles of its own
    num_warps: int
    num_stages: int
    registers: int | None = None  # that a thread may have; None: as many as the compiler likes

    @property
    def block_q(self) -> int:
        """Tokens of a tile."""
        return self.block_m // self.group


class Table(NamedTuple):
    """The work of a step on its device: what ringkern.tile_table made of the spans for a cut."""

    tiles: torch.Tensor  # int32 [n * splits, 5]: q0, q1, begin, middle, end
    pieces: torch.Tensor  # int32 [m, 6]: k0, k1, lo, hi, q_stride, k_stride
    splits: int  # parts of each tile, which are merged after the step
    rows: tuple[int, ...]  # in tiles: where each run of them begins and ends
    cut: Cut


def choose_cut(
    nheads: int, nheads_k: int, headdim: int, headdim_v: int, dtype: str, arch: int, tokens: int,
    phase: str = "*",
) -> Cut:  # fmt: skip
    """Return how to cut steps whose runs of queries have up to `tokens` rows.

    dtype and phase as configs.pick() takes them; "*" is right for any. Few tokens: the heads of a
    group share a tile, so that K and V are read once for all of them, and the tile gets no more
    rows than it needs.

    Raises:
        ValueError: no configuration has this headdim or dtype.
    """
    shape = "step", arch, headdim, headdim_v, dtype, phase
    block_m, group = configs.pick(*shape).block_m, nheads // nheads_k
    apart = tokens / (triton.cdiv(tokens, block_m) * block_m)
    packed = 0.0
    if group <= block_m:
        packed = tokens * group / (triton.cdiv(tokens, block_m // group) * block_m)
    group = group if apart < PACK_BELOW * packed else 1
    config = configs.pick(*shape, rows=min(tokens * group, block_m))
    return Cut(config.block_m, config.block_n, group, *config[2:])


def tiles_to_fill(cut: Cut, batch: int, nheads: int, num_sms: int) -> int:
    """Return how many tiles fill a GPU: the `fill` of tile_table.make_tiles().

    Two programs for each of its SMs; a tile is one program for each sequence of the batch and group.
    """
    return triton.cdiv(2 * num_sms, max(batch * (nheads // cut.group), 1))


def make_table(tile_table, cut: Cut, device, put=None) -> Table:
    """Return a ringkern.tile_table.TileTable, of cut.block_q and cut.block_n, on a device.

    put: put(array, device) copies an array there. None: a copy that waits for the device.
    """
    put = put or (lambda array, device: torch.from_numpy(array).to(device))
    tiles, pieces = (put(x, device) for x in (tile_table.tiles, tile_table.pieces))
    # No two tiles share rows, so where one ends and another begins is no border of a run.
    rows = np.setxor1d(tile_table.tiles[:, 0], tile_table.tiles[:, 1])
    return Table(tiles, pieces, tile_table.splits, tuple(rows.tolist()), cut)
