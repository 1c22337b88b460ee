"""Packed batches on one device: sequence after sequence, and the edges between them."""

import numpy as np
import torch

from ringkern.errors import ArgumentError, check


def check_edges(what: str, cu_seqlens, total: int | None) -> np.ndarray:
    """Return cu_seqlens as int64, checked."""
    try:
        edges = np.asarray(cu_seqlens.cpu() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{what}: want a list of ints, got {cu_seqlens!r}: {error}") from error
    whole = np.issubdtype(edges.dtype, np.integer) and edges.ndim == 1 and len(edges) > 1
    check(whole, what, "int32 [batch + 1]", f"{edges.dtype} {list(edges.shape)}")
    rising = edges[0] == 0 and (np.diff(edges) >= 0).all()
    check(rising, what, "0 first, and no step down", edges[:8].tolist())
    if total is not None:
        check(edges[-1] == total, what, f"{total} last, the number of rows", int(edges[-1]))
    else:
        check(edges[-1] > 0, what, "at least one position", edges[:8].tolist())
    return edges.astype(np.int64)


def whole_runs(edges, start):
    """Return one run per sequence, columns as in types.Run."""
    length = np.diff(edges)
    table = np.stack(
        [np.arange(len(length)), edges[:-1], start, length, np.ones_like(length)], axis=1
    )
    return table[length > 0]
