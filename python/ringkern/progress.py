"""In which layers the plans of a cache have run, and which may run next. Host only."""

from collections.abc import Iterable

from ringkern.errors import check
from ringkern.plan import Plan


class Progress:
    """How far a plan has come, whose tokens have room in a cache."""

    def __init__(self, plan: Plan, parents: list["Progress"]):
        self.serial, self._numbers = plan.serial, frozenset(plan.numbers)
        # sequence number -> (begin, end), the positions of its tokens; also of forks since
        ends = (plan.starts + plan.lengths).tolist()
        spans = zip(plan.starts.tolist(), ends, strict=True)
        self.tokens = dict(zip(plan.numbers, spans, strict=True))
        self.parents = parents  # that are to run in a layer before this one
        self.layers = set()  # that have run
        self.finished = False  # all have
        self.cut = False  # tokens of it were truncated or freed before that

    @property
    def is_over(self) -> bool:
        """Whether no later plan needs to know of it."""
        return self.finished or not self.tokens

    def check_layer(self, layer: int) -> None:
        """Raise ArgumentError unless the plan may run in this layer, now."""
        if layer in self.layers:
            got = f"plan {self.serial} for layer {layer} again"
            check(False, "plan", "one that has not run", got)
        if self.cut:
            want = "one whose sequences are as it left them"
            got = f"plan {self.serial}, some of whose tokens were truncated or freed since"
            check(False, "plan", want, got, "Plan again.")
        check_parents(self.parents, layer)

    def ran(self, layers: Iterable[int], num_layers: int) -> None:
        """Note that the plan has run in some layers."""
        self.layers.update(layers)
        if len(self.layers) == num_layers:
            self.finished, self.parents = True, []

    def cut_tokens(self, number: int, length: int) -> None:
        """Note that a sequence's tokens from position `length` on are gone: a fork's need not run."""
        begin, end = self.tokens.get(number, (0, 0))
        self.cut |= end > length and number in self._numbers
        if begin >= length:
            self.tokens.pop(number, None)

    def missing(self) -> str:
        """Return what to do about a plan that has not run in every layer."""
        if self.cut:
            return f"Truncate all tokens of plan {self.serial}: it cannot run any more."
        return f"Run plan {self.serial} in every layer first."


def check_parents(parents: Iterable[Progress], layer: int) -> None:
    """Raise ArgumentError unless all of them have run in this layer."""
    for parent in parents:
        if layer not in parent.layers:
            want = f"one in which plan {parent.serial} has run, whose keys these tokens see"
            check(False, "layer", want, layer, parent.missing())


class Unfinished:
    """The plans that have not run in every layer: few, as the next one mostly comes after."""

    def __init__(self):
        self._plans: list[Progress] = []  # oldest first; some may be over
        self._most = 16  # of them, before those that are over are looked for

    def __bool__(self):
        while self._plans and self._plans[-1].is_over:
            self._plans.pop()
        return bool(self._plans)

    def latest(self, number: int) -> Progress | None:
        """Return the latest one of a sequence, which itself comes after those before it."""
        found = (plan for plan in reversed(self._plans) if number in plan.tokens)
        return next((plan for plan in found if not plan.finished), None)

    def parents(self, numbers: Iterable[int]) -> list[Progress]:
        """Return those whose keys new tokens of these sequences see."""
        found = dict.fromkeys(self.latest(number) for number in numbers) if self else ()
        return [plan for plan in found if plan]

    def enter(self, plan: Progress) -> None:
        if len(self._plans) >= self._most:
            self._plans = [plan for plan in self._plans if not plan.is_over]
            self._most = 2 * len(self._plans) + 16
        self._plans.append(plan)

    def fork(self, number: int, new: int) -> None:
        for plan in self._plans:
            if number in plan.tokens:
                plan.tokens[new] = plan.tokens[number]

    def cut(self, number: int, length: int) -> None:
        """Note that a sequence's tokens from position `length` on are gone."""
        for plan in self._plans:
            plan.cut_tokens(number, length)
