"""Protects what groups of sequences mean to the planner: they are dealt whole, and they cost what
their sequences cost, but for what these share (``test_sharing.py``)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.cost import CostModel, call_cost
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.memory import call_memory
from planner.mesh import DeviceMesh
from planner.plan import Allocation, Problem, allocation_problem
from planner.simulate import sample_bytes
from planner.strategy import ParallelStrategy
from profiles.collectives import Collectives
from profiles.errors import PlanError
from profiles.roofline import RooflineCosts
from tests.planner.plans import make_test_cluster, ppo

CALLS = ("actor_gen", "rew_inf", "critic_inf", "actor_train")


def problem(batch_size: int, group_size: int, prompt: int = 16) -> Problem:
    overrides = [f"batch_size={batch_size}", f"samples_per_prompt={group_size}"]
    return ppo(
        make_test_cluster(1, 4), [*overrides, "ppo.num_mini_batches=2", f"prompt_len={prompt}"]
    )


@pytest.mark.parametrize("prompt, shares", [(16, True), (15, False)])
@pytest.mark.parametrize("call", CALLS)
def test_groups_cost_what_as_many_single_sequences_cost(
    call: str, prompt: int, shares: bool
) -> None:
    """Or less: a prompt is read once for all of its answers, where it is worth while."""
    cluster = make_test_cluster(1, 4)
    model = CostModel(cluster, RooflineCosts(cluster.device), Collectives(cluster))
    allocation = Allocation(
        mesh=DeviceMesh(0, 4), strategy=ParallelStrategy(dp=2, pp=2), num_micro_batches=2
    )
    groups, singles, fewer = problem(8, 3, prompt), problem(24, 1, prompt), problem(8, 1, prompt)
    cost, apart, few = (call_cost(p, call, allocation, model) for p in (groups, singles, fewer))
    need, need_apart, need_few = (
        call_memory(p, call, allocation) for p in (groups, singles, fewer)
    )
    assert cost.seconds > few.seconds
    assert need.total > need_few.total
    if call == "actor_gen":
        assert cost.parts["decode"] == pytest.approx(apart.parts["decode"])
        assert few.parts["prefill"] <= cost.parts["prefill"] < apart.parts["prefill"]
        assert need_few.total < need.total <= need_apart.total
    elif shares:
        assert cost.seconds < apart.seconds
        assert need.total < need_apart.total
    else:
        assert cost.seconds == pytest.approx(apart.seconds)
        assert need == need_apart


def test_a_group_is_never_split() -> None:
    """Three prompts on four ranks cannot run, however many answers each has."""
    strategy = ParallelStrategy(dp=4)
    reason = allocation_problem(
        problem(6, 4), "actor_train", Allocation(mesh=DeviceMesh(0, 4), strategy=strategy)
    )
    assert reason == "dp 4 exceeds the 3 groups of a mini-batch"


def test_bytes_of_a_group_count_what_it_has_once_once() -> None:
    keys = ("sequences", "rewards", "baseline")
    groups, singles = (_with_baseline(size) for size in (3, 1))
    tokens = singles.workload.expected_tokens
    assert sample_bytes(singles, keys) == 8 * tokens + 4 + 4
    assert sample_bytes(groups, keys) == 3 * (8 * tokens + 4) + 4


def _with_baseline(group_size: int) -> Problem:
    base = problem(8, group_size)
    baseline = DataKey(name="baseline", per="sequence", once=True)
    return replace(base, graph=replace(base.graph, keys=(*base.graph.keys, baseline)))


def test_a_call_sees_one_sequence_of_a_group_where_all_its_keys_are_once() -> None:
    once = DataKey(name="best", per="token", once=True)
    each = DataKey(name="rewards", per="sequence")
    tokens = DataKey(name="sequences", per="token")
    select = ModelFunctionCall(
        name="select", kind=CallKind.FUNCTION, role=None, inputs=("sequences",), outputs=("best",)
    )
    train = ModelFunctionCall(name="train", kind=CallKind.TRAIN, role="a", inputs=("best",))
    graph = DataflowGraph(
        name="g", calls=(select, train), keys=(once, each, tokens),
        source_keys=frozenset({"sequences"}),
    )  # fmt: skip
    assert graph.sequences_per_group(select, 5) == 5
    assert graph.sequences_per_group(train, 5) == 1
    mixed = ModelFunctionCall(
        name="mixed", kind=CallKind.TRAIN, role="a", inputs=("best", "sequences")
    )
    with pytest.raises(PlanError, match=r"graph\.mixed\.inputs: reads tokens that"):
        DataflowGraph(
            name="g", calls=(select, mixed), keys=graph.keys, source_keys=graph.source_keys
        )
