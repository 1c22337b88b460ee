"""Attention and merge by their definitions, in plain torch: the oracle of every test.

Materialises all scores: for small sizes. In float64 by default; given another dtype it computes
the same formula in that dtype, which is the baseline of the tolerance rule.
"""

import torch


def visible(q_pos, k_pos, causal=False, window_size=(-1, -1)):
    """Return bool [seqlen_q, seqlen_k]: does the query at q_pos see the key at k_pos?"""
    ahead = k_pos[None, :] - q_pos[:, None]
    mask = torch.ones_like(ahead, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        mask &= ahead >= -left
    if right >= 0:
        mask &= ahead <= right
    return mask & (ahead <= 0) if causal else mask


def attn(
    q,
    k,
    v,
    *,
    q_pos=None,
    k_pos=None,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    softcap=0.0,
    sinks=None,
    dtype=torch.float64,
):
    """Return (out, lse) of dense attention, both in `dtype`.

    q [batch, seqlen_q, nheads, headdim], k and v [batch, seqlen_k, nheads_k, headdim(_v)], lse
    [batch, nheads, seqlen_q], natural log. Positions default to bottom-right aligned: the last
    query stands at the last key. A sink is one more score per head, with a value of zero.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    k_pos = torch.arange(seqlen_k, device=q.device) if k_pos is None else k_pos
    if q_pos is None:
        q_pos = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[2] // k.shape[2]
    q = q.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q * scale) @ k.transpose(-1, -2)  # [batch, nheads, seqlen_q, seqlen_k]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(q_pos, k_pos, causal, window_size), float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :seqlen_k]
    weights = weights.masked_fill((lse == float("-inf"))[..., None], 0.0)
    return (weights @ v).transpose(1, 2), lse


def attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """Return (out, lse) of packed attention: [total, nheads, headdim_v] and [nheads, total]."""
    outs, lses = [], []
    edges_q, edges_k = ([int(x) for x in cu] for cu in (cu_seqlens_q, cu_seqlens_k))
    for seq in range(len(edges_q) - 1):
        mine = slice(edges_q[seq], edges_q[seq + 1])
        theirs = slice(edges_k[seq], edges_k[seq + 1])
        out, lse = attn(q[None, mine], k[None, theirs], v[None, theirs], **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def merge(outs, lses):
    """Return the (out, lse) of all parts together. paper.md, equation (4).

    outs [parts, ..., seqlen, nheads, headdim], lses [parts, ..., nheads, seqlen]; computed in
    lses' dtype. Total: a part with lse = -inf weighs nothing and its out is not looked at; parts
    with lse = +inf share all the weight evenly; NaN stays NaN.
    """
    top = lses.amax(dim=0)
    weights = torch.where(torch.isinf(top), (lses == top) & (top > 0), torch.exp(lses - top))
    mass = weights.sum(dim=0)
    lse = torch.where(torch.isinf(top), top, top + torch.log(mass))
    out = torch.zeros_like(outs[0], dtype=lses.dtype)
    for part, weight in zip(outs, weights / mass.where(mass > 0, 1.0), strict=True):
        weight = weight.transpose(-1, -2)[..., None]
        out += torch.where(weight == 0, 0.0, part.to(out.dtype) * weight)
    return out, lse
