"""One ring step in plain torch, made for the CPU: the contract of step.py without a GPU.

State per query row: the normalised out and lse over the keys seen so far, both float32. A span
adds its keys to it. Work is cut into blocks of bounded size, each of which goes to torch's fused
CPU attention where its traps do not bite and to plain matrix products elsewhere.
"""

import torch

# Rows per block. A fused block never materialises its scores; its float32 copies of q, k and v
# and its partial out are what these bound. Below 2048 the fused op slows down (1024: by 10 %).
BLOCK_Q = 2048
BLOCK_K = 4096
# Up to so many rows, the query heads of a key head become rows of one product: K and V are read
# once for all of them. With more rows it makes no difference.
PACKED_Q = 256
# Rows per block of the plain path, whose scores are [nheads, PLAIN_Q, PLAIN_K] float32.
PLAIN_Q = 256
PLAIN_K = 1024


def step(q, k, v, out, lse, spans, *, softmax_scale, softcap=0.0):
    """Add the keys of `spans` to the running (out, lse), in place.

    Args:
        q: [batch, seqlen_q, nheads, headdim], any floating dtype; computed in float32.
        k, v: [batch, seqlen_k, nheads_k, headdim] and [..., headdim_v].
        out: [batch, seqlen_q, nheads, headdim_v] float32, normalised; 0 where nothing was seen.
        lse: [batch, nheads, seqlen_q] float32, natural log; -inf where nothing was seen.
        spans: rows (q0, q1, k0, k1, lo, hi, q_stride, k_stride) as in types.Span.
    """
    # The fused op masks before it scales, so a scale of zero or less undoes its mask.
    fused = q.shape[-1] == v.shape[-1] and softcap == 0.0 and softmax_scale > 0
    fused = fused and q.device.type == "cpu"
    for q0, q1, k0, k1, lo, hi, *strides in spans:
        pieces = _fused_pieces if fused and strides == [1, 1] else _plain_pieces
        for piece in pieces(q1 - q0, k1 - k0, lo, hi, *strides):
            part, rows = None, slice(q0 + piece[0], q0 + piece[1])
            if piece[4] != PLAIN:
                part = _fused(*_blocks(q, k, v, q0, k0, piece), piece[4] == TRIANGLE, softmax_scale)
            if part is not None:
                merge_(out[:, rows], lse[:, :, rows], *part)
                continue
            for i0, i1, j0, j1, _ in _plain_blocks(*piece[:4], lo, hi, *strides):
                rows = slice(q0 + i0, q0 + i1)
                shift = i0 * strides[0] - j0 * strides[1]  # the band from the block's own corner
                band = lo + shift, hi + shift, *strides
                blocks = _blocks(q, k, v, q0, k0, (i0, i1, j0, j1))
                part = _plain(*blocks, band, softmax_scale, softcap)
                merge_(out[:, rows], lse[:, :, rows], *part)


def _blocks(q, k, v, q0, k0, piece):
    """Return the piece's q, k and v as [batch, heads, rows, headdim] float32."""
    rows, keys = slice(q0 + piece[0], q0 + piece[1]), slice(k0 + piece[2], k0 + piece[3])
    return (x.float().transpose(1, 2) for x in (q[:, rows], k[:, keys], v[:, keys]))


FULL, TRIANGLE, PLAIN = range(3)


def _fused_pieces(q_length, k_length, lo, hi, *_):
    """Yield (i0, i1, j0, j1, kind) that together cover the band lo <= j - i <= hi exactly once.

    Per block of rows: keys that all rows see are FULL; from the first row's last key on, the rest
    is a TRIANGLE, row i sees j <= i, which is how the fused op aligns its causal mask. Where the
    band's left edge cuts through a block, the op has no mask to fit: PLAIN.
    """
    for i0 in range(0, q_length, BLOCK_Q):
        i1 = min(i0 + BLOCK_Q, q_length)
        i0 = max(i0, -hi)  # rows before see nothing
        if i0 >= i1:
            continue
        first, last = max(0, i0 + lo), min(k_length, i1 + hi)  # keys that any row sees
        common = max(0, i1 - 1 + lo)  # from here on no row is cut on the left
        corner = i0 + hi if i0 + hi < k_length - 1 else k_length  # to here every row sees all
        if common > corner:
            yield i0, i1, first, last, PLAIN
            continue
        if first < common:
            yield i0, i1, first, common, PLAIN
        for j0 in range(common, corner, BLOCK_K):
            yield i0, i1, j0, min(j0 + BLOCK_K, corner), FULL
        if corner < last:
            yield i0, i1, corner, last, TRIANGLE


