"""Protects generation a step ahead: its seconds, its memory, and a search that may choose it."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.mesh import DeviceMesh
from planner.plan import Allocation, ExecutionPlan, Problem
from planner.plan_memory import kept_layouts, plan_memory
from planner.program import (
    Free,
    Generate,
    Instruction,
    Reallocate,
    Transfer,
    compile_plan,
)
from planner.program_check import check_program
from planner.program_versions import check_versions
from planner.report import program_table
from planner.search import search
from planner.search.evaluate import Evaluator
from planner.search.options import OptionSpace
from planner.simulate import StepPrices, run_program
from planner.strategy import ParallelStrategy
from profiles.errors import InfeasibleError, PlanError
from tests.planner import instances
from tests.planner.plans import SPEC, make_test_cluster, ppo, random_plan
from tests.planner.test_search import give_memory, model_of, random_assignment, space_of
from tests.planner.test_simulate import SECONDS, FixedPrices, one


def ahead(problem: Problem) -> Problem:
    return replace(problem, graph=replace(problem.graph, max_staleness=1))


def step_s(allocations: Mapping[str, Allocation], *, stale: bool) -> float:
    problem = ppo(make_test_cluster(1, 2), ["batch_size=24"])
    plan = ExecutionPlan(problem=ahead(problem) if stale else problem, allocations=allocations)
    return run_program(plan, compile_plan(plan), FixedPrices(plan, SECONDS)).step_s


def test_generation_beside_training_by_hand() -> None:
    """Generation takes 4 s on device 1, the rest 9 s on device 0: 13 s in turns, 9 s side by side;

    on one device it makes no difference, and where everything else takes less, generation is all.
    """
    apart = dict.fromkeys(SECONDS, one(0)) | {"actor_gen": one(1)}
    assert step_s(apart, stale=False) == pytest.approx(13.0)
    assert step_s(apart, stale=True) == pytest.approx(9.0)
    assert step_s(dict.fromkeys(SECONDS, one(0)), stale=True) == pytest.approx(13.0)


def one_ahead(**calls: Allocation) -> ExecutionPlan:
    problem = ahead(ppo(make_test_cluster(1, 2), ["batch_size=24"]))
    return ExecutionPlan(problem=problem, allocations=dict.fromkeys(SECONDS, one(0)) | calls)


def test_answers_go_and_weights_come_before_the_step_trains() -> None:
    """All that is between two steps: no message is, so that a run may end or be evaluated there."""
    program = compile_plan(one_ahead(actor_gen=one(1)))
    kinds = [[type(i) for i in program.step[rank]] for rank in (0, 1)]
    assert kinds[1] == [Transfer] * len(sent(program.step[1])) + [Reallocate, Generate, Free]
    place = kinds[0].index(Reallocate)
    assert set(kinds[0][:place]) == {Transfer}
    assert not any(isinstance(i, Transfer) for i in program.step[0][place:])


def sent(instructions: Sequence[Instruction]) -> list[Transfer]:
    return [i for i in instructions if isinstance(i, Transfer) and i.sends]


SEEDS = range(40)


def random_ahead(seed: int) -> ExecutionPlan:
    """PPO, at times with an averaged reference, on eight devices."""
    rng = random.Random(seed)
    words = ["batch_size=24", *(["ppo.ref_average=0.1"] if seed % 2 else [])]
    return random_plan(rng, ahead(ppo(make_test_cluster(2, 4), words)))


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_of_random_plans_run_to_their_end(seed: int) -> None:
    """Before the first step, in every step, in the last, and in an evaluation."""
    plan = random_ahead(seed)
    program = compile_plan(plan)
    check_program(plan, program)
    assert program.ahead is not None
    assert not {i.index for own in program.step.values() for i in own} & {
        i.index
        for part in (program.ahead.first, program.ahead.last, program.ahead.alone)
        for own in part.values()
        for i in own
    }


def test_a_borrowed_layout_that_is_read_while_its_role_trains_is_a_copy() -> None:
    """On the devices that train, what training changes must not be what generation reads."""
    both = Allocation(mesh=DeviceMesh(0, 2), strategy=ParallelStrategy(dp=2))
    plan = one_ahead(actor_gen=both)
    program = compile_plan(plan)
    check_program(plan, program)
    moved = [i for own in program.step.values() for i in own if isinstance(i, Reallocate)]
    assert [i.lends for i in moved] == [False, False]
    lending = {
        rank: tuple(replace(i, lends=True) if isinstance(i, Reallocate) else i for i in own)
        for rank, own in program.step.items()
    }
    with pytest.raises(PlanError, match=r"actor_train changes actor while .* has its old weights"):
        check_program(plan, replace(program, step=lending))
    (layout,) = {i.destination for i in moved}
    assert ("actor", layout) in kept_layouts(plan)
    spec = plan.problem.models["actor"]
    with_copy = plan_memory(plan)[0].weights - plan_memory(plan, kept=frozenset())[0].weights
    assert with_copy == 0  # as if nothing were lent, kept or not
    assert layout.num_values(0) == spec.num_parameters


def test_what_a_rank_does_says_which_step_it_is_for() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(program_table(one_ahead(actor_gen=one(1)), 1))
    lines = console.export_text().splitlines()
    assert [line.split()[:2] for line in lines if "before" in line] == [
        ["before", "Reallocate"], ["before", "Generate"], ["before", "Free"],
    ]  # fmt: skip
    assert sum("for the step that follows" in line for line in lines) == 2


def test_weights_of_two_steps_ago_are_found() -> None:
    """Planted: what came before the first step is never brought again, nor dropped."""
    plan = one_ahead(actor_gen=one(1))
    program = compile_plan(plan)
    assert program.ahead is not None
    kept = replace(program.ahead, first={
        rank: tuple(i for i in own if not isinstance(i, Free))
        for rank, own in program.ahead.first.items()
    })  # fmt: skip
    bare = {
        rank: tuple(i for i in own if not isinstance(i, Reallocate | Free))
        for rank, own in program.step.items()
    }
    with pytest.raises(PlanError, match="actor_gen reads actor 2 steps behind, at most 1"):
        check_versions(plan, replace(program, step=bare, ahead=kept))


def test_answers_of_another_step_are_found() -> None:
    """Planted: nothing was generated before the first step; or it trains on what it generates."""
    plan = one_ahead(actor_gen=one(1))
    program = compile_plan(plan)
    assert program.ahead is not None
    with pytest.raises(PlanError, match="moves actor_gen's data 1 steps behind"):
        check_versions(plan, replace(program, ahead=replace(program.ahead, first={})))
    late = {
        rank: tuple(
            replace(i, index=i.index + 1000)
            if isinstance(i, Transfer) and i.producer == "actor_gen"
            else i
            for i in own
        )
        for rank, own in program.step.items()
    }
    with pytest.raises(PlanError, match="moves actor_gen's data -1 steps behind"):
        check_versions(plan, replace(program, step=late))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("algorithm", ["ppo", "ppo ppo.ref_average=0.1", "grpo", "remax"])
def test_the_evaluator_agrees(algorithm: str, seed: int) -> None:
    """With the simulator to 1e-9 and the memory model to the byte, on random assignments."""
    rng = random.Random(seed)
    name, *words = algorithm.split()
    found = find_algorithm(name)
    config = make_config(
        found.config_class, [*words, "batch_size=24", "prompt_len=16", "response_len=16"]
    )
    cluster = make_test_cluster(*rng.choice([(1, 4), (2, 2), (2, 4)]))
    space = space_of(ahead(make_problem(found, config, model=SPEC, critic=SPEC, cluster=cluster)))
    evaluator = Evaluator(space)
    give_memory(evaluator, 5e8)
    for _ in range(25):
        assignment = random_assignment(rng, space)
        plan, score = evaluator.plan(assignment), evaluator.score(assignment)
        expected_s = run_program(plan, compile_plan(plan), space.prices, num_steps=1).step_s
        assert score.step_s == pytest.approx(expected_s, rel=1e-9)
        fullest = max(need.total for need in plan_memory(plan, kept=frozenset()).values())
        assert score.overshoot == pytest.approx(max(0.0, fullest / 5e8 - 1.0), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_not_above_the_best_plan(seed: int) -> None:
    """Of problems that can be tried out whole, a step ahead or not; allowing it is never worse."""
    problem, best = instances.instance(seed)
    if best is None or not ahead(problem).graph.ahead:
        pytest.skip("nothing fits, or nothing is generated for training")
    costs = model_of(problem)
    stale = ahead(problem)
    space = OptionSpace(stale, StepPrices(stale, costs))
    try:
        tried = search(stale, costs, engine="brute", time_limit_s=600, space=space).step_s
    except InfeasibleError:
        tried = math.inf
    found = search(stale, costs, engine="exact", gap=0.0, time_limit_s=60)
    assert found.step_s == pytest.approx(min(tried, best.step_s), rel=2e-6)
    assert found.lower_bound_s <= found.step_s * (1 + 1e-9)
    assert found.gap <= 2e-6
    assert found.plan.problem.graph.max_staleness == int(tried < best.step_s * (1 - 1e-6))
