"""GRPO's graph (no torch): PPO's without a critic; without a KL term also without a reference.

prompts -> actor_gen -> sequences -> { rew_inf, ref_inf } -> actor_train
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.grpo.config import GRPOExperiment
from experiments.parts import (
    SAMPLED,
    SAMPLED_KEYS,
    actor_gen,
    averages,
    ref_inf,
    reward_calls,
    train,
    workload_of,
)
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import DataflowGraph
from planner.plan import Workload


def build_graph(config: GRPOExperiment) -> DataflowGraph:
    """Three calls, four with a KL term; a group is a prompt's answers."""
    config.check()
    with_ref = config.grpo.kl_coef > 0
    experience = (*SAMPLED, *(("ref_log_probs",) if with_ref else ()), "rewards")
    references = (ref_inf(),) if with_ref else ()
    return DataflowGraph(
        name="grpo",
        keys=SAMPLED_KEYS,
        source_keys=frozenset({"prompts"}),
        averages=averages(config.grpo),
        calls=(
            actor_gen(),
            *reward_calls(config.reward.source),
            *references,
            train("actor", experience, config.grpo),
        ),
    )


def workload(config: GRPOExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: GRPOExperiment) -> Mapping[str, RoleSpec]:
    """The reward model is ``--critic``'s."""
    return {
        "actor": RoleSpec(source="model", head="lm"),
        "ref": RoleSpec(source="model", head="lm"),
        "reward": RoleSpec(source="critic", head="scalar"),
    }


ALGORITHM = Algorithm(
    name="grpo",
    config_class=GRPOExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.grpo.functions",
)
