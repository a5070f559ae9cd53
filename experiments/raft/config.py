"""Every option of RAFT, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import (
    GenerationConfig,
    RewardConfig,
    check_least,
    check_mini_batches,
)
from planner.run_config import ModelConfig, RunConfig


@dataclass
class RAFTConfig:
    """RAFT's own numbers."""

    num_mini_batches: int = 1  # optimizer steps per batch


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
        check_mini_batches(self, self.raft.num_mini_batches, where="raft")
        return self
