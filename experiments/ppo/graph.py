"""PPO's dataflow graph (no torch): six calls, named as users of the prior system know them.

    prompts -> actor_gen -> sequences -> { rew_inf, ref_inf, critic_inf } -> { actor_train,
                                                                               critic_train }

With ``reward.source`` other than ``model``, ``rew_inf`` is a function of the answers' text.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.ppo.config import PPOExperiment
from planner.algorithm import Algorithm, RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall
from planner.plan import Workload

KEYS = (
    DataKey(name="prompts", per="token", dtype="int64", once=True),
    DataKey(name="sequences", per="token", dtype="int64"),
    DataKey(name="prompt_lengths", per="sequence", dtype="int64"),
    DataKey(name="finished", per="sequence"),
    DataKey(name="log_probs", per="token"),
    DataKey(name="ref_log_probs", per="token"),
    DataKey(name="values", per="token"),
    DataKey(name="rewards", per="sequence"),
)


def build_graph(config: PPOExperiment) -> DataflowGraph:
    """The six calls; mini-batches come from ``config.ppo``."""
    config.check()
    sequences = ("sequences", "prompt_lengths")
    experience = (*sequences, "finished", "log_probs", "ref_log_probs", "values", "rewards")
    steps = config.ppo.num_mini_batches
    with_model = config.reward.source == "model"
    return DataflowGraph(
        name="ppo",
        keys=KEYS,
        source_keys=frozenset({"prompts"}),
        calls=(
            ModelFunctionCall(
                name="actor_gen", kind=CallKind.GENERATE, role="actor", inputs=("prompts",),
                outputs=("sequences", "prompt_lengths", "finished", "log_probs"),
            ),
            ModelFunctionCall(
                name="rew_inf", kind=CallKind.INFER if with_model else CallKind.FUNCTION,
                role="reward" if with_model else None, inputs=sequences, outputs=("rewards",),
            ),
            ModelFunctionCall(
                name="ref_inf", kind=CallKind.INFER, role="ref", inputs=sequences,
                outputs=("ref_log_probs",),
            ),
            ModelFunctionCall(
                name="critic_inf", kind=CallKind.INFER, role="critic", inputs=sequences,
                outputs=("values",),
            ),
            ModelFunctionCall(
                name="actor_train", kind=CallKind.TRAIN, role="actor", inputs=experience,
                num_mini_batches=steps,
            ),
            ModelFunctionCall(
                name="critic_train", kind=CallKind.TRAIN, role="critic", inputs=experience,
                num_mini_batches=steps,
            ),
        ),
    )  # fmt: skip


def workload(config: PPOExperiment) -> Workload:
    """The longest prompts and answers that the configuration admits."""
    return Workload(
        batch_size=config.batch_size,
        prompt_tokens=config.prompt_len,
        response_tokens=config.response_len,
        group_size=config.samples_per_prompt,
    )


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
