"""torch.compile and torch.export trace through ringkern's operators, and agree with eager calls."""

import pytest
import ringkern
import torch
from accelerator import DEVICE
from ringkern import ops, tiles
from ringkern.kernels import cut, step
from ringkern.tile_table import make_tiles

REAL = dict(test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


def tensors(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def check(op, *args):
    torch.library.opcheck(op, args, **REAL)


def test_attention_compiles_whole():
    q, k, v = tensors((2, 9, 4, 16), (2, 13, 2, 16), (2, 13, 2, 24))
    sinks = torch.zeros(4, device=DEVICE)

    def model(q, k, v):
        out, lse = ringkern.attn_func(q * 2, k, v, causal=True, window_size=(5, -1), sinks=sinks)
        return out + 1, lse

    want = model(q, k, v)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(q, k, v)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    args = (q, k, v, True, None, [5, -1], 0.0, sinks, "auto")
    check(torch.ops.ringkern.attn.default, *args)


def test_packed_attention_and_merge_export():
    q, k, v = tensors((7, 4, 16), (11, 2, 16), (11, 2, 16))
    edges_q, edges_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7], [0, 4, 11]))

    class Model(torch.nn.Module):
        def forward(self, q, k, v, edges_q, edges_k):
            out, lse = ringkern.attn_varlen_func(q, k, v, edges_q, edges_k, causal=True)
            return ringkern.merge(torch.stack([out, out]), torch.stack([lse, lse - 1]))

    args = (q, k, v, edges_q, edges_k)
    program = torch.export.export(Model(), args)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"ringkern.attn_varlen.default", "ringkern.merge.default"} <= names
    for a, b in zip(program.module()(*args), Model()(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    check(torch.ops.ringkern.attn_varlen.default, *args, True, None, [-1, -1], 0.0, None, "auto")
    outs, lses = tensors((3, 5, 2, 8), (3, 2, 5))
    check(torch.ops.ringkern.merge.default, outs, lses)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_step_compiles(splits):
    q, k, v = tensors((1, 5, 4, 16), (1, 40, 2, 16), (1, 40, 2, 16))
    runs = (torch.tensor([[0, 0, 35, 5, 1]]).numpy(), torch.tensor([[0, 0, 0, 40, 1]]).numpy())
    how = cut.choose_cut(4, 2, 16, 16, "float32", 80, 5)
    spans = tiles.make_spans(*runs, *tiles.bounds(True, (-1, -1)))
    made = make_tiles(spans, how.block_q, how.block_n, splits=splits)
    table = cut.make_table(made, how, DEVICE)
    out, lse = tensors((1, 5, 4, 16), (1, 4, 5))
    rest = (table.tiles, table.pieces, table.splits, list(table.rows), list(how))
    scores = (0.25, 0.0, "middle", None, None, False)
    check(torch.ops.ringkern.step.default, q, k, v, out, lse, *rest, *scores)
    want = out.clone(), lse.clone()
    step.step(q, k, v, *want, table, softmax_scale=0.25)
    run = torch.compile(ops.step, backend="aot_eager", fullgraph=True)
    run(q, k, v, out, lse, *rest, *scores)
    torch.testing.assert_close((out, lse), want, rtol=0, atol=0)


def test_decode_merge_and_copies_compile():
    q, k, v = tensors((2, 4, 16), (24, 2, 16), (24, 2, 16))
    out, lse = tensors((2, 4, 16), (4, 2))
    ints = dict(dtype=torch.int32, device=DEVICE)
    page_table = torch.tensor([[2, 0], [1, 0]], **ints)
    lengths, edges = torch.tensor([13, 5], **ints), torch.tensor([0, 1, 2], **ints)
    args = (q, k, v, out, lse, page_table, lengths, edges, 1, 8, 0.25, 0.0, None, 2, True, False)
    check(torch.ops.ringkern.decode.default, *args)
    outs, lses = tensors((3, 1, 5, 2, 8), (3, 1, 2, 5))
    check(
        torch.ops.ringkern.merge_into.default, outs, lses, *tensors((1, 5, 2, 8), (1, 2, 5)), True
    )
    slots = torch.tensor([3, 0, 17], device=DEVICE)
    (rows,) = tensors((3, 2, 16))
    check(torch.ops.ringkern.gather_rows.default, k, slots, rows)
    check(torch.ops.ringkern.scatter_rows.default, rows, slots, k)
