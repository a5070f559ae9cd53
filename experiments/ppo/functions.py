"""PPO's mathematics, call by call (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from experiments.advantages import normalized
from experiments.experience import Experience, RunningMoments
from experiments.losses import gae, response_mask, token_rewards, value_loss
from experiments.policy import policy_functions
from experiments.ppo.config import PPOConfig, PPOExperiment


def make_functions(config: PPOExperiment) -> dict[str, Any]:
    """One object for each call; see ``executor.calls``."""
    return {
        **policy_functions(config, config.ppo, experience_of(config.ppo)),
        "critic_inf": Values(),
        "critic_train": TrainCritic(config.ppo),
    }


class Values:
    """The critic's value of the state after each token; normalised where ``normalize_values``."""

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Mapping[str, Tensor]:
        return {"values": head(hidden).float()}


def experience_of(ppo: PPOConfig) -> Experience:
    """Advantages and returns by GAE; actor and critic each keep the numbers, which are equal."""
    estimate = Estimate(ppo)
    moments = {"scores": estimate.scores, "returns": estimate.returns}
    return Experience(estimate, ppo, moments)


class Estimate:
    """Adds ``advantages``, ``returns`` and ``targets`` [tokens]; ``values`` become denormalised.

    With ``normalize_values`` the critic speaks in units of the running moments of all returns:
    what it said is denormalised by the moments that it was trained with, and it learns
    ``targets``, the returns normalised by those that know this batch as well. It is clipped
    around ``raw_values``, what it said.
    """

    def __init__(self, ppo: PPOConfig) -> None:
        self.ppo = ppo
        self.scores, self.returns = RunningMoments(), RunningMoments()

    def __call__(self, batch: SequenceBatch, kl_coef: float, sum_over_dp: Sum) -> SequenceBatch:
        ppo, log_probs = self.ppo, batch.get("log_probs")
        rewards = token_rewards(
            batch, self._scores(batch, sum_over_dp), log_probs,
            batch.get("ref_log_probs") if kl_coef > 0 else log_probs, kl_coef=kl_coef,
            estimator=ppo.kl_estimator,
        )  # fmt: skip
        raw = batch.get("values")
        values = self.returns.denormalize(raw) if ppo.normalize_values else raw
        advantages, returns = gae(batch, rewards, values, gamma=ppo.gamma, lam=ppo.lam)
        mask, targets = response_mask(batch), returns
        if ppo.normalize_advantages:
            advantages = normalized(advantages, mask, sum_over_dp)
        if ppo.normalize_values:
            self.returns.update(returns[mask], sum_over_dp)
            targets = self.returns.normalize(returns)
        return batch.with_values(
            per_token={
                "advantages": advantages, "returns": returns, "values": values,
                "raw_values": raw, "targets": targets,
            }
        )  # fmt: skip

    def _scores(self, batch: SequenceBatch, sum_over_dp: Sum) -> Tensor:
        """[num_sequences]: the rewards, shaped."""
        ppo, scores = self.ppo, batch.get("rewards")
        if ppo.normalize_rewards:
            self.scores.update(scores, sum_over_dp)
            scores = self.scores.normalize(scores)
        scores = (scores - ppo.reward_bias) * ppo.reward_scale
        scores = scores.clamp(-ppo.reward_clip, ppo.reward_clip)
        if not ppo.score_truncated:
            scores = scores * batch.get("finished")
        return scores


class TrainCritic:
    """Statistics give the explained variance of the values that the advantages came from:
    1 - (error_square - mean_error^2) / (return_square - mean_return^2), error = return - value.
    """

    def __init__(self, ppo: PPOConfig) -> None:
        self.ppo, self.experience = ppo, experience_of(ppo)

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        return self.experience.prepare(batch, sum_over_dp)

    def state(self) -> Mapping[str, Any]:
        return self.experience.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.experience.restore(state)

    def count(self, batch: SequenceBatch) -> Tensor:
        """Number of answer tokens, float64 []."""
        return response_mask(batch).sum().double()

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        places = response_mask(batch).nonzero()[:, 0]
        states = places - 1  # the state before an answer token
        losses, clipped = value_loss(
            head(hidden[states]), batch.get("raw_values")[states], batch.get("targets")[places],
            clip=self.ppo.value_clip,
        )  # fmt: skip
        loss = losses.sum() / denominator
        returns = batch.get("returns")[places]
        error = returns - batch.get("values")[states]
        statistics = {
            "loss": loss.detach(),
            "clip_fraction": clipped.sum() / denominator,
            "mean_return": returns.sum() / denominator,
            "return_square": (returns**2).sum() / denominator,
            "mean_error": error.sum() / denominator,
            "error_square": (error**2).sum() / denominator,
        }
        return loss, statistics
