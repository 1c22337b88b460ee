"""torch.compile and torch.export trace through ringkern's operators, and agree with eager calls."""

import subprocess
import sys

import pytest
import ringkern
import torch
from accelerator import DEVICE
from ringkern import ops, tiles
from ringkern.errors import UnsupportedError
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


LOADS = """
import sys
import ringkern.ops
import torch

given, want = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(*given)
torch.testing.assert_close(found, want, rtol=0, atol=0)
names = "attn attn_varlen merge step decode merge_into gather_rows scatter_rows".split()
assert all(hasattr(torch.ops.ringkern, name) for name in names)
"""


def test_a_saved_program_runs_in_a_fresh_process(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            out, lse = ringkern.attn_func(q, k, v, causal=True)
            return ringkern.merge(torch.stack([out, -out]), torch.stack([lse, lse + 1]))

    given = tuple(tensors((1, 5, 4, 16), (1, 9, 2, 16), (1, 9, 2, 16)))
    torch.export.save(torch.export.export(Model(), given), tmp_path / "program.pt2")
    torch.save((given, Model()(*given)), tmp_path / "tensors.pt")
    paths = tmp_path / "program.pt2", tmp_path / "tensors.pt"
    subprocess.run([sys.executable, "-c", LOADS, *paths], check=True, timeout=120)


class Projected(torch.nn.Module):
    """A model whose parameters ask for gradients, as they do unless somebody says otherwise."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 16, device=DEVICE)

    def forward(self, x):
        q = self.project(x)
        return ringkern.attn_func(q, q, q, causal=True)


def test_gradients_are_refused_in_the_call():
    """By the operators too: not as late as in backward, where torch knows of no formula."""
    model, refused = Projected(), "gradients: ringkern is for inference"
    (x,) = tensors((1, 5, 2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=refused):
        compiled(x)
    with pytest.raises(UnsupportedError, match=refused):
        torch.export.export(model, (x,))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert all(map(torch.equal, compiled(x), model(x)))
        assert all(map(torch.equal, program.module()(x), model(x)))
    with pytest.raises(UnsupportedError, match=refused):
        program.module()(x)

    q, lses = x.clone().requires_grad_(), torch.zeros(1, 2, 5, device=DEVICE)
    edges = torch.tensor([0, 5], dtype=torch.int32)
    rest = True, None, [-1, -1], 0.0, None, "auto"
    for call, args in (
        (torch.ops.ringkern.attn, (q, x, x, *rest)),
        (torch.ops.ringkern.attn_varlen, (q[0], x[0], x[0], edges, edges, *rest)),
        (torch.ops.ringkern.merge, (q, lses)),
        (ringkern.attn_func, (q, x, x)),
        (ringkern.attn_varlen_func, (q[0], x[0], x[0], edges, edges)),
        (ringkern.merge, (q, lses)),
        (ringkern.merge, ([x[0], x[0]], [lses[0], lses[0].requires_grad_()])),
    ):
        with pytest.raises(UnsupportedError, match=refused):
            call(*args)
        with torch.no_grad():
            call(*args)


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
    args = (q, k, v, out, lse, page_table, lengths, edges, 1, 8, 0.25, 0.0, None)
    check(torch.ops.ringkern.decode.default, *args, None, 2, True, False)
    check(torch.ops.ringkern.decode.default, *args, torch.zeros(4, device=DEVICE), 2, False, False)
    outs, lses = tensors((3, 1, 5, 2, 8), (3, 1, 2, 5))
    check(
        torch.ops.ringkern.merge_into.default, outs, lses, *tensors((1, 5, 2, 8), (1, 2, 5)), True
    )
    slots = torch.tensor([3, 0, 17], device=DEVICE)
    (rows,) = tensors((3, 2, 16))
    check(torch.ops.ringkern.gather_rows.default, k, slots, rows)
    check(torch.ops.ringkern.scatter_rows.default, rows, slots, k)
