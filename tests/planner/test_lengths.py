"""Protects lengths of prompts and answers: what options make of them, and which are refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ppo.graph import ALGORITHM
from planner.algorithm import make_config, planned_workload
from planner.lengths import MOST_LENGTHS, lognormal_lengths, lognormal_sigma, summary
from planner.plan import ExecutionPlan, Workload
from planner.plan_memory import plan_memory
from planner.plan_schema import plan_from_dict, plan_to_dict
from planner.program import compile_plan
from planner.resolve import make_costs
from planner.simulate import StepPrices, run_program
from profiles.errors import ConfigError, PlanError
from tests.planner.plans import random_plan


@pytest.mark.parametrize("average, p95", [(200, 500), (400, 1000), (100, 380), (300, 400)])
def test_a_lognormal_has_the_mean_and_the_percentile_that_were_asked_for(
    average: float, p95: float
) -> None:
    lengths = lognormal_lengths(average, lognormal_sigma(average, p95), 10**9)
    assert mean(lengths) == pytest.approx(average, rel=0.02)
    below = sum(length <= p95 for length in lengths) / len(lengths)
    assert below == pytest.approx(0.95, abs=1.5 / MOST_LENGTHS)


def test_what_is_longer_than_the_longest_answer_is_cut_off_there() -> None:
    whole, cut = (lognormal_lengths(400, 1.0, longest) for longest in (10**9, 512))
    assert max(cut) == 512 < max(whole)
    assert mean(cut) == pytest.approx(mean(min(n, 512) for n in whole), rel=0.02)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=500))
def test_a_summary_keeps_the_mean(lengths: list[int]) -> None:
    found = summary(lengths)
    assert len(found) <= MOST_LENGTHS
    assert list(found) == sorted(found)
    assert min(lengths) <= found[0] <= found[-1] <= max(lengths)
    if len(lengths) <= MOST_LENGTHS or len(lengths) % MOST_LENGTHS == 0:
        assert mean(found) == pytest.approx(mean(lengths), abs=0.5)


def workload(*overrides: str) -> Workload:
    config = make_config(ALGORITHM.config_class, ["response_len=1024", *overrides])
    return planned_workload(ALGORITHM, config)


def test_a_configuration_gives_its_lengths_to_the_plan() -> None:
    assert workload().response_lengths == ()
    assert workload().expected_response_tokens == 1024
    some = workload("data.response_mean=300", "data.response_p95=700")
    assert some.expected_response_tokens == pytest.approx(300, rel=0.02)
    same = workload("data.response_mean=300", f"data.response_sigma={lognormal_sigma(300, 700)}")
    assert same == some
    seen = workload("data.response_lengths=[30,10,50]")
    assert (seen.response_lengths, seen.expected_response_tokens) == ((10, 30, 50), 30)
    assert seen.max_tokens == workload().max_tokens  # memory stays for the longest


def test_a_configuration_gives_the_mean_of_its_prompts_to_the_plan() -> None:
    assert workload().mean_prompt_tokens is None
    some = workload("prompt_len=64", "data.prompt_mean=45.5")
    assert (some.prompt_tokens, some.expected_prompt_tokens) == (64, 45.5)
    # An algorithm may say it itself, as a user's file does; the option is heard before it.
    own = replace(ALGORITHM, workload=lambda _: replace(some, mean_prompt_tokens=20.0))
    config = make_config(ALGORITHM.config_class)
    assert planned_workload(own, config).mean_prompt_tokens == 20
    config.data.prompt_mean = 30.0
    assert planned_workload(own, config).mean_prompt_tokens == 30


@pytest.mark.parametrize("seed", range(6))
def test_prompts_are_priced_at_their_mean_and_held_at_their_longest(seed: int) -> None:
    """Oracles: all prompts as long as the mean; all as long as the longest."""
    plan = random_plan(random.Random(seed))

    def with_prompts(longest: int, mean: float | None = None) -> ExecutionPlan:
        known = replace(
            plan.problem.workload, prompt_tokens=longest, mean_prompt_tokens=mean, group_size=3
        )
        return replace(plan, problem=replace(plan.problem, workload=known))

    def step_s(plan: ExecutionPlan) -> float:
        prices = StepPrices(plan.problem, make_costs(plan.problem.cluster, None))
        return run_program(plan, compile_plan(plan), prices).step_s

    unlike, mean_ones, longest_ones = (
        with_prompts(640, 80), with_prompts(80), with_prompts(640)
    )  # fmt: skip
    assert step_s(unlike) == pytest.approx(step_s(mean_ones), rel=1e-12)
    assert step_s(unlike) < step_s(longest_ones)
    assert plan_memory(unlike) == plan_memory(longest_ones) != plan_memory(mean_ones)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["data.response_mean=300"], "data.response_p95: a lognormal distribution needs its 95th"),
        (["data.response_p95=300"], "data.response_mean: a distribution needs its mean"),
        (["data.response_mean=300", "data.response_p95=200"], "200 is not above the mean of 300"),
        (["data.response_mean=300", "data.response_p95=1200"], "at most 3.87 times it"),
        (["data.response_mean=2000", "data.response_sigma=1"], "not from 1 to the longest answer"),
        (["data.response_mean=-1"], "data.response_mean: -1.0 is below 0"),
        (["data.response_lengths=[5,1025]"], "data.response_lengths: 1025 is not from 1 to"),
        (["data.response_lengths=[5]", "data.response_mean=3"], "give one of them"),
        (
            ["prompt_len=32", "data.prompt_mean=33"],
            "33 is not from 1 to the longest prompt, 32; lower it or raise prompt_len",
        ),
        (["data.prompt_mean=0.5"], "data.prompt_mean: 0.5 is not from 1 to the longest prompt"),
        (["data.prompt_mean=-1"], "data.prompt_mean: -1.0 is below 0"),
        (["data.prompt_mean=inf"], "data.prompt_mean: inf is no number of tokens"),
        (["data.prompt_mean=many"], "override 'data.prompt_mean=many': Value 'many'"),
    ],
)
def test_lengths_that_cannot_be_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        workload(*overrides)


def test_a_plans_file_keeps_its_lengths() -> None:
    plan = random_plan(random.Random(1))
    known = replace(plan.problem.workload, response_lengths=(1, 2, 2), mean_prompt_tokens=12.25)
    plan = replace(plan, problem=replace(plan.problem, workload=known))
    again = plan_from_dict(json.loads(json.dumps(plan_to_dict(plan))))
    assert again.problem.workload == known


def test_a_plan_refuses_an_answer_longer_than_the_longest() -> None:
    with pytest.raises(PlanError, match=r"workload\.response_lengths: 9 is not from 1 to"):
        Workload(batch_size=1, prompt_tokens=1, response_tokens=8, response_lengths=(3, 9))


@given(st.integers(1, 500), st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_the_length_that_a_token_sees(prompt: int, lengths: list[int]) -> None:
    """Oracle: the sum of squares of all sequences, by the sum of their tokens."""
    found = Workload(
        batch_size=1, prompt_tokens=prompt, response_tokens=900, response_lengths=tuple(lengths)
    )
    tokens = [prompt + length for length in lengths]
    assert found.attended_tokens == pytest.approx(sum(t * t for t in tokens) / sum(tokens))
    assert found.attended_tokens >= found.expected_tokens * (1 - 1e-12)
    assert math.isclose(found.expected_tokens, mean(tokens))
