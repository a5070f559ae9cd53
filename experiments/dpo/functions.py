"""DPO's mathematics, call by call (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.answers import answer_log_probs
from experiments.dpo.config import DPOConfig, DPOExperiment
from experiments.losses import answer_lengths, answer_sums
from experiments.pairs import dpo_loss, ipo_loss, number_of_pairs


def make_functions(config: DPOExperiment) -> dict[str, Any]:
    return {"ref_inf": AnswerLogProbs(), "actor_train": TrainOnPairs(dpo=config.dpo)}


def _answers(head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext) -> Tensor:
    """[num_sequences]: log-probability of each answer, the sum over its tokens."""
    log_probs, _ = answer_log_probs(head, hidden, batch, ctx, temperature=1.0)
    return answer_sums(batch, log_probs.float())


class AnswerLogProbs:
    """The reference's log-probability of each answer."""

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Mapping[str, Tensor]:
        return {"ref_answer_log_probs": _answers(head, hidden, batch, ctx)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOnPairs:
    """The mean loss of pairs. ``accuracy``: pairs whose chosen answer gained more."""

    dpo: DPOConfig

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        return batch

    def count(self, batch: SequenceBatch) -> Tensor:
        return number_of_pairs(batch)

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        gains = _answers(head, hidden, batch, ctx) - batch.get("ref_answer_log_probs")
        if self.dpo.loss == "ipo":
            gains = gains / answer_lengths(batch)
        log_ratio = gains[0::2] - gains[1::2]  # [pairs]
        if self.dpo.loss == "ipo":
            losses = ipo_loss(log_ratio, beta=self.dpo.beta)
        else:
            losses = dpo_loss(
                log_ratio, beta=self.dpo.beta, label_smoothing=self.dpo.label_smoothing
            )
        loss, apart = losses.sum() / denominator, log_ratio.detach()
        statistics = {
            "loss": loss.detach(),
            "accuracy": (apart > 0).sum() / denominator,
            "reward_difference": self.dpo.beta * apart.sum() / denominator,
        }
        return loss, statistics
