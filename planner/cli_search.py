"""The verbs that plan: ``search`` and ``baselines``, from flags to a saved plan.

Flags and ``key=value`` words become a ``Problem`` and ``Overrides``; the rest is
``planner.search``. Progress goes to stderr. Ctrl-C ends a search with the best plan so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.algorithm import find_algorithm, make_config, make_problem, role_paths
from planner.arguments import seconds, whole
from planner.confidence import confidence
from planner.console import make_table, note, output_console, say
from planner.cost import Costs
from planner.overrides import Overrides, parse_overrides
from planner.plan import ExecutionPlan, Problem
from planner.plan_schema import plan_to_dict, save_plan
from planner.report import BASELINE_NAMES, confidence_text, print_plan
from planner.resolve import load_table, make_costs, resolve_cluster
from planner.search import SearchResult, estimate_plan, search
from planner.search.baselines import baselines
from planner.search.bounds import lower_bound_s
from planner.search.engine import Course, News
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.search.warm import are_kept
from planner.simulate import StepPrices
from profiles.catalogue import resolve_model
from profiles.errors import ConfigError, InfeasibleError
from profiles.shipped import describe_costs
from profiles.table import CostTable
from profiles.units import format_bytes, format_seconds

# With --model of this family the critic is llama-7b, as in published RLHF experiments.
_LLAMA_ACTORS = ("llama-7b", "llama-13b", "llama-34b", "llama-70b")
# Flags that stand for an option of every algorithm.
_SUGAR = {"prompt_len": "prompt_len", "response_len": "response_len", "batch_size": "batch_size"}


def make_search_problem(
    args: argparse.Namespace, overrides: Overrides, table: CostTable | None
) -> Problem:
    """The problem that the flags and words of ``search`` describe."""
    algorithm = find_algorithm(args.algorithm)
    sugar = [
        f"{key}={whole(getattr(args, flag), '--' + flag.replace('_', '-'), least=1)}"
        for flag, key in _SUGAR.items()
        if getattr(args, flag) is not None
    ]
    config = make_config(algorithm.config_class, [*sugar, *overrides.algorithm])
    critic = args.critic or ("llama-7b" if args.model in _LLAMA_ACTORS else args.model)
    cluster = overrides.on(resolve_cluster(args.cluster, args.device, args.gpus, table))
    problem = make_problem(
        algorithm, config, model=resolve_model(args.model), critic=_resolve_critic(critic),
        paths=role_paths(algorithm, config, model=args.model, critic=args.critic), cluster=cluster,
    )  # fmt: skip
    overrides.check_calls(problem.graph)
    graph = dataclasses.replace(problem.graph, max_staleness=overrides.max_staleness)
    return dataclasses.replace(problem, graph=graph)


def _resolve_critic(name: str) -> Any:
    try:
        return resolve_model(name)
    except ConfigError as error:
        where = "--critic" if error.where == "--model" else error.where
        raise ConfigError(error.problem, where=where, remedy=error.remedy) from None


def _provenance(args: argparse.Namespace, evaluations: int) -> Mapping[str, Any]:
    """Where a plan comes from: tool, date, profile, engine."""
    try:
        tool = version("realplan")
    except PackageNotFoundError:  # a bare checkout
        tool = "unknown"
    return {
        "tool": f"realplan {tool}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "profile": args.profile,
        "engine": getattr(args, "engine", "baseline"),
        "evaluations": evaluations,
    }


def run_search(args: argparse.Namespace) -> int:
    """``realplan search``."""
    seed = whole(args.seed, "--seed", least=0)
    time_limit_s = seconds(args.time_limit, "--time-limit")
    if not Path(args.output).absolute().parent.is_dir():
        raise ConfigError(
            f"no folder for {args.output}", where="-o", remedy="name a file in one that exists"
        )
    overrides = parse_overrides(args.words)
    table = load_table(args.profile)
    problem = make_search_problem(args, overrides, table)
    costs = make_costs(problem.cluster, table)
    if table is None:
        kinds = dict.fromkeys(group.device for group in problem.cluster.groups)
        note(f"no --profile: {'; '.join(map(describe_costs, kinds))}")
    if not are_kept():
        note("compiling the search's kernels, once: some seconds, on a busy machine a minute")
    course = Course()
    with _interrupts() as interrupted, _Progress() as progress:

        def tell(news: News) -> None:
            progress.tell(news)
            course.add(news)

        result = search(
            problem, costs, engine=args.engine, seed=seed, time_limit_s=time_limit_s,
            progress=tell, gap=overrides.gap, locks=overrides.locks, offload=overrides.offload,
        )  # fmt: skip
    provenance = {
        **_provenance(args, result.evaluations),
        "wall_s": round(result.wall_s, 3),
        "progress": course.rows,
    }
    plan = dataclasses.replace(result.plan, provenance=provenance)
    save_plan(plan, args.output)
    if interrupted:
        note("interrupted: the plan is the best so far")
    if args.json:
        print(json.dumps(plan_to_dict(plan)))
        return 0
    print_plan(plan, result.timeline, output_console())
    for line in _sureness(result, costs):
        say(output_console(), line)
    say(output_console(), f"\n{result.evaluations:,} plans looked at in {result.wall_s:.1f} s by "
        f"{result.engine}, seed {result.seed}; the best is in {args.output}")  # fmt: skip
    return 0


def _sureness(result: SearchResult, costs: Costs) -> list[str]:
    """What a calibrated profile's intervals say of the plan beside each baseline."""
    prices = StepPrices(result.plan.problem, costs)
    return [
        confidence_text(found, BASELINE_NAMES.get(name, name))
        for name, other in result.baseline_plans.items()
        if (found := confidence(result.plan, other, prices)) is not None
    ]


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals of Ctrl-C so far: an engine ends on the first with what it has."""
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """Best, bound and gap so far, on stderr: a changing line on a terminal, else one a second."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("costing the options of every call")
        self._start_s = self._told_s = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def tell(self, news: News) -> None:
        """A new best plan, or a higher bound."""
        now_s = time.monotonic()
        text = (
            f"{now_s - self._start_s:.0f} s: {news.evaluations:,} plans, "
            f"best {format_seconds(news.best_s)} per step, none below "
            f"{format_seconds(news.lower_bound_s)}, gap {news.gap:.1%}"
        )
        if self._console.is_terminal:
            self._status.update(text)
        elif now_s - self._told_s >= 1.0:
            self._told_s = now_s
            say(self._console, text)


