"""What can go wrong, sorted by what the caller can do about it."""


class RingkernError(Exception):
    """Base of every error that ringkern raises on purpose."""


class ArgumentError(RingkernError, ValueError):
    """The call is wrong. Nothing was computed, sent or stored. Fix the call."""


class UnsupportedError(RingkernError, NotImplementedError):
    """The call is right, but this build or this machine cannot do it."""


class TransportError(RingkernError, ConnectionError):
    """A peer or a link failed. This ring is finished: make a new one.

    Attributes:
        origin: the rank where the failure began, -1 where that is not known.
    """

    origin = -1


class TransportTimeoutError(TransportError, TimeoutError):
    """A peer did not answer in time. This ring is finished: make a new one."""


class AuthenticationError(TransportError):
    """A peer does not know the ring's secret, or is not who it says. Nothing was exchanged."""


class ProtocolError(TransportError):
    """A peer sent what was not due: another size, another order, a damaged frame."""


def check(ok: bool, what: str, want: object, got: object, hint: str = "") -> None:
    """Raise ArgumentError("{what}: want {want}, got {got}. {hint}") unless ok."""
    if not ok:
        raise ArgumentError(f"{what}: want {want}, got {got}. {hint}".rstrip())
