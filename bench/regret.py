"""What each rule of choice takes at each point of the grid, and what that costs."""

from dataclasses import dataclass

from ringkern.schedule import METHODS

RULES = {
    "auto": "auto",
    "algorithm_1": "Algorithm 1",
    "algorithm_5": "Algorithm 5",
    "fitted_rule": "fitted rule",
}


@dataclass(frozen=True)
class Point:
    """New tokens on top of cached ones, over one link."""

    link: str
    new: int
    cached: int
    us: dict[str, float]  # by method, measured
    taken: dict[str, str]  # by rule, the method

    @property
    def fastest(self) -> str:
        return min(self.us, key=self.us.get)

    def regret(self, rule: str) -> float:
        """Return how much longer the rule's method took than the fastest, as a share of that."""
        return self.us[self.taken[rule]] / self.us[self.fastest] - 1


def points(records: list[dict]) -> list[Point]:
    """Return the points of stage records, those that have all methods."""
    cases: dict[str, dict] = {}
    for one in records:
        cases.setdefault(one["case"], {})[one["impl"]] = one
    return [_point(found) for found in cases.values() if set(METHODS) <= set(found)]


def _point(found: dict[str, dict]) -> Point:
    one = found["pass_kv"]  # whose details hold what the rules take
    taken = {rule: next(m for m in METHODS if one["detail"][f"{rule}:{m}"]) for rule in RULES}
    us = {method: found[method]["time_us"]["p50"] for method in METHODS}
    return Point(one["link"], one["shape"]["new"], one["shape"]["cached"], us, taken)
