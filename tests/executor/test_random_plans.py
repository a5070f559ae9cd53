"""Protects the claim that any plan that passes the checks runs: random plans, through real workers,
in a row in the same processes, to the same tokens, and none of them hangs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from planner.plan import ExecutionPlan, Problem
from planner.program import compile_plan
from planner.program_check import check_program
from tests.planner.plans import random_plan
from tests.runs import OVERRIDES, Outcome, ppo_problem, run_rank
from tests.spawn import spawn

NUM_PLANS = 8


def checked_plan(problem: Problem, rng: random.Random) -> ExecutionPlan:
    plan = random_plan(rng, problem)
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
    plans = [checked_plan(problem, rng) for _ in range(NUM_PLANS)]
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
