"""PPO's dataflow graph (no torch): six calls, named as users of the prior system know them.

    prompts -> actor_gen -> sequences -> { rew_inf, ref_inf, critic_inf } -> { actor_train,
                                                                               critic_train }

With ``reward.source`` other than ``model``, ``rew_inf`` is a function of the answers' text; with
``model+NAME`` a call ``rew_fn`` adds one to the model's score. Without a KL term there is no
reference.
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
from experiments.ppo.config import PPOExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload

VALUES = DataKey(name="values", per="token")


def build_graph(config: PPOExperiment) -> DataflowGraph:
    """The six calls; passes over the batch come from ``config.ppo``."""
    config.check()
    with_ref = config.ppo.kl_coef > 0
    experience = (*SAMPLED, *(("ref_log_probs",) if with_ref else ()), "values", "rewards")
    critic_inf = ModelFunctionCall(
        name="critic_inf", kind=CallKind.INFER, role="critic",
        inputs=("sequences", "prompt_lengths"), outputs=("values",),
    )  # fmt: skip
    return DataflowGraph(
        name="ppo",
        keys=(*SAMPLED_KEYS, VALUES),
        source_keys=frozenset({"prompts"}),
        averages=averages(config.ppo),
        calls=(
            actor_gen(),
            *reward_calls(config.reward.source),
            *((ref_inf(),) if with_ref else ()),
            critic_inf,
            train("actor", experience, config.ppo),
            train("critic", experience, config.ppo),
        ),
    )


def workload(config: PPOExperiment) -> Workload:
    return workload_of(config, group_size=config.samples_per_prompt)


def roles(config: PPOExperiment) -> Mapping[str, RoleSpec]:
    """Actor and reference are language models; critic and reward end in a scalar head."""
    return {
        "actor": RoleSpec(source="model", head="lm"),
        "ref": RoleSpec(source="model", head="lm"),
        "critic": RoleSpec(source="critic", head="scalar"),
        "reward": RoleSpec(source="critic", head="scalar"),
    }


ALGORITHM = Algorithm(
    name="ppo",
    config_class=PPOExperiment,
    graph=build_graph,
    workload=workload,
    roles=roles,
    functions="experiments.ppo.functions",
)
