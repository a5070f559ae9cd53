"""Every option of PPO, with its default and its meaning; the defaults are the prior system's.

Shown and set as ``key=value`` behind the flags of ``realplan search`` and ``realexec run``:
``batch_size=256 ppo.kl_coef=0.05 actor.path=models/sft``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    PolicyConfig,
    RewardConfig,
    check_above,
    check_least,
    check_policy,
    check_share,
)
from planner.run_config import ModelConfig, RunConfig


@dataclass
class PPOConfig(PolicyConfig):
    """PPO's own numbers; ``PolicyConfig`` has those of its actor's loss."""

    num_mini_batches: int = 4  # optimizer steps of a pass over the batch
    gamma: float = 1.0  # discount
    lam: float = 1.0  # lambda of GAE
    value_clip: float = 0.2  # new values are clipped to the old ones +- value_clip
    reward_clip: float = 20.0  # scores are clipped to +- reward_clip
    reward_scale: float = 1.0  # score = (reward - reward_bias) * reward_scale
    reward_bias: float = 0.0
    # Rewards less the mean of all so far, over their standard deviation; before scale and clip.
    normalize_rewards: bool = False
    normalize_advantages: bool = True  # over all answer tokens of the batch
    # The critic learns returns in units of the moments of all so far.
    normalize_values: bool = False
    score_truncated: bool = True  # false: an answer without an end token gets no score


@dataclass
class PPOExperiment(RunConfig):
    """PPO with four models: actor, critic, reference and reward."""

    output: str = "runs/ppo"
    samples_per_prompt: int = 1  # answers to each prompt; a step has batch_size times as many
    ppo: PPOConfig = field(default_factory=PPOConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    critic: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> PPOExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self, 1, "samples_per_prompt")
        check_policy(self, self.ppo, where="ppo")
        check_share(self.ppo, "gamma", "lam", where="ppo")
        check_above(self.ppo, 0, "value_clip", "reward_clip", where="ppo")
        return self
