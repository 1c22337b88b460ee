"""One step on this device, by the kernels that backend.pick() named."""

import functools
import warnings
from typing import NamedTuple

import numpy as np
import torch

from ringkern import env, tile_table
from ringkern.backend import pick_backend
from ringkern.capture import captures
from ringkern.decode_table import make_decode_table
from ringkern.errors import UnsupportedError
from ringkern.kernels import reference, step_torch
from ringkern.types import Problem
from ringkern.upload import upload

MOST_LAYOUTS = 16  # for which a kernel is kept ready; more come of tensors that lie ever otherwise


def clear_state(out, lse, sinks=None) -> None:
    """Make (out, lse) what they are before any key was seen.

    A sink is a key with a value of zero that every query of its head sees: the state starts with
    lse = sink instead of -inf.
    """
    out.zero_()
    if sinks is None:
        lse.fill_(float("-inf"))
    else:
        lse.copy_(sinks[None, :, None].expand_as(lse))


def make_state(q, headdim_v: int, sinks=None):
    """Return the running (out, lse) before any key was seen, float32.

    q [batch, seqlen, nheads, headdim]; out [..., headdim_v], lse [batch, nheads, seqlen].
    """
    batch, seqlen, nheads, _ = q.shape
    out = q.new_empty(batch, seqlen, nheads, headdim_v, dtype=torch.float32)
    lse = q.new_empty(batch, nheads, seqlen, dtype=torch.float32)
    clear_state(out, lse, sinks)
    return out, lse


class _Spans(NamedTuple):
    """What step_torch takes beside q, k, v and the state."""

    spans: list[list[int]]
    phase: str


class _Tiles(NamedTuple):
    """What the step kernel takes."""

    table: object
    phase: str
    ready: dict  # layout -> the kernel, as prepare() of its module returned it


class _Decode(NamedTuple):
    """What the decode kernel takes."""

    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, int]
    phase: str
    ready: dict  # as of _Tiles


def prepare(
    spans: np.ndarray,
    problem: Problem,
    device: torch.device,
    backend: str,
    *,
    rows: int,
    page_size: int | None = None,
    phase: str = "middle",
):
    """Return the work of some spans, as step() takes it: once for all layers.

    Args:
        spans: int64 [n, 8], columns as in types.Span.
        backend: "torch" or "triton".
        rows: of the query tensor.
        page_size: of the cache that K and V are slots of; None: they are packed.
        phase: "middle" adds to a state. "first": the state has seen no key yet, need not hold
            anything, and all of it is written. Of triton: "last", after which comes nothing, and
            out is written in q's dtype; "only", both at once.
    """
    if backend == "torch":
        return _Spans(spans.tolist(), phase)
    if page_size and problem.batch == 1:
        table = make_decode_table(spans, rows, page_size)
        if table:
            tables = tuple(
                upload(x, device) for x in (table.page_table, table.seqused_k, table.cu_seqlens_q)
            )
            queries = int(np.diff(table.cu_seqlens_q).max(initial=1))
            found = np.count_nonzero(table.seqused_k), int(table.seqused_k.max())
            return _prepare_decode(tables, queries, page_size, problem, phase, *found)
    from ringkern.kernels import cut, target

    heads = problem.nheads, problem.nheads_k, problem.headdim, problem.headdim_v
    tokens = int((spans[:, 1] - spans[:, 0]).max(initial=1))
    how = cut.choose_cut(*heads, problem.dtype, target.arch(device), tokens, phase)
    fixed = env.num_splits()
    fill = cut.tiles_to_fill(how, problem.batch, problem.nheads, _num_sms(device))
    whole = 0 if phase == "middle" else rows  # tiles also of queries that see no key
    table = tile_table.make_tiles(
        spans, how.block_q, how.block_n, rows=whole, fill=fill, splits=fixed
    )
    return _Tiles(cut.make_table(table, how, device, upload), phase, {})


def prepare_room(share, problem: Problem, *, page_size: int, phase: str):
    """Return work for step() whose pages are told later, and anew, as CUDA graphs need it.

    By the Triton kernels. Phases as in prepare().

    Args:
        share: room.Share, where the pages are told.
    """
    rows, pages = share.page_table.shape
    device = share.page_table.device
    cu_seqlens_q = upload(np.arange(rows + 1, dtype=np.int32), device)
    tables = share.page_table, share.seqused_k, cu_seqlens_q
    return _prepare_decode(tables, 1, page_size, problem, phase, rows, pages * page_size)


def _prepare_decode(tables, queries, page_size, problem, phase, sequences, longest) -> _Decode:
    from ringkern.kernels.decode import choose_splits

    num_sms = _num_sms(tables[0].device)
    splits = env.num_splits() or choose_splits(sequences, problem.nheads_k, longest, num_sms)
    options = dict(page_size=page_size, num_splits=splits, max_seqlen_q=queries)
    return _Decode(tables, options, phase, {})


