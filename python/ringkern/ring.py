"""The ring: runs the steps of a schedule. The only module that sees kernels and transport both."""

import json
from dataclasses import asdict

import torch

from ringkern import env, local
from ringkern.errors import ArgumentError, RingkernError, UnsupportedError, check
from ringkern.plan import Plan
from ringkern.problem import check_dims, make_problem
from ringkern.schedule import make_schedule
from ringkern.stats import Stats
from ringkern.types import Problem

METHODS = ("auto", "pass_kv", "pass_q", "gather_kv", "gather_q")
RECORD_BYTES = 2048  # of a rank's arguments, as RINGKERN_CHECK compares them


class Ring:
    """The ranks that share a sequence. Made by init_ring(); a context manager.

    All ranks make the same calls in the same order. After a TransportError the ring is finished:
    every later call raises that same error; make a new one.

    Attributes:
        rank, world_size: this rank, and how many there are.
        device: where tensors must lie.
        transport: "tcp" or "local".
    """

    def __init__(self, transport, device: torch.device):
        self._link = transport
        self.rank, self.world_size = transport.rank, transport.world_size
        self.device, self.transport = device, transport.name
        self._stats = Stats()
        self._wires: dict[torch.dtype, list[torch.Tensor]] = {}
        self._check = env.flag("RINGKERN_CHECK")
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def __repr__(self):
        return f"<ringkern.Ring rank {self.rank} of {self.world_size}, {self.transport}>"

    # ---- attention

    def attn(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        *,
        cache=None,
        layer: int = 0,
        method: str = "auto",
        causal: bool = True,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        partial_dtype: torch.dtype | None = None,
        return_lse: bool = False,
    ):
        """Return attention of this rank's queries to the keys of every rank.

        Exact: the same as attention over the whole batch on one device, up to rounding. Every rank
        must call it.

        Args:
            q: [n_local, nheads, headdim], float16, bfloat16 or float32: this rank's new tokens as
                plan.shard() cuts them; n_local may be 0.
            k: [n_local, nheads_k, headdim], nheads % nheads_k == 0.
            v: [n_local, nheads_k, headdim_v].
            plan: what placement.prefill() returned, the same on every rank.
            cache, layer, partial_dtype: for persistent KV and methods that this version does not
                have; must be left out.
            method: "auto" or "pass_kv": K and V go round the ring, world_size - 1 steps.
            causal: a query sees the keys at its position and before, in its own sequence.
            softmax_scale: None means headdim ** -0.5.
            window_size: (left, right): how many positions before and after a query it sees; -1
                means no bound.
            softcap: 0.0 is off; else scores become softcap * tanh(scores / softcap).
            sinks: [nheads], one more score per head with a value of zero; None means none.
            return_lse: also return lse.

        Returns:
            out: [n_local, nheads, headdim_v] in q's dtype, accumulated in float32; 0 where a query
                sees no key.
            lse: only with return_lse. [nheads, n_local] float32, natural log; -inf where a query
                sees no key.

        Raises:
            ArgumentError: shapes, dtypes or the plan do not fit; nothing was sent.
            UnsupportedError: this version cannot do it; nothing was sent.
            TransportError: a rank is gone or late; the error names it.
        """
        asked = dict(
            causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap
        )

        def accept():
            check(isinstance(plan, Plan), "plan", "a Plan", type(plan).__name__)
            check(
                plan.world_size == self.world_size,
                "plan",
                f"world_size {self.world_size}, as the ring",
                plan.world_size,
            )
            check_method(method, cache, layer, partial_dtype)
            check_dims(q, k, v, 3, "packed, [n_local, heads, headdim]")
            problem = make_problem(q, k, v, **asked, sinks=sinks, device=self.device)
            want = f"{plan.num_tokens(self.rank)} rows, rank {self.rank}'s share of the plan"
            for name, x in (("q", q), ("k", k)):
                check(len(x) == plan.num_tokens(self.rank), name, want, tuple(x.shape))
            return problem

        problem = self.agree(accept, plan)
        out, lse = self.run(q[None], k[None], v[None], plan, problem, sinks)
        return (out[0], lse[0]) if return_lse else out[0]

    def run(self, q, k, v, plan: Plan, problem: Problem, sinks=None):
        """Return (out, lse) for checked arguments, dense: [batch, n_local, heads, headdim].

        The loop of pass-KV: post the exchange, attend with what is at hand, wait, swap. Merging is
        part of attending: local.step() adds to the running state.
        """
        schedule = make_schedule(plan, self.rank, problem.causal, problem.window_size)
        stats, prev_rank, next_rank = self._stats, *self._neighbours()
        out, lse = local.make_state(q, problem.headdim_v, sinks)
        kv, spare = self._load_wire(k, v, plan, problem)
        for step in schedule:
            send = _rows(kv, step.send_tokens, problem)
            recv = _rows(spare, step.recv_tokens, problem)
            ticket = self._post(send, next_rank, recv, prev_rank)
            if len(step.spans):
                with stats.timed("attend", step.index):
                    here = (k, v) if step.index == 0 else _split(kv, plan, step.kv_rank, problem)
                    local.step(q, *here, out, lse, step.spans, problem)
            if ticket:
                with stats.timed("wait", step.index):
                    times = ticket.wait()
                stats.add("exchange", step.index, *times, nbytes=_nbytes(send))
                kv, spare = spare, kv
            stats.bytes_planned += step.send_tokens * bytes_per_token(problem)
            stats.steps += 1
        stats.calls += 1
        return out.to(q.dtype), lse

    def agree(self, accept, plan: Plan | None) -> Problem:
        """Return accept()'s Problem after checking it against the plan and this ring.

        With RINGKERN_CHECK=1 the ranks first compare what they were asked, so that a call that one
        rank refuses, or that differs between ranks, is an ArgumentError on every rank.
        """
        if not self._check:
            return self._accept(accept)
        try:
            problem, refused = self._accept(accept), None
            mine = {**asdict(problem), "plan": repr(plan)}
            mine["plan"] = mine["plan"][: RECORD_BYTES // 2]
        except RingkernError as error:
            mine, refused = {"refused": str(error)[: RECORD_BYTES // 2]}, error
        records = [json.loads(x) for x in self.gather_bytes(json.dumps(mine).encode())]
        if refused:
            raise refused
        for rank, record in enumerate(records):
            if "refused" in record:
                raise ArgumentError(f"rank {rank} refused the call: {record['refused']}")
        _check_same(records)
        return problem

    def _accept(self, accept):
        check(not self._closed, "ring", "an open ring", "a closed one", "Make a new ring.")
        local.pick_backend("auto", self.device)
        return accept()

    # ---- data from every rank

    def unshard(self, x_local: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Return all ranks' rows in packed global order, on every rank.

        Args:
            x_local: [n_local, ...], this rank's rows as plan.shard() cuts them.
            plan: the same on every rank.

        Returns:
            [total_new, ...], like x_local.
        """
        check(
            plan.world_size == self.world_size,
            "plan",
            f"world_size {self.world_size}",
            plan.world_size,
        )
        check(
            isinstance(x_local, torch.Tensor), "x_local", "a torch.Tensor", type(x_local).__name__
        )
        want = plan.num_tokens(self.rank)
        check(
            x_local.dim() > 0 and len(x_local) == want,
            "x_local",
            f"{want} rows, this rank's share of the plan",
            tuple(x_local.shape),
        )
        whole = x_local.new_empty(plan.total, *x_local.shape[1:])
        shapes = [(plan.num_tokens(rank), *x_local.shape[1:]) for rank in range(self.world_size)]
        for rank, rows in enumerate(self._gather(x_local.contiguous(), shapes)):
            whole[torch.from_numpy(plan.indices(rank)).to(whole.device)] = rows
        return whole

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """Return what every rank passed, at most RECORD_BYTES each. Small, for agreements."""
        check(len(mine) <= RECORD_BYTES, "mine", f"at most {RECORD_BYTES} bytes", len(mine))
        padded = torch.frombuffer(bytearray(mine.ljust(RECORD_BYTES)), dtype=torch.uint8)
        parts = self._gather(padded, [(RECORD_BYTES,)] * self.world_size)
        return [bytes(part.numpy()).rstrip() for part in parts]

    def gather_int(self, mine: int) -> list[int]:
        """Return the int that every rank passed."""
        parts = self._gather(torch.tensor([mine]), [(1,)] * self.world_size)
        return [int(part) for part in parts]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.gather_int(0)

    def _gather(self, mine, shapes):
        """Return every rank's tensor, by one exchange with all of them at once."""
        check(not self._closed, "ring", "an open ring", "a closed one", "Make a new ring.")
        parts = [mine if r == self.rank else mine.new_empty(s) for r, s in enumerate(shapes)]
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        sends = [(rank, mine) for rank in others if mine.numel()]
        recvs = [(rank, parts[rank]) for rank in others if parts[rank].numel()]
        if sends or recvs:
            self._link.exchange(sends, recvs).wait()
        return parts

    # ---- life

    def stats(self) -> dict:
        """Return totals since the ring was made: calls, steps, bytes, milliseconds; see Stats.

        "transport" holds what the transport itself counted.
        """
        return self._stats.to_dict() | {"transport": self._link.stats()}

    def events(self) -> list:
        """Return the latest stats.Event of this rank, oldest first: for timelines."""
        return list(self._stats.events)

    def close(self) -> None:
        """Leave the ring. Safe to call again; never hangs."""
        if not self._closed:
            self._closed = True
            self._wires.clear()
            self._link.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and not self._closed:
            self._link.abort(f"rank {self.rank} left the ring with {kind.__name__}: {error}")
        self.close()

    # ---- wires

    def _neighbours(self):
        return (self.rank - 1) % self.world_size, (self.rank + 1) % self.world_size

    def _post(self, send, next_rank, recv, prev_rank):
        """Post what this step sends and receives; None where both are empty."""
        sends = [(next_rank, send)] if send.numel() else []
        recvs = [(prev_rank, recv)] if recv.numel() else []
        if not (sends or recvs):
            return None
        self._stats.bytes_sent += _nbytes(send)
        return self._link.exchange(sends, recvs)

    def _load_wire(self, k, v, plan: Plan, problem: Problem):
        """Return two wire buffers, the first with this rank's K and V. Kept from call to call."""
        if self.world_size == 1:
            return k.new_empty(0), k.new_empty(0)
        largest = max(plan.num_tokens(rank) for rank in range(self.world_size))
        need = largest * bytes_per_token(problem) // k.element_size()
        wires = self._wires.get(k.dtype)
        if wires is None or wires[0].numel() < need:
            self._wires[k.dtype] = wires = None  # free the small ones first
            self._wires[k.dtype] = wires = [k.new_empty(need) for _ in range(2)]
        for wire, x in zip(_split(wires[0], plan, self.rank, problem), (k, v), strict=True):
            wire.copy_(x)
        return wires


def check_method(method: str, cache=None, layer: int = 0, partial_dtype=None) -> None:
    """Raise unless this version can do it."""
    check(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    if method not in ("auto", "pass_kv"):
        raise UnsupportedError(f'method {method!r}: this version has "pass_kv" only. Use "auto".')
    for name, value, default in (
        ("cache", cache, None),
        ("layer", layer, 0),
        ("partial_dtype", partial_dtype, None),
    ):
        if value != default:
            raise UnsupportedError(
                f"{name}: needs a persistent KV cache or travelling partials, which this version "
                f"does not have. Leave it out."
            )


def bytes_per_token(problem: Problem) -> int:
    """Return how many bytes the K and V of one position take on the wire, whole batch."""
    itemsize = 4 if problem.dtype == "float32" else 2
    return problem.batch * problem.nheads_k * (problem.headdim + problem.headdim_v) * itemsize


def _split(wire, plan: Plan, rank: int, problem: Problem):
    """Return K and V of a rank, [batch, n, nheads_k, headdim(_v)], as views of a wire buffer."""
    rows = problem.batch * plan.num_tokens(rank) * problem.nheads_k
    shape = (problem.batch, plan.num_tokens(rank), problem.nheads_k)
    k_size, v_size = rows * problem.headdim, rows * problem.headdim_v
    k, v = wire[:k_size], wire[k_size : k_size + v_size]
    return k.view(*shape, problem.headdim), v.view(*shape, problem.headdim_v)


def _rows(wire, tokens: int, problem: Problem):
    return wire[: tokens * problem.batch * problem.nheads_k * (problem.headdim + problem.headdim_v)]


def _nbytes(x) -> int:
    return x.numel() * x.element_size()


def _check_same(records: list[dict]) -> None:
    for key in records[0]:
        values: dict = {}
        for rank, record in enumerate(records):
            values.setdefault(json.dumps(record[key]), []).append(rank)
        told = "; ".join(f"{value}: ranks {ranks}" for value, ranks in values.items())
        if len(values) > 1:
            raise ArgumentError(f"{key} differs between ranks: {told}. Call all ranks alike.")
