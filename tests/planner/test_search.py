"""Protects the search: its quick numbers are the simulator's and the memory model's, its bound is
below every plan, it finds the optimum where brute force can, and a seed fixes its answer.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numba import njit

from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, make_problem
from planner.cost import CostModel, Costs, MixedCosts
from planner.memory import RESERVE_BYTES, call_memory
from planner.mesh import DeviceMesh, MeshKind, enumerate_meshes
from planner.plan import Problem, validate_plan
from planner.plan_memory import check_memory, plan_memory
from planner.program import compile_plan
from planner.search import estimate_plan, search
from planner.search.baselines import baselines
from planner.search.descent import Place, beside, descend, fastest, iterate, place_of
from planner.search.engine import Budget, News, Record
from planner.search.evaluate import Evaluator, Score
from planner.search.moves import MOVES, State, move
from planner.search.options import Assignment, Option, OptionSpace
from planner.search.records import Ints, Tables
from planner.search.variants import considered_meshes, variants, ways
from planner.simulate import StepPrices, run_program, simulate
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.errors import ConfigError, InfeasibleError
from profiles.hardware import ClusterSpec
from profiles.roofline import RooflineCosts
from tests.planner.plans import SPEC, make_test_cluster, ppo, random_problem


def model_of(problem: Problem) -> Costs:
    cluster = problem.cluster
    models = [CostModel(g, RooflineCosts(g.device), Collectives(g)) for g in cluster.groups]
    return models[0] if isinstance(cluster, ClusterSpec) else MixedCosts(cluster, models)


def give_memory(evaluator: Evaluator, memory_bytes: float) -> None:
    """To every device, after its options were chosen for another size."""
    meshes = evaluator.tables.meshes
    meshes["memory_bytes"] = memory_bytes
    meshes["free_bytes"] = memory_bytes - evaluator.tables.reserve_bytes


def space_of(problem: Problem) -> OptionSpace:
    return OptionSpace(problem, StepPrices(problem, model_of(problem)))


def random_assignment(rng: random.Random, space: OptionSpace) -> Assignment:
    """Any option for each call; now and then one call copies the mesh of another."""
    chosen: list[Option] = []
    for call in space.calls:
        mesh = rng.choice(space.meshes[call.name])
        if chosen and rng.random() < 0.5 and chosen[-1].mesh in space.meshes[call.name]:
            mesh = chosen[-1].mesh
        choice = rng.choice(space.choices_on(call.name, mesh))
        chosen.append(space.option(call.name, mesh, choice))
    return tuple(chosen)


@pytest.mark.parametrize("mean_prompt", [None, 6.5])
@pytest.mark.parametrize("seed", range(12))
def test_the_evaluator_agrees_with_the_simulator_and_the_memory_model(
    seed: int, mean_prompt: float | None
) -> None:
    """On random plans: step_s to 1e-9, the fullest device to the byte, no floor above it."""
    rng = random.Random(seed)
    problem = random_problem(rng)
    known = replace(problem.workload, mean_prompt_tokens=mean_prompt)
    problem = replace(problem, workload=known)
    space = space_of(problem)
    evaluator = Evaluator(space)
    for _ in range(12):
        assignment = random_assignment(rng, space)
        plan = evaluator.plan(assignment)
        timeline = run_program(plan, compile_plan(plan), space.prices)
        score = evaluator.score(assignment)
        assert score.step_s == pytest.approx(timeline.step_s, rel=1e-9)
        assert evaluator.floor_s(assignment) <= score.step_s * (1 + 1e-9)
        fullest = max(need.total for need in plan_memory(plan, kept=frozenset()).values())
        had = problem.cluster.device.memory_bytes
        assert score.overshoot == pytest.approx(max(0.0, fullest / had - 1.0), rel=1e-12)


def test_overshoot_is_that_of_the_memory_model() -> None:
    """Options fit alone; together they may not, by as much as the memory model says."""
    rng = random.Random(5)
    roomy = ppo(make_test_cluster(1, 4), ["batch_size=24"])
    fullest = sorted(fullest_bytes(space_of(roomy), rng) for _ in range(41))
    had = fullest[10]
    space = space_of(ppo(make_test_cluster(1, 4, memory_bytes=had), ["batch_size=24"]))
    evaluator, seen = Evaluator(space), 0
    for _ in range(60):
        assignment = random_assignment(rng, space)
        need = max(
            n.total for n in plan_memory(evaluator.plan(assignment), kept=frozenset()).values()
        )
        overshoot = evaluator.overshoot(assignment)
        assert overshoot == pytest.approx(max(0.0, need / had - 1.0), abs=1e-12)
        seen += overshoot > 0
    assert 0 < seen < 60


def tiny_problem(rng: random.Random) -> Problem:
    """Few enough plans to try them all; memory for some of them only."""
    spec = replace(SPEC, num_layers=rng.choice([2, 3]), ffn=rng.choice([32, 128]))
    reserve = RESERVE_BYTES["cpu"]
    cluster = make_test_cluster(
        1, 2, memory_bytes=reserve + rng.choice([500, 800, 1200, 4000]) * 1024
    )
    overrides = [f"batch_size={rng.choice([2, 3])}", "ppo.num_mini_batches=1"]
    return ppo(cluster, [*overrides, f"reward.source={rng.choice(['model', 'vader'])}"], spec)


@pytest.mark.parametrize("seed", range(12))
def test_the_walk_finds_the_optimum_and_the_bound_is_below_it(seed: int) -> None:
    """Brute force over every plan is the oracle; baselines are never better than the result."""
    rng = random.Random(seed)
    problem = tiny_problem(rng)
    try:
        best = search(problem, model_of(problem), engine="brute", time_limit_s=600)
    except InfeasibleError:
        with pytest.raises(InfeasibleError, match=r"GiB|MiB|KiB"):
            search(problem, model_of(problem), seed=seed, max_evaluations=2000)
        return
    found = search(problem, model_of(problem), seed=seed, gap=0.0, max_evaluations=8000)
    assert best.plan.estimate is not None
    assert found.plan.estimate is not None
    assert found.plan.estimate.step_s == pytest.approx(best.plan.estimate.step_s, rel=1e-9)
    assert found.lower_bound_s <= best.plan.estimate.step_s * (1 + 1e-9)
    assert found.gap == pytest.approx(1 - found.lower_bound_s / found.plan.estimate.step_s)
    assert all(s >= found.plan.estimate.step_s * (1 - 1e-9) for s in found.baselines.values())


def fullest_bytes(space: OptionSpace, rng: random.Random) -> int:
    plan = Evaluator(space).plan(random_assignment(rng, space))
    return max(need.total for need in plan_memory(plan, kept=frozenset()).values())


def test_a_seed_fixes_the_plan() -> None:
    """Same seed, same plan and numbers, however long it took; all within an evaluation budget."""
    problem = random_problem(random.Random(4))
    runs = [
        search(problem, model_of(problem), seed=7, max_evaluations=3000, gap=0.0, time_limit_s=600)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].plan.seed == 7
    assert runs[0].evaluations <= 3001


def test_the_plan_found_fits_and_its_estimate_is_the_simulators() -> None:
    problem = random_problem(random.Random(9))
    costs = model_of(problem)
    plan = search(problem, costs, max_evaluations=3000).plan
    check_memory(plan)
    estimate = plan.estimate
    assert estimate is not None
    assert estimate.step_s == simulate(plan, compile_plan(plan), costs).step_s
    assert estimate.peak_bytes == max(need.total for need in plan_memory(plan).values())
    assert sum(estimate.provenance.values()) == pytest.approx(1.0)
    assert {call.name for call in problem.graph.calls} <= set(estimate.per_call_s)


def test_an_interrupt_leaves_the_best_so_far() -> None:
    """Ctrl-C in the walk returns a plan that is no worse than what was seen before it."""
    problem, seen = random_problem(random.Random(11)), []  # the walk betters its start ten times

    def interrupt(news: News) -> None:
        seen.append(news.best_s)
        if len(seen) == 2:
            raise KeyboardInterrupt

    found = search(problem, model_of(problem), progress=interrupt, gap=0.0)
    assert len(seen) == 2
    assert found.plan.estimate is not None
    assert found.plan.estimate.step_s == pytest.approx(min(seen), rel=1e-9)


def test_an_interrupt_ends_both_searches_of_a_staleness() -> None:
    """That of today's weights ends with its plan, the other with its bound: it went on for its

    whole time.
    """
    problem, seen = ppo(make_test_cluster(2, 2), ["batch_size=8"]), 0
    problem = replace(problem, graph=replace(problem.graph, max_staleness=1))

    def interrupt(news: News) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    began_s = time.monotonic()
    found = search(problem, model_of(problem), progress=interrupt, gap=0.0, time_limit_s=600)
    assert time.monotonic() - began_s < 120
    assert found.interrupted
    assert 0 < found.lower_bound_s <= found.step_s


def test_an_interrupt_before_the_second_search_has_a_plan_keeps_that_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All was lost. Of a space that was not looked at no bound is claimed."""
    problem, calls = ppo(make_test_cluster(1, 2), ["batch_size=8"]), 0
    problem = replace(problem, graph=replace(problem.graph, max_staleness=1))

    def interrupted(evaluator: Evaluator) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return baselines(evaluator)

    monkeypatch.setattr(sys.modules["planner.search"], "baselines", interrupted)
    found = search(problem, model_of(problem), max_evaluations=500)
    assert (found.interrupted, found.lower_bound_s, found.gap) == (True, 0.0, 1.0)
    assert found.plan.problem.graph.max_staleness == 0