def step(q, k, v, out, lse, work, problem: Problem, sinks=None, result=None, layout=None) -> None:
    """Add the keys of the spans to the running (out, lse), in place. Shapes as in step_torch.

    Args:
        work: as prepare() returned it; its phase says what is read and written.
        sinks: [nheads], in phases "first" and "only": what a state starts from.
        result: of out's shape in q's dtype, written in its place in phases "last" and "only", the
            second of which has no use for out.
        layout: what Layouts.find() returned for this call's tensors, where the others are the same
            whenever it is the same: then Triton's kernels are only made ready for the first one,
            and later ones run on the current device, which must be the tensors'.
    """
    if isinstance(work, _Spans):
        if work.phase == "first":
            clear_state(out, lse, sinks)
        options = dict(softmax_scale=problem.softmax_scale, softcap=problem.softcap)
        step_torch.step(q, k, v, out, lse, work.spans, **options)
        return
    run = None if layout is None else work.ready.get(layout)
    if run is None:
        sinks = as_sinks(sinks)
        given = q, k, v
        q, k, v = align(*given)
        run = _make_ready(q, k, v, out, lse, work, problem, sinks, result)
        if layout is not None and all(x is y for x, y in zip(given, (q, k, v), strict=True)):
            if len(work.ready) == MOST_LAYOUTS:
                work.ready.clear()
            work.ready[layout] = run
        with torch.cuda.device_of(q):
            run(q, k, v, out, lse, result, sinks)
        return
    run(q, k, v, out, lse, result, sinks)


def _make_ready(q, k, v, out, lse, work, problem, sinks, result):
    """Return the work as a function of its tensors, for those of the same layouts."""
    options = dict(softmax_scale=problem.softmax_scale, softcap=problem.softcap, sinks=sinks)
    options |= dict(allow_tf32=_allow_tf32())
    if isinstance(work, _Tiles):
        from ringkern.kernels import step as kernel

        given = q, k, v, out, lse, work.table
        return kernel.prepare(*given, phase=work.phase, result=result, **options)
    from ringkern.kernels import decode

    only, last = work.phase == "only", work.phase == "last"
    packed = (x[0] for x in (q, k, v, result if only else out, lse))
    seeded = work.phase in ("middle", "last")
    run = decode.prepare(*packed, *work.tables, **work.options, **options, seeded=seeded)

    def ready(q, k, v, out, lse, result, sinks):
        run(q, k, v, result if only else out, lse, sinks)  # of one batch: their addresses
        if last:
            result.copy_(out)

    return ready


def as_sinks(sinks):
    """Return sinks as kernels take them, or None."""
    return None if sinks is None else sinks.float().contiguous()


class Layout:
    """What Triton's kernels that were made ready for tensors are good for. Itself alone is equal.

    Attributes:
        aligned: whether kernels take the tensors as they are, without align().
    """

    def __init__(self, tensors):
        self.aligned = all(x is y for x, y in zip(tensors, align(*tensors), strict=True))


class Layouts:
    """Finds layouts of tensors that may lie otherwise in each call, of the same shapes and dtypes."""

    def __init__(self):
        self._known: dict[tuple, Layout] = {}

    def find(self, *tensors) -> Layout:
        """Return the layout of tensors; None where there is none."""
        where = [None if x is None else (x.stride(), x.data_ptr() % 16) for x in tensors]
        key = *where, _allow_tf32()
        layout = self._known.get(key)
        if layout is None:
            if len(self._known) == MOST_LAYOUTS:
                self._known.clear()
            layout = self._known[key] = Layout([x for x in tensors if x is not None])
        return layout


def attend(q, k, v, spans: np.ndarray, problem: Problem, sinks, backend: str):
    """Return (out, lse) of all there is: out in q's dtype, lse float32.

    q [batch, seqlen_q, nheads, headdim], k [batch, seqlen_k, nheads_k, headdim], v [...,
    headdim_v]; out [batch, seqlen_q, nheads, headdim_v], lse [batch, nheads, seqlen_q].
    """
    batch, seqlen_q, nheads, _ = q.shape
    if backend == "torch" or not q.numel():
        out, lse = make_state(q, problem.headdim_v, sinks)
        work = prepare(spans, problem, q.device, "torch", rows=seqlen_q)
        step(q, k, v, out, lse, work, problem)
        return out.to(q.dtype), lse
    if captures(q.device):  # its tables would be the capture's, and gone when the graph runs
        raise UnsupportedError(
            "attention in a CUDA graph: want a ring's call, whose tables stay, got one on its own. "
            "Use ringkern.DecodeGraphs, or call it outside of the graph."
        )
    q, k, v = align(q, k, v, say="qkv")
    work = prepare(spans, problem, q.device, backend, rows=seqlen_q, phase="only")
    out = q.new_empty(batch, seqlen_q, nheads, problem.headdim_v)
    lse = q.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)
    step(q, k, v, None, lse, work, problem, sinks=sinks, result=out)
    return out, lse


