"""What was measured of one implementation: on one rank, then of all ranks together."""

import statistics
from dataclasses import dataclass, field


@dataclass
class Measurement:
    """Times and findings. A rank that only stood by has times near 0 and found nothing."""

    times_s: list[list[float]]  # [repetition][call]
    ok: bool = True
    max_err: float = 0.0
    details: list[dict[str, float]] = field(default_factory=list)  # by repetition
    peak_mem_bytes: int | None = None
    facts: dict = field(default_factory=dict)  # fields of the record that only measuring told

    def add(self, finding: dict) -> None:
        """Take up what check() of an operation found: ok, max_err, and details."""
        finding = dict(finding)
        self.ok &= finding.pop("ok", True)
        self.max_err = max(self.max_err, finding.pop("max_err", 0.0))
        self.details.append(finding)


def combine(ranks: list[Measurement]) -> Measurement:
    """Return the worst of all ranks: per call the slowest, per detail the largest."""
    times = [
        [max(calls) for calls in zip(*repetition, strict=True)]
        for repetition in zip(*(rank.times_s for rank in ranks), strict=True)
    ]
    details = []
    for found in zip(*(rank.details for rank in ranks), strict=True):
        keys = dict.fromkeys(key for one in found for key in one)
        worst = {key: max(one[key] for one in found if key in one) for key in keys}
        if "ended_at_ms" in worst:  # by one clock: from the last rank's last attention to the end
            worst["tail_ms"] = worst.pop("ended_at_ms") - worst.pop("attended_at_ms")
        details.append(worst)
    peaks = [rank.peak_mem_bytes for rank in ranks if rank.peak_mem_bytes is not None]
    return Measurement(
        times,
        ok=all(rank.ok for rank in ranks),
        max_err=max(rank.max_err for rank in ranks),
        details=details,
        peak_mem_bytes=max(peaks, default=None),
    )


def detail(measured: Measurement) -> dict[str, float]:
    """Return the median of each detail over the repetitions; counts stay whole."""
    keys = dict.fromkeys(key for one in measured.details for key in one)
    middle = {}
    for key in keys:
        values = [one[key] for one in measured.details if key in one]
        whole = all(type(value) is int for value in values)
        median = statistics.median_high if whole else statistics.median
        middle[key] = median(values) if whole else round(median(values), 4)
    return middle
