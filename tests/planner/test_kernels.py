"""Protects the compiled evaluator: it says what the simulator and the memory model say.

Random plans of every algorithm's graph on several clusters; the oracles run the whole program.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.cost import lanes
from planner.memory import RESERVE_BYTES
from planner.plan import Problem
from planner.plan_memory import plan_memory
from planner.program import compile_plan
from planner.search import boxes, chain, kernels, search
from planner.search.evaluate import Evaluator
from planner.search.kernels import slot
from planner.search.prices import empty_prices, grown, put
from planner.search.records import NO_KEY
from planner.search.warm import warm_up
from planner.simulate import run_program
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from tests.planner.plans import SPEC, make_test_cluster, ppo
from tests.planner.test_algorithms import CALLS
from tests.planner.test_search import give_memory, model_of, random_assignment, space_of


def problem_of(algorithm: str, rng: random.Random) -> Problem:
    """``algorithm``: a name and overrides; a cluster of any shape, keys and values of any."""
    name, *overrides = algorithm.split()
    cluster = make_test_cluster(*rng.choice([(1, 1), (1, 4), (2, 2), (2, 4), (3, 2), (4, 1)]))
    spec = replace(SPEC, num_kv_heads=rng.choice([1, 2, 4]), num_layers=rng.choice([2, 3, 5]))
    if rng.random() < 0.5:  # calls may work on the same samples and split their experts unlike
        spec = replace(spec, num_experts=4, experts_per_token=2)
    found = find_algorithm(name)
    overrides += [f"batch_size={rng.choice([12, 24])}", "prompt_len=16", "response_len=16"]
    config = make_config(found.config_class, overrides)
    return make_problem(found, config, model=spec, critic=spec, cluster=cluster)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", sorted(CALLS))
def test_the_evaluator_agrees_with_the_simulator_and_the_memory_model(
    algorithm: str, seed: int
) -> None:
    """step_s to 1e-9 and the fullest device to the byte, of ten random plans each."""
    rng = random.Random(seed)
    space = space_of(problem_of(algorithm, rng))
    evaluator = Evaluator(space)
    had = RESERVE_BYTES["cpu"] + rng.choice([50, 200, 1000]) * 1024  # many do not fit
    give_memory(evaluator, float(had))
    for _ in range(10):
        assignment = random_assignment(rng, space)
        plan = evaluator.plan(assignment)
        score = evaluator.score(assignment)
        expected_s = run_program(plan, compile_plan(plan), space.prices, num_steps=1).step_s
        assert score.step_s == pytest.approx(expected_s, rel=1e-9)
        fullest = max(need.total for need in plan_memory(plan, kept=frozenset()).values())
        assert score.overshoot == pytest.approx(max(0.0, fullest / had - 1.0), rel=1e-12)


def test_an_average_in_fp32_takes_its_memory() -> None:
    """On GPUs, where weights are bf16: the reference has four bytes more of each value."""
    rng = random.Random(1)
    cluster = make_cluster("h100", 16)
    space = space_of(ppo(cluster, ["ppo.ref_average=0.1"], spec=MODELS["llama-7b"]))
    evaluator = Evaluator(space)
    give_memory(evaluator, 20e9)
    for _ in range(20):
        assignment = random_assignment(rng, space)
        fullest = max(
            n.total for n in plan_memory(evaluator.plan(assignment), kept=frozenset()).values()
        )
        expected = max(0.0, fullest / 20e9 - 1.0)
        assert evaluator.overshoot(assignment) == pytest.approx(expected, rel=1e-12)


def test_many_at_once_are_scored_as_one_by_one() -> None:
    rng = random.Random(1)
    evaluator = Evaluator(space_of(ppo(make_test_cluster(2, 4), ["batch_size=24"])))
    assignments = [random_assignment(rng, evaluator.space) for _ in range(50)]
    alone = [evaluator.score(assignment) for assignment in assignments]
    vectors = [evaluator.index.vectors(assignment) for assignment in assignments]
    mesh, row = (np.stack(column) for column in zip(*vectors, strict=True))
    together = evaluator.score_many(mesh, row)
    assert together.tolist() == [[score.step_s, score.overshoot] for score in alone]


def test_prices_are_found_again_when_the_table_has_grown() -> None:
    """Against a dict: 3,000 keys, many of which meet in one place."""
    rng = random.Random(1)
    wanted = {rng.randrange(1 << rng.choice([8, 20, 45])): rng.random() for _ in range(3000)}
    table = empty_prices(16)
    for count, (key, seconds) in enumerate(wanted.items()):
        if 2 * count >= len(table.keys):
            table = grown(table)
        put(table, key, seconds)
    found = {key: table.seconds[slot(table.keys, key)] for key in wanted}
    assert found == wanted
    assert table.keys[slot(table.keys, 1 << 50)] == NO_KEY


def test_what_is_compiled_in_advance_is_what_a_search_calls() -> None:
    """Another type of one argument would compile a kernel again, in the user's time."""
    warm_up().join()
    problem = ppo(make_test_cluster(1, 4), ["batch_size=8"])
    for engine in ("auto", "descent"):
        search(problem, model_of(problem), engine=engine, gap=0.0, max_evaluations=3000)
    called = (kernels.evaluate, chain.run_chain, chain.scan_call, lanes._cross_all, kernels.slot,
              boxes.bound_s, boxes.branch)  # fmt: skip
    for kernel in called:
        assert len(kernel.signatures) == 1, kernel


@pytest.mark.slow
def test_it_is_known_beforehand_whether_a_search_must_compile(tmp_path: Path) -> None:
    """In an empty cache the command says so on stderr, in the one beside it it does not."""
    small = ["batch_size=4", "ppo.num_mini_batches=1"]
    words = ["search", "--model", "tiny", "--gpus", "1", "--time-limit", "1", *small]
    command = [sys.executable, "-m", "planner.cli", *words, "-o", str(tmp_path / "plan.json")]
    told = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600
        )
        assert found.returncode == 0, found.stderr
        told.append("compiling the search's kernels" in found.stderr)
    assert told == [True, False]
