"""A small seeded decoder stack of Llama's shape, in plain torch, for the demo: no weights to fetch.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, and a head that is not the embedding:
with random weights a tied head would repeat the last token for ever. Attention is passed in, so
that one process and a ring run the same code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the stack. vocab 256: the tokens are bytes."""

    layers: int = 4
    hidden: int = 512
    ffn_hidden: int = 1024
    nheads: int = 8
    nheads_k: int = 2
    headdim: int = 64
    vocab: int = 256
    rope_base: float = 10000.0
    score_scale: float = 2.0  # of random queries: at 1 every key weighs about the same, and an
    # output that averages thousands of values hardly shows which of them were lost


class Decoder:
    """The stack with random weights; the same seed gives the same weights in every process."""

    def __init__(self, shape: Shape, seed: int = 0):
        self.shape = shape
        draw = torch.Generator().manual_seed(seed)
        q_size, k_size = shape.nheads * shape.headdim, shape.nheads_k * shape.headdim

        def matrix(rows, columns):
            return torch.randn(rows, columns, generator=draw) * columns**-0.5

        self.embedding, self.head = torch.randn(2, shape.vocab, shape.hidden, generator=draw)
        self.layers = [
            {
                "qkv": matrix(q_size + 2 * k_size, shape.hidden),
                "out": matrix(shape.hidden, q_size),
                "gate_up": matrix(2 * shape.ffn_hidden, shape.hidden),
                "down": matrix(shape.hidden, shape.ffn_hidden),
            }
            for _ in range(shape.layers)
        ]
        for layer in self.layers:
            layer["qkv"][:q_size] *= shape.score_scale

    @torch.inference_mode()
    def hidden_states(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Callable, progress: Callable
    ) -> torch.Tensor:
        """Return the last layer's output, [seqlen, hidden] float32.

        Args:
            tokens: [seqlen] int64.
            positions: [seqlen] int64, each token's place in the whole sequence.
            attend: (layer, q, k, v) -> out, all packed [seqlen, heads, headdim]; layer from 0.
            progress: called with the number of each finished layer, from 1.

        seqlen may be 0: what a rank without a new token runs, as attention needs every rank.
        """
        shape = self.shape
        sizes = [shape.nheads, shape.nheads_k, shape.nheads_k]
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            heads = F.linear(_norm(x), layer["qkv"]).unflatten(-1, (-1, shape.headdim))
            q, k, v = heads.split(sizes, dim=1)
            q, k = (_rotate(y, positions, shape.rope_base) for y in (q, k))
            x = x + F.linear(attend(number, q, k, v).flatten(1), layer["out"])
            gate, up = F.linear(_norm(x), layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
            progress(number + 1)
        return _norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [seqlen, vocab] float32 from hidden states [seqlen, hidden]."""
        return F.linear(hidden, self.head)


def _norm(x):
    return F.rms_norm(x, x.shape[-1:])


def _rotate(x, positions, base):
    """Rotate pairs of x [seqlen, heads, headdim] by their positions (RoPE, arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None].double() * rates  # float64: positions are large
    cos, sin = (f(angles).float()[:, None, :] for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
