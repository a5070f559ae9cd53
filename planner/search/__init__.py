"""``search``: a problem and its costs -> a plan, a lower bound, and the gap between them.

``options.py`` says what each call may choose, ``evaluate.py`` scores a choice for all calls,
``mcmc.py`` walks, ``bounds.py`` proves how much better a plan could be at most, ``baselines.py``
is what people do without a search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

from planner.cost import CostModel
from planner.lock import Lock
from planner.memory import check_memory, plan_memory
from planner.plan import Estimate, ExecutionPlan, Problem
from planner.program import compile_plan
from planner.search.baselines import baselines
from planner.search.bounds import lower_bound_s
from planner.search.evaluate import Evaluator
from planner.search.exact import auto, exact
from planner.search.mcmc import Budget, Progress, Record, greedy, walk
from planner.search.options import Assignment, OptionSpace, more_memory
from planner.simulate import StepPrices, Timeline, run_program
from profiles.costs import Provenance
from profiles.errors import ConfigError, InfeasibleError

__all__ = ["ENGINES", "SearchResult", "estimate_plan", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """``plan`` carries its estimate. ``gap``: at most this share of the step can be saved.

    ``baselines``: seconds per step by name. ``evaluations``: assignments looked at. ``timeline``:
    of the plan.
    """

    plan: ExecutionPlan
    lower_bound_s: float
    gap: float
    evaluations: int
    baselines: Mapping[str, float]
    seed: int
    timeline: Timeline


Engine = Callable[[Evaluator, list[Assignment], Budget, int], Record]


def _mcmc(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    return walk(evaluator, starts, budget, seed=seed)


def _brute(evaluator: Evaluator, starts: list[Assignment], budget: Budget, seed: int) -> Record:
    """Every assignment, for spaces of at most 2 million: the oracle of the tests.

    Raises:
        ConfigError: the space is larger.
    """
    space = evaluator.space
    if space.num_plans > 2e6:
        raise ConfigError(
            f"{space.num_plans:.3g} plans are too many to try all", where="--engine brute",
            remedy="use --engine mcmc",
        )  # fmt: skip
    record = Record(evaluator=evaluator, budget=budget)
    for start in starts:
        record.score(start)
    try:
        for assignment in product(*(list(space.options(call.name)) for call in space.calls)):
            if evaluator.floor_s(assignment) < record.best_score.step_s or record.best is None:
                record.score(assignment)
    except KeyboardInterrupt:
        if record.best is None:
            raise
    return record


ENGINES: Mapping[str, Engine] = {
    "auto": auto, "mcmc": _mcmc, "exact": exact, "brute": _brute,
}  # fmt: skip


def search(
    problem: Problem,
    costs: CostModel,
    *,
    engine: str = "auto",
    seed: int = 1,
    time_limit_s: float = 10.0,
    gap: float = 0.01,
    max_evaluations: int = 60_000,
    progress: Progress | None = None,
    locks: Mapping[str, Lock] | None = None,
) -> SearchResult:
    """The best plan found; it fits the devices' memory, and its calls are as ``locks`` say.

    Stops after ``max_evaluations``, at a plan within ``gap`` of the lower bound, or, whatever
    was reached, ``time_limit_s`` seconds after the options were costed. The same seed gives the
    same plan unless the time limit cut in. Ctrl-C returns the best so far.

    Raises:
        InfeasibleError: no plan fits; says what lacks.
        ConfigError: an unknown engine, or a lock that no option of its call meets.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"unknown engine '{engine}'", where="--engine", remedy=f"use {' or '.join(ENGINES)}"
        )
    space = OptionSpace(problem, StepPrices(problem, costs), locks)
    evaluator = Evaluator(space)
    bound_s = lower_bound_s(evaluator)
    found = baselines(evaluator)
    budget = Budget(
        max_evaluations=max_evaluations,
        deadline_s=time.monotonic() + time_limit_s,
        target_s=bound_s / (1.0 - gap) if gap < 1 else 0.0,
        gap=gap,
        progress=progress,
    )
    starts = [b.assignment for b in found.values() if space.allows(b.assignment)]
    record = ENGINES[engine](evaluator, starts, budget, seed)
    if record.best is None:
        raise _nothing_fits(evaluator, record)
    bound_s = max(bound_s, record.lower_bound_s)
    seconds = {name: b.score.step_s for name, b in found.items()}
    plan, timeline = estimate_plan(
        replace(evaluator.plan(record.best, seed=seed), baselines=seconds),
        space.prices,
        lower_bound=bound_s,
    )
    assert plan.estimate is not None
    return SearchResult(
        plan=plan, lower_bound_s=bound_s, gap=plan.estimate.gap, evaluations=record.looked_at,
        baselines=seconds, seed=seed, timeline=timeline,
    )  # fmt: skip


def _nothing_fits(evaluator: Evaluator, record: Record) -> InfeasibleError:
    """The error of the plan that lacks least, with a remedy that is in the user's hands."""
    plan = evaluator.plan(record.least_unfit[1] if record.least_unfit else greedy(evaluator))
    fullest = max(plan_memory(plan).values(), key=lambda need: need.total)
    remedy = more_memory(plan.problem, fullest.biggest[0])
    try:
        check_memory(plan)
    except InfeasibleError as error:
        problem = f"no plan fits; in the one that lacks least {error.problem}"
        return InfeasibleError(problem, where=error.where, remedy=remedy)
    return InfeasibleError("no plan that fits was found in the budget", remedy=remedy)


def estimate_plan(
    plan: ExecutionPlan, prices: StepPrices, *, lower_bound: float | None = None
) -> tuple[ExecutionPlan, Timeline]:
    """``plan`` with the estimate of the simulator and the memory model, and its timeline.

    ``per_call_s`` also has ``reallocate ROLE`` for weights that move. Without ``lower_bound`` the
    bound of the plan's earlier estimate stays, or 0 where there is none.
    """
    timeline = run_program(plan, compile_plan(plan), prices)
    per_call_s, origin = dict[str, float](), dict.fromkeys(Provenance, 0.0)
    for call in plan.problem.graph.calls:
        cost = prices.call(call.name, plan.allocations[call.name])
        per_call_s[call.name] = cost.seconds
        for provenance, seconds in cost.provenance.items():
            origin[provenance] += seconds
    for span in timeline.last_step:
        if span.kind == "reallocate":
            per_call_s[span.label] = span.seconds
    total = sum(origin.values())
    if lower_bound is None:
        lower_bound = plan.estimate.lower_bound_s if plan.estimate else 0.0
    estimate = Estimate(
        step_s=timeline.step_s,
        lower_bound_s=lower_bound,
        per_call_s=per_call_s,
        peak_bytes=max(need.total for need in plan_memory(plan).values()),
        provenance={p.value: s / total for p, s in origin.items() if s > 0} if total > 0 else {},
    )
    return replace(plan, estimate=estimate), timeline
