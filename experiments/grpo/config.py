"""Every option of GRPO, with its default and its meaning; variants are settings of them.

Dr. GRPO   grpo.advantage_std=false grpo.aggregation=constant
DAPO       grpo.clip_high=0.28 grpo.aggregation=token grpo.kl_coef=0 grpo.drop_equal=true
           grpo.overlong_buffer=N (a fifth of response_len in the paper)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    PolicyConfig,
    RewardConfig,
    check_least,
    check_policy,
)
from planner.run_config import ModelConfig, RunConfig


@dataclass
class GRPOConfig(PolicyConfig):
    """GRPO's own numbers. A = (reward - mean of the group) / (std of the group)."""

    advantage_std: bool = True  # divide by the group's standard deviation
    kl_coef: float = 0.04  # of KL(pi, ref); 0: no reference
    kl_in: str = "loss"
    kl_estimator: str = "k3"
    aggregation: str = "sequence"
    drop_equal: bool = False  # leave groups out of the loss whose rewards are all equal
    # Truncated answers: left out of the loss; and the last tokens before response_len over which
    # an answer's reward falls by up to 1 (0: it does not).
    mask_truncated: bool = False
    overlong_buffer: int = 0


@dataclass
class GRPOExperiment(RunConfig):
    """GRPO: no critic; an answer is compared with the others to its prompt."""

    output: str = "runs/grpo"
    samples_per_prompt: int = 8
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> GRPOExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self, 2, "samples_per_prompt")
        check_policy(self, self.grpo, where="grpo")
        check_least(self.grpo, 0, "overlong_buffer", where="grpo")
        return self