def align(*tensors, say: str = ""):
    """Return tensors as Triton's kernels take them: copies of those whose rows begin elsewhere.

    say: a letter for each, where the copies are worth a warning: of what a caller gave.
    """
    from ringkern.kernels import target

    found = []
    for i, x in enumerate(tensors):
        if not target.is_aligned(x):
            if say:
                _warn_copy(say[i])
            x = x.clone(memory_format=torch.contiguous_format)
        found.append(x)
    return found


@functools.cache
def _warn_copy(name: str) -> None:
    """Say once that an input costs a copy in each call."""
    message = f"attention copies {name} in each call: want an address and strides that are "
    warnings.warn(message + "multiples of 16 bytes.", RuntimeWarning, stacklevel=5)


class Rows:
    """Copies rows from and to a layer's paged pools, [1, slots, nheads_k, headdim(_v)].

    Of slots, int64 [rows], contiguous. Triton's kernel runs on the current device.
    """

    def __init__(self, backend: str):
        self._backend = backend
        self._ready: dict = {}  # what the kernel of Triton was made ready for, and it

    def gather(self, pools, slots, outs) -> None:
        """Write out[0, i] = pool[0, slots[i]], for each of K and V."""
        if self._backend == "triton":
            self._copy(pools, slots, outs, True)
            return
        for pool, out in zip(pools, outs, strict=True):
            torch.index_select(pool, 1, slots, out=out)

    def scatter(self, news, slots, pools) -> None:
        """Write pool[0, slots[i]] = new[0, i], for each of K and V."""
        if self._backend == "triton":
            self._copy(pools, slots, news, False)
            return
        for new, pool in zip(news, pools, strict=True):
            pool.index_copy_(1, slots, new)

    def _copy(self, pools, slots, packed, gather):
        offsets = [x.data_ptr() % 16 for x in (*pools, slots, *packed)]
        key = gather, len(slots), *offsets, *[x.stride() for x in packed]
        run = self._ready.get(key)
        if run is None:
            from ringkern.kernels import pack

            one_batch = [pool[0] for pool in pools], slots, [x[0] for x in packed]
            run = pack.prepare(*one_batch, "out" if gather else "x", gather=gather)
            if len(self._ready) == MOST_LAYOUTS:
                self._ready.clear()
            self._ready[key] = run
        run(pools, slots, packed)  # of one batch: their addresses


class Merge:
    """Merges parts into states that are contiguous and of one shape.

    Args:
        outs, lses: the parts, [parts, ...], which may hold others in each call; outs of any dtype.
    """

    def __init__(self, outs, lses):
        self._parts, self._run = (outs, lses), None

    def __call__(self, out, lse) -> None:
        """Merge them into (out, lse), float32, in place; by Triton on the current device."""
        if self._run is None:
            self._run = self._make_ready(out, lse)
        self._run(*self._parts, out, lse)

    def _make_ready(self, out, lse):
        merging = _merging(out.shape[-1], out.dtype)
        if pick_backend("auto", out.device, merging, "merge") != "triton":
            return _merge_each
        from ringkern.kernels import merge as kernel

        return kernel.prepare(*self._parts, out, lse, seeded=True)


def _merge_each(outs, lses, out, lse):
    for part_out, part_lse in zip(outs, lses, strict=True):
        step_torch.merge_(out, lse, part_out.float(), part_lse)


def merge(outs, lses):
    """Return (out, lse) of all parts together; out in outs' dtype, lse float32."""
    asked = outs.device, _merging(outs.shape[-1], outs.dtype)
    if outs.numel() and pick_backend("auto", *asked, "merge") == "triton":
        from ringkern.kernels import merge as kernel

        return kernel.merge(outs.contiguous(), lses.float())
    out, lse = reference.merge(outs, lses.float())
    return out.to(outs.dtype), lse


@functools.cache
def _merging(headdim: int, dtype: torch.dtype) -> Problem:
    """Return merges of parts with such rows, as pick_backend() takes them."""
    name = str(dtype).removeprefix("torch.")
    return Problem(1, 1, 1, headdim, headdim, name, False, 1.0, (-1, -1), 0.0)


def _allow_tf32() -> bool:
    """Return whether float32 products may be rounded: torch.set_float32_matmul_precision()."""
    return torch.get_float32_matmul_precision() != "highest"


@functools.cache
def _num_sms(device: torch.device) -> int:
    """Return how many streaming multiprocessors (SMs) a GPU has; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
