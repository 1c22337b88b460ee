"""The float64 answer of attention at some rows and heads, on whatever device the inputs are."""

import torch
from ringkern.kernels import reference

from bench.oracle import FACTOR, FLOOR, Sample

NATS, NATS_PER_NAT = 1e-4, 1e-5  # how far an lse may be off, as in the tests
ROWS, HEADS = 8, 2  # most that are looked at, of rows and of heads of K and V


class Rows(Sample):
    """An answer of any shape, and what the same formula gives in the tested dtype."""

    def __init__(self, want: torch.Tensor, baseline: torch.Tensor):
        self.want = want
        self.limit = FACTOR * (baseline.double() - want).abs().max().item() + FLOOR


def spread(count: int, most: int, device) -> torch.Tensor:
    """Return up to `most` of the indices below count, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), device=device).round().long().unique()


class Attention:
    """The answer (out, lse) in float64, and out of the same formula in q's dtype.

    Args:
        q: [batch, seqlen_q, nheads, headdim].
        k, v: [batch, seqlen_k, nheads_k, headdim].
        causal: the last query stands at the last key.
    """

    def __init__(self, q, k, v, causal: bool = False):
        self._group, seqlen_k = q.shape[2] // k.shape[2], k.shape[1]
        self._rows = spread(q.shape[1], ROWS, q.device)
        self._heads = spread(k.shape[2], HEADS, q.device)
        some = self.rows(q), k[:, :, self._heads], v[:, :, self._heads]
        positions = torch.arange(seqlen_k, device=q.device)
        q_pos = self._rows + seqlen_k - q.shape[1]
        options = dict(q_pos=q_pos, k_pos=positions, causal=causal)
        self.out, self.lse = reference.attn(*some, **options)
        self.baseline, _ = reference.attn(*some, **options, dtype=q.dtype)

    def rows(self, x):
        """Return what is looked at of an out [batch, seqlen_q, nheads, headdim]."""
        x = x[:, self._rows].unflatten(2, (-1, self._group))
        return x[:, :, self._heads].flatten(2, 3)

    def lses(self, lse):
        """Return what is looked at of an lse [batch, nheads, seqlen_q]."""
        lse = lse[:, :, self._rows].unflatten(1, (-1, self._group))
        return lse[:, self._heads].flatten(1, 2)


def same_lse(lse, want) -> bool:
    """Return whether an lse is near enough to what was wanted, everywhere."""
    error = (lse.double() - want).abs()
    return bool((error <= NATS + NATS_PER_NAT * want.abs()).all())
