"""GRPO's mathematics (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from typing import Any

import torch

from executor.batch import SequenceBatch
from executor.calls import Sum
from experiments.advantages import (
    group_centered,
    group_normalized,
    groups_with_signal,
    overlong_penalty,
    penalized,
    to_tokens,
)
from experiments.experience import Experience
from experiments.grpo.config import GRPOExperiment
from experiments.losses import answer_lengths
from experiments.policy import policy_functions


def make_functions(config: GRPOExperiment) -> dict[str, Any]:
    return policy_functions(config, config.grpo, Experience(Estimate(config), config.grpo))


class Estimate:
    """An answer's score against those of its group, the same at all of its tokens."""

    def __init__(self, config: GRPOExperiment) -> None:
        self.config = config

    def __call__(self, batch: SequenceBatch, kl_coef: float, sum_over_dp: Sum) -> SequenceBatch:
        """Adds ``advantages`` [tokens] and ``kept`` [num_sequences], 1 or 0."""
        grpo, group = self.config.grpo, self.config.samples_per_prompt
        penalty = overlong_penalty(
            answer_lengths(batch), longest=self.config.response_len, buffer=grpo.overlong_buffer
        )
        scores = penalized(
            batch, batch.get("rewards") + penalty, kl_coef=kl_coef, estimator=grpo.kl_estimator
        )
        advantages = (group_normalized if grpo.advantage_std else group_centered)(scores, group)
        kept = torch.ones_like(scores)
        if grpo.drop_equal:
            kept = kept * groups_with_signal(batch.get("rewards"), group)
        if grpo.mask_truncated:
            kept = kept * batch.get("finished")
        return batch.with_values(
            per_token={"advantages": to_tokens(batch, advantages)}, per_sequence={"kept": kept}
        )
