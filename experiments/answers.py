"""Answers in every algorithm: how they are sampled, scored, and how likely a model finds them.

The torch half of the calls in ``parts.py``; ``sampling_functions`` makes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Head, Records
from executor.context import RankContext
from executor.generate.sampling import SamplingParams
from executor.parallel.tensor import vocab_parallel_log_probs
from experiments.losses import last_token_index, response_mask
from experiments.parts import split_source
from experiments.rewards import RewardFunction, load_reward, rewards_of

Statistics = Mapping[str, Tensor]


def sampling_functions(config: Any) -> dict[str, Any]:
    """The calls that every algorithm on sampled answers has, or some of them: answers, rewards,
    and the reference's log-probabilities.

    Raises:
        ConfigError: a reward function of ``reward.source`` cannot be found.
    """
    with_model, names = split_source(config.reward.source)
    function = Reward([load_reward(name) for name in names])
    score = Score("model_rewards" if names else "rewards")
    return {
        "actor_gen": Generate(config=config),
        "rew_inf": score if with_model else function,
        "rew_fn": function,
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


# ---- rewards ----------------------------------------------------------------------------------


class Score:
    """The reward model's score of each sequence, its last token's, as the output ``key``."""

    def __init__(self, key: str) -> None:
        self.key = key

    def read(
        self, head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext
    ) -> Statistics:
        return {self.key: head(hidden[last_token_index(batch)]).float()}


class Reward:
    """The sum of functions' rewards of each answer's text, and of a reward model's where it ran."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.functions = functions

    def run(self, batch: SequenceBatch, records: Records) -> Statistics:
        total = torch.zeros(batch.num_sequences, dtype=torch.float64)
        for function in self.functions:
            total += torch.tensor(rewards_of(function, records), dtype=torch.float64)
        scored = batch.per_sequence.get("model_rewards")
        if scored is not None:
            total += scored.cpu()
        return {"rewards": total.float()}


# ---- log-probabilities ------------------------------------------------------------------------


def answer_logits(
    head: Head, hidden: Tensor, batch: SequenceBatch, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logits [answer tokens, vocab / tp], places [answer tokens]) of the answers' tokens.

    Only the states before answer tokens go through the head: they alone are asked about.
    """
    places = response_mask(batch).nonzero()[:, 0]
    logits = head(hidden[places - 1])
    if temperature != 1.0:
        logits = logits.float() / temperature  # in fp32, as the sampler divides
    return logits, places


def answer_log_probs(
    head: Head, hidden: Tensor, batch: SequenceBatch, ctx: RankContext, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, places) of the answers' tokens, [answer tokens] each."""
    logits, places = answer_logits(head, hidden, batch, temperature=temperature)
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
