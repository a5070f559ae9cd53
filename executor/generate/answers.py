"""``Answer``: a prompt with its answer, before, while and after it is generated.

``begun`` makes them of prompts and checks these, ``batch_of`` puts those that have ended into what
every back end of generation returns. How tokens are chosen is theirs: ``engine.py``, ``vllm.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.generate.prefixes import prefix_key
from executor.generate.sampling import SamplingParams
from profiles.errors import ConfigError
from profiles.models import ModelSpec


@dataclass(kw_only=True)
class Answer:
    """A prompt [length] and its answer so far; ``limit``: tokens of both together at most."""

    sample: int
    prompt: Tensor
    limit: int
    answer: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @cached_property
    def key(self) -> bytes:
        """The prompt, to be compared with others (``prefixes.py``)."""
        return prefix_key(self.prompt)

    def append(self, token: int, log_prob: float) -> None:
        """One more token of the answer.

        Raises:
            FloatingPointError: the log-probability is not finite.
        """
        if not math.isfinite(log_prob):
            raise FloatingPointError(
                f"logits of sample {self.sample} at position {self.length} are not "
                "finite: the model's weights have diverged or are damaged"
            )
        self.answer.append(token)
        self.log_probs.append(log_prob)


def begun(
    spec: ModelSpec, prompts: Sequence[Tensor], samples: Sequence[int], params: SamplingParams
) -> list[Answer]:
    """Of every prompt (int64 token ids [length]) an answer without a token.

    Raises:
        ConfigError: an empty or too long prompt, a token outside the vocabulary.
    """
    answers = [
        Answer(
            sample=sample,
            prompt=prompt.cpu(),
            limit=min(len(prompt) + params.max_new_tokens, spec.max_positions),
        )
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    _check(spec, answers, params)
    return answers


def _check(spec: ModelSpec, answers: Sequence[Answer], params: SamplingParams) -> None:
    for answer in answers:
        where, length = f"prompt of sample {answer.sample}", len(answer.prompt)
        if length == 0:
            raise ConfigError("no token", where=where, remedy="begin it with a start token")
        if length >= spec.max_positions:
            raise ConfigError(
                f"{length} tokens leave no room for an answer",
                where=where,
                remedy=f"{spec.name} has {spec.max_positions} positions",
            )
    ids = torch.cat([answer.prompt for answer in answers]) if answers else torch.zeros(0)
    largest = max([*params.stop_token_ids, int(ids.max()) if len(ids) else 0])
    if largest >= spec.vocab:
        raise ConfigError(
            f"token {largest} is outside the vocabulary of {spec.vocab} of {spec.name}",
            where="generation",
            remedy="use the tokenizer of this model",
        )


def batch_of(answers: Sequence[Answer], device: torch.device) -> SequenceBatch:
    """All of them, ended, as one batch: as ``engine.generate`` returns it."""
    ids: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    log_probs: list[Tensor] = [torch.zeros(0)]
    for answer in answers:
        ids += [answer.prompt, torch.tensor(answer.answer)]
        log_probs += [torch.zeros(len(answer.prompt)), torch.tensor(answer.log_probs)]
    batch = SequenceBatch(
        samples=tuple(answer.sample for answer in answers),
        lengths=tuple(answer.length for answer in answers),
        per_token={"sequences": torch.cat(ids), "log_probs": torch.cat(log_probs)},
        per_sequence={
            "prompt_lengths": torch.tensor([len(a.prompt) for a in answers], dtype=torch.long),
            "finished": torch.tensor([float(a.finished) for a in answers]),
        },
    )
    return batch.to(device)
