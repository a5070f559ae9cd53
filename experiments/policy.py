"""Training a policy on sampled answers: the clipped loss that PPO, GRPO and REINFORCE share.

They differ in their advantages (``experience.py``) and in their options' defaults. Every loss is
divided by a count over all ranks and micro-batches, so that no split of the data changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Sum
from executor.context import RankContext
from executor.parallel.tensor import vocab_parallel_entropy, vocab_parallel_log_probs
from experiments.advantages import to_tokens
from experiments.answers import answer_logits, sampling_functions
from experiments.experience import Experience
from experiments.losses import answer_lengths, kl_estimates, kl_penalty, policy_loss
from experiments.options import PolicyConfig


class TrainPolicy:
    """Sum over answer tokens of w (clipped loss + kl_coef KL - entropy_coef H) / denominator.

    ``aggregation`` token: w = 1, denominator all answer tokens; sequence: w = 1 / tokens of the
    answer, denominator the answers; constant: w = 1, answers * ``response_len``. Where the
    experience has ``kept`` [num_sequences], 1 or 0, answers that are left out have w = 0 and
    count in the first two denominators as none. Statistics but the loss are means over tokens.
    """

    def __init__(
        self, experience: Experience, *, options: PolicyConfig, temperature: float,
        response_len: int,
    ) -> None:  # fmt: skip
        self.experience, self.options = experience, options
        self.temperature, self.response_len = temperature, response_len
        self.prepare: Callable[[SequenceBatch, Sum], SequenceBatch] = experience.prepare
        self.state: Callable[[], Mapping[str, Any]] = experience.state
        self.restore: Callable[[Mapping[str, Any]], None] = experience.restore

    def count(self, batch: SequenceBatch) -> Tensor:
        """[2] float64: what the loss is divided by, and the answer tokens that count."""
        lengths = answer_lengths(batch)
        kept = _kept(batch, lengths)
        tokens = (kept * lengths).sum()
        whole = batch.num_sequences * self.response_len
        by = {"token": tokens, "sequence": kept.sum(), "constant": kept.new_tensor(float(whole))}
        return torch.stack([by[self.options.aggregation], tokens])

    def loss(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, denominator: Tensor,
        ctx: RankContext,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        logits, places = answer_logits(head, hidden, batch, temperature=self.temperature)
        log_probs = vocab_parallel_log_probs(logits, batch.token_ids[places], ctx)
        old = batch.get("log_probs")[places]
        losses, clipped = policy_loss(
            log_probs, old, batch.get("advantages")[places], clip=self.options.clip,
            clip_high=self.options.clip_high, dual_clip=self.options.dual_clip,
        )  # fmt: skip
        kept = _kept(batch, answer_lengths(batch))
        over, tokens = denominator.clamp(min=1.0)  # 0 where every answer is left out

        def mean(values: Tensor) -> Tensor:
            return (to_tokens(batch, kept)[places] * values.detach()).sum() / tokens

        k1, k3 = kl_estimates(log_probs.detach(), old)
        statistics = {
            "clip_fraction": mean(clipped),
            "approx_kl": mean(k3),
            "approx_kl_k1": mean(k1),
            "mean_ratio": mean((-k1).exp()),
        }
        if self.options.kl_coef > 0:
            ref = batch.get("ref_log_probs")[places]
            penalty = kl_penalty(log_probs, ref, estimator=self.options.kl_estimator)
            losses = losses + self.experience.kl_in_loss * penalty
            statistics["ref_kl"] = mean(penalty)
            statistics["kl_coef"] = mean(torch.full_like(penalty, self.experience.kl_coef))
        if self.options.entropy_coef > 0:
            entropy = vocab_parallel_entropy(logits, ctx)
            losses = losses - self.options.entropy_coef * entropy
            statistics["entropy"] = mean(entropy)
        weights = kept
        if self.options.aggregation == "sequence":
            weights = kept / answer_lengths(batch)
        loss = (to_tokens(batch, weights)[places] * losses).sum() / over
        return loss, {"loss": loss.detach(), **statistics}

    @property
    def may_stop(self) -> bool:
        return self.options.max_ratio > 0 or self.options.max_kl > 0

    def stops(self, statistics: Mapping[str, float]) -> bool:
        """A mini-batch of these statistics is beyond ``max_ratio`` or ``max_kl``."""
        limits = {"mean_ratio": self.options.max_ratio, "approx_kl": self.options.max_kl}
        return any(limit > 0 and statistics[name] > limit for name, limit in limits.items())


def policy_functions(config: Any, options: PolicyConfig, experience: Experience) -> dict[str, Any]:
    """The calls of an algorithm on rewarded answers: theirs, and the actor's training.

    Raises:
        ConfigError: a reward function of ``reward.source`` cannot be found.
    """
    train = TrainPolicy(
        experience, options=options, temperature=config.generation.temperature,
        response_len=config.response_len,
    )  # fmt: skip
    return {**sampling_functions(config), "actor_train": train}


def _kept(batch: SequenceBatch, lengths: Tensor) -> Tensor:
    """[num_sequences] float64: 1 of answers that count, 0 of others."""
    found = batch.per_sequence.get("kept")
    return torch.ones_like(lengths, dtype=torch.float64) if found is None else found.double()