def test_an_interrupt_while_the_plan_is_estimated_does_not_lose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = ppo(make_test_cluster(1, 2), ["batch_size=8"])
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return estimate_plan(*args, **options)

    monkeypatch.setattr(sys.modules["planner.search"], "estimate_plan", interrupted)
    found = search(problem, model_of(problem), max_evaluations=500)
    assert (found.interrupted, calls) == (True, 2)


def test_the_walk_finds_what_fits_where_all_that_lacks_a_little_is_faster() -> None:
    """It ended at plans that lack 0.01% of the memory, and said that no plan fits.

    With a budget of 20,000 of 172,800; ``exact`` is the oracle.
    """
    memory_bytes = RESERVE_BYTES["cuda"] + 700 * 1024
    cluster = make_test_cluster(2, 1, memory_bytes=memory_bytes)
    network = replace(cluster.intra_link, bytes_per_s=1e8)
    cluster = replace(
        cluster, device=replace(cluster.device, kind="cuda"), intra_link=network,
        inter_link=network, host_link=replace(cluster.host_link, bytes_per_s=1e7),
    )  # fmt: skip
    spec = replace(SPEC, num_layers=3, ffn=128, num_kv_heads=2, vocab=1000, tied_embedding=True)
    words = ["batch_size=2", "ppo.num_mini_batches=2", "data.response_mean=3",
             "data.response_p95=4", "prompt_len=16", "response_len=16"]  # fmt: skip
    config = make_config(ALGORITHM.config_class, words)
    critic = replace(spec, num_layers=1)
    problem = make_problem(ALGORITHM, config, model=spec, critic=critic, cluster=cluster)
    best = search(problem, model_of(problem), engine="exact", gap=0.0, time_limit_s=600)
    walked = search(
        problem, model_of(problem), engine="mcmc", gap=0.0, max_evaluations=20_000,
        time_limit_s=600,
    )  # fmt: skip
    assert best.gap <= 1e-9
    assert best.step_s * (1 - 1e-9) <= walked.step_s <= best.step_s * 1.01


