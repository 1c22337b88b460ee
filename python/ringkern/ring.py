"""The ring: checks a call, chooses its method, and runs its program over the transport."""

import contextlib
import weakref

import torch

from ringkern import calibrate, env
from ringkern.agreement import agree
from ringkern.backend import pick_backend
from ringkern.cache import KVCache
from ringkern.capture import captures
from ringkern.collectives import Collectives
from ringkern.cost import Choice, choose
from ringkern.errors import TransportError, UnsupportedError, check
from ringkern.guard import guard
from ringkern.plan import Plan
from ringkern.problem import check_dims, make_asked, make_problem, signature
from ringkern.programs import Programs
from ringkern.schedule import check_method
from ringkern.stats import Stats
from ringkern.tracer import make_tracer
from ringkern.turns import Turns
from ringkern.types import Hardware, Problem
from ringkern.upload import upload

PART_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


class Ring(Collectives):
    """The ranks that share a sequence. Made by init_ring(); a context manager.

    All ranks make the same calls in the same order. After a TransportError the ring is finished:
    every later call raises that same error; make a new one.

    Attributes:
        rank, world_size: this rank, and how many there are.
        device: where tensors must lie.
        transport: "tcp", "nccl" or "local".
        order: the ranks as the ring goes round: neighbours are on one host where they can be.
    """

    def __init__(self, transport, device: torch.device, hardware: Hardware | None = None):
        self._link, self._hardware = transport, hardware
        self.rank, self.world_size = transport.rank, transport.world_size
        self.device, self.transport = device, transport.name
        self._stats = self._make_stats()
        of_gpus = transport is not transport.host
        legs = transport.legs if of_gpus else list
        self._tracer = make_tracer(transport.host, self._stats, legs)
        self.order = transport.order or tuple(range(self.world_size))
        self.programs = Programs(self.rank, device, self.backend, self.order)
        self.graphs = weakref.WeakSet()  # the DecodeGraphs of this ring
        self._turns = Turns(device)
        self.compares_arguments = env.flag("RINGKERN_CHECK")
        self._closed = False

    def _make_stats(self) -> Stats:
        if self.device.type == "cpu" or not env.trace():
            return Stats()
        from ringkern.device_stats import DeviceStats

        stats = DeviceStats(self.device)
        self._link.time_by(stats)
        return stats

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def __repr__(self):
        return f"<ringkern.Ring rank {self.rank} of {self.world_size}, {self.transport}>"

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
        """Return attention of this rank's new queries to the keys of every rank.

        Exact: the same as attention over the whole batch on one device, up to rounding. Every rank
        must call it.

        Args:
            q: [n_local, nheads, headdim], float16, bfloat16 or float32: this rank's new tokens as
                plan.shard() cuts them; n_local may be 0.
            k: [n_local, nheads_k, headdim], nheads % nheads_k == 0.
            v: [n_local, nheads_k, headdim_v].
            plan: what placement.prefill() or decode() returned, the same on every rank.
            cache: where the K and V of the plan's sequences lie; the new tokens' are stored there.
                None: the plan must be a full prefill.
            layer: which layer of the cache.
            method: "pass_kv", "pass_q", "gather_kv", "gather_q", or "auto": what choose() says.
            partial_dtype: of the outputs that travel, by pass_q and gather_q: float32 (None), or
                bfloat16 or float16, which halves them and rounds them once.
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
            ArgumentError: shapes, dtypes, the plan or the cache do not fit, or pages run out;
                nothing was stored or sent.
            UnsupportedError: this version cannot do it; nothing was sent.
            TransportError: a rank is gone or late; the error names it.
        """
        mask = causal, softmax_scale, window_size, softcap
        asked = *mask, method, partial_dtype, layer if cache is None else None
        given = signature(q, k, v, sinks, *asked), type(cache), self.rank, self.world_size
        known = given[0] and type(plan) is Plan and not (self._closed or self.compares_arguments)
        problem = plan.memo.get(given) if known else None
        if problem is None:
            problem = self._accept(q, k, v, plan, cache, layer, method, mask, sinks, partial_dtype)
            plan.memo[given] = problem
        elif cache is not None:
            cache.check_call(self, plan, layer, problem)
        out, lse = self.run(
            q[None],
            k[None],
            v[None],
            plan,
            problem,
            method=method,
            sinks=sinks,
            cache=cache,
            layer=layer,
            partial_dtype=partial_dtype,
        )
        return (out[0], lse[0]) if return_lse else out[0]

    def _accept(self, q, k, v, plan, cache, layer, method, mask, sinks, partial_dtype):
        """Return the Problem of a call's arguments, all checked."""
        names = "causal", "softmax_scale", "window_size", "softcap"

        def accept():
            self._check_plan(plan)
            check_method(method)
            check(partial_dtype in PART_DTYPES, "partial_dtype", PART_DTYPES, partial_dtype)
            check_dims(q, k, v, 3, "packed, [n_local, heads, headdim]")
            asked = dict(zip(names, mask, strict=True))
            problem = make_problem(q, k, v, **asked, sinks=sinks, device=self.device)
            self.backend(problem)
            want = f"{plan.num_tokens(self.rank)} rows, rank {self.rank}'s share of the plan"
            for name, x in (("q", q), ("k", k)):
                check(len(x) == plan.num_tokens(self.rank), name, want, tuple(x.shape))
            if cache is None:
                want = "one, as the plan is on top of cached tokens"
                check(not plan.has_history, "cache", want, "None")
                check(layer == 0, "layer", "0 without a cache", repr(layer))
            else:
                want = "a KVCache or None"
                check(isinstance(cache, KVCache), "cache", want, type(cache).__name__)
                cache.check_call(self, plan, layer, problem)
            return problem

        more = dict(plan=plan, method=method, sinks=sinks, layer=layer, partial_dtype=partial_dtype)
        return agree(self, accept, **more)

    def run(
        self,
        q,
        k,
        v,
        plan,
        problem,
        *,
        method="auto",
        sinks=None,
        cache=None,
        layer=0,
        partial_dtype=None,
    ):
        """Return (out, lse) for checked arguments, dense: [batch, n_local, heads, headdim]."""
        if method == "auto":
            method = self._choose(plan, problem, partial_dtype).method
            method = self.programs.pin(problem, method)
        captured = captures(self.device)
        self.programs.check_capture(captured, cache)
        self._stats.begin(method)
        with guard(self.device), contextlib.nullcontext() if captured else self._turns:
            own_kv = cache.write(plan, layer, k, v) if cache else (k, v)
            given = plan, method, problem, cache, q.dtype, partial_dtype
            program = self.programs.find(*given, captured)
            if program.kv_room:
                self._load(program, plan, k, v, cache, layer)
            if program.sends_q:
                q = q.contiguous()
            try:
                out, lse = program.run(self._link, self._stats, q, own_kv, sinks)
            except BaseException as error:
                # Between a post and its wait the ranks are an exchange apart, and buffers under
                # way: where the call was interrupted there, the ring fails on every rank.
                if not isinstance(error, TransportError):
                    self._link.abort(f"a call ended with {type(error).__name__}: {error}")
                raise
        self._stats.end()
        return out, lse

    def choose(
        self,
        plan: Plan,
        *,
        nheads: int,
        nheads_k: int,
        headdim: int,
        dtype,
        headdim_v: int | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        partial_dtype: torch.dtype | None = None,
    ) -> Choice:
        """Return what method="auto" does for such a call: .method, .reason, .predicted_us.

        The same on every rank. Without a profile, the first choice of a ring measures it, for which
        every rank must call.

        Raises:
            ArgumentError: these are no arguments of a call on this ring; nothing was sent.
        """
        self._check_plan(plan)
        heads = nheads, nheads_k, headdim, headdim if headdim_v is None else headdim_v
        problem = make_asked(*heads, dtype=dtype, causal=causal, window_size=window_size)
        check(partial_dtype in PART_DTYPES, "partial_dtype", PART_DTYPES, partial_dtype)
        return self._choose(plan, problem, partial_dtype)

    def _choose(self, plan, problem, partial_dtype):
        itemsize = (partial_dtype or torch.float32).itemsize
        key = "choice", problem, itemsize
        if key not in plan.memo:
            if self._hardware is None and self.world_size > 1:
                self._hardware = calibrate.probe(self, problem)
            plan.memo[key] = choose(plan, problem, self._hardware, self.order, itemsize)
        return plan.memo[key]

    @property
    def hardware(self) -> Hardware | None:
        """The ring's profile; None until one was given or measured."""
        return self._hardware

    def backend(self, problem: Problem) -> str:
        """Return what computes such a problem here: "triton" or "torch"; raise if nothing can."""
        return pick_backend("auto", self.device, problem)

    def check_open(self) -> None:
        """Raise unless calls can be made."""
        check(not self._closed, "ring", "an open ring", "a closed one", "Make a new ring.")
        pick_backend("auto", self.device)

    def _check_plan(self, plan) -> None:
        check(isinstance(plan, Plan), "plan", "a Plan", type(plan).__name__)
        want = f"world_size {self.world_size}, as the ring"
        check(plan.world_size == self.world_size, "plan", want, plan.world_size)

    # ---- data from every rank

    def unshard(self, x_local: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Return all ranks' rows in packed global order, on every rank.

        Args:
            x_local: [n_local, ...], this rank's rows as plan.shard() cuts them.
            plan: the same on every rank.

        Returns:
            [total_new, ...], like x_local.
        """
        self._check_plan(plan)
        ok = isinstance(x_local, torch.Tensor)
        check(ok, "x_local", "a torch.Tensor", type(x_local).__name__)
        where = x_local.device
        check(where.type == self.device.type, "x_local", f"a tensor on {self.device}", where)
        if torch.is_grad_enabled() and x_local.requires_grad:
            raise UnsupportedError("gradients: unshard() has no backward. Pass x_local.detach().")
        want = plan.num_tokens(self.rank)
        check(
            x_local.dim() > 0 and len(x_local) == want,
            "x_local",
            f"{want} rows, this rank's share of the plan",
            tuple(x_local.shape),
        )
        whole = x_local.new_empty(plan.total, *x_local.shape[1:])
        shapes = [(plan.num_tokens(rank), *x_local.shape[1:]) for rank in range(self.world_size)]
        for rank, rows in enumerate(self.gather(x_local.contiguous(), shapes)):
            whole[upload(plan.indices(rank), whole.device)] = rows
        return whole

    # ---- life

    def stats(self) -> dict:
        """Return totals since the ring was made: calls, steps, bytes, milliseconds; see Stats.

        "transport" holds what the transport itself counted. On a ring of GPUs the milliseconds are
        those of the host, which runs ahead of it over NCCL, unless RINGKERN_TRACE is set: then the
        GPU's.
        """
        return self._stats.to_dict() | {"transport": self._link.stats()}

    def events(self) -> list:
        """Return the latest stats.Event of this rank, oldest first: for timelines."""
        return list(self._stats.events)

    @contextlib.contextmanager
    def watch(self):
        """Return a context for the run of a CUDA graph with calls in it: the deadline is on it."""
        with self._turns, self._link.run_of_graph():
            yield

    def close(self) -> None:
        """Leave the ring. Safe to call again; never hangs."""
        if not self._closed:
            self._closed = True
            if self._tracer:
                self._tracer.finish()
            for graphs in list(self.graphs):
                graphs.clear()
            self.drop_buffers()
            self._link.close()

    def drop_buffers(self) -> None:
        """Forget the wire buffers; the next call makes new ones."""
        self.programs.clear()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and not self._closed:
            self._link.abort(f"rank {self.rank} left the ring with {kind.__name__}: {error}")
        self.close()

    # ---- messages

    def _load(self, program, plan, k, v, cache, layer):
        """Fill the wire with this rank's K and V, cached ones first."""
        if cache:
            slots = cache.slots(plan) if program.kv_slots is None else program.kv_slots
            return cache.gather(layer, slots, *program.kv_room)
        for room, x in zip(program.kv_room, (k, v), strict=True):
            room.copy_(x)
