"""Every option of DPO, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.options import check_above, check_choice
from planner.run_config import ModelConfig, RunConfig
from profiles.errors import ConfigError


@dataclass
class DPOConfig:
    """DPO's own numbers; h is (log pi/ref of the chosen answer) - (that of the rejected one)."""

    beta: float = 0.1  # strength of the pull towards the reference
    loss: str = "sigmoid"  # sigmoid: -log sigmoid(beta h); ipo: (h - 1 / (2 beta))^2
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round (cDPO)


@dataclass
class DPOExperiment(RunConfig):
    """Preference optimisation on pairs; ``batch_size`` counts pairs.

    Lines of the data are ``{"prompt", "pos_answers": […], "neg_answers": […]}`` or
    ``{"prompt", "chosen", "rejected"}``.
    """

    output: str = "runs/dpo"
    dpo: DPOConfig = field(default_factory=DPOConfig)
    actor: ModelConfig = field(default_factory=ModelConfig)
    ref: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> DPOExperiment:
        """Itself, or ``ConfigError`` naming the first value out of range."""
        self.check_run()
        check_above(self.dpo, 0, "beta", where="dpo")
        check_choice(self.dpo, "loss", ("sigmoid", "ipo"), where="dpo")
        if not 0 <= self.dpo.label_smoothing < 0.5:
            raise ConfigError(
                f"{self.dpo.label_smoothing} is not in [0, 0.5)", where="dpo.label_smoothing"
            )
        if self.dpo.label_smoothing and self.dpo.loss != "sigmoid":
            raise ConfigError(
                "only the sigmoid loss has it", where="dpo.label_smoothing",
                remedy="use dpo.loss=sigmoid",
            )  # fmt: skip
        return self
