"""From a plan and overrides to a run that can start: everything is checked before any process.

``resolve`` makes a ``Run`` or raises a ``UserError``; the launcher gives the ``Run`` to workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from executor.generate import vllm
from executor.model.hf_load import tensor_files
from executor.optional import check_package
from planner.algorithm import (
    Algorithm,
    config_to_dict,
    find_algorithm,
    import_functions,
    make_config,
    planned_workload,
)
from planner.graph import CallKind
from planner.mesh import DeviceMesh, enumerate_meshes
from planner.plan import Allocation, ExecutionPlan, Problem, largest_dp, validate_plan
from planner.program import compile_plan
from planner.program_check import check_program
from planner.strategy import ParallelStrategy, tensor_parallel_problem
from profiles.errors import CheckpointError, PlanError
from profiles.hardware import ClusterSpec, MixedCluster
from profiles.hf_config import read_hf_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A plan whose configuration is final, the algorithm that it runs, and where it goes on."""

    plan: ExecutionPlan
    algorithm: Algorithm
    config: Any
    resume_from: Path | None = None  # a checkpoint's folder

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def model_path(self, role: str) -> str | None:
        """The role's Hugging Face folder; None where its weights are random."""
        model = self.config.models()[role]
        if (model.init or self.config.init) == "random":
            return None
        return model.path or self.plan.problem.paths.get(role, "")


def resolve(plan: ExecutionPlan, overrides: Sequence[str], *, on_this_machine: bool = True) -> Run:
    """The run of ``plan`` with ``key=value`` overrides of its configuration.

    ``on_this_machine``: it is to run here, so the devices must be here.

    Raises:
        ConfigError, PlanError, CheckpointError: an override is wrong, the plan cannot run with
            it, a role has no weights or those of another shape, or this machine has no such
            devices.
    """
    equal_nodes(plan)
    run = configure(plan, overrides)
    if run.config.generation_backend == "vllm":
        vllm.one_tp(run.plan)
    if on_this_machine:
        check_devices(run.plan)
        if run.config.generation_backend == "vllm":
            check_package("vllm", where=vllm.WHERE, remedy=vllm.REMEDY)
    for role in run.plan.problem.graph.roles:
        check_weights(run, role)
    return run


def configure(plan: ExecutionPlan, overrides: Sequence[str]) -> Run:
    """As ``resolve``, wherever it is to run: neither devices nor weights are looked at."""
    algorithm = find_algorithm(plan.problem.algorithm)
    config = make_config(algorithm.config_class, overrides, base=plan.problem.config)
    problem = replace(
        plan.problem,
        config=config_to_dict(config),
        graph=replace(algorithm.graph(config), max_staleness=plan.problem.graph.max_staleness),
        workload=planned_workload(algorithm, config),
    )
    plan = replace(plan, problem=problem)
    validate_plan(plan)
    check_program(plan, compile_plan(plan))
    return Run(plan=plan, algorithm=algorithm, config=config)


def equal_nodes(plan: ExecutionPlan) -> ClusterSpec:
    """The plan's cluster; raises ``PlanError`` where it has unlike nodes."""
    cluster = plan.problem.cluster
    if isinstance(cluster, MixedCluster):
        kinds = " beside ".join(dict.fromkeys(group.device.name for group in cluster.groups))
        raise PlanError(
            f"a plan on unlike nodes ({kinds}) can be searched, estimated and checked, but not "
            "run yet",
            where="cluster.groups", remedy="search a plan for one of the groups",
        )  # fmt: skip
    return cluster


def check_devices(plan: ExecutionPlan) -> None:
    """Raise ``PlanError`` unless this machine has the plan's devices."""
    device, wanted = equal_nodes(plan).device, plan.num_devices
    if device.kind == "cuda":
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if available < wanted:
            raise PlanError(
                f"the plan is for {wanted} {device.name} devices, this machine has "
                f"{available or 'no'} CUDA device{'' if available == 1 else 's'}",
                where="cluster",
                remedy="make a plan for this machine with realplan search --cluster local",
            )
        return
    cores = os.cpu_count() or 1
    if wanted > 16 * cores:
        raise PlanError(
            f"the plan is for {wanted} CPU workers, this machine has {cores} cores",
            where="cluster",
            remedy="make a plan for this machine with realplan search --cluster local",
        )


# Fields of a model that say nothing about what it computes. (A learned position is a weight.)
_FREE = ("name", "source", "max_positions")


