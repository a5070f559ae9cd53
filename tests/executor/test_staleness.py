"""Protects the runtime from plans that it cannot carry out: generation a step ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from executor.run import configure
from planner.plan import ExecutionPlan
from profiles.errors import PlanError
from tests.planner.plans import make_test_cluster, ppo
from tests.planner.test_simulate import SECONDS, one


def test_generation_a_step_ahead_is_refused() -> None:
    """A run makes the graph anew, so that the word would be lost and the plan run in turns."""
    problem = ppo(make_test_cluster(1, 2), ["batch_size=24"])
    problem = replace(problem, graph=replace(problem.graph, max_staleness=1))
    plan = ExecutionPlan(problem=problem, allocations=dict.fromkeys(SECONDS, one(0)))
    with pytest.raises(PlanError, match=r"max_staleness: a plan that generates a step ahead"):
        configure(plan, [])
