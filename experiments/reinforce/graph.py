"""The graph of REINFORCE++ and RLOO (no torch): as GRPO's.

prompts -> actor_gen -> sequences -> { rew_inf, ref_inf } -> actor_train
"""

from __future__ import annotations

from collections.abc import Mapping

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
from experiments.reinforce.config import ReinforceExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import DataflowGraph
from planner.plan import Workload


def build_graph(config: ReinforceExperiment) -> DataflowGraph:
    """Three calls, four with a KL term; a group is a prompt's answers."""
    config.check()
    with_ref = config.reinforce.kl_coef > 0
    experience = (*SAMPLED, *(("ref_log_probs",) if with_ref else ()), "rewards")
    references = (ref_inf(),) if with_ref else ()
    return DataflowGraph(
        name="reinforce",
        keys=SAMPLED_KEYS,
        source_keys=frozenset({"prompts"}),
        averages=averages(config.reinforce),
        calls=(
            actor_gen(),
            *reward_calls(config.reward.source),
            *references,
            train("actor", experience, config.reinforce),
        ),
    )


def workload(config: ReinforceExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: ReinforceExperiment) -> Mapping[str, RoleSpec]:
    """The reward model is ``--critic``'s."""
    return {
        "actor": RoleSpec(source="model", head="lm"),
        "ref": RoleSpec(source="model", head="lm"),
        "reward": RoleSpec(source="critic", head="scalar"),
    }


ALGORITHM = Algorithm(
    name="reinforce",
    config_class=ReinforceExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.reinforce.functions",
)
