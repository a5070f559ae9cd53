"""Protects ``explain``: its critical cycle is the whole truth about the pace of a plan, and its
levers are what a simulation with those prices says.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.explain import critical_cycle, explain, rank_groups, steady_cycle
from planner.program import compile_plan
from planner.resolve import hardware_levers, make_costs
from planner.simulate import StepPrices, run_program
from tests.planner.plans import random_plan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_the_cycle_takes_exactly_its_number_of_steps(seed: int) -> None:
    """Oracle: seconds per step of a simulation that is long enough to be steady."""
    plan = random_plan(random.Random(seed))
    prices, program = StepPrices(plan.problem, make_costs(plan.problem.cluster, None)), None
    program = compile_plan(plan)
    cycle, _ = steady_cycle(plan, program, prices)
    steady_s = run_program(plan, program, prices, num_steps=64).step_s
    assert cycle.seconds == pytest.approx(cycle.num_steps * steady_s, rel=1e-6)
    assert [step.step for step in cycle.steps] == sorted(step.step for step in cycle.steps)
    assert {step.label for step in cycle.steps} & {call.name for call in plan.problem.graph.calls}


@pytest.mark.parametrize("seed", range(8))
def test_only_what_is_on_the_cycle_sets_the_pace(seed: int) -> None:
    """A call that is off the cycle saves nothing when it is faster; one that takes all of it

    saves its share.
    """
    plan = random_plan(random.Random(seed))
    costs = make_costs(plan.problem.cluster, None)
    links, device = hardware_levers(None)
    found = explain(plan, costs, links=links, device=device)
    on_cycle = {step.label for step in found.cycle.steps}
    saved = {lever.what: found.step_s - lever.step_s for lever in found.levers}
    for call in plan.problem.graph.calls:
        gain_s = saved[f"{call.name} takes 10% less"]
        most_s = sum(s.seconds for s in found.cycle.steps if s.label == call.name)
        assert gain_s <= 0.1 * most_s / found.cycle.num_steps + 1e-9 * found.step_s
        if call.name not in on_cycle:
            assert gain_s == pytest.approx(0.0, abs=1e-9 * found.step_s)
    assert all(gain_s >= -1e-9 * found.step_s for gain_s in saved.values())


@pytest.mark.parametrize("seed", range(4))
def test_groups_hold_every_rank_once(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, None))
    timeline = run_program(plan, compile_plan(plan), prices)
    groups = rank_groups(timeline)
    assert sorted(rank for group in groups for rank in group.ranks) == list(range(plan.num_devices))
    for group in groups:
        busy_s = sum(group.busy_s.values())
        expected = max(0.0, 1.0 - busy_s / timeline.step_s)
        assert group.idle_share == pytest.approx(expected, abs=0.02)


def test_a_timeline_of_one_step_has_no_cycle() -> None:
    plan = random_plan(random.Random(1))
    prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, None))
    assert critical_cycle(run_program(plan, compile_plan(plan), prices, num_steps=1)) is None


def test_measured_costs_say_nothing_of_other_hardware() -> None:
    """Without ``links`` and ``device`` no lever is about hardware."""
    plan = random_plan(random.Random(2))
    found = explain(plan, make_costs(plan.problem.cluster, None), links=None, device=None)
    assert not [lever for lever in found.levers if lever.what.endswith("2x")]
    assert replace(found, levers=()).step_s == found.step_s