@pytest.mark.parametrize("seed", range(4))
def test_the_walk_finds_what_kicked_descents_find_in_half_its_budget(seed: int) -> None:
    problem = ppo(make_test_cluster(2, 4), ["batch_size=32"])
    few, limit_s = 20_000, 600.0
    found = [
        search(
            problem, model_of(problem), engine=engine, gap=0.0, max_evaluations=budget, seed=seed,
            time_limit_s=limit_s,
        )
        for engine, budget in (("descent", few), ("mcmc", 2 * few + 100))
    ]  # fmt: skip
    assert found[1].step_s <= found[0].step_s * (1 + 1e-9)


def test_several_threads_score_at_once_what_each_scores_alone() -> None:
    """Kernels hold no lock: each thread needs room of its own."""
    rng = random.Random(1)
    space = space_of(ppo(make_test_cluster(2, 4), ["batch_size=32"]))
    evaluator = Evaluator(space)
    assignments = [random_assignment(rng, space) for _ in range(400)]
    alone = [evaluator.score(assignment) for assignment in assignments]
    vectors = [evaluator.index.vectors(assignment) for assignment in assignments]

    def score(first: int) -> list[Score]:
        order = [*vectors[first:], *vectors[:first]]
        return [evaluator.score_vectors(*pair) for _ in range(10) for pair in order][-400:]

    with ThreadPoolExecutor(4) as pool:
        starts = (0, 100, 200, 300)
        for first, found in zip(starts, pool.map(score, starts), strict=True):
            assert found == [*alone[first:], *alone[:first]]


