"""Work of a graph's program has tables of its own within one tensor, which one copy fills."""

import numpy as np
import pytest
import torch
from ringkern import room
from ringkern.decode_table import Rows
from ringkern.room import Room, Tables


def rows_of(keys, pages, first):
    table = first + np.arange(len(keys) * pages, dtype=np.int32).reshape(len(keys), pages)
    return Rows(table, np.array(keys, dtype=np.int32))


@pytest.mark.parametrize("rows", [[3, 0, 5], [1], [4, 4], [0], []])
def test_every_work_has_its_own_rows(monkeypatch, rows):
    sent, upload = [], room.upload
    monkeypatch.setattr(room, "upload", lambda *given: sent.append(1) or upload(*given))
    tables = Tables(rows, 8, torch.device("cpu"))
    shares = [tables.take(count) for count in rows]
    for share, count in zip(shares, rows, strict=True):
        assert share.page_table.shape == (count, 8) and share.page_table.dtype == torch.int32
        assert share.seqused_k.tolist() == [0] * count, "no row sees a key yet"
        assert share.page_table.is_contiguous() and share.seqused_k.is_contiguous()
        begins = share.page_table.storage_offset(), share.seqused_k.storage_offset()
        assert all(begin % 4 == 0 for begin in begins), "at 16 bytes, as kernels are compiled for"
    told = [rows_of(range(1, count + 1), 3, 100 * i) for i, count in enumerate(rows)]
    for share, some in zip(shares, told, strict=True):
        share.fill(some)
        assert not share.seqused_k.any(), "nothing is sent yet"
    tables.send()
    for share, some in zip(shares, told, strict=True):
        assert share.page_table[:, :3].tolist() == some.page_table.tolist()
        assert share.seqused_k.tolist() == some.seqused_k.tolist()
    assert len(sent) == (1 if sum(rows) else 0)


def test_there_is_room_for_more():
    assert Room.over(1, 1) == (4, 1) and Room.over(2, 3) == (4, 4)
    assert Room.over(16, 16) == (32, 16) and Room.over(17, 17) == (64, 32)
