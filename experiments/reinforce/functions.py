"""The mathematics of REINFORCE++ and RLOO (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from typing import Any

from executor.batch import SequenceBatch
from executor.calls import Sum
from experiments.advantages import (
    group_centered,
    leave_one_out,
    normalized,
    penalized,
    rewards_to_go,
    to_tokens,
)
from experiments.experience import Experience
from experiments.losses import response_mask
from experiments.policy import policy_functions
from experiments.reinforce.config import ReinforceExperiment


def make_functions(config: ReinforceExperiment) -> dict[str, Any]:
    return policy_functions(
        config, config.reinforce, Experience(Estimate(config), config.reinforce)
    )


class Estimate:
    """The advantages that ``baseline`` says.

    batch: rewards to go, normalised over the batch's tokens (Hu 2025, arXiv:2501.03262);
    group: likewise, of scores less their group's mean;
    leave_one_out: one number for a whole answer, its score - kl_coef * sum of log p / p_ref, less
    the mean of the others' (Ahmadian et al. 2024, arXiv:2402.14740).
    """

    def __init__(self, config: ReinforceExperiment) -> None:
        self.config = config

    def __call__(self, batch: SequenceBatch, kl_coef: float, sum_over_dp: Sum) -> SequenceBatch:
        """Adds ``advantages`` [tokens]."""
        own, group = self.config.reinforce, self.config.samples_per_prompt
        scores, estimator = batch.get("rewards"), own.kl_estimator
        if own.baseline == "leave_one_out":
            whole = penalized(batch, scores, kl_coef=kl_coef, estimator=estimator)
            found = to_tokens(batch, leave_one_out(whole, group))
            return batch.with_values(per_token={"advantages": found})
        if own.baseline == "group":
            scores = group_centered(scores, group)
        found = rewards_to_go(batch, scores, kl_coef=kl_coef, gamma=own.gamma, estimator=estimator)
        found = normalized(found, response_mask(batch), sum_over_dp)
        return batch.with_values(per_token={"advantages": found})