# ---- baselines --------------------------------------------------------------------------------


def run_baselines(args: argparse.Namespace) -> int:
    """``realplan baselines``: what people do without a search, with their plans on request."""
    overrides = parse_overrides(args.words)
    table = load_table(args.profile)
    problem = make_search_problem(args, overrides, table)
    plans = baseline_plans(problem, make_costs(problem.cluster, table))
    if args.output is not None:
        folder = Path(args.output)
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder", where="-o", remedy="name one that exists"
            )  # fmt: skip
        for name, plan in plans.items():
            save_plan(dataclasses.replace(plan, provenance=_provenance(args, 1)), folder /
                      f"{name}.json")  # fmt: skip
    if args.json:
        print(json.dumps({name: plan_to_dict(plan) for name, plan in plans.items()}))
        return 0
    output_console().print(_baselines_table(problem, plans))
    if args.output is not None:
        names = ", ".join(f"{name}.json" for name in plans)
        say(output_console(), f"written to {args.output}: {names}")
    return 0


def baseline_plans(problem: Problem, costs: Costs) -> Mapping[str, ExecutionPlan]:
    """The plans that fit, with their estimates, by name: symmetric, split, greedy.

    Raises:
        InfeasibleError: none of them fits.
    """
    space = OptionSpace(problem, StepPrices(problem, costs))
    evaluator = Evaluator(space)
    bound_s = lower_bound_s(evaluator)
    found = baselines(evaluator)
    if not found:
        raise InfeasibleError(
            f"no baseline fits on {problem.cluster.name}",
            remedy="realplan search looks at every plan and says what lacks",
        )
    return {
        name: estimate_plan(evaluator.plan(b.assignment), space.prices, lower_bound=bound_s)[0]
        for name, b in found.items()
    }


def _baselines_table(problem: Problem, plans: Mapping[str, ExecutionPlan]) -> Table:
    title = f"{problem.graph.name} on {problem.cluster.name}"
    table = make_table(
        title, ("baseline", "a step", "fullest device", "what it is"),
        whole=("a step", "fullest device"),
    )  # fmt: skip
    for name, plan in sorted(plans.items(), key=lambda item: _step_s(item[1])):
        assert plan.estimate is not None
        table.add_row(
            name, format_seconds(plan.estimate.step_s), format_bytes(plan.estimate.peak_bytes),
            BASELINE_NAMES.get(name, ""),
        )  # fmt: skip
    for name in [name for name in BASELINE_NAMES if name not in plans]:
        table.add_row(name, "does not fit", "", BASELINE_NAMES.get(name, ""))
    return table


def _step_s(plan: ExecutionPlan) -> float:
    assert plan.estimate is not None
    return plan.estimate.step_s
