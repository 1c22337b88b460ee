"""What a rank computes and merges in one go: whatever comes in one step and lies together."""

import pytest
import ringkern
import torch
from ringkern import local, program
from ringkern.problem import make_problem
from ringkern.ring import Ring

from bench.host import NoLink

WORLD = 5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "method, steps, merges",
    # Own work in halves, and at once what is asked of the others, or theirs one by one.
    [("gather_q", 3, 1), ("pass_q", 2 + WORLD - 1, WORLD - 1), ("pass_kv", WORLD, 0)],
)
@pytest.mark.parametrize("small", [False, True])
def test_what_comes_together_goes_together(monkeypatch, batch, method, steps, merges, small):
    if not small:
        monkeypatch.setattr(program, "AT_ONCE", 0)
    counts = dict(step=0, merge=0)

    def count(name):
        def one_more(*_, **__):
            counts[name] += 1

        return one_more

    monkeypatch.setattr(local, "step", count("step"))
    monkeypatch.setattr(local.Merge, "__call__", count("merge"))
    with Ring(NoLink(WORLD), torch.device("cpu")) as ring:
        plan = ringkern.Placement(WORLD).prefill(dict(a=4001, b=1))
        rows = plan.num_tokens(ring.rank)
        q, k, v = (torch.zeros(batch, rows, heads, 8) for heads in (4, 2, 2))
        masks = dict(causal=False, softmax_scale=1.0, window_size=(-1, -1), softcap=0.0)
        problem = make_problem(q, k, v, **masks, sinks=None, device=ring.device)
        ring.run(q, k, v, plan, problem, method=method)
    if method == "gather_q" and batch > 1:  # one behind the other they are no batch
        steps += WORLD - 2
    assert counts == dict(step=steps, merge=min(merges, 1) if small else merges)
