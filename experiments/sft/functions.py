"""The mathematics of supervised fine-tuning (the torch half; ``graph.py`` names the call)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.answers import answer_log_probs
from experiments.losses import response_mask
from experiments.sft.config import SFTExperiment


def make_functions(config: SFTExperiment) -> dict[str, Any]:
    return {"actor_train": TrainOnAnswers()}


class TrainOnAnswers:
    """The mean of -log p over the answers' tokens; the prompts' are read, not learned."""

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        return batch

    def count(self, batch: SequenceBatch) -> Tensor:
        """Number of answer tokens, float64 []."""
        return response_mask(batch).sum().double()

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        log_probs, _ = answer_log_probs(head, hidden, batch, ctx, temperature=1.0)
        loss = -log_probs.sum() / denominator
        return loss, {"loss": loss.detach()}
