"""How close is close enough: the tolerance of every test."""

import torch

NATS, NATS_PER_NAT = 1e-4, 1e-5  # on lse: absolute, and relative to its size

# Largest 1 - 2<a,b> / (<a,a> + <b,b>). Sees a small error spread over all elements, which the
# worst-element rule does not: 1 % too large is 5e-5.
DRIFT = {torch.float32: 1e-10, torch.float16: 1e-6, torch.bfloat16: 1e-5}


def assert_close(actual, oracle, baseline, *, name, factor=2.0, floor=1e-5):
    """Assert that actual is as good as its dtype allows, element by element and overall.

    oracle is the float64 answer; baseline is the same formula in actual's own dtype, and no
    element may be further from the oracle than factor x the baseline's worst.
    """
    assert actual.shape == oracle.shape, f"{name}: want {oracle.shape}, got {actual.shape}"
    for special in ("isnan", "isposinf", "isneginf"):
        got, want = getattr(torch, special)(actual), getattr(torch, special)(oracle)
        assert torch.equal(got, want), f"{name}: {int(got.sum())} {special}, want {int(want.sum())}"
    if not actual.numel():
        return
    a, b, c = (x.double().nan_to_num(0, 0, 0) for x in (actual, oracle, baseline))
    error, limit = (a - b).abs(), factor * (c - b).abs().max().item() + floor
    if error.max() > limit:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: error {error.max():.3g} > {limit:.3g} at {at}: got {a[at]:.6g}, "
            f"want {b[at]:.6g}; {int((error > limit).sum())} of {error.numel()} elements out"
        )
    norm = (a * a + b * b).sum().item()
    drift = 1 - 2 * (a * b).sum().item() / norm if norm else 0.0
    assert drift <= DRIFT[actual.dtype], f"{name}: drift {drift:.3g} > {DRIFT[actual.dtype]:.3g}"


def assert_lse_close(actual, oracle, *, name):
    """Assert that lse is float32, near the oracle's, and infinite at the same places."""
    assert actual.dtype == torch.float32, f"{name}: lse is {actual.dtype}"
    assert torch.equal(actual.isneginf(), oracle.isneginf()), f"{name}: -inf at other places"
    error = (actual.double() - oracle.double()).nan_to_num(0, 0, 0).abs()
    allowed = NATS + NATS_PER_NAT * oracle.double().nan_to_num(0, 0, 0).abs()
    assert (error <= allowed).all(), f"{name}: lse off by {error.max():.3g} nats"
