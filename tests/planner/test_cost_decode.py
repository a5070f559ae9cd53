"""Protects which rows decode when: against a generation that is played turn by turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import CostModel, call_cost
from planner.cost.decode import schedule, spread
from planner.cost.generate import generate_parts
from planner.lengths import lognormal_lengths
from planner.plan import Problem
from profiles.catalogue import MODELS
from profiles.clusters import make_cluster
from profiles.collectives import Collectives
from profiles.roofline import RooflineCosts
from tests.planner.test_cost import PROMPT, RoundCosts, allocate, free_links, ppo


def played(lengths: list[int], num_rows: int) -> tuple[list[list[int]], list[int]]:
    """Turn by turn: answered tokens of every live row, and prompts that enter before each turn."""
    waiting, rows = list(lengths), list[tuple[int, int]]()  # (tokens left, answered)
    turns, entries = [], []
    while waiting or rows:
        entered = 0
        while waiting and len(rows) < num_rows:
            left = waiting.pop(0) - 1
            entered += 1
            if left:
                rows.append((left, 1))
        entries.append(entered)
        turns.append([answered for _, answered in rows])
        rows = [(left - 1, answered + 1) for left, answered in rows if left > 1]
    return [turn for turn in turns if turn], [count for count in entries if count]


lists = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(lists, st.integers(1, 40), st.integers(1, 40))
def test_the_schedule_is_the_generation_played_turn_by_turn(
    lengths: list[int], num_sequences: int, num_rows: int
) -> None:
    found = schedule(tuple(lengths), num_sequences, num_rows)
    turns, entries = played(spread(lengths, num_sequences), num_rows)
    assert sum(s.turns for s in found.stretches) == len(turns)
    assert sum(s.turns * s.rows for s in found.stretches) == pytest.approx(sum(map(len, turns)))
    answered = sum(s.turns * s.rows * s.answered for s in found.stretches)
    assert answered == pytest.approx(sum(map(sum, turns)))
    assert found.entries == Counter(entries)
    assert all(s.rows <= num_rows for s in found.stretches)


@given(lists, st.integers(1, 200))
def test_sequences_have_the_lengths_in_their_proportions(lengths: list[int], count: int) -> None:
    found = Counter(spread(lengths, count))
    for length, times in Counter(lengths).items():
        # The quantiles (i + 0.5) / count that fall into this length's share.
        assert abs(found[length] - times / len(lengths) * count) <= 1
    assert sum(found.values()) == count


CLUSTER = free_links(make_cluster("a100", 8))


def with_lengths(*lengths: int, longest: int = 1024, batch_size: int = 64) -> Problem:
    problem = ppo(CLUSTER)
    workload = replace(
        problem.workload, response_lengths=lengths, response_tokens=longest, batch_size=batch_size
    )
    return replace(problem, workload=workload)


def test_one_length_is_no_distribution() -> None:
    model = CostModel(CLUSTER, RoundCosts(head_s=1.0), Collectives(CLUSTER))
    for batch in (0, 24):
        allocation = replace(allocate(m=2), generation_batch=batch)
        fixed = call_cost(with_lengths(longest=100), "actor_gen", allocation, model)
        for lengths in ((100,), (100, 100, 100)):
            found = call_cost(with_lengths(*lengths, longest=100), "actor_gen", allocation, model)
            assert found == fixed


@pytest.mark.parametrize("batch", [0, 7])
def test_generation_is_the_sum_of_its_turns(batch: int) -> None:
    """Oracle: every turn of the played generation priced by itself; a step costs its context."""
    lengths = (3, 8, 20, 50)
    model = CostModel(CLUSTER, RoundCosts(), Collectives(CLUSTER))
    allocation = replace(allocate(), generation_batch=batch)
    found = call_cost(with_lengths(*lengths), "actor_gen", allocation, model).parts
    turns, _ = played(spread(lengths, 64), batch or 64)
    steps = sum(PROMPT + answered for turn in turns for answered in turn)
    # Rows and contexts of a stretch are whole numbers.
    assert found["decode"] == pytest.approx(4 * steps, rel=0.01)
    assert found["prefill"] == pytest.approx(4 * 64 * PROMPT)


@pytest.mark.parametrize("batch", [0, 32, 128])
def test_few_stretches_are_enough_on_a_real_device(batch: int) -> None:
    """Oracle: 7B on an A100, where a decode step is no straight line, turn by turn."""
    cluster = make_cluster("a100", 8)
    spec, lengths = MODELS["llama-7b"], lognormal_lengths(300, 0.8, 1024)
    workload = replace(
        ppo(cluster).workload, batch_size=256, response_tokens=1024, response_lengths=lengths
    )
    model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    allocation = replace(allocate(), generation_batch=batch)
    found = generate_parts(spec, workload, allocation, model)["decode"].seconds
    turns, _ = played(spread(lengths, 256), batch or 256)
    exact = 0.0
    for turn in turns:
        context = round(PROMPT + sum(turn) / len(turn))
        whole = model.layer_costs.layer(
            spec, "block", "decode", tp=1, size=len(turn), length=context
        ).seconds
        exact += 32 * whole
        exact += model.layer_costs.layer(
            spec, "embedding", "decode", tp=1, size=len(turn), length=context
        ).seconds
        exact += model.layer_costs.layer(
            spec, "head", "decode", tp=1, size=len(turn), length=context
        ).seconds
    assert found == pytest.approx(exact, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.floats(50, 500), st.floats(0.1, 1.2), st.sampled_from([0, 16, 64]), st.integers(2, 3))
def test_shorter_answers_are_never_slower(
    average: float, sigma: float, batch: int, factor: int
) -> None:
    model = CostModel(CLUSTER, RoundCosts(head_s=10.0), Collectives(CLUSTER))
    allocation = replace(allocate(), generation_batch=batch)

    def seconds(mean: float) -> float:
        lengths = lognormal_lengths(mean, sigma, 1024)
        return call_cost(with_lengths(*lengths), "actor_gen", allocation, model).seconds

    assert seconds(average / factor) <= seconds(average)
    longest = call_cost(with_lengths(longest=1024), "actor_gen", allocation, model).seconds
    assert seconds(average) <= longest


def test_training_and_inference_take_the_mean() -> None:
    model = CostModel(CLUSTER, RoundCosts(), Collectives(CLUSTER))
    for call in ("ref_inf", "actor_train"):
        found = call_cost(with_lengths(10, 30, 80), call, allocate(), model).seconds
        mean = call_cost(with_lengths(longest=40), call, allocate(), model).seconds
        assert found == pytest.approx(mean)
