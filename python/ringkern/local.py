"""One step on this device: picks the kernel."""

import torch

from ringkern.errors import UnsupportedError, check
from ringkern.kernels import reference, step_torch

BACKENDS = ("auto", "triton", "hopper", "torch")


def pick_backend(backend: str, device: torch.device) -> str:
    """Return the backend that will run on this device, or raise what is missing for it."""
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    if backend in ("triton", "hopper"):
        raise UnsupportedError(
            f'backend "{backend}": needs kernels that this version does not have. Use "torch".'
        )
    if device.type != "cpu":
        raise UnsupportedError(
            f"attention on {device.type}: this version computes on the CPU. Move q, k and v there."
        )
    return "torch"


def make_state(q, headdim_v: int, sinks=None):
    """Return the running (out, lse) before any key was seen, float32.

    q [batch, seqlen, nheads, headdim]. A sink is a key with a value of zero that every query of
    its head sees: the state starts with lse = sink instead of -inf.
    """
    batch, seqlen, nheads, _ = q.shape
    out = q.new_zeros(batch, seqlen, nheads, headdim_v, dtype=torch.float32)
    if sinks is None:
        lse = q.new_full((batch, nheads, seqlen), float("-inf"), dtype=torch.float32)
    else:
        lse = sinks.float()[None, :, None].repeat(batch, 1, seqlen)
    return out, lse


def clear_(out, lse) -> None:
    """Make a state that has seen no key, in place."""
    out.zero_()
    lse.fill_(float("-inf"))


def prepare(spans):
    """Return a table of spans as step() takes it: once for all layers."""
    return spans.tolist()


def step(q, k, v, out, lse, spans, problem) -> None:
    """Add the keys of the spans to the running (out, lse), in place. Shapes as in step_torch.

    spans: as prepare() returned them.
    """
    scale, softcap = problem.softmax_scale, problem.softcap
    step_torch.step(q, k, v, out, lse, spans, softmax_scale=scale, softcap=softcap)


def merge_(out, lse, part_out, part_lse) -> None:
    """Merge a part into the running (out, lse), in place; float32 all."""
    step_torch.merge_(out, lse, part_out, part_lse)


def merge(outs, lses):
    """Return (out, lse) of all parts together; out in outs' dtype, lse float32."""
    out, lse = reference.merge(outs, lses.float())
    return out.to(outs.dtype), lse
