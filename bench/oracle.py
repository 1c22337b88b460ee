"""The float64 answer for a few rows, and how far the tested dtype may be from it."""

import torch
from ringkern.kernels import reference

# The tolerance rule of the tests: no element further from the oracle than twice the worst of the
# same formula in that dtype, and no drift, which sees a small error spread over all elements.
FACTOR, FLOOR = 2.0, 1e-5
DRIFT = {torch.float32: 1e-10, torch.float16: 1e-6, torch.bfloat16: 1e-5}


class Sample:
    """The answer at some positions of one causal sequence.

    Args:
        q, k, v: [seqlen, heads, headdim], whole.
        positions: int64, of the rows to know.
    """

    def __init__(self, q, k, v, positions: torch.Tensor):
        args = [x[None] for x in (q[positions], k, v)]
        options = dict(q_pos=positions, causal=True)
        self.want = reference.attn(*args, **options)[0][0]
        baseline = reference.attn(*args, **options, dtype=q.dtype)[0][0]
        self.limit = FACTOR * (baseline - self.want).abs().max().item() + FLOOR

    def compare(self, rows: torch.Tensor) -> dict:
        """Return {ok, max_err} of computed rows [len(positions), heads, headdim]."""
        got, want = rows.double(), self.want
        error = (got - want).abs().max().item()
        if not torch.isfinite(got).all():
            return {"ok": False, "max_err": float("inf")}
        drift = 1 - 2 * (got * want).sum().item() / (got * got + want * want).sum().item()
        return {"ok": error <= self.limit and drift <= DRIFT[rows.dtype], "max_err": error}
