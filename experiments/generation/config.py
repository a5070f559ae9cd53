"""Every option of batch inference, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import GenerationConfig, check_least
from planner.run_config import ModelConfig, RunConfig


@dataclass
class GenerationExperiment(RunConfig):
    """Answers to the prompts of a file, written to ``<output>/answers``; nothing is trained."""

    output: str = "runs/generation"
    samples_per_prompt: int = 1
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> GenerationExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self, 1, "samples_per_prompt")
        return self
