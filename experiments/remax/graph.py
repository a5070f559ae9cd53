"""ReMax's graph (no torch): two generations of one actor.

    prompts -> actor_gen  -> sequences        -> { rew_inf, ref_inf } -> actor_train
            -> greedy_gen -> greedy_sequences ->   greedy_rew_inf     ->

Keys of the greedy answers start with ``greedy_``; a group has one of them.
Source: Li et al. 2023 (arXiv:2310.10505), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.parts import (
    SAMPLED,
    SAMPLED_KEYS,
    actor_gen,
    ref_inf,
    reward_calls,
    train,
    workload_of,
)
from experiments.remax.config import ReMaxExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload

GREEDY = (
    DataKey(name="greedy_sequences", per="token", dtype="int64", once=True),
    DataKey(name="greedy_prompt_lengths", per="sequence", dtype="int64", once=True),
    DataKey(name="greedy_model_rewards", per="sequence", once=True),
    DataKey(name="greedy_rewards", per="sequence", once=True),
)


def build_graph(config: ReMaxExperiment) -> DataflowGraph:
    """Five calls, six with a KL term."""
    config.check()
    with_ref = config.remax.kl_coef > 0
    greedy_gen = ModelFunctionCall(
        name="greedy_gen", kind=CallKind.GENERATE, role="actor", prefix="greedy_",
        inputs=("prompts",), outputs=("greedy_sequences", "greedy_prompt_lengths"),
    )  # fmt: skip
    experience = (*SAMPLED, *(("ref_log_probs",) if with_ref else ()), "rewards", "greedy_rewards")
    source, references = config.reward.source, (ref_inf(),) if with_ref else ()
    return DataflowGraph(
        name="remax",
        keys=(*SAMPLED_KEYS, *GREEDY),
        source_keys=frozenset({"prompts"}),
        calls=(
            actor_gen(), greedy_gen, *reward_calls(source),
            *reward_calls(source, prefix="greedy_"), *references,
            train("actor", experience, config.remax),
        ),
    )  # fmt: skip


def workload(config: ReMaxExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: ReMaxExperiment) -> Mapping[str, RoleSpec]:
    """The reward model is ``--critic``'s."""
    return {
        "actor": RoleSpec(source="model", head="lm"),
        "ref": RoleSpec(source="model", head="lm"),
        "reward": RoleSpec(source="critic", head="scalar"),
    }


ALGORITHM = Algorithm(
    name="remax",
    config_class=ReMaxExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.remax.functions",
)
