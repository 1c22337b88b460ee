"""RINGKERN_NUM_SPLITS: keys are split as asked, and not by the size of a GPU or of the batch."""

import numpy as np
import pytest
import ringkern
import torch
from accelerator import DEVICE
from close import assert_close
from ringkern import local
from ringkern.errors import ArgumentError
from ringkern.kernels import reference
from ringkern.types import Problem

PROBLEM = Problem(1, 2, 1, 16, 16, "float32", False, 0.25, (-1, -1), 0.0)


def spans(sequences, keys):
    """Return one query per sequence against all its keys, which fill whole pages of 16."""
    rows = [[i, i + 1, i * keys, (i + 1) * keys, 0, keys - 1, 1, 1] for i in range(sequences)]
    return np.array(rows, dtype=np.int64)


def splits_of(sequences, page_size):
    table = spans(sequences, 4096)
    rows = sequences
    work = local.prepare(table, PROBLEM, DEVICE, "triton", rows=rows, page_size=page_size)
    return work.options["num_splits"] if page_size else work.table.splits


@pytest.mark.parametrize("page_size", [16, None], ids=["decode", "step"])
def test_keys_are_split_as_asked(monkeypatch, page_size):
    for num_sms in (1, 132):
        monkeypatch.setattr(local, "_num_sms", lambda device, n=num_sms: n)
        monkeypatch.setenv("RINGKERN_NUM_SPLITS", "5")
        assert [splits_of(n, page_size) for n in (1, 7)] == [5, 5]
    monkeypatch.delenv("RINGKERN_NUM_SPLITS")
    assert splits_of(1, page_size) > splits_of(64, page_size)  # as many as fill the GPU


def test_results_are_the_same_attention(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, h, 16, device=DEVICE) for n, h in ((3, 2), (301, 1), (301, 1)))
    want, _ = reference.attn(q, k, v)
    for splits in ("1", "3", "128"):
        monkeypatch.setenv("RINGKERN_NUM_SPLITS", splits)
        out, _ = ringkern.attn_func(q, k, v, backend="triton")
        assert_close(out.cpu(), want.cpu(), want.float().cpu(), name=f"{splits} splits")


@pytest.mark.parametrize("value", ["0", "129", "two"])
def test_what_is_no_number_of_splits(monkeypatch, value):
    monkeypatch.setenv("RINGKERN_NUM_SPLITS", value)
    with pytest.raises(ArgumentError, match="RINGKERN_NUM_SPLITS: want 1 to 128"):
        splits_of(1, 16)
