"""``search``: a problem and its costs -> a plan, a lower bound, and the gap between them.

``options.py`` says what each call may choose, ``evaluate.py`` scores a choice for all calls with
the compiled ``kernels.py``, ``mcmc.py`` walks, ``bounds.py`` proves how much better a plan could be
at most, ``baselines.py`` is what people do without a search.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from planner.cost import Costs
from planner.lock import Lock
from planner.plan import Estimate, ExecutionPlan, Problem
from planner.plan_memory import check_memory, plan_memory
from planner.program import compile_plan
from planner.search.baselines import Baseline, baselines
from planner.search.bounds import lower_bound_s
from planner.search.brute import brute
from planner.search.descent import descent, fastest
from planner.search.engine import Budget, Engine, News, Progress, Record
from planner.search.evaluate import Evaluator
from planner.search.exact import auto, exact
from planner.search.mcmc import walk
from planner.search.options import Assignment, Option, OptionSpace, more_memory
from planner.search.warm import warm_up
from planner.simulate import StepPrices, Timeline, run_program
from profiles.costs import Provenance
from profiles.errors import ConfigError, InfeasibleError

__all__ = ["ENGINES", "SearchResult", "estimate_plan", "search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """``plan`` carries its estimate: seconds per step, lower bound, gap, provenance.

    ``baselines``: seconds per step by name, ``baseline_plans`` what takes them. ``timeline``: of
    the plan. ``evaluations``: assignments looked at. ``wall_s``: seconds from pricing the options
    to the end.
    ``cut_by_time``: the time limit ended it, so that the same ``seed`` may give another plan.
    ``interrupted``: Ctrl-C did.
    """

    plan: ExecutionPlan
    baselines: Mapping[str, float]
    baseline_plans: Mapping[str, ExecutionPlan]
    timeline: Timeline
    evaluations: int
    seed: int
    engine: str
    wall_s: float = field(compare=False)
    cut_by_time: bool = False
    interrupted: bool = False

    @property
    def estimate(self) -> Estimate:
        assert self.plan.estimate is not None
        return self.plan.estimate

    @property
    def step_s(self) -> float:
        return self.estimate.step_s

    @property
    def lower_bound_s(self) -> float:
        """No plan of the options is faster under the same costs."""
        return self.estimate.lower_bound_s

    @property
    def gap(self) -> float:
        """At most this share of the step can be saved."""
        return self.estimate.gap


ENGINES: Mapping[str, Engine] = {
    "auto": auto, "mcmc": walk, "exact": exact, "descent": descent, "brute": brute,
}  # fmt: skip


@contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for cycles of garbage: a search makes none.

    It makes millions of small values that stay, and looking through them again and again takes a
    fifth of the time until it starts.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@no_collection()
def search(
    problem: Problem,
    costs: Costs,
    *,
    engine: str = "auto",
    seed: int = 1,
    time_limit_s: float = 10.0,
    gap: float = 0.01,
    max_evaluations: int = 20_000_000,
    progress: Progress | None = None,
    locks: Mapping[str, Lock] | None = None,
    offload: bool = True,
    space: OptionSpace | None = None,
) -> SearchResult:
    """The best plan found; it fits the devices' memory, and its calls are as ``locks`` say.

    ``offload``: state of roles may be in the host's memory between calls, where that pays.
    ``space``: the options of ``problem`` under ``costs`` and ``locks``, where they are costed.

    Where the graph allows ``max_staleness`` 1 both that and 0 are searched, each for half of the
    time, and the better plan says which it is; the bound is for both.

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
    began_s = time.monotonic()
    warm_up()
    if problem.graph.max_staleness and space is None:
        again = partial(
            search, costs=costs, engine=engine, seed=seed, time_limit_s=time_limit_s / 2, gap=gap,
            max_evaluations=max_evaluations // 2, locks=locks,
        )  # fmt: skip
        spaces = [
            OptionSpace(p, StepPrices(p, costs), locks, offload=offload)
            for p in (on_policy(problem), problem)
        ]
        return _better_of(spaces, again, progress)
    space = space or OptionSpace(problem, StepPrices(problem, costs), locks, offload=offload)
    evaluator = Evaluator(space)
    bound_s = lower_bound_s(evaluator)
    found = baselines(evaluator)
    budget = Budget(
        max_evaluations=max_evaluations,
        deadline_s=time.monotonic() + time_limit_s,
        gap=gap,
        lower_bound_s=bound_s,
        progress=progress,
    )
    starts = [b.assignment for b in found.values() if space.allows(b.assignment)]
    record = ENGINES[engine](evaluator, starts, budget, seed)
    if record.best is None:
        raise _nothing_fits(evaluator, record)
    finish = partial(_result, evaluator, record, found, engine, seed, began_s)
    try:
        return finish()
    except KeyboardInterrupt:  # the plan is found: one Ctrl-C does not lose it
        return replace(finish(), interrupted=True)


def _result(
    evaluator: Evaluator, record: Record, found: Mapping[str, Baseline], engine: str, seed: int,
    began_s: float,
) -> SearchResult:  # fmt: skip
    """What ``record`` holds, with its estimate and that of the baselines."""
    assert record.best is not None
    space = evaluator.space
    seconds = {name: b.score.step_s for name, b in found.items()}
    plan = evaluator.plan(resident_again(evaluator, record.best), seed=seed)
    plan, timeline = estimate_plan(
        replace(plan, baselines=seconds), space.prices, lower_bound=record.lower_bound_s
    )
    return SearchResult(
        plan=plan, baselines=seconds,
        baseline_plans={name: evaluator.plan(b.assignment) for name, b in found.items()},
        timeline=timeline, evaluations=record.evaluations, seed=seed,
        engine=engine, wall_s=time.monotonic() - began_s, cut_by_time=record.cut_by_time,
        interrupted=record.interrupted,
    )  # fmt: skip


