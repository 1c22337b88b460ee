"""Exact attention over sequences that are sharded across ranks."""

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that the planner runs where torch
# is not installed and `import ringkern` costs nothing.
_PUBLIC = {
    "ArgumentError": "errors",
    "AuthenticationError": "errors",
    "DecodeGraphs": "graphs",
    "KVCache": "cache",
    "LocalGroup": "transport",
    "Placement": "placement",
    "Plan": "plan",
    "ProtocolError": "errors",
    "Ring": "ring",
    "RingkernError": "errors",
    "TransportError": "errors",
    "TransportTimeoutError": "errors",
    "UnsupportedError": "errors",
    "attn_func": "attn",
    "attn_varlen_func": "attn",
    "init_ring": "api",
    "merge": "attn",
    "ring_attn_func": "api",
    "ring_attn_varlen_func": "api",
    "shard_sequence": "api",
    "unshard_sequence": "api",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ringkern' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted(__all__ + ["__version__"])
