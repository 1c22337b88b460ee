"""A ring's profile as a file: what `ringkern calibrate` writes and init_ring() reads."""

import dataclasses
import json
import pathlib

from ringkern.errors import ArgumentError, check
from ringkern.types import Hardware


def save(hardware: Hardware, path: str) -> None:
    """Write the profile as JSON."""
    pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(hardware), indent=2) + "\n")


def load(profile: "Hardware | str | pathlib.Path | dict") -> Hardware:
    """Return a profile, from a file's path or from what is one already."""
    if isinstance(profile, Hardware):
        return profile
    if isinstance(profile, (str, pathlib.Path)):
        try:
            profile = json.loads(pathlib.Path(profile).read_text())
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"profile: want a file that `ringkern calibrate` wrote, got {profile}: {error}"
            ) from error
    check(isinstance(profile, dict), "profile", "a path or a Hardware", type(profile).__name__)
    fields = dataclasses.fields(Hardware)
    names = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    fits = needed <= set(profile) <= names
    check(fits, "profile", f"the keys {sorted(names)}", sorted(profile))
    rates = {
        name: tuple(sorted((int(rows), float(rate)) for rows, rate in profile.get(name, ())))
        for name in ("attend_tflops", "alone_tflops")
    }
    values = {name: float(value) for name, value in profile.items() if name not in rates}
    above = [rate for table in rates.values() for _, rate in table]
    above += [values[name] for name in needed & set(values)]
    ok = rates["attend_tflops"] and min(above) > 0 and min(values.values()) >= 0
    check(ok, "profile", "numbers above 0", profile)
    return Hardware(**rates, **values)
