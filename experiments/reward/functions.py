"""The mathematics of reward modelling (the torch half; ``graph.py`` names the call)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.losses import last_token_index
from experiments.pairs import bradley_terry_loss, number_of_pairs
from experiments.reward.config import BradleyTerryConfig, RewardExperiment


def make_functions(config: RewardExperiment) -> dict[str, Any]:
    return {"reward_train": TrainOnPairs(options=config.pairs)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOnPairs:
    """The mean Bradley-Terry loss of pairs; a sequence's score is its last token's."""

    options: BradleyTerryConfig

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        return batch

    def count(self, batch: SequenceBatch) -> Tensor:
        return number_of_pairs(batch)

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        scores = head(hidden[last_token_index(batch)]).float()  # chosen, rejected, chosen, ...
        chosen, rejected = scores[0::2], scores[1::2]
        losses = bradley_terry_loss(
            chosen, rejected, margin=self.options.margin, center_coef=self.options.center_coef
        )
        loss, apart = losses.sum() / denominator, (chosen - rejected).detach()
        statistics = {
            "loss": loss.detach(),
            "accuracy": (apart > 0).sum() / denominator,
            "score_difference": apart.sum() / denominator,
        }
        return loss, statistics