def test_an_interrupt_ends_what_goes_on_beside_and_keeps_what_it_found() -> None:
    """Its budget is counted, and the rest is the record's again."""
    problem = ppo(make_test_cluster(1, 4), ["batch_size=32"])
    evaluator = Evaluator(space_of(problem))
    budget = Budget(max_evaluations=10**9, deadline_s=time.monotonic() + 600)
    record = Record(evaluator=evaluator, budget=budget)
    start = place_of(evaluator, fastest(evaluator))
    began = threading.Event()

    def look(own: Record) -> Place:
        descend(own, start, random.Random(1))
        began.set()
        return iterate(own, start, random.Random(1))

    def interrupted() -> None:
        with beside(record, 10**8, look):
            assert record.budget.max_evaluations == 9 * 10**8
            assert began.wait(timeout=60)
            assert record.best is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert record.best is not None
    assert 0 < record.evaluations < 10**8
    assert record.budget == budget


def test_no_call_fits_alone() -> None:
    problem = ppo(make_test_cluster(1, 2, memory_bytes=1 << 20), ["batch_size=4"])
    with pytest.raises(InfeasibleError, match=r"role actor does not fit.*too little.*devices"):
        search(problem, model_of(problem))


def test_a_brute_search_refuses_a_large_space() -> None:
    problem = ppo(make_test_cluster(2, 8), ["batch_size=64"])
    with pytest.raises(ConfigError, match=r"--engine brute: .* too many to try all"):
        search(problem, model_of(problem), engine="brute")
    with pytest.raises(
        ConfigError, match=r"'magic'; use auto or mcmc or exact or descent or brute"
    ):
        search(problem, model_of(problem), engine="magic")


@pytest.mark.parametrize(("num_nodes", "devices_per_node"), [(1, 8), (3, 4), (16, 8), (5, 6)])
def test_up_to_16_nodes_every_mesh_is_considered(num_nodes: int, devices_per_node: int) -> None:
    cluster = make_test_cluster(num_nodes, devices_per_node)
    assert list(considered_meshes(cluster)) == list(enumerate_meshes(cluster))


