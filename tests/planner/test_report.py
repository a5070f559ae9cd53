"""Protects what people read: the numbers shown are the plan's, every device and rank is told."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from planner.cost import CostModel
from planner.plan import ExecutionPlan
from planner.plan_memory import plan_memory
from planner.program import compile_plan
from planner.report import (
    estimate_lines,
    memory_table,
    plan_table,
    print_plan,
    program_table,
    ranges_text,
    timeline_text,
)
from planner.search import estimate_plan
from planner.simulate import StepPrices, Timeline
from profiles.collectives import Collectives
from profiles.errors import ConfigError
from profiles.roofline import RooflineCosts
from tests.planner.plans import random_plan


def estimated(seed: int) -> tuple[ExecutionPlan, Timeline]:
    plan = random_plan(random.Random(seed))
    cluster = plan.problem.cluster
    costs = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    return estimate_plan(plan, StepPrices(plan.problem, costs), lower_bound=1e-6)


def printed(renderable: object, *, width: int = 120) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(renderable)
    return text.getvalue()


@pytest.mark.parametrize("seed", range(6))
def test_everything_prints_at_any_width(seed: int) -> None:
    plan, timeline = estimated(seed)
    for width in (40, 100, 200):
        text = io.StringIO()
        print_plan(plan, timeline, Console(file=text, width=width))
        assert "per step" in text.getvalue()
        assert "lower bound" in text.getvalue()


def test_the_table_has_every_call_with_its_layout() -> None:
    plan, _ = estimated(2)
    lines = printed(plan_table(plan)).splitlines()
    for name, allocation in plan.allocations.items():
        (line,) = [text for text in lines if re.search(rf"^\s*{name}\s", text)]
        assert allocation.strategy.short in line
        assert str(allocation.mesh).strip("[]") in line


def test_every_device_is_in_the_memory_table_once() -> None:
    plan, _ = estimated(3)
    shown = printed(memory_table(plan, most_rows=1000))
    cells = [re.split("  +", line.strip())[0] for line in shown.splitlines() if "%" in line]
    listed = [
        number
        for cell in cells
        for run in cell.split(", ")
        for number in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)
    ]
    assert sorted(listed) == sorted(plan_memory(plan))


def test_the_timeline_shows_each_rank_and_its_idle_share() -> None:
    _, timeline = estimated(5)
    text = timeline_text(timeline, width=120, most_rows=1000).plain
    rows = [line for line in text.splitlines()[1:-1] if line]
    shares = [int(line.rsplit(None, 1)[1].rstrip("%")) for line in rows]
    assert all(0 <= share <= 100 for share in shares)
    assert max(shares) == round(100 * max(timeline.idle_share.values()))
    assert all(len(line) <= 120 for line in rows)


@pytest.mark.parametrize("seed", range(4))
def test_a_ranks_program_lists_every_instruction(seed: int) -> None:
    plan, _ = estimated(seed)
    program = compile_plan(plan)
    for rank in (0, plan.num_devices - 1):
        setup, step = program.setup.get(rank, ()), program.step.get(rank, ())
        rows = program_table(plan, rank).row_count
        assert rows == len(setup) + max(1, len(step))  # a rank without calls: "nothing"


def test_a_rank_that_does_not_exist() -> None:
    plan, _ = estimated(1)
    last = plan.num_devices - 1
    with pytest.raises(
        ConfigError, match=f"--rank: .* is not a rank of this plan; use 0 to {last}"
    ):
        program_table(plan, plan.num_devices)


def test_the_estimate_says_ratio_and_gap() -> None:
    plan, _ = estimated(1)
    assert plan.estimate is not None
    twice = {"symmetric": 2 * plan.estimate.step_s}
    lines = estimate_lines(
        ExecutionPlan(
            problem=plan.problem, allocations=plan.allocations, estimate=plan.estimate,
            baselines=twice,
        )
    )  # fmt: skip
    assert any(line.startswith("2.00x as fast as the best single layout") for line in lines)
    assert any(f"{plan.estimate.gap:.1%}" in line for line in lines)
    assert any("100% roofline" in line for line in lines)


def test_ranges() -> None:
    assert ranges_text([3, 1, 2, 7]) == "1-3, 7"
