"""The mathematics of REINFORCE++ and RLOO (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.advantages import (
    group_centered,
    leave_one_out,
    normalized,
    rewards_to_go,
    to_tokens,
)
from experiments.losses import kl_estimates, policy_loss, response_mask
from experiments.pairs import answer_sums
from experiments.ppo.functions import answer_log_probs, sampling_functions
from experiments.reinforce.config import ReinforceExperiment


def make_functions(config: ReinforceExperiment) -> dict[str, Any]:
    return {**sampling_functions(config), "actor_train": TrainActor(config=config)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainActor:
    """The clipped loss, a mean over all answer tokens, of the advantages that ``baseline`` says.

    batch: rewards to go, normalised over the batch's tokens (Hu 2025, arXiv:2501.03262);
    group: likewise, of scores less their group's mean;
    leave_one_out: one number for a whole answer, its score - kl_coef * sum of log p / p_ref, less
    the mean of the others' (Ahmadian et al. 2024, arXiv:2402.14740).
    """

    config: ReinforceExperiment

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        """Adds ``advantages`` [tokens]."""
        own, group = self.config.reinforce, self.config.samples_per_prompt
        scores = batch.get("rewards")
        if own.baseline == "leave_one_out":
            found = to_tokens(batch, leave_one_out(self._penalized(batch), group))
            return batch.with_values(per_token={"advantages": found})
        if own.baseline == "group":
            scores = group_centered(scores, group)
        found = rewards_to_go(batch, scores, kl_coef=own.kl_coef, gamma=own.gamma)
        found = normalized(found, response_mask(batch), sum_over_dp)
        return batch.with_values(per_token={"advantages": found})

    def _penalized(self, batch: SequenceBatch) -> Tensor:
        """[num_sequences]: the scores, less the KL penalty of the whole answer."""
        scores, kl_coef = batch.get("rewards"), self.config.reinforce.kl_coef
        if kl_coef == 0:
            return scores
        apart = batch.get("log_probs") - batch.get("ref_log_probs")
        return scores - kl_coef * answer_sums(batch, apart[response_mask(batch)])

    def count(self, batch: SequenceBatch) -> Tensor:
        """Number of answer tokens, float64 []."""
        return response_mask(batch).sum().double()

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        log_probs, places = answer_log_probs(
            head, hidden, batch, ctx, temperature=self.config.generation.temperature
        )
        old = batch.get("log_probs")[places]
        losses, clipped = policy_loss(
            log_probs, old, batch.get("advantages")[places], clip=self.config.reinforce.clip
        )
        loss = losses.sum() / denominator
        statistics = {
            "loss": loss.detach(),
            "clip_fraction": clipped.sum() / denominator,
            "approx_kl": kl_estimates(log_probs.detach(), old)[1].sum() / denominator,
        }
        return loss, statistics
