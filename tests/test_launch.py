"""Kernels that were made ready are launched as Triton would: the same ones, with the same arguments."""

import json
import os
import subprocess
import sys

import accelerator
import pytest

pytestmark = pytest.mark.skipif(accelerator.ON_GPU, reason="the stub driver has no GPU")

PROGRAM = '''
import collections, json, sys
import ringkern, torch
from bench.host import NoLink
from ringkern.kernels import pack
from ringkern.kernels.launch import Launch
from ringkern.ring import Ring
from tests.stub_triton import STREAM, stub_triton

HEADS = 8, 2, 2
call = Launch.__call__
checked = collections.Counter()


def compare(launch, *tensors):
    """Launch, and launch anew by Triton: once is expected, and what Triton does is the judge."""
    ready, start = launch.ready, len(launches)
    call(launch, *tensors)
    if not ready:
        return
    again = Launch.__new__(Launch)
    again.__dict__ |= launch.__dict__
    again._run, again._numbers = None, launch._numbers[: -len(launch._constexprs)]
    name = launches[start][0]
    if name == "_copy_rows":  # which Triton sees as words
        *rows, slots = tensors
        tensors = *(x.flatten(0, -3).flatten(1).view(torch.int32) for x in rows), slots
    call(again, *tensors)
    (_, ours), (_, tritons) = launches[start:]
    assert ours[3] == STREAM and not any(isinstance(x, torch.Tensor) for x in ours)
    ours, tritons = (
        [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (*args[:6], *args[9:])]
        for args in (ours, tritons)  # without what is for hooks
    )
    assert ours == tritons, (name, ours, tritons)
    checked[name] += 1


def session(ring, dtype):
    placement = ringkern.Placement(ring.world_size)
    cache = ringkern.KVCache(ring, placement, num_layers=12, nheads_k=2, headdim=64, dtype=dtype,
                             num_pages=400, page_size=16)
    lengths = {"a": 700, "b": 3, "c": 41}
    for turn in (placement.prefill, placement.prefill, placement.decode, placement.decode):
        plan = turn(lengths if turn == placement.prefill else list(lengths))
        rows = plan.num_tokens(ring.rank)
        for number, method in enumerate(("pass_kv", "pass_q", "gather_kv", "gather_q")):
            for layer in range(3 * number, 3 * number + 3):
                fused = torch.zeros(rows, sum(HEADS), 64, dtype=dtype)
                qkv = fused.split(HEADS, 1)
                if layer % 3 < 2:
                    qkv = [x.contiguous() for x in qkv]
                ring.attn(*qkv, plan, cache=cache, layer=layer, method=method)


def copies():
    """Of K and V of unlike widths, one of a single vector, for which Triton compiles otherwise."""
    slots = torch.arange(7)
    for sizes in ((8, 64), (64, 8), (8, 8)):
        pools, packed = ([torch.zeros(n, 1, d).half() for d in sizes] for n in (50, 7))
        run = pack.prepare(pools, slots, packed, "out", gather=True)
        for _ in range(2):
            run(pools, slots, packed)


with stub_triton() as launches:
    Launch.__call__ = compare
    copies()
    with Ring(NoLink(3), torch.device("cpu")) as ring:
        session(ring, torch.bfloat16)
json.dump(checked, sys.stdout)
'''


def test_launches_are_triton_s():
    root = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join([root, os.path.join(root, "tests")])
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = json.loads(done.stdout)
    assert all(checked[name] > 10 for name in ("_step", "_decode", "_merge", "_copy_rows")), checked
