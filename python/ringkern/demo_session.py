"""The demo's session of two turns, and how a rank of a ring and a single process run it.

Each turn is a prompt, then decoding: the most likely token is fed back, one pass per token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ringkern import api
from ringkern.cache import KVCache
from ringkern.model import Decoder, Shape
from ringkern.placement import Placement
from ringkern.plan import Plan

SEQUENCE = "text"
PAGE_SIZE = 64


@dataclass(frozen=True)
class Stage:
    """A prompt in one forward pass, or decoding in one pass per token."""

    turn: int
    kind: str  # prefill | decode
    cached: int  # tokens before it
    new: int
    prompt: bytes = b""

    @property
    def name(self) -> str:
        return f"turn {self.turn} {self.kind}"

    @property
    def passes(self) -> int:
        return self.new if self.kind == "decode" else 1

    def plan(self, placement: Placement) -> Plan:
        """Return the plan of the stage's next pass."""
        if self.kind == "decode":
            return placement.decode([SEQUENCE])
        return placement.prefill({SEQUENCE: self.new})


@dataclass(frozen=True)
class Session:
    """What both runs do: prompt, decode, follow-up prompt, decode. Tokens are bytes."""

    prompt: bytes
    follow_up: bytes
    decode: int  # tokens per turn
    shape: Shape

    @property
    def stages(self) -> list[Stage]:
        stages, cached = [], 0
        for turn, prompt in enumerate((self.prompt, self.follow_up), 1):
            stages.append(Stage(turn, "prefill", cached, len(prompt), prompt))
            cached += len(prompt)
            stages.append(Stage(turn, "decode", cached, self.decode))
            cached += self.decode
        return stages

    @property
    def total(self) -> int:
        """Tokens in the cache at the end, on all ranks together."""
        return len(self.prompt) + len(self.follow_up) + 2 * self.decode


# ---- one process


@dataclass(frozen=True)
class AloneStage:
    """One stage of the run of one process.

    tokens are the decoded ones; logits [len(tokens), vocab] are what each was chosen from.
    """

    hidden: torch.Tensor  # [new, hidden]
    tokens: list[int]
    logits: torch.Tensor


class _AloneCache:
    """K and V of all layers in one piece each, and torch's own attention to them."""

    def __init__(self, shape: Shape, room: int):
        self._kv = torch.empty(shape.layers, 2, room, shape.nheads_k, shape.headdim)

    def attend(self, start: int, layer: int, q, k, v):
        """Store the new k and v at position `start`; return causal attention."""
        end = start + len(q)
        for room, new in zip(self._kv[layer], (k, v), strict=True):
            room[start:end] = new
        q, k, v = (x.transpose(0, 1)[None] for x in (q, *self._kv[layer, :, :end]))
        mask = None  # a single query sees every key
        if start and end - start > 1:
            mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=start == 0, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def run_alone(session: Session, say: Callable) -> list[AloneStage]:
    """Return the stages as one process runs them, by torch's own attention.

    say: called with (number of the stage, share of it that is done).
    """
    model, cache = Decoder(session.shape), _AloneCache(session.shape, session.total)
    stages = []
    last = None  # logits after the latest token
    for number, stage in enumerate(session.stages):
        hidden, chosen_from = [], [torch.empty(0, session.shape.vocab)]
        for index in range(stage.passes):
            tokens = torch.tensor(list(stage.prompt))
            if stage.kind == "decode":
                chosen_from.append(last)
                tokens = last.argmax(-1)
            start = stage.cached + index
            hidden.append(
                model.hidden_states(
                    tokens,
                    torch.arange(start, start + len(tokens)),
                    lambda *args, start=start: cache.attend(start, *args),
                    _progress(say, number, stage, index, session.shape.layers),
                )
            )
            last = model.logits(hidden[-1][-1:])
        logits = torch.cat(chosen_from)
        tokens = logits.argmax(-1).tolist()
        stages.append(AloneStage(torch.cat(hidden), tokens, logits))
    return stages


def _progress(say, number, stage, index, layers):
    """Return a progress callback that says layers of a prompt, and tokens of decoding."""

    def progress(layer):
        if stage.kind == "prefill" or layer == layers:
            say((number, (index + layer / layers) / stage.passes))

    return progress


# ---- a ring


