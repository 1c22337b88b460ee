"""What kernels refuse before anything is computed, beside what each one's own tests have."""

import subprocess
import sys
import warnings

import pytest
import ringkern
import torch
from accelerator import DEVICE
from ringkern import local
from ringkern.kernels import decode, merge, step, target
from step_case import cut_of, draw, make_spans, run_of, table_of

OVER = target.MAX_ROWS + 1


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def far(*shape):
    """Return a tensor of any size without the memory: all rows are the same."""
    return zeros(shape[-1]).expand(shape)


STEP = {
    "sinks: want a tensor on": dict(sinks=torch.zeros(4, device="meta")),
    "sinks: want torch.float16 or": dict(sinks=zeros(4, dtype=torch.int32)),
    "sinks: want a last stride of 1": dict(sinks=zeros(8)[::2]),
    "softmax_scale: want a finite number, got nan": dict(softmax_scale=float("nan")),
    "softcap: want 0 or more, got inf": dict(softcap=float("inf")),
    f"seqlen: want at most {target.MAX_ROWS}, got {OVER}": dict(
        k=far(1, OVER, 2, 16), v=far(1, OVER, 2, 16)
    ),
}


@pytest.mark.parametrize("match", STEP)
def test_step_refuses(match):
    q, k, v = draw(8, 9, heads=(4, 2), dims=(16, 16))
    out, lse = torch.zeros_like(q), zeros(1, q.shape[2], 8)
    table = table_of(make_spans(run_of(8), run_of(9)), cut_of(q, k))
    call = dict(q=q, k=k, v=v, out=out, lse=lse, table=table, softmax_scale=1.0, phase="first")
    with pytest.raises(ValueError, match=match):
        step.step(**call | STEP[match])
    assert not out.any() and not lse.any()


def elsewhere(x):
    """Return x from an address that 16 does not divide."""
    memory = zeros(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.view(x.shape).copy_(x)


def apart(x):
    """Return x with rows that begin a number of bytes apart that 16 does not divide."""
    memory = zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)[..., :-1]
    return memory.copy_(x)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "way, got",
    [(elsewhere, "an address of 4 more and strides"), (apart, r"strides of \(.*136, 68\): pass")],
)
def test_unaligned_tensors_are_refused(way, got, name):
    want = f"{name}: want an address and strides that are multiples of 16 bytes, got .*{got}"
    made = dict(zip("qkv", (x.contiguous() for x in draw(8, 9, (2, 2), (16, 16))), strict=True))
    made[name] = way(made[name])
    out, lse = torch.zeros_like(made["q"].contiguous()), zeros(1, 2, 8)
    table = table_of(make_spans(run_of(8), run_of(9)), cut_of(made["q"], made["k"]))
    with pytest.raises(ValueError, match=want):
        step.step(**made, out=out, lse=lse, table=table, softmax_scale=1.0, phase="first")
    int32 = dict(dtype=torch.int32, device=DEVICE)
    tables = (
        zeros(1, 1, dtype=torch.int32),
        torch.tensor([9], **int32),
        torch.tensor([0, 8], **int32),
    )
    numbers = dict(max_seqlen_q=8, page_size=9, softmax_scale=1.0)
    with pytest.raises(ValueError, match=want):
        decode.decode(*(x[0] for x in made.values()), out[0], lse[0], *tables, **numbers)
    assert not out.any() and not lse.any()


def test_strides_that_lead_nowhere_need_no_alignment():
    x = torch.empty_strided((1, 3, 1, 16), (7, 16, 5, 1), device=DEVICE)
    assert target.is_aligned(x)
    assert not target.is_aligned(torch.empty_strided((2, 3, 1, 16), x.stride(), device=DEVICE))
    assert target.is_aligned(x[..., 1:]), "rows of 60 bytes: no layout is better"


@pytest.mark.parametrize("way", [elsewhere, apart])
def test_unaligned_inputs_are_copied_and_that_is_said_once(way):
    q, k, v = (x.contiguous() for x in draw(8, 9, (2, 2), (16, 16)))
    options = dict(causal=True, backend="triton")
    want = ringkern.attn_func(q, k, v, **options)
    local._warn_copy.cache_clear()
    with pytest.warns(RuntimeWarning) as told:
        got = ringkern.attn_func(way(q), k, way(v), **options)
    said = [str(one.message).partition(":")[0] for one in told]  # by Triton's interpreter too
    assert [text for text in said if "attention" in text] == [
        f"attention copies {name} in each call" for name in "qv"
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attention")
        again = ringkern.attn_func(way(q), k, way(v), **options)
    for found in (got, again):
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("name", ["tiles", "pieces"])
def test_step_refuses_a_table_of_other_integers(name):
    q, k, v = draw(8, 9, dims=(16, 16))
    out, lse = torch.zeros_like(q), zeros(1, q.shape[2], 8)
    table = table_of(make_spans(run_of(8), run_of(9)), cut_of(q, k))
    wide = table._replace(**{name: getattr(table, name).long()})
    with pytest.raises(ValueError, match="want torch.int32, got torch.int64"):
        step.step(q, k, v, out, lse, wide, softmax_scale=1.0, phase="first")
    assert not out.any()


DECODE = {
    "softmax_scale: want a finite number, got inf": dict(softmax_scale=float("inf")),
    "softcap: want 0, which is none, or more, got inf": dict(softcap=float("inf")),
    f"max_seqlen_q: want at most {target.MAX_ROWS // 2}, got {OVER}": dict(max_seqlen_q=OVER),
    "page_table: want pages of at most": dict(page_size=OVER // 2),
}


@pytest.mark.parametrize("match", DECODE)
def test_decode_refuses(match):
    out, lse = zeros(3, 4, 16), zeros(4, 3)
    int32 = dict(dtype=torch.int32, device=DEVICE)
    call = dict(
        page_table=zeros(2, 2, dtype=torch.int32),
        seqused_k=torch.tensor([7, 8], **int32),
        cu_seqlens_q=torch.tensor([0, 1, 3], **int32),
        **dict(max_seqlen_q=2, page_size=8, softmax_scale=1.0),
    )
    with pytest.raises(ValueError, match=match):
        decode.decode(
            zeros(3, 4, 16) + 1, *(zeros(16, 2, 16) + 1,) * 2, out, lse, **call | DECODE[match]
        )
    assert not out.any() and not lse.any()


def test_merge_refuses_more_tiles_than_a_grid_has():
    outs, lses = far(1, 1 << 36, 2, 16), zeros(1).expand(1, 2, 1 << 36)
    with pytest.raises(ValueError, match=f"outs: want at most {target.MAX_PROGRAMS} tiles"):
        merge.merge_into(outs, lses, outs[0], lses[0])


@pytest.mark.parametrize("version", ["3.5.1", "2.3"])
def test_an_old_triton_is_refused(version):
    code = f"import triton; triton.__version__ = {version!r}; import ringkern.kernels.step"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ImportError: triton: want 3.6 or later, got {version}" in done.stderr
