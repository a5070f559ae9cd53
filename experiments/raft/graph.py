"""RAFT's graph (no torch): best of n, then fine-tuning on the best.

    prompts -> actor_gen -> sequences -> rew_inf -> select -> best_sequences -> actor_train

A group has one best answer, so that training costs a n-th of generation's sequences.
Source: Dong et al. 2023 (arXiv:2304.06767), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.parts import (
    MODEL_REWARDS,
    PROMPTS,
    REWARDS,
    SEQUENCES,
    actor_gen,
    reward_calls,
    train,
    workload_of,
)
from experiments.raft.config import RAFTExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload

BEST = (
    DataKey(name="best_sequences", per="token", dtype="int64", once=True),
    DataKey(name="best_prompt_lengths", per="sequence", dtype="int64", once=True),
)


def build_graph(config: RAFTExperiment) -> DataflowGraph:
    """Four calls; ``select`` reads whole groups and passes one sequence of each on."""
    config.check()
    best = ("best_sequences", "best_prompt_lengths")
    return DataflowGraph(
        name="raft",
        keys=(PROMPTS, *SEQUENCES, MODEL_REWARDS, REWARDS, *BEST),
        source_keys=frozenset({"prompts"}),
        calls=(
            actor_gen("sequences", "prompt_lengths"),
            *reward_calls(config.reward.source),
            ModelFunctionCall(
                name="select", kind=CallKind.FUNCTION, role=None,
                inputs=("sequences", "prompt_lengths", "rewards"), outputs=best,
            ),
            train("actor", best, config.raft, prefix="best_"),
        ),
    )  # fmt: skip


def workload(config: RAFTExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: RAFTExperiment) -> Mapping[str, RoleSpec]:
    """The reward model is ``--critic``'s."""
    return {
        "actor": RoleSpec(source="model", head="lm"),
        "reward": RoleSpec(source="critic", head="scalar"),
    }


ALGORITHM = Algorithm(
    name="raft",
    config_class=RAFTExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.raft.functions",
)
