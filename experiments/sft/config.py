"""Every option of supervised fine-tuning, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.run_config import ModelConfig, RunConfig


@dataclass
class SFTExperiment(RunConfig):
    """Fine-tuning of one model on answers; a step is one optimizer step on ``batch_size`` of them.

    Lines of the data are ``{"prompt": "…", "answer": "…"}`` or ``{"messages": […]}``.
    """

    output: str = "runs/sft"
    actor: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> SFTExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        return self
