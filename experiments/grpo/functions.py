"""GRPO's mathematics, call by call (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.advantages import (
    group_centered,
    group_normalized,
    groups_with_signal,
    overlong_penalty,
    to_tokens,
)
from experiments.grpo.config import GRPOExperiment
from experiments.losses import kl_estimates, kl_penalty, policy_loss
from experiments.pairs import answer_lengths
from experiments.ppo.functions import answer_log_probs, sampling_functions


def make_functions(config: GRPOExperiment) -> dict[str, Any]:
    return {**sampling_functions(config), "actor_train": TrainActor(config=config)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainActor:
    """Sum over answer tokens of w (clipped loss + kl_coef KL) / denominator.

    ``aggregation`` sequence: w = 1 / tokens of the answer, denominator the answers; token: w = 1,
    all their tokens; constant: w = 1, answers * ``response_len``. Answers that are left out
    (``drop_equal``, ``mask_truncated``) have w = 0 and count in the first two denominators as
    none. The statistics are means with the same weights.
    """

    config: GRPOExperiment

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        """Adds ``advantages`` [tokens] and ``kept`` [num_sequences], 1 or 0."""
        grpo, group = self.config.grpo, self.config.samples_per_prompt
        penalty = overlong_penalty(
            answer_lengths(batch), longest=self.config.response_len, buffer=grpo.overlong_buffer
        )
        scores = batch.get("rewards") + penalty
        advantages = (group_normalized if grpo.advantage_std else group_centered)(scores, group)
        kept = torch.ones_like(scores)
        if grpo.drop_equal:
            kept = kept * groups_with_signal(batch.get("rewards"), group)
        if grpo.mask_truncated:
            kept = kept * batch.get("finished")
        return batch.with_values(
            per_token={"advantages": to_tokens(batch, advantages)}, per_sequence={"kept": kept}
        )

    def count(self, batch: SequenceBatch) -> Tensor:
        """The denominator's share of these sequences, float64 []."""
        kept = batch.get("kept").double()
        if self.config.grpo.aggregation == "sequence":
            return kept.sum()
        if self.config.grpo.aggregation == "token":
            return (kept * answer_lengths(batch)).sum()
        return torch.tensor(float(batch.num_sequences * self.config.response_len)).to(kept)

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        grpo = self.config.grpo
        log_probs, places = answer_log_probs(
            head, hidden, batch, ctx, temperature=self.config.generation.temperature
        )
        weights = batch.get("kept")
        if grpo.aggregation == "sequence":
            weights = weights / answer_lengths(batch)
        weights = to_tokens(batch, weights)[places]
        denominator = denominator.clamp(min=1.0)  # 0 where every answer is left out

        def mean(values: Tensor) -> Tensor:
            return (weights * values).sum() / denominator

        old = batch.get("log_probs")[places]
        losses, clipped = policy_loss(
            log_probs, old, batch.get("advantages")[places], clip=grpo.clip,
            clip_high=grpo.clip_high,
        )  # fmt: skip
        statistics = {
            "clip_fraction": mean(clipped),
            "approx_kl": mean(kl_estimates(log_probs.detach(), old)[1]),
        }
        if grpo.kl_coef > 0:
            ref = batch.get("ref_log_probs")[places]
            penalty = kl_penalty(log_probs, ref, estimator=grpo.kl_estimator)
            losses = losses + grpo.kl_coef * penalty
            statistics["ref_kl"] = mean(penalty.detach())
        loss = mean(losses)
        return loss, {"loss": loss.detach(), **statistics}
