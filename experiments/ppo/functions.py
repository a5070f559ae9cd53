"""PPO's mathematics, call by call (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Records, Sum
from executor.context import RankContext
from executor.generate.sampling import SamplingParams
from executor.parallel.tensor import vocab_parallel_log_probs
from experiments.advantages import normalized
from experiments.losses import (
    gae,
    kl_estimates,
    last_token_index,
    policy_loss,
    response_mask,
    token_rewards,
    value_loss,
)
from experiments.ppo.config import PPOConfig, PPOExperiment
from experiments.rewards import RewardFunction, load_reward, rewards_of

Statistics = Mapping[str, Tensor]


def make_functions(config: PPOExperiment) -> dict[str, Any]:
    """One object for each of the six calls; see ``executor.calls``."""
    return {
        **sampling_functions(config),
        "critic_inf": Values(),
        "actor_train": TrainActor(ppo=config.ppo, temperature=config.generation.temperature),
        "critic_train": TrainCritic(ppo=config.ppo),
    }


def sampling_functions(config: Any) -> dict[str, Any]:
    """The calls that every algorithm on sampled answers has, or some of them: answers, rewards,
    and the reference's log-probabilities."""
    from_model = config.reward.source == "model"
    return {
        "actor_gen": Generate(config=config),
        "rew_inf": Score() if from_model else Reward(load_reward(config.reward.source)),
        # The sampler tells log-probabilities at this temperature even where it is greedy.
        "ref_inf": LogProbs(temperature=config.generation.temperature),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Sampling as ``generation`` and ``response_len`` of any algorithm's configuration say."""

    config: Any

    def sampling(self, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        options = self.config.generation
        return SamplingParams(
            max_new_tokens=self.config.response_len,
            min_new_tokens=options.min_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            greedy=options.greedy,
            stop_token_ids=stop_token_ids,
        )


class Score:
    """The reward model's score of each sequence: its last token's."""

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Statistics:
        return {"rewards": head(hidden[last_token_index(batch)]).float()}


class Reward:
    """A function's reward of each answer's text."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def run(self, batch: SequenceBatch, records: Records) -> Statistics:
        return {"rewards": torch.tensor(rewards_of(self.function, records), dtype=torch.float32)}


class Values:
    """The critic's value of the state after each token."""

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Statistics:
        return {"values": head(hidden).float()}


def answer_log_probs(
    head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, places) of the answers' tokens, [answer tokens] each.

    Only the states before answer tokens go through the head: they alone are asked about.
    """
    places = response_mask(batch).nonzero()[:, 0]
    logits = head(hidden[places - 1])  # [answer tokens, vocab / tp]
    if temperature != 1.0:
        logits = logits.float() / temperature  # in fp32, as the sampler divides
    return vocab_parallel_log_probs(logits, batch.token_ids[places], ctx), places


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """The reference's log-probability of each answer token, at the sampling temperature."""

    temperature: float

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Statistics:
        found, places = answer_log_probs(head, hidden, batch, ctx, temperature=self.temperature)
        zeros = torch.zeros(batch.num_tokens, dtype=torch.float32, device=hidden.device)
        return {"ref_log_probs": zeros.index_copy(0, places, found.float())}


def experience(batch: SequenceBatch, ppo: PPOConfig, sum_over_dp: Sum) -> SequenceBatch:
    """The batch with ``advantages`` and ``returns`` [tokens]."""
    scores = (batch.get("rewards") - ppo.reward_bias) * ppo.reward_scale
    scores = scores.clamp(-ppo.reward_clip, ppo.reward_clip)
    if not ppo.score_truncated:
        scores = scores * batch.get("finished")
    rewards = token_rewards(
        batch, scores, batch.get("log_probs"), batch.get("ref_log_probs"), kl_coef=ppo.kl_coef
    )
    advantages, returns = gae(batch, rewards, batch.get("values"), gamma=ppo.gamma, lam=ppo.lam)
    if ppo.normalize_advantages:
        advantages = normalized(advantages, response_mask(batch), sum_over_dp)
    return batch.with_values(per_token={"advantages": advantages, "returns": returns})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOnExperience:
    """What training the actor and the critic share: the experience, and what losses divide by."""

    ppo: PPOConfig

    def prepare(self, batch: SequenceBatch, sum_over_dp: Sum) -> SequenceBatch:
        return experience(batch, self.ppo, sum_over_dp)

    def count(self, batch: SequenceBatch) -> Tensor:
        """Number of answer tokens, float64 []."""
        return response_mask(batch).sum().double()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainActor(TrainOnExperience):
    temperature: float

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Statistics]:  # fmt: skip
        log_probs, places = answer_log_probs(head, hidden, batch, ctx, temperature=self.temperature)
        old = batch.get("log_probs")[places]
        losses, clipped = policy_loss(
            log_probs, old, batch.get("advantages")[places], clip=self.ppo.clip
        )
        loss = losses.sum() / denominator
        with torch.no_grad():
            k1, k3 = kl_estimates(log_probs, old)
            statistics = {
                "loss": loss.detach(),
                "approx_kl": k3.sum() / denominator,
                "approx_kl_k1": k1.sum() / denominator,
                "mean_ratio": (-k1).exp().sum() / denominator,
                "ref_kl": (old - batch.get("ref_log_probs")[places]).sum() / denominator,
                "clip_fraction": clipped.sum() / denominator,
            }
        return loss, statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCritic(TrainOnExperience):
    """Statistics give the explained variance of the values that the advantages came from:
    1 - (error_square - mean_error^2) / (return_square - mean_return^2), error = return - value.
    """

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Statistics]:  # fmt: skip
        places = response_mask(batch).nonzero()[:, 0]
        states = places - 1  # the state before an answer token
        old, returns = batch.get("values")[states], batch.get("returns")[places]
        losses, clipped = value_loss(head(hidden[states]), old, returns, clip=self.ppo.value_clip)
        loss = losses.sum() / denominator
        error = returns - old
        statistics = {
            "loss": loss.detach(),
            "clip_fraction": clipped.sum() / denominator,
            "mean_return": returns.sum() / denominator,
            "return_square": (returns**2).sum() / denominator,
            "mean_error": error.sum() / denominator,
            "error_square": (error**2).sum() / denominator,
        }
        return loss, statistics
