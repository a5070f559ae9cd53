"""The data of a step, read on every rank: order and content follow from (seed, step) alone.

Read ``Item`` (a group of the step's batch), then ``Dataset``. What a file looks like is
``records.py``'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from executor.records import DataKind, Example, Prompt, joined, read_examples
from profiles.errors import ConfigError

_ANSWERS: Mapping[DataKind, int] = {"prompts": 0, "answers": 1, "pairs": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One group of the data: ``prompt`` [length] int64, ``answers`` likewise (chosen, rejected)."""

    record: Mapping[str, Any]
    prompt: Tensor
    where: str = ""  # file:line
    answers: tuple[Tensor, ...] = ()
    fills_batch: bool = False  # of a pass that was not asked for: it makes the last batch whole


class Prompts(Protocol):
    """A source of data. ``num_prompts`` is None where it is endless."""

    num_prompts: int | None

    def batch(self, step: int, batch_size: int) -> list[Item]:
        """The groups of a step, the same on every rank."""
        ...


class MockData:
    """Random token ids of random lengths in [longest / 2, longest]: for benchmarks."""

    def __init__(
        self, *, vocab: int, prompt_len: int, seed: int, kind: DataKind = "prompts",
        response_len: int = 1,
    ) -> None:  # fmt: skip
        self.num_prompts: int | None = None
        self.vocab, self.seed, self.kind = vocab, seed, kind
        self.prompt_len, self.response_len = prompt_len, response_len

    def batch(self, step: int, batch_size: int) -> list[Item]:
        rng = _generator(self.seed, step)

        def texts(longest: int, count: int) -> list[Tensor]:
            lengths = torch.randint(max(1, longest // 2), longest + 1, (count,), generator=rng)
            return [torch.randint(0, self.vocab, (int(n),), generator=rng) for n in lengths]

        prompts, each = texts(self.prompt_len, batch_size), _ANSWERS[self.kind]
        answers = texts(self.response_len, batch_size * each)
        return [
            Item(
                record={"id": f"{step}-{i}", "prompt": ""},
                prompt=prompts[i],
                answers=tuple(answers[i * each : (i + 1) * each]),
            )
            for i in range(batch_size)
        ]


class Dataset:
    """A file or folder of ``records.py``, checked when opened; shuffled anew in every pass over it.

    Without ``shuffle`` every pass has the file's order. Items after ``num_passes`` are marked
    ``fills_batch``; 0: none are.

    Raises:
        ConfigError: a line is not as ``records.py`` says, or is too long; names file and line.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: DataKind,
        seed: int,
        chat_template: bool,
        tokenizer: Any,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        stop_token_ids: tuple[int, ...] = (),
        shuffle: bool = True,
        num_passes: int = 0,
    ) -> None:
        self.seed, self.shuffle, self.num_passes = seed, shuffle, num_passes
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.longest = {"prompt": max_prompt_tokens, "answer": max_answer_tokens}
        self.stops = stop_token_ids
        self.items = [self._item(example) for example in read_examples(path, kind)]
        self.num_prompts: int | None = len(self.items)

    def batch(self, step: int, batch_size: int) -> list[Item]:
        count = len(self.items)
        places = range(step * batch_size, (step + 1) * batch_size)
        order = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        items = [self.items[order[place // count][place % count]] for place in places]
        end = self.num_passes * count or places.stop
        return [
            replace(item, fills_batch=True) if place >= end else item
            for place, item in zip(places, items, strict=True)
        ]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.items))
        order: list[int] = torch.randperm(
            len(self.items), generator=_generator(self.seed, epoch)
        ).tolist()
        return order

    def _item(self, example: Example) -> Item:
        prompt = prompt_ids(self.tokenizer, example.prompt, chat_template=self.chat_template)
        answers = [
            answer_ids(
                self.tokenizer, example.prompt, answer, chat_template=self.chat_template,
                stops=self.stops,
            )
            for answer in example.answers
        ]  # fmt: skip
        return Item(
            record=example.record,
            where=example.where,
            prompt=self._checked(prompt, "prompt", example.where),
            answers=tuple(self._checked(ids, "answer", example.where) for ids in answers),
        )

    def _checked(self, ids: list[int], what: str, where: str) -> Tensor:
        option = {"prompt": "prompt_len", "answer": "response_len"}[what]
        if not ids:
            raise ConfigError(
                f"the tokenizer makes no tokens of the {what}", where=where,
                remedy="remove the line",
            )  # fmt: skip
        if len(ids) > self.longest[what]:
            raise ConfigError(
                f"the {what} has {len(ids)} tokens, more than {option}={self.longest[what]}",
                where=where,
                remedy=f"shorten it or search a plan with {option}={len(ids)}",
            )
        return torch.tensor(ids, dtype=torch.int64)


def _generator(seed: int, counter: int) -> torch.Generator:
    """A generator of its own for every pair: torch's on the CPU keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {counter}").getrandbits(32))


# ---- texts to tokens --------------------------------------------------------------------------


def _turns(prompt: Prompt) -> list[Mapping[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _has_template(tokenizer: Any, chat_template: bool) -> bool:
    return chat_template and bool(getattr(tokenizer, "chat_template", None))


def _chat(tokenizer: Any, turns: list[Mapping[str, str]], *, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    return text


def prompt_ids(tokenizer: Any, prompt: Prompt, *, chat_template: bool) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template if it has one.

    Without a template messages are joined by line breaks.
    """
    if _has_template(tokenizer, chat_template):
        text = _chat(tokenizer, _turns(prompt), prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(prompt, str):
        prompt = joined(prompt) + "\n"
    return list(tokenizer(prompt)["input_ids"])


def answer_ids(
    tokenizer: Any, prompt: Prompt, answer: str, *, chat_template: bool, stops: tuple[int, ...]
) -> list[int]:
    """Token ids that follow ``prompt_ids`` where the model gives ``answer``, with an end token.

    With a template: what the template adds to the prompt for the assistant's turn.
    """
    text = answer
    if _has_template(tokenizer, chat_template):
        turns = _turns(prompt)
        before = _chat(tokenizer, turns, prompt=True)
        turns.append({"role": "assistant", "content": answer})
        whole = _chat(tokenizer, turns, prompt=False)
        # Some templates write an assistant's turn otherwise than they begin one; then as it is.
        text = whole[len(before) :].rstrip() if whole.startswith(before) else answer
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ended = bool(stops) and bool(ids) and ids[-1] in stops
    return ids if ended or not stops else [*ids, stops[0]]