def _plain_pieces(q_length, k_length, *_):
    yield 0, q_length, 0, k_length, PLAIN


def _plain_blocks(i0, i1, j0, j1, lo, hi, q_stride=1, k_stride=1):
    """Yield PLAIN pieces of the rectangle, those that the band touches."""
    for a in range(i0, i1, PLAIN_Q):
        b = min(a + PLAIN_Q, i1)
        first = -(-(lo + a * q_stride) // k_stride)  # the first and last keys that any row sees
        last = (hi + (b - 1) * q_stride) // k_stride
        for c in range(max(j0, first), min(j1, last + 1), PLAIN_K):
            yield a, b, c, min(c + PLAIN_K, j1, last + 1), PLAIN


def _fused(q, k, v, causal, softmax_scale):
    """Attend with torch's fused CPU op. float32, [batch, heads, rows, headdim].

    Some of its traps (wrong lse for rows without keys, a crash without any key) cannot be met: a
    piece has keys, and each of its rows sees at least one. One can: a row whose scores are all NaN
    or overflow gets lse = 0 and an out of no meaning. Returns None where that may have happened.
    """
    batch, nheads, rows, headdim = q.shape
    packed = not causal and nheads != k.shape[1] and rows <= PACKED_Q
    if packed:
        q = q.reshape(batch, k.shape[1], -1, headdim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=softmax_scale
    )
    if packed:
        out, lse = out.reshape(batch, nheads, rows, headdim), lse.reshape(batch, nheads, rows)
    return (out.transpose(1, 2), lse) if lse.all() else None


def _plain(q, k, v, band, softmax_scale, softcap):
    """Attend by matrix products under a band (lo, hi, q_stride, k_stride). Shapes as for _fused."""
    batch, nheads, rows, headdim = q.shape
    nheads_k, keys = k.shape[1], k.shape[2]
    # The query heads that share a key head become rows of one product.
    q = q.reshape(batch, nheads_k, -1, headdim)
    scores = (q @ k.transpose(-1, -2)).mul_(softmax_scale)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, nheads, rows, keys)
    lo, hi, q_stride, k_stride = band
    if lo > (1 - rows) * q_stride or hi < (keys - 1) * k_stride:
        at_q, at_k = (torch.arange(n, device=q.device) for n in (rows, keys))
        ahead = at_k * k_stride - at_q[:, None] * q_stride
        scores.masked_fill_((ahead < lo) | (ahead > hi), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    shift = torch.where(lse == float("-inf"), 0.0, lse)  # a row without keys: exp(-inf - 0) = 0
    weights = scores.sub_(shift[..., None]).exp_()
    out = weights.view(batch, nheads_k, -1, keys) @ v
    return out.view(batch, nheads, rows, -1).transpose(1, 2), lse


def merge_(out, lse, part_out, part_lse):
    """Merge a part into the running (out, lse), in place. paper.md, equation (4), for two.

    float32, out [batch, rows, nheads, headdim], lse [batch, nheads, rows]. Neither lse may be
    +inf; -inf on either side or both is exact, NaN stays NaN, and inf in v stays inf.
    """
    # Weights by the difference: exp(lse - total) would carry the rounding of total, once for each
    # of many parts.
    ahead = part_lse - lse
    ahead.masked_fill_(lse == float("-inf"), float("inf"))
    ahead.masked_fill_(part_lse == float("-inf"), float("-inf"))
    added = torch.sigmoid(ahead).transpose(1, 2)[..., None]
    kept = torch.sigmoid(ahead.neg_()).transpose(1, 2)[..., None]
    out.mul_(kept).addcmul_(part_out, added)
    torch.logaddexp(lse, part_lse, out=lse)
