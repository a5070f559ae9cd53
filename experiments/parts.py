"""Parts that the graphs of several algorithms share: data keys, calls, workloads (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from experiments.options import PassesConfig, PolicyConfig, RewardConfig
from planner.algorithm import RoleSpec
from planner.graph import CallKind, DataflowGraph, DataKey, ModelFunctionCall, ParameterAverage
from planner.plan import Workload
from planner.run_config import RunConfig


class SampledConfig(Protocol):
    """What a configuration of an algorithm on rewarded answers has."""

    reward: RewardConfig


PROMPTS = DataKey(name="prompts", per="token", dtype="int64", once=True)
SEQUENCES = (
    DataKey(name="sequences", per="token", dtype="int64"),
    DataKey(name="prompt_lengths", per="sequence", dtype="int64"),
)
FINISHED = DataKey(name="finished", per="sequence")
LOG_PROBS = DataKey(name="log_probs", per="token")
REF_LOG_PROBS = DataKey(name="ref_log_probs", per="token")
REWARDS = DataKey(name="rewards", per="sequence")
MODEL_REWARDS = DataKey(name="model_rewards", per="sequence")  # where functions add to a model's
SAMPLED = ("sequences", "prompt_lengths", "finished", "log_probs")
# What algorithms on sampled answers exchange.
SAMPLED_KEYS = (PROMPTS, *SEQUENCES, FINISHED, LOG_PROBS, REF_LOG_PROBS, MODEL_REWARDS, REWARDS)


def split_source(source: str) -> tuple[bool, tuple[str, ...]]:
    """(is there a reward model, names of reward functions) in ``reward.source``.

    >>> split_source("model"), split_source("model+vader"), split_source("a.b:f")
    ((True, ()), (True, ('vader',)), (False, ('a.b:f',)))
    """
    names = source.split("+")
    return "model" in names, tuple(name for name in names if name != "model")


def actor_gen(*outputs: str) -> ModelFunctionCall:
    """Answers to the step's prompts; without ``outputs`` all that the engine tells of them."""
    return ModelFunctionCall(
        name="actor_gen", kind=CallKind.GENERATE, role="actor", inputs=("prompts",),
        outputs=outputs or SAMPLED,
    )  # fmt: skip


def reward_calls(source: str, *, prefix: str = "") -> tuple[ModelFunctionCall, ...]:
    """Rewards of answers: by a model, by functions, or by a model to which functions add."""
    with_model, functions = split_source(source)
    inputs = (f"{prefix}sequences", f"{prefix}prompt_lengths")
    rewards, scores = f"{prefix}rewards", f"{prefix}model_rewards"
    if not with_model or not functions:
        call = ModelFunctionCall(
            name=f"{prefix}rew_inf", kind=CallKind.INFER if with_model else CallKind.FUNCTION,
            role="reward" if with_model else None, prefix=prefix, inputs=inputs,
            outputs=(rewards,),
        )  # fmt: skip
        return (call,)
    return (
        ModelFunctionCall(
            name=f"{prefix}rew_inf", kind=CallKind.INFER, role="reward", prefix=prefix,
            inputs=inputs, outputs=(scores,),
        ),
        ModelFunctionCall(
            name=f"{prefix}rew_fn", kind=CallKind.FUNCTION, role=None, prefix=prefix,
            inputs=(*inputs, scores), outputs=(rewards,),
        ),
    )  # fmt: skip


def ref_inf() -> ModelFunctionCall:
    """The reference's log-probabilities of the answers' tokens."""
    return ModelFunctionCall(
        name="ref_inf", kind=CallKind.INFER, role="ref",
        inputs=("sequences", "prompt_lengths"), outputs=("ref_log_probs",),
    )  # fmt: skip


def train(
    role: str, inputs: tuple[str, ...], passes: PassesConfig, *, prefix: str = ""
) -> ModelFunctionCall:
    """``actor_train`` or ``critic_train`` with its passes over the batch."""
    return ModelFunctionCall(
        name=f"{role}_train", kind=CallKind.TRAIN, role=role, inputs=inputs, prefix=prefix,
        num_mini_batches=passes.num_mini_batches, num_epochs=passes.num_epochs,
    )  # fmt: skip


def averages(policy: PolicyConfig) -> tuple[ParameterAverage, ...]:
    """The reference follows the actor, where ``ref_average`` says so."""
    if not policy.ref_average:
        return ()
    return (ParameterAverage(role="ref", of="actor", rate=policy.ref_average),)


def graph_without_critic(name: str, config: SampledConfig, policy: PolicyConfig) -> DataflowGraph:
    """PPO's graph without a critic, and without a reference where no KL term asks for it.

    prompts -> actor_gen -> sequences -> { rew_inf, ref_inf } -> actor_train
    """
    with_ref = policy.kl_coef > 0
    experience = (*SAMPLED, *(("ref_log_probs",) if with_ref else ()), "rewards")
    return DataflowGraph(
        name=name,
        keys=SAMPLED_KEYS,
        source_keys=frozenset({"prompts"}),
        averages=averages(policy),
        calls=(
            actor_gen(),
            *reward_calls(config.reward.source),
            *((ref_inf(),) if with_ref else ()),
            train("actor", experience, policy),
        ),
    )


# The reward model is ``--critic``'s.
ROLES_WITHOUT_CRITIC: Mapping[str, RoleSpec] = {
    "actor": RoleSpec(source="model", head="lm"),
    "ref": RoleSpec(source="model", head="lm"),
    "reward": RoleSpec(source="critic", head="scalar"),
}


def workload_of(config: RunConfig, *, group_size: int = 1) -> Workload:
    """The longest prompts and answers that the configuration admits."""
    return Workload(
        batch_size=config.batch_size,
        prompt_tokens=config.prompt_len,
        response_tokens=config.response_len,
        group_size=group_size,
    )