def test_large_clusters_have_a_space_that_does_not_grow() -> None:
    cluster = make_test_cluster(128, 8)
    meshes = list(considered_meshes(cluster))
    assert len({mesh.num_devices for mesh in meshes}) == 3 + 3 + 16
    assert DeviceMesh(0, 1024) in meshes
    assert set(meshes) <= set(enumerate_meshes(cluster))


def test_pruning_keeps_the_best_of_every_layout() -> None:
    """Whatever variant exists, a kept one of its layout is no slower and no larger."""
    problem = ppo(make_test_cluster(1, 4), ["batch_size=24"])
    space = space_of(problem)
    mesh = DeviceMesh(0, 4)
    for call in space.calls:
        for allocation in variants(problem, call, mesh):
            strategy = allocation.strategy
            seconds = space.prices.call(call.name, allocation).seconds
            need = call_memory(problem, call.name, allocation).total
            assert any(
                choice.axes == (strategy.pp, strategy.tp, strategy.dp, strategy.ep)
                and choice.seconds <= seconds
                and call_memory(problem, call.name, option.allocation).total <= need
                for choice in space.choices[call.name][MeshKind(0, 4)]
                for option in [space.option(call.name, mesh, choice)]
            )


@njit
def one_move(t: Tables, number: int, mesh: Ints, row: Ints, state: State) -> bool:
    """``move`` is for kernels only; this is its way from Python."""
    return bool(move(t, number, mesh, row, state))


@pytest.mark.parametrize("name", sorted(MOVES))
def test_moves_make_legal_plans(name: str) -> None:
    """Every move, from anywhere, gives a plan that can run; and it does move."""
    rng, moved = random.Random(1), 0
    evaluator = Evaluator(space_of(ppo(make_test_cluster(2, 4), ["batch_size=24"])))
    mesh, row = evaluator.index.vectors(random_assignment(rng, evaluator.space))
    state = np.array([1], dtype=np.uint64)
    for _ in range(200):
        next_mesh, next_row = mesh.copy(), row.copy()
        if one_move(evaluator.tables, list(MOVES).index(name), next_mesh, next_row, state):
            moved += not (np.array_equal(mesh, next_mesh) and np.array_equal(row, next_row))
            mesh, row = next_mesh, next_row
            validate_plan(evaluator.plan(evaluator.index.assignment(mesh, row)))
    assert moved > 0


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "gpt2-xl", "phi3-medium"])
def test_every_family_is_planned(name: str) -> None:
    """Experts, ungated feed-forwards, and heads that tp does not divide: found, and it fits."""
    problem = ppo(make_cluster("h100", 64), ["batch_size=64"], spec=MODELS[name])
    degrees = {
        way.strategy.ep
        for call in problem.graph.step_calls
        for layout in ways(problem, call, DeviceMesh(0, 64))
        for way in layout
    }
    most = {"mixtral-8x7b": {1, 2, 4, 8}, "qwen1.5-moe-a2.7b": {1, 2, 4}}.get(name, {1})
    assert degrees == most
    result = search(problem, model_of(problem), max_evaluations=200)
    check_memory(result.plan)
    timeline = simulate(result.plan, compile_plan(result.plan), model_of(problem))
    assert result.lower_bound_s <= timeline.step_s * (1 + 1e-9)


@pytest.mark.parametrize("engine", ["auto", "mcmc", "descent", "exact"])
def test_no_time_at_all_still_gives_a_plan_that_fits(engine: str) -> None:
    """The clock is looked at while prices are asked, too; the best baseline is left."""
    problem = ppo(make_test_cluster(2, 4), ["batch_size=24"])
    found = search(problem, model_of(problem), engine=engine, time_limit_s=0.0, gap=0.0)
    check_memory(found.plan)
    assert found.cut_by_time
    assert found.step_s <= min(found.baselines.values()) * (1 + 1e-9)
    assert 0 < found.lower_bound_s <= found.step_s
