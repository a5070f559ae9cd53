"""``calibrate``: traces of runs -> one correction a phase, with its interval, for their profile.

Each run's plan is priced with the bare profile, as long as its prompts and answers really were,
and each call and reallocation is one observation: measured over predicted seconds. A phase's factor
is their geometric mean. Start with ``observe``, then ``fit``.

What a rank waits for is no phase: transfers, and what precedes the last rank's start of a call.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planner.graph import CallKind, ModelFunctionCall
from planner.labels import label_of
from planner.plan import ExecutionPlan, Workload
from planner.plan_schema import load_plan
from planner.program import Function, Generate, Infer, Reallocate, Train, compile_plan
from planner.resolve import make_costs
from planner.simulate import StepEvent, StepPrices, list_events, steady_step_s
from planner.trace import TraceSpan, first_warm_step, measured_seconds, step_seconds, trace_of_run
from profiles.calibration import PHASES, Calibration, Correction
from profiles.errors import ConfigError
from profiles.table import CostTable

_PHASE_OF: Mapping[type, str] = {
    Generate: "generate", Infer: "infer", Train: "train", Function: "function",
    Reallocate: "reallocate",
}  # fmt: skip

# Two-sided 90% quantiles of Student's t for 1, 2, … degrees of freedom (NIST/SEMATECH e-Handbook
# of Statistical Methods, 1.3.6.7.2); beyond the last those of the normal distribution do.
_T90 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771,
    1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706,
    1.703, 1.701, 1.699, 1.697,
)  # fmt: skip
_NORMAL90 = 1.645

# Faster calls are timer and scheduler noise; a rule on an answer's text takes milliseconds.
LEAST_SECONDS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One call or reallocation of one run: seconds by the bare profile, and as it was."""

    run: str
    label: str
    phase: str
    predicted_s: float
    measured_s: float

    @property
    def log_ratio(self) -> float:
        return math.log(self.measured_s / self.predicted_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as the profile sees it: its observations, and what predicts and measures its step."""

    name: str
    plan: ExecutionPlan
    events: Sequence[StepEvent]
    observations: Sequence[Observation]
    step_s: float

    def predicted_step_s(self, factors: Mapping[str, float]) -> float:
        """Seconds per step in steady state with the phases' factors."""
        return steady_step_s([corrected(event, factors) for event in self.events])


def phase_of(event: StepEvent) -> str:
    """The phase of a call or a reallocation; empty: of no phase, as an average of weights."""
    return _PHASE_OF.get(type(event.instruction), "")


def corrected(event: StepEvent, factors: Mapping[str, float]) -> StepEvent:
    """The event with its phase's factor on its seconds; what it waits for stays."""
    return replace(event, seconds=event.seconds * factors.get(phase_of(event), 1.0))


def observe(folder: str | Path, table: CostTable) -> RunRecord:
    """A run's output folder, priced with ``table`` and none of its corrections.

    Raises:
        ConfigError: no plan or no trace there, or the profile is of another kind of device.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == "trace" and not _has_plan(folder) else folder
    if not _has_plan(folder):
        raise ConfigError(
            "no plan.json here", where=str(folder), remedy="name the output folder of realexec run"
        )
    plan, spans = load_plan(folder / "plan.json"), trace_of_run(folder)
    first = first_warm_step(spans)
    if first is None:
        raise ConfigError("no step in its trace", where=str(folder), remedy="run a step or more")
    workload = as_run(plan, spans, first, _answer_tokens(folder / "metrics.jsonl", plan, first))
    plan = replace(plan, problem=replace(plan.problem, workload=workload))
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, table.uncorrected))
    events = list_events(plan, compile_plan(plan), prices)
    measured = measured_seconds(spans, first_step=first)
    predicted: dict[str, float] = {}
    phases: dict[str, str] = {}
    for event in events:
        if not phase_of(event):
            continue
        label = label_of(event.instruction)
        predicted[label] = predicted.get(label, 0.0) + event.seconds
        phases[label] = phase_of(event)
    return RunRecord(
        name=str(folder),
        plan=plan,
        events=events,
        observations=[
            Observation(
                run=str(folder), label=label, phase=phases[label], predicted_s=seconds,
                measured_s=measured[label],
            )
            for label, seconds in predicted.items()
            if seconds >= LEAST_SECONDS and measured.get(label, 0.0) >= LEAST_SECONDS
        ],
        step_s=step_seconds(spans, first_step=first),
    )  # fmt: skip


def _has_plan(folder: Path) -> bool:
    return (folder / "plan.json").is_file()


def _answer_tokens(metrics: Path, plan: ExecutionPlan, first: int) -> float | None:
    """Mean tokens of an answer from step ``first`` on, as the run reported them."""
    names = [f"{c.name}/response_tokens" for c in _generations(plan)]
    if not names or not metrics.is_file():
        return None
    found = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(values, dict) and values.get("step", -1) >= first and names[0] in values:
            found.append(float(values[names[0]]))
    return statistics.fmean(found) if found else None


def _generations(plan: ExecutionPlan) -> list[ModelFunctionCall]:
    return [call for call in plan.problem.graph.calls if call.kind is CallKind.GENERATE]


def as_run(
    plan: ExecutionPlan, spans: Sequence[TraceSpan], first: int, answer_tokens: float | None
) -> Workload:
    """The plan's workload with the mean lengths of prompts and answers that the run had.

    Answers keep the form of their distribution. Unchanged where nothing generates, or where the
    trace does not say how many tokens were.
    """
    workload = plan.problem.workload
    calls = _generations(plan)
    if not calls or answer_tokens is None:
        return workload
    name = calls[0].name
    strategy = plan.allocations[name].strategy
    generated = [s for s in spans if s.label == name and s.step >= first]
    steps = len({s.step for s in generated})
    whole = plan.problem.workload_of(name).num_sequences * steps * strategy.tp * strategy.pp
    tokens = sum(s.num_tokens for s in generated)
    prompt_tokens = tokens / whole - answer_tokens if whole else 0.0
    if not 0 < prompt_tokens <= workload.prompt_tokens:
        return workload
    ratio = answer_tokens / workload.expected_response_tokens
    lengths = workload.response_lengths or (workload.response_tokens,)
    return replace(
        workload, mean_prompt_tokens=prompt_tokens,
        response_lengths=tuple(
            min(workload.response_tokens, max(1, round(length * ratio))) for length in lengths
        ),
    )  # fmt: skip


def fit(observations: Iterable[Observation], *, source: str, date: str) -> Calibration:
    """The geometric mean of measured / predicted in each phase that was observed.

    The interval takes observations as independent; those of one call in like plans are not quite.
    """
    by_phase: dict[str, list[float]] = {}
    for observation in observations:
        by_phase.setdefault(observation.phase, []).append(observation.log_ratio)
    corrections = [_correction(phase, by_phase[phase]) for phase in PHASES if phase in by_phase]
    return Calibration(corrections=tuple(corrections), source=source, date=date)


def _correction(phase: str, logs: Sequence[float]) -> Correction:
    mean, count = statistics.fmean(logs), len(logs)
    if count == 1:
        return Correction(
            phase=phase, factor=math.exp(mean), low=None, high=None, spread=None, observations=1
        )
    spread = statistics.stdev(logs)
    t = _T90[count - 2] if count - 2 < len(_T90) else _NORMAL90
    half = t * spread / math.sqrt(count)
    return Correction(
        phase=phase, factor=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half),
        spread=spread, observations=count,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Median of abs(predicted - measured) / measured, over calls or over steps.

    ``held_out``: each run predicted with factors of the other runs; None for a single run.
    """

    what: str
    before: float
    after: float
    held_out: float | None
    count: int


def judge(runs: Sequence[RunRecord]) -> list[Judgement]:
    """How well phases and whole steps are predicted, before and after the correction."""
    everything = _factors(runs)
    errors: dict[str, list[list[float]]] = defaultdict(list)
    for run in runs:
        others = _factors([other for other in runs if other is not run])
        choices: tuple[Mapping[str, float], ...] = ({}, everything, others)
        for o in run.observations:
            calls_s = (o.predicted_s * factors.get(o.phase, 1.0) for factors in choices)
            errors[o.phase].append([abs(s / o.measured_s - 1.0) for s in calls_s])
        steps_s = (run.predicted_step_s(factors) for factors in choices)
        errors["step"].append([abs(s / run.step_s - 1.0) for s in steps_s])
    return [
        _judgement(what, errors[what], held_out=len(runs) > 1)
        for what in (*PHASES, "step") if what in errors
    ]  # fmt: skip


def _factors(runs: Sequence[RunRecord]) -> Mapping[str, float]:
    return fit([o for run in runs for o in run.observations], source="", date="").factors


def _judgement(what: str, errors: Sequence[Sequence[float]], *, held_out: bool) -> Judgement:
    before, after, left_out = (statistics.median(column) for column in zip(*errors, strict=True))
    return Judgement(
        what=what, before=before, after=after, held_out=left_out if held_out else None,
        count=len(errors),
    )  # fmt: skip
