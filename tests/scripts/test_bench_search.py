"""Protects the search's benchmark: it reads the tables of the kernels, which change."""

from __future__ import annotations

from planner.resolve import make_costs
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.simulate import StepPrices
from scripts.bench_search import evaluations_per_second, make_case


def test_assignments_are_drawn_and_counted() -> None:
    problem = make_case("7B@8", "7B", "h100")
    space = OptionSpace(problem, StepPrices(problem, make_costs(problem.cluster, None)))
    assert evaluations_per_second(Evaluator(space), count=20) > 0
