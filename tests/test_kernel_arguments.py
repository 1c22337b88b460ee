"""What kernels refuse before anything is computed, beside what each one's own tests have."""

import subprocess
import sys

import pytest
import torch
from accelerator import DEVICE
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
