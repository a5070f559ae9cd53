"""Every option of REINFORCE++ and RLOO, with its default and its meaning.

REINFORCE++             reinforce.baseline=batch samples_per_prompt=1
REINFORCE++-baseline    reinforce.baseline=group
RLOO                    reinforce.baseline=leave_one_out
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    PolicyConfig,
    RewardConfig,
    check_choice,
    check_least,
    check_policy,
    check_share,
)
from planner.run_config import ModelConfig, RunConfig

BASELINES = ("batch", "group", "leave_one_out")


@dataclass
class ReinforceConfig(PolicyConfig):
    """REINFORCE's own numbers; ``PolicyConfig`` has those of its loss."""

    # Rewards are compared with the mean over the batch (batch), over the prompt's answers (group),
    # or over the prompt's other answers (leave_one_out).
    baseline: str = "batch"
    kl_coef: float = 0.01  # beta of KL(pi, ref); 0: no reference
    gamma: float = 1.0  # discount


@dataclass
class ReinforceExperiment(RunConfig):
    """REINFORCE without a critic."""

    output: str = "runs/reinforce"
    samples_per_prompt: int = 4
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> ReinforceExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_choice(self.reinforce, "baseline", BASELINES, where="reinforce")
        check_least(self, 1 if self.reinforce.baseline == "batch" else 2, "samples_per_prompt")
        check_policy(self, self.reinforce, where="reinforce")
        check_share(self.reinforce, "gamma", where="reinforce")
        return self
