"""Every option of reward modelling, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import check_least
from planner.run_config import ModelConfig, RunConfig


@dataclass
class BradleyTerryConfig:
    """The loss of a pair: -log sigmoid(score of chosen - score of rejected - margin)."""

    margin: float = 0.0
    center_coef: float = 0.0  # times (score of chosen + score of rejected)^2: keeps scores near 0


@dataclass
class RewardExperiment(RunConfig):
    """A scalar head trained on pairs; ``batch_size`` counts pairs.

    Lines of the data are ``{"prompt", "pos_answers": […], "neg_answers": […]}`` or
    ``{"prompt", "chosen", "rejected"}``.
    """

    output: str = "runs/reward"
    pairs: BradleyTerryConfig = field(default_factory=BradleyTerryConfig)
    reward: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> RewardExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_least(self.pairs, 0, "center_coef", where="pairs")
        return self
