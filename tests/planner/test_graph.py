"""Protects the dataflow graph: what it refuses, who depends on whom, PPO's six calls."""

from __future__ import annotations

from typing import Any

import pytest

from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from profiles.errors import PlanError
from tests.planner.plans import make_test_cluster, ppo

KEYS = tuple(DataKey(name=name, per="token") for name in ("prompts", "a", "b"))


def call(name: str, kind: CallKind, role: str | None, **more: Any) -> ModelFunctionCall:
    return ModelFunctionCall(name=name, kind=kind, role=role, **more)


GEN = call("gen", CallKind.GENERATE, "actor", inputs=("prompts",), outputs=("a",))
TRAIN = call("train", CallKind.TRAIN, "actor", inputs=("a",))


def graph(*calls: ModelFunctionCall) -> DataflowGraph:
    return DataflowGraph(name="g", calls=calls, keys=KEYS, source_keys=frozenset({"prompts"}))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((), "needs calls with distinct names"),
        ((GEN, GEN), "needs calls with distinct names"),
        ((TRAIN, GEN), "graph.train.inputs: nothing before it produces 'a'; produced so far"),
        ((GEN, call("x", CallKind.INFER, "ref", outputs=("a",))), "'a' is produced twice"),
        ((GEN, call("x", CallKind.INFER, "ref", outputs=("z",))), "'z' is not a declared key"),
        ((GEN, TRAIN, call("x", CallKind.TRAIN, "actor")), "a role is trained by two calls"),
        ((call("f", CallKind.FUNCTION, "actor"),), "a FUNCTION call has no role"),
        ((call("f", CallKind.INFER, None),), "every other call has one"),
        ((call("t", CallKind.TRAIN, "actor", num_mini_batches=0),), "must be at least 1"),
    ],
)
def test_what_is_no_graph_is_refused(calls: tuple[ModelFunctionCall, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        graph(*calls)


def test_training_follows_the_other_calls_of_its_role() -> None:
    """Even one whose data it does not read: it changes the weights that the other reads."""
    score = call("score", CallKind.INFER, "actor", inputs=("a",), outputs=("b",))
    assert graph(GEN, score, TRAIN).predecessors(TRAIN) == (GEN, score)


def test_ppo_has_the_edges_of_its_picture() -> None:
    found = ppo(make_test_cluster(1, 1)).graph.to_networkx()
    now = {(a, b) for a, b, data in found.edges(data=True) if not data["next_step"]}
    later = {(a, b) for a, b, data in found.edges(data=True) if data["next_step"]}
    inferences, trains = ("rew_inf", "ref_inf", "critic_inf"), ("actor_train", "critic_train")
    assert now == (
        {("actor_gen", other) for other in (*inferences, *trains)}
        | {(inference, train) for inference in inferences for train in trains}
    )
    assert later == {("actor_train", "actor_gen"), ("critic_train", "critic_inf")}


def test_a_reward_function_has_no_role() -> None:
    problem = ppo(make_test_cluster(1, 1), ["reward.source=vader"])
    assert problem.graph.call("rew_inf").kind is CallKind.FUNCTION
    assert problem.graph.roles == ("actor", "ref", "critic")
    assert problem.spec_of("rew_inf") is None
