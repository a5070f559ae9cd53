"""May a run go over to another plan, between which steps, and what stays of the plan before.

Read ``switched``: it makes the run of the new plan or says in one sentence why not. Whoever asks
leaves the plan's file in ``launch/`` (``launch.job``); ``handover.py`` moves what ranks hold.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from executor.resume import FIXED_OPTIONS, unlike_shape
from executor.run import Run, equal_nodes
from planner.plan import ExecutionPlan, validate_plan
from planner.plan_schema import load_plan, save_plan
from planner.program import compile_plan
from planner.program_check import check_program
from profiles.errors import PlanError

# What a plan is made for; all other options are the run's, whatever the plan says.
PLANNED_OPTIONS = tuple(name for name in FIXED_OPTIONS if name != "seed")


def switched(run: Run, plan: ExecutionPlan, *, num_ranks: int, ranks_per_node: int) -> Run:
    """``run`` under ``plan``, with the run's own options, models and data; nothing is done yet.

    ``num_ranks``: processes that were started, ``ranks_per_node`` on each node.

    Raises:
        PlanError: the plan is of another problem or other devices, or cannot run.
    """
    now, then = run.plan.problem, plan.problem
    if then.algorithm != now.algorithm:
        raise PlanError(
            f"the plan is for {then.algorithm}, the run is {now.algorithm}", where="algorithm"
        )
    for name in PLANNED_OPTIONS:
        planned, value = then.config.get(name), getattr(run.config, name)
        if planned is not None and planned != value:
            raise PlanError(
                f"the plan is for {planned}, the run has {value}", where=name,
                remedy=f"search with {name}={value}",
            )  # fmt: skip
    if then.graph.max_staleness != now.graph.max_staleness:
        raise PlanError(
            f"the plan's is {then.graph.max_staleness}, the run's {now.graph.max_staleness}: "
            "that would change what is trained on", where="max_staleness",
            remedy=f"search with max_staleness={now.graph.max_staleness}",
        )  # fmt: skip
    for role, spec in now.models.items():
        planned = asdict(then.models[role]) if role in then.models else {}
        unlike = unlike_shape(asdict(spec), planned)
        if unlike:
            raise PlanError(
                f"the plan's {role} has {unlike} {planned.get(unlike)}, the run's "
                f"{getattr(spec, unlike)}", where=f"models.{role}",
                remedy="search a plan for the run's models",
            )  # fmt: skip
    _check_devices(run, plan, num_ranks, ranks_per_node)
    if run.config.generation_backend == "vllm":
        raise PlanError(
            "vLLM's engines are made once and stay", where="generation_backend=vllm",
            remedy="stop the run and resume it under the plan",
        )  # fmt: skip
    calls = {call.name for call in now.graph.calls}
    unlike_calls = sorted(calls ^ set(plan.allocations))
    if unlike_calls:
        raise PlanError(
            f"{unlike_calls[0]} is in the {'run' if unlike_calls[0] in calls else 'plan'} only",
            where="allocations", remedy="search with the run's options",
        )  # fmt: skip
    plan = replace(plan, problem=replace(now, cluster=then.cluster))
    validate_plan(plan)
    check_program(plan, compile_plan(plan))
    return replace(run, plan=plan)


def _check_devices(run: Run, plan: ExecutionPlan, num_ranks: int, ranks_per_node: int) -> None:
    cluster, kind = equal_nodes(plan), run.plan.problem.cluster.kind
    if cluster.kind != kind:
        raise PlanError(
            f"the plan is for {cluster.device.name}, the run is on {kind} devices", where="cluster"
        )
    if plan.num_devices > num_ranks:
        raise PlanError(
            f"the plan is for {plan.num_devices} devices, the run has {num_ranks} ranks",
            where="cluster", remedy="stop the run and resume it under the plan",
        )  # fmt: skip
    crosses = plan.num_devices > ranks_per_node
    if crosses and cluster.devices_per_node != ranks_per_node:
        raise PlanError(
            f"the plan's nodes have {cluster.devices_per_node} devices, the run's {ranks_per_node}",
            where="cluster", remedy="search a plan for the run's nodes",
        )  # fmt: skip


# ---- what the output folder says of it ----------------------------------------------------------


def with_newest_plan(run: Run) -> Run:
    """The run under the plan that it last went over to, if it did."""
    file = run.output / "plan.json"
    return replace(run, plan=load_plan(file)) if file.is_file() else run


def past_folder(output: Path, step: int) -> Path:
    """Plan, trace and metrics of the steps before ``step`` that another plan ran.

    >>> past_folder(Path("runs/ppo"), 12).as_posix()
    'runs/ppo/before/step00000012'
    """
    return output / "before" / f"step{step:08}"


def put_away(output: Path, step: int, plan: ExecutionPlan, *, any_steps: bool) -> None:
    """What was written under the plan so far goes into a folder of its own; ``plan.json`` is new.

    One rank, while no trace is open. So plan and trace of a folder belong together, for
    ``summary.py`` and ``realplan calibrate``. ``metrics.jsonl`` goes on, and is there as it was.
    ``any_steps``: some ran under the old plan; else nothing is kept of it.
    """
    past = past_folder(output, step)
    shutil.rmtree(past, ignore_errors=True)
    if any_steps:
        past.mkdir(parents=True)
        (output / "trace").rename(past / "trace")
        for name in ("plan.json", "metrics.jsonl"):
            shutil.copy(output / name, past / name)
    else:
        shutil.rmtree(output / "trace")
    save_plan(plan, output / "plan.json")
