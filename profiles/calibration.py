"""What runs have taught of a profile: one factor for each phase of a step, with its interval.

``realplan calibrate`` fits it (``planner/calibrate.py``), a ``CostTable`` keeps it, ``CostModel``
multiplies by it. The measured rows stay as they are: a second calibration replaces the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from profiles.errors import ProfileError

PHASES = ("generate", "infer", "train", "function", "reallocate")

# No phase of a sound profile is off by more: such a factor comes of another machine or unit.
MOST = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """``factor``: measured over predicted seconds, the geometric mean of ``observations``.

    ``low``, ``high``: 90% interval of the factor (Student's t of the logarithms). ``spread``:
    standard deviation of one observation's logarithm about the factor's. All three are None for
    a single observation.
    """

    phase: str
    factor: float
    low: float | None
    high: float | None
    spread: float | None
    observations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Corrections by phase, and where they come from.

    Raises:
        ProfileError: a correction is impossible; names the phase.
    """

    corrections: tuple[Correction, ...]
    source: str
    date: str

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for correction in self.corrections:
            problem = _problem(correction)
            if problem is None and correction.phase in seen:
                problem = "a second correction of this phase"
            if problem is not None:
                raise ProfileError(
                    problem, where=f"header.calibration.{correction.phase}",
                    remedy="fit it again with realplan calibrate",
                )  # fmt: skip
            seen.add(correction.phase)

    def of(self, phase: str) -> Correction | None:
        return next((c for c in self.corrections if c.phase == phase), None)

    @property
    def factors(self) -> Mapping[str, float]:
        """By phase; a phase that was not observed is absent."""
        return {c.phase: c.factor for c in self.corrections}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """The inverse of ``to_dict``; raises ``ProfileError`` with the JSON path."""
        where = "header.calibration"
        rows = data.get("corrections") if isinstance(data, Mapping) else None
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            raise ProfileError("corrections are missing or no list", where=where)
        names = {f.name for f in fields(Correction)}
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping) or set(row) != names:
                raise ProfileError(
                    f"needs {', '.join(sorted(names))}", where=f"{where}.corrections[{index}]"
                )
        for name in ("source", "date"):
            if not isinstance(data.get(name), str):
                raise ProfileError("missing or not text", where=f"{where}.{name}")
        return cls(
            corrections=tuple(Correction(**row) for row in rows), source=data["source"],
            date=data["date"],
        )  # fmt: skip


def _problem(c: Correction) -> str | None:
    if c.phase not in PHASES:
        return f"{c.phase!r} is unknown; known: {', '.join(PHASES)}"
    if not _is_number(c.factor) or not 1 / MOST <= c.factor <= MOST:
        return f"factor {c.factor!r} is not from 1/{MOST:g} to {MOST:g}"
    if type(c.observations) is not int or c.observations < 1:
        return f"observations {c.observations!r} is not a whole number of at least 1"
    if c.observations == 1:
        return None if c.low is c.high is c.spread is None else "one observation has no interval"
    for name in ("low", "high", "spread"):
        if not _is_number(getattr(c, name)):
            return f"{name} {getattr(c, name)!r} is not a number"
    assert c.low is not None
    assert c.high is not None
    assert c.spread is not None
    if not 0 < c.low <= c.factor <= c.high or c.spread < 0:
        return f"{c.low!r} to {c.high!r} (spread {c.spread!r}) is no interval of {c.factor!r}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
