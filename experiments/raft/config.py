"""Every option of RAFT, with its default and its meaning."""

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
class RAFTConfig(PassesConfig):
    """RAFT's own numbers: how often training passes over the best answers."""


@dataclass
class RAFTExperiment(RunConfig):
    """RAFT: fine-tuning on the answer of highest reward among several to each prompt."""

    output: str = "runs/raft"
    samples_per_prompt: int = 8
    raft: RAFTConfig = field(default_factory=RAFTConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> RAFTExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self, 2, "samples_per_prompt")
        check_passes(self, self.raft, where="raft")
        return self