def on_policy(problem: Problem) -> Problem:
    """The same, generation always with the newest weights."""
    return replace(problem, graph=replace(problem.graph, max_staleness=0))


def _better_of(
    spaces: Sequence[OptionSpace], again: Callable[..., SearchResult], progress: Progress | None
) -> SearchResult:
    """The best plan of several spaces, with the bound of all of them.

    Raises:
        InfeasibleError: that of the first, where nothing fits in any.
    """
    found: list[SearchResult] = []
    errors: list[InfeasibleError] = []

    def tell(news: News) -> None:
        if progress is not None:
            seen_s = [(result.step_s, result.lower_bound_s) for result in found]
            best_s = min([news.best_s, *(step_s for step_s, _ in seen_s)])
            bound_s = min([news.lower_bound_s, *(low_s for _, low_s in seen_s)])
            done = sum(result.evaluations for result in found)
            progress(
                replace(
                    news, best_s=best_s, lower_bound_s=bound_s, evaluations=done + news.evaluations
                )
            )

    for space in spaces:
        # After Ctrl-C the rest is bounded only: the bound is for all.
        limit = {"time_limit_s": 0.0} if any(result.interrupted for result in found) else {}
        try:
            found.append(again(space.problem, space=space, progress=tell, **limit))
        except InfeasibleError as error:
            errors.append(error)
        except KeyboardInterrupt:  # before it had a plan; that of the other is not lost
            if not found:
                raise
            best = replace(found[0], interrupted=True)
            estimate = replace(best.estimate, lower_bound_s=0.0)
            return replace(best, plan=replace(best.plan, estimate=estimate))
    if not found:
        raise errors[0]
    best = found[0]  # on a tie the newest weights
    for result in found[1:]:
        best = result if result.step_s < best.step_s * (1 - 1e-6) else best
    lower_bound_s = min(result.lower_bound_s for result in found)
    plan = replace(best.plan, estimate=replace(best.estimate, lower_bound_s=lower_bound_s))
    return replace(
        best, plan=plan, evaluations=sum(result.evaluations for result in found),
        wall_s=sum(result.wall_s for result in found),
        cut_by_time=any(result.cut_by_time for result in found),
        interrupted=any(result.interrupted for result in found),
    )  # fmt: skip


def resident_again(evaluator: Evaluator, best: Assignment) -> Assignment:
    """``best`` without offloads that save nothing: role by role, where it fits and is no slower."""
    space = evaluator.space
    for role in dict.fromkeys(call.role for call in space.calls):
        trial = tuple(
            _resident(space, option) if call.role == role and option.choice.offload else option
            for call, option in zip(space.calls, best, strict=True)
        )
        if trial != best and space.allows(trial):
            score = evaluator.score(trial)
            if score.overshoot == 0 and score.step_s <= evaluator.score(best).step_s:
                best = trial
    return best


def _resident(space: OptionSpace, option: Option) -> Option:
    """The same without offload; itself where that was not worth keeping."""
    wanted = replace(option.allocation, offload=False)
    for choice in space.choices_on(option.call, option.mesh):
        twin = space.option(option.call, option.mesh, choice)
        if twin.allocation == wanted:
            return twin
    return option


def _nothing_fits(evaluator: Evaluator, record: Record) -> InfeasibleError:
    """The error of the plan that lacks least, with a remedy that is in the user's hands."""
    plan = evaluator.plan(record.least_unfit[1] if record.least_unfit else fastest(evaluator))
    fullest = max(plan_memory(plan).values(), key=lambda need: need.total)
    remedy = more_memory(plan.problem, fullest.biggest[0])
    try:
        check_memory(plan)
    except InfeasibleError as error:
        # inf: it was proven; else another plan may fit.
        none = "no plan fits" if record.lower_bound_s == math.inf else "found no plan that fits"
        problem = f"{none}; in the one that lacks least {error.problem}"
        return InfeasibleError(problem, where=error.where, remedy=remedy)
    return InfeasibleError("no plan that fits was found in the budget", remedy=remedy)


def estimate_plan(
    plan: ExecutionPlan, prices: StepPrices, *, lower_bound: float | None = None
) -> tuple[ExecutionPlan, Timeline]:
    """``plan`` with the estimate of the simulator and the memory model, and its timeline.

    ``per_call_s`` also has ``reallocate ROLE`` for weights that move, and so of averages, reloads
    and offloads. Without ``lower_bound`` the bound of the plan's earlier estimate stays, or 0 where
    there is none.
    """
    timeline = run_program(plan, compile_plan(plan), prices)
    per_call_s, origin = dict[str, float](), dict.fromkeys(Provenance, 0.0)
    for call in plan.problem.graph.calls:
        cost = prices.call(call.name, plan.allocations[call.name])
        per_call_s[call.name] = cost.seconds
        for provenance, seconds in cost.provenance.items():
            origin[provenance] += seconds
    moved = ("reallocate", "average", "reload", "offload")
    moves = {(s.label, s.start_s, s.end_s) for s in timeline.last_step if s.kind in moved}
    for label, start_s, end_s in sorted(moves, key=lambda move: move[1]):
        per_call_s[label] = per_call_s.get(label, 0.0) + end_s - start_s
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
