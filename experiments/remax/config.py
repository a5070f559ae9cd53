"""Every option of ReMax, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    PassesConfig,
    RewardConfig,
    check_least,
    check_passes,
)
from planner.run_config import ModelConfig, RunConfig


@dataclass
class ReMaxConfig(PassesConfig):
    """ReMax's own numbers. A = reward of the sampled answer - reward of the greedy answer."""

    kl_coef: float = (
        0.1  # beta of the per-token reward -beta * (log p - log p_ref); 0: no reference
    )


@dataclass
class ReMaxExperiment(RunConfig):
    """ReMax: REINFORCE whose baseline is the reward of the greedy answer to the same prompt."""

    output: str = "runs/remax"
    samples_per_prompt: int = 1  # all have one greedy answer as baseline
    remax: ReMaxConfig = field(default_factory=ReMaxConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> ReMaxExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self, 1, "samples_per_prompt")
        check_passes(self, self.remax, where="remax")
        check_least(self.remax, 0, "kl_coef", where="remax")
        return self
