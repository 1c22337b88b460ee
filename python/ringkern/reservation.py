"""Which plans a cache has made room for, and in which layers they have run. Host only."""

from collections.abc import Iterable

from ringkern.errors import check
from ringkern.plan import Plan


class Reservation:
    """Where one plan's tokens lie on this rank: made once, used by every layer."""

    def __init__(self, plan: Plan, parents: list["Reservation"]):
        self.serial = plan.serial
        # sequence number -> (begin, end), the positions of its tokens; also of forks since
        ends = (plan.starts + plan.lengths).tolist()
        spans = zip(plan.starts.tolist(), ends, strict=True)
        self.tokens = dict(zip(plan.numbers, spans, strict=True))
        self.new_slots = None  # int64 tensor: of the new tokens, in local packed order
        self.runs = None  # [n, 5], columns as in types.Run, with slots as offsets
        self.slots = None  # int64 array: of all, in the order of plan.kv_runs()
        self.all_slots = None  # the same as a tensor, once a layer gathers them
        self.parents = parents  # that are to run in a layer before this one
        self.layers = set()  # that have run
        self.finished = False  # all have
        self.cut = False  # tokens of it were truncated or freed before that
        self.fits = set()  # problems that were checked

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


def check_parents(parents: Iterable[Reservation], layer: int) -> None:
    """Raise ArgumentError unless all of them have run in this layer."""
    for parent in parents:
        if layer not in parent.layers:
            want = f"one in which plan {parent.serial} has run, whose keys these tokens see"
            hint = "Run every plan in every layer."
            if parent.cut:
                hint = "Truncate all of that plan's tokens: it cannot run any more."
            check(False, "layer", want, layer, hint)


class Unfinished:
    """The plans that have not run in every layer: few, as the next one mostly comes after."""

    def __init__(self):
        self._plans: list[Reservation] = []  # oldest first

    def __bool__(self):
        self._plans = [plan for plan in self._plans if plan.tokens and not plan.finished]
        return bool(self._plans)

    def latest(self, number: int) -> Reservation | None:
        """Return the latest one of a sequence, which itself comes after those before it."""
        found = (plan for plan in reversed(self._plans) if number in plan.tokens)
        return next((plan for plan in found if not plan.finished), None)

    def parents(self, numbers: Iterable[int]) -> list[Reservation]:
        """Return those whose keys new tokens of these sequences see."""
        found = dict.fromkeys(self.latest(number) for number in numbers) if self else ()
        return [plan for plan in found if plan]

    def enter(self, plan: Reservation) -> None:
        self._plans.append(plan)

    def fork(self, number: int, new: int) -> None:
        for plan in self._plans:
            if number in plan.tokens:
                plan.tokens[new] = plan.tokens[number]

    def cut(self, number: int, length: int) -> None:
        """Note that a sequence's tokens from position `length` on are gone."""
        for plan in self._plans:
            begin, end = plan.tokens.get(number, (0, 0))
            plan.cut |= end > length
            if begin >= length:
                plan.tokens.pop(number, None)
