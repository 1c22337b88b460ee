"""What `ringkern calibrate` does, by its default budget: how long it takes to measure a ring."""

from types import SimpleNamespace

from ringkern import calibrate

from bench.operation import Operation, nothing


def make_inputs(session, case):
    """Return a state: a ring, and what is to be spent on it."""
    return SimpleNamespace(ring=session.ring(), seconds=case.shape["seconds"], profile=None)


def call(state, impl: str, index: int) -> None:
    state.profile = calibrate.measure(state.ring, state.seconds)


def check(state, impl: str) -> dict:
    """Every rank has the same profile."""
    everyone = state.ring.gather_bytes(repr(state.profile).encode())
    return {"ok": len(set(everyone)) == 1}


CALIBRATE = Operation("calibrate", make_inputs, call, check, nothing, nothing)
