"""Every option of GRPO, with its default and its meaning; variants are settings of them.

Dr. GRPO   grpo.advantage_std=false grpo.aggregation=constant
DAPO       grpo.clip_high=0.28 grpo.aggregation=token grpo.kl_coef=0 grpo.drop_equal=true
           grpo.overlong_buffer=N (a fifth of response_len in the paper)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    RewardConfig,
    check_above,
    check_choice,
    check_least,
    check_mini_batches,
)
from planner.run_config import ModelConfig, RunConfig

AGGREGATIONS = ("sequence", "token", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass
class GRPOConfig:
    """GRPO's own numbers. A = (reward - mean of the group) / (std of the group)."""

    num_mini_batches: int = 1  # optimizer steps per batch
    advantage_std: bool = True  # divide by the group's standard deviation
    clip: float = 0.2  # policy ratio is clipped to at least 1 - clip
    clip_high: float = 0.0  # and to at most 1 + clip_high; 0: as clip
    kl_coef: float = 0.04  # of KL(pi, ref) in the loss; 0: no reference
    kl_estimator: str = "k3"  # k1, k2 or k3 (Schulman 2020)
    # A loss of tokens is averaged over each answer, then over answers (sequence); over all tokens
    # (token); or summed and divided by answers * response_len (constant).
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
        check_mini_batches(self, self.grpo.num_mini_batches, where="grpo")
        check_above(self.grpo, 0, "clip", where="grpo")
        check_least(self.grpo, 0, "clip_high", "kl_coef", "overlong_buffer", where="grpo")
        check_choice(self.grpo, "kl_estimator", KL_ESTIMATORS, where="grpo")
        check_choice(self.grpo, "aggregation", AGGREGATIONS, where="grpo")
        return self
