"""How sure is it that one plan beats another, given how far a calibrated profile is off?

A calibration knows two things of each phase: how well its factor is known, which is an error that
all calls of the phase share, and how far a single call is off beside it. Both are drawn. A call
that two plans allocate alike is off alike in both, so what they share decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.calibrate import phase_of
from planner.plan import ExecutionPlan
from planner.program import Reallocate, compile_plan
from planner.simulate import StepEvent, StepPrices, list_events, steady_step_s
from profiles.calibration import Calibration

# With fewer observations of a phase the tails of Student's t say nothing.
LEAST_OBSERVATIONS = 3
NUM_DRAWS = 256

Draws = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """``faster``: probability that the first plan's step is shorter than the second's.

    ``ratio_low``, ``ratio_high``: 90% interval of second / first. ``step_low_s``, ``step_high_s``:
    90% interval of the first plan's seconds per step.
    """

    faster: float
    ratio_low: float
    ratio_high: float
    step_low_s: float
    step_high_s: float


def knows_enough(plan: ExecutionPlan, calibration: Calibration) -> bool:
    """Was every kind of call of the plan observed often enough?

    But rules by code, whose seconds are few.
    """
    phases = {call.kind.value for call in plan.problem.graph.calls} - {"function"}
    return all(
        (c := calibration.of(phase)) is not None and c.observations >= LEAST_OBSERVATIONS
        for phase in phases
    )


def confidence(
    a: ExecutionPlan, b: ExecutionPlan, prices: StepPrices, *, seed: int = 1
) -> Confidence | None:
    """Of two plans of one problem; None where the prices' costs are not calibrated, or by too few
    observations."""
    calibration = prices.model.calibration
    if calibration is None or not knows_enough(a, calibration):
        return None
    errors = _Errors(calibration, seed)
    steps = [errors.steps_s(plan, list_events(plan, compile_plan(plan), prices)) for plan in (a, b)]
    ratio = steps[1] / steps[0]
    ratio_low, ratio_high = np.quantile(ratio, (0.05, 0.95))
    low_s, high_s = np.quantile(steps[0], (0.05, 0.95))
    return Confidence(
        faster=float((ratio > 1.0).mean() + (ratio == 1.0).mean() / 2),
        ratio_low=float(ratio_low), ratio_high=float(ratio_high),
        step_low_s=float(low_s), step_high_s=float(high_s),
    )  # fmt: skip


class _Errors:
    """Logarithms of errors, drawn once for each phase and for each call in an allocation."""

    def __init__(self, calibration: Calibration, seed: int) -> None:
        self.calibration = calibration
        self.rng = np.random.default_rng(seed)
        self.shared: dict[str, Draws] = {}
        self.own: dict[object, Draws] = {}

    def steps_s(self, plan: ExecutionPlan, events: Sequence[StepEvent]) -> Draws:
        """Seconds per step of the plan in every draw."""
        factors = [np.exp(self._of(plan, event)) for event in events]
        return np.array(
            [
                steady_step_s(
                    [
                        replace(event, seconds=event.seconds * float(factor[draw]))
                        for event, factor in zip(events, factors, strict=True)
                    ]
                )
                for draw in range(NUM_DRAWS)
            ]
        )

    def _of(self, plan: ExecutionPlan, event: StepEvent) -> Draws:
        phase = phase_of(event)
        correction = self.calibration.of(phase)
        if correction is None or correction.spread is None:
            return np.zeros(NUM_DRAWS)
        if phase not in self.shared:
            scale = correction.spread / math.sqrt(correction.observations)
            t = self.rng.standard_t(correction.observations - 1, NUM_DRAWS)
            self.shared[phase] = scale * t
        key = _identity(plan, event)
        if key not in self.own:
            self.own[key] = correction.spread * self.rng.standard_normal(NUM_DRAWS)
        return self.shared[phase] + self.own[key]


def _identity(plan: ExecutionPlan, event: StepEvent) -> object:
    """Equal for events of two plans that do the same in the same layout."""
    instruction = event.instruction
    if isinstance(instruction, Reallocate):
        return instruction.role, instruction.source, instruction.destination
    return event.call, plan.allocations[event.call]
