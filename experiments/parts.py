"""Parts that the graphs of several algorithms share: data keys, calls, workloads (no torch)."""

from __future__ import annotations

from planner.graph import CallKind, DataKey, ModelFunctionCall
from planner.plan import Workload
from planner.run_config import RunConfig

PROMPTS = DataKey(name="prompts", per="token", dtype="int64", once=True)
SEQUENCES = (
    DataKey(name="sequences", per="token", dtype="int64"),
    DataKey(name="prompt_lengths", per="sequence", dtype="int64"),
)
FINISHED = DataKey(name="finished", per="sequence")
LOG_PROBS = DataKey(name="log_probs", per="token")
REF_LOG_PROBS = DataKey(name="ref_log_probs", per="token")
REWARDS = DataKey(name="rewards", per="sequence")
SAMPLED = ("sequences", "prompt_lengths", "finished", "log_probs")


def actor_gen(*outputs: str) -> ModelFunctionCall:
    """Answers to the step's prompts; without ``outputs`` all that the engine tells of them."""
    return ModelFunctionCall(
        name="actor_gen", kind=CallKind.GENERATE, role="actor", inputs=("prompts",),
        outputs=outputs or SAMPLED,
    )  # fmt: skip


def rew_inf(source: str, *, prefix: str = "") -> ModelFunctionCall:
    """Rewards of answers, by a model where ``source`` (``reward.source``) says so."""
    with_model = source == "model"
    return ModelFunctionCall(
        name=f"{prefix}rew_inf", kind=CallKind.INFER if with_model else CallKind.FUNCTION,
        role="reward" if with_model else None, prefix=prefix,
        inputs=(f"{prefix}sequences", f"{prefix}prompt_lengths"), outputs=(f"{prefix}rewards",),
    )  # fmt: skip


def ref_inf() -> ModelFunctionCall:
    """The reference's log-probabilities of the answers' tokens."""
    return ModelFunctionCall(
        name="ref_inf", kind=CallKind.INFER, role="ref",
        inputs=("sequences", "prompt_lengths"), outputs=("ref_log_probs",),
    )  # fmt: skip


def workload_of(config: RunConfig, *, group_size: int = 1) -> Workload:
    """The longest prompts and answers that the configuration admits."""
    return Workload(
        batch_size=config.batch_size,
        prompt_tokens=config.prompt_len,
        response_tokens=config.response_len,
        group_size=group_size,
    )