def check_weights(run: Run, role: str) -> None:
    """Raise ``CheckpointError`` unless the role's weights are named, and computed as the plan's."""
    path = run.model_path(role)
    if path is None:
        return
    if not path:
        raise CheckpointError(
            f"the plan names no weights for {role}",
            where=f"{role}.path",
            remedy=_weights_remedy(run, role),
        )
    if not Path(path).is_dir():
        raise CheckpointError(
            f"no folder '{path}'", where=f"{role}.path",
            remedy="give a Hugging Face folder with config.json and safetensors",
        )  # fmt: skip
    check_head(run, role, Path(path))
    planned = run.plan.problem.models[role]
    found = read_hf_config(path, head=planned.head)
    free = (*_FREE, "tied_embedding") if planned.head == "scalar" else _FREE
    unlike = [
        f"{name} {getattr(found, name)} instead of {getattr(planned, name)}"
        for name in (field.name for field in fields(planned))
        if name not in free and getattr(found, name) != getattr(planned, name)
    ]
    if unlike:
        raise CheckpointError(
            f"{path} is not the planned model: {', '.join(unlike)}",
            where=f"{role}.path",
            remedy="search a plan for this model",
        )


def _weights_remedy(run: Run, role: str) -> str:
    if is_scored_by_model(run, role) and hasattr(run.config.models()[role], "source"):
        return f"give {role}.path=FOLDER of a trained reward model, or {role}.source=vader"
    return f"give {role}.path=FOLDER, or init=random for a benchmark"


def is_scored_by_model(run: Run, role: str) -> bool:
    """A frozen role with a scalar head: its weights must have been trained to score."""
    graph = run.plan.problem.graph
    return run.plan.problem.models[role].head == "scalar" and graph.train_call(role) is None


def check_head(run: Run, role: str, folder: Path) -> None:
    """Raise ``CheckpointError`` where a frozen scalar head would be random."""
    if not is_scored_by_model(run, role):
        return
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = saved.get("architectures") or []
    if "score.weight" not in tensor_files(folder):
        what = f" ({', '.join(kinds)})" if kinds else ""
        raise CheckpointError(
            f"{folder}{what} has no head that scores, no tensor score.weight",
            where=f"{role}.path",
            remedy=f"train one with --algorithm reward, or use {role}.source=vader",
        )


def functions_of(run: Run) -> dict[str, Any]:
    """The torch half of the algorithm: an object for every call."""
    module = import_functions(run.algorithm)
    functions: dict[str, Any] = module.make_functions(run.config)
    missing = [c.name for c in run.plan.problem.graph.calls if c.name not in functions]
    assert not missing, f"{run.algorithm.functions} has no function for {missing}"
    return functions


def one_layout_plan(problem: Problem, strategy: ParallelStrategy, *, seed: int) -> ExecutionPlan:
    """Every call on all devices under one strategy: a run without a search.

    Functions are on as many devices as there are samples for.

    Raises:
        PlanError: the strategy does not use the cluster's devices or does not divide a model.
    """
    mesh = DeviceMesh(0, problem.cluster.num_devices)
    allocations: dict[str, Allocation] = {}
    for call in problem.graph.calls:
        spec = problem.spec_of(call.name)
        reason = tensor_parallel_problem(spec, strategy.tp) if spec else None
        if reason is not None:
            raise PlanError(reason, where="--layout")
        if spec is None:
            meshes = enumerate_meshes(problem.cluster)
            most = largest_dp(problem, call.name)
            own_mesh = max(
                (m for m in meshes if m.first == 0 and m.num_devices <= most),
                key=lambda m: m.num_devices, default=mesh,
            )  # fmt: skip
            function_dp = ParallelStrategy(dp=own_mesh.num_devices)
            allocations[call.name] = Allocation(mesh=own_mesh, strategy=function_dp)
            continue
        # Two micro-batches a stage keep a pipeline three quarters full or better.
        most = max(1, largest_dp(problem, call.name) // strategy.dp)
        wanted = 1 if strategy.pp == 1 else 2 * strategy.pp
        own = strategy if call.kind is CallKind.TRAIN else replace(strategy, zero=0)
        allocations[call.name] = Allocation(
            mesh=mesh, strategy=own, num_micro_batches=min(wanted, most)
        )
    plan = ExecutionPlan(problem=problem, allocations=allocations, seed=seed)
    validate_plan(plan)
    return plan
