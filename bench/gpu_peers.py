"""What ringkern's kernels are held against: others' implementations, where they are importable.

Each takes an operation's state and returns what calls it; it raises where it cannot take part. Its
outs have the shape of ringkern's.
"""

import math
from functools import partial

import torch
from ringkern.kernels import reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

LOG2E = math.log2(math.e)
WORKSPACE_BYTES = 256 << 20  # as FlashInfer asks for


def _sdpa(backend, q, k, v, scale, causal=False):
    """Return a call of torch's attention by one backend; [batch, seqlen, heads, headdim] all."""
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError("its causal mask counts from the first key")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = dict(is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def _step_torch(backend, state):
    return _sdpa(backend, state.q, state.k, state.v, state.scale, state.causal)


def _step_flash_attn(state):
    from flash_attn import flash_attn_func

    options = dict(softmax_scale=state.scale, causal=state.causal)
    return partial(flash_attn_func, state.q, state.k, state.v, **options)


def _step_flash_attn_4(state):
    from flash_attn.cute import flash_attn_func

    options = dict(softmax_scale=state.scale, causal=state.causal)
    return lambda: _first(flash_attn_func(state.q, state.k, state.v, **options))


def _step_flashinfer(state):
    import flashinfer

    _one_entry(state.q)
    options = dict(causal=state.causal, sm_scale=state.scale)
    call = flashinfer.single_prefill_with_kv_cache
    return lambda: call(state.q[0], state.k[0], state.v[0], **options)[None]


def _one_entry(q):
    if len(q) != 1:
        raise ValueError(f"takes one sequence, here are {len(q)}")


def _first(found):
    return found[0] if isinstance(found, tuple) else found


# ---- decode


def _decode_torch(backend, state):
    """Without pages, which torch does not take: k and v lie packed."""
    k, v = state.unpaged(slice(None))
    q = state.q.unflatten(0, (len(state.seqused_k), -1))
    call = _sdpa(backend, q, k, v, state.scale)
    return lambda: call().flatten(0, 1)


def _paged(state):
    """Return q [batch, queries, nheads, headdim] and the pages [pages, page_size, ...] of k, v."""
    q = state.q.unflatten(0, (len(state.seqused_k), -1))
    return q, *(x.unflatten(0, (-1, state.page_size)) for x in (state.k, state.v))


def _decode_flash_attn(state):
    from flash_attn import flash_attn_with_kvcache

    q, k, v = _paged(state)
    options = dict(cache_seqlens=state.seqused_k, block_table=state.page_table)
    options["softmax_scale"] = state.scale
    return lambda: flash_attn_with_kvcache(q, k, v, **options).flatten(0, 1)


def _decode_flash_attn_4(state):
    from flash_attn.cute import flash_attn_varlen_func

    _, k, v = _paged(state)
    options = dict(cu_seqlens_q=state.cu_seqlens_q, seqused_k=state.seqused_k)
    options |= dict(page_table=state.page_table, softmax_scale=state.scale)
    return lambda: _first(flash_attn_varlen_func(state.q, k, v, **options))


def _decode_flashinfer(state):
    import flashinfer

    _, k, v = _paged(state)
    if state.queries != 1:
        raise ValueError(f"its decode takes one query of a sequence, here are {state.queries}")
    batch, pages = state.page_table.shape
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=k.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=k.device) * pages
    last = torch.full_like(state.seqused_k, state.cached - (pages - 1) * state.page_size)
    heads = state.q.shape[1], k.shape[2], k.shape[3], state.page_size
    types = dict(q_data_type=k.dtype, kv_data_type=k.dtype, sm_scale=state.scale)
    wrapper.plan(indptr, state.page_table.flatten(), last, *heads, **types)
    return lambda: wrapper.run(state.q, (k, v))


# ---- merges and copies


def _merge_torch(state):
    """The formula in plain torch: each operation writes its result to memory."""
    outs, lses = state.outs, state.lses
    if state.before:
        raise ValueError("makes a new state, where ringkern adds to one in place")
    return lambda: reference.merge(outs, lses)[0].to(outs.dtype)


def _merge_flashinfer(state):
    import flashinfer

    if state.before:
        raise ValueError("takes a state of the dtype of the part")
    # Its parts lie together token by token, and its lse is in base 2.
    v = state.outs.transpose(0, 1).contiguous()
    s = (state.lses * LOG2E).permute(2, 0, 1).contiguous()
    return lambda: flashinfer.merge_states(v, s)[0]


def _pack_torch(state):
    if state.gathers:
        return partial(torch.index_select, state.cache, 0, state.slots, out=state.packed)
    return partial(state.cache.index_copy_, 0, state.slots, state.packed)


BACKENDS = {
    "torch_cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch_flash": SDPBackend.FLASH_ATTENTION,
}
STEP = {impl: partial(_step_torch, backend) for impl, backend in BACKENDS.items()} | {
    "flash_attn": _step_flash_attn,
    "flash_attn_4": _step_flash_attn_4,
    "flashinfer": _step_flashinfer,
}
DECODE = {impl: partial(_decode_torch, backend) for impl, backend in BACKENDS.items()} | {
    "flash_attn": _decode_flash_attn,
    "flash_attn_4": _decode_flash_attn_4,
    "flashinfer": _decode_flashinfer,
}
MERGE = {"torch": _merge_torch, "flashinfer": _merge_flashinfer}
PACK = {"torch": _pack_torch}