@dataclass(frozen=True)
class Pass:
    """One forward pass on one rank. Times by time.monotonic_ns()."""

    method: str
    reason: str
    following: int  # the token that is most likely to follow, as the ring computed it
    bytes_sent: int  # by the attention of all layers, as the transport counted them
    start_ns: int
    end_ns: int
    hidden: torch.Tensor  # [n_local, hidden]


@dataclass(frozen=True)
class RankStage:
    """One stage on one rank; stats are those of ring.stats() in milliseconds, of this stage."""

    passes: list[Pass]
    stats: dict[str, float]
    events: list


@dataclass(frozen=True)
class RankRun:
    """What one rank did; cache is KVCache.stats() at the end."""

    rank: int
    stages: list[RankStage]
    cache: dict[str, int]

    def chosen(self, number: int) -> list[int]:
        """Return the tokens that the ring chose for the passes of decoding stage `number`."""
        before = self.stages[number - 1].passes[-1:]
        return [done.following for done in (before + self.stages[number].passes)[:-1]]


def run_rank(worker, session: Session, expected: list[list[int]], timeout_s: float) -> RankRun:
    """Run the session as one of launch()'s ranks."""
    with api.init_ring(device="cpu", timeout_s=timeout_s) as ring:
        return run_ring(ring, session, expected, worker.say)


def run_ring(ring, session: Session, expected: list[list[int]], say: Callable) -> RankRun:
    """Run this rank's share of the session, attention over the ring.

    The ring chooses its own tokens, and they are returned to be compared. What is fed is
    `expected`, by stage, the tokens of one process: the same as long as the runs agree, and where
    they do not, the stages after it can still be compared.
    """
    runner, stages = _Runner(ring, session.shape, session.total), []
    for number, stage in enumerate(session.stages):
        ring.barrier()
        before, begin_ns = ring.stats(), time.monotonic_ns()
        passes = []
        for index in range(stage.passes):
            fed = expected[number][index : index + 1] or list(stage.prompt)
            progress = _progress(say, number, stage, index, session.shape.layers)
            passes.append(runner.forward(stage, fed, progress))
        after = ring.stats()
        stats = {name: after[name] - before[name] for name in after if name.endswith("_ms")}
        events = [event for event in ring.events() if event.start_ns >= begin_ns]
        stages.append(RankStage(passes, stats, events))
    return RankRun(ring.rank, stages, runner.cache.stats())


class _Runner:
    """The stack on one rank: weights, the history, and this rank's shard of the cache."""

    def __init__(self, ring, shape: Shape, total: int):
        self._ring, self._shape, self._model = ring, shape, Decoder(shape)
        self._placement = Placement(ring.world_size)
        share = -(-total // ring.world_size)  # tokens; a rank may hold one more than another
        self.cache = KVCache(
            ring,
            self._placement,
            num_layers=shape.layers,
            nheads_k=shape.nheads_k,
            headdim=shape.headdim,
            dtype=torch.float32,
            num_pages=share // PAGE_SIZE + 1,
            page_size=PAGE_SIZE,
        )
        # Without a profile the first choice measures the ring: now, not in the first stage.
        self._choose(Placement(ring.world_size).prefill({SEQUENCE: 1}))

    def _choose(self, plan):
        shape = self._shape
        return self._ring.choose(
            plan,
            nheads=shape.nheads,
            nheads_k=shape.nheads_k,
            headdim=shape.headdim,
            dtype=torch.float32,
        )

    def forward(self, stage: Stage, tokens: list[int], progress) -> Pass:
        """Run the stage's next pass, over these new tokens."""
        ring, start_ns, sent = self._ring, time.monotonic_ns(), 0
        plan = stage.plan(self._placement)
        choice = self._choose(plan)

        def attend(layer, q, k, v):
            nonlocal sent
            before = _bytes_sent(ring)
            out = ring.attn(q, k, v, plan, cache=self.cache, layer=layer, method="auto")
            sent += _bytes_sent(ring) - before
            return out

        hidden = self._model.hidden_states(
            plan.shard(torch.tensor(tokens), ring.rank),
            torch.from_numpy(plan.positions(ring.rank)),
            attend,
            progress,
        )
        likely = self._model.logits(hidden).argmax(-1)  # after each of this rank's tokens
        following = int(ring.unshard(likely, plan)[-1])
        end_ns = time.monotonic_ns()
        return Pass(choice.method, choice.reason, following, sent, start_ns, end_ns, hidden)


def _bytes_sent(ring) -> int:
    return ring.stats()["transport"]["bytes_sent"]
