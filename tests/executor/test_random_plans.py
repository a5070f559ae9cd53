"""Protects the claim that any plan that passes the checks runs: random plans, through real workers,
in a row in the same processes, to the same tokens, and none of them hangs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from planner.graph import CallKind
from planner.mesh import enumerate_meshes
from planner.plan import Allocation, ExecutionPlan, Problem, largest_dp, validate_plan
from planner.program import compile_plan
from planner.program_check import check_program
from planner.strategy import Recompute, legal_strategies
from tests.runs import OVERRIDES, Outcome, ppo_problem, run_rank
from tests.spawn import spawn

NUM_PLANS = 8


def random_plan(problem: Problem, rng: random.Random) -> ExecutionPlan:
    meshes = list(enumerate_meshes(problem.cluster))
    allocations = {}
    for call in problem.graph.calls:
        most = largest_dp(problem, call.name)
        legal = [
            (mesh, strategy)
            for mesh in meshes
            for strategy in legal_strategies(
                problem.spec_of(call.name), mesh, problem.cluster, max_dp=most
            )
        ]
        mesh, strategy = rng.choice(legal)
        if call.kind is CallKind.TRAIN:
            strategy = replace(
                strategy, zero=rng.choice((0, 1)), recompute=rng.choice(get_args(Recompute))
            )
        if call.kind in (CallKind.INFER, CallKind.TRAIN) and strategy.tp > 1:
            strategy = replace(strategy, sequence_parallel=rng.choice((False, True)))
        micro_batches = rng.randint(1, max(1, most // strategy.dp))
        allocations[call.name] = Allocation(
            mesh=mesh, strategy=strategy, num_micro_batches=micro_batches
        )
    plan = ExecutionPlan(problem=problem, allocations=allocations)
    validate_plan(plan)
    check_program(plan, compile_plan(plan))
    return plan


def run_in_a_row(
    rank: int, world_size: int, plans: list[ExecutionPlan], folder: str
) -> list[Outcome]:
    outcomes = []
    for i, plan in enumerate(plans):
        own = Path(folder, str(i))
        own.mkdir(exist_ok=True)
        outcomes.append(run_rank(rank, world_size, plan, str(own)))
    return outcomes


@pytest.mark.parametrize("seed", [0, 1])
def test_random_plans_run_and_agree(seed: int, tmp_path: Path) -> None:
    problem = ppo_problem(4, OVERRIDES)
    rng = random.Random(seed)
    plans = [random_plan(problem, rng) for _ in range(NUM_PLANS)]
    by_rank = spawn(4, run_in_a_row, plans, str(tmp_path), timeout_s=240)
    tokens = []
    for i in range(NUM_PLANS):
        found: dict[tuple[int, int], list[int]] = {}
        for outcomes in by_rank:
            found |= outcomes[i].tokens
        tokens.append(found)
    assert len(tokens[0]) == 16
    for i, found in enumerate(tokens):
        assert found == tokens[0], plans[i].allocations
