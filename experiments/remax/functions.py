"""ReMax's mathematics, call by call (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.advantages import rewards_to_go, to_tokens
from experiments.answers import Generate, answer_log_probs, sampling_functions
from experiments.remax.config import ReMaxExperiment


def make_functions(config: ReMaxExperiment) -> dict[str, Any]:
    sampled = sampling_functions(config)
    greedy = replace(config, generation=replace(config.generation, greedy=True))
    return {
        **sampled,
        "greedy_gen": Generate(config=greedy),
        "greedy_rew_inf": sampled["rew_inf"],
        "greedy_rew_fn": sampled["rew_fn"],
        "actor_train": TrainActor(config=config),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainActor:
    """Mean over answers of sum_t -A_t log p_t, A_t = rewards from t on - the greedy reward.

    Source: Li et al. 2023 (arXiv:2310.10505), equation 4, with the KL penalty as a reward.
    """

    config: ReMaxExperiment

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        """Adds ``advantages`` [tokens]."""
        follows = rewards_to_go(
            batch, batch.get("rewards"), kl_coef=self.config.remax.kl_coef, gamma=1.0
        )
        baseline = to_tokens(batch, batch.get("greedy_rewards"))
        return batch.with_values(per_token={"advantages": follows - baseline})

    def count(self, batch: SequenceBatch) -> Tensor:
        """Number of answers, float64 []."""
        return torch.tensor(float(batch.num_sequences), dtype=torch.float64)

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        log_probs, places = answer_log_probs(
            head, hidden, batch, ctx, temperature=self.config.generation.temperature
        )
        loss = -(batch.get("advantages")[places] * log_probs).sum() / denominator
        beyond = (batch.get("rewards") - batch.get("greedy_rewards")).sum() / denominator
        return loss, {"loss": loss.detach(), "reward_above_greedy": beyond}
