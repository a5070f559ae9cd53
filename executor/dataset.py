"""Prompts, read on every rank: order and content follow from (seed, step) alone."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from profiles.errors import ConfigError

Record = Mapping[str, Any]


class Prompts(Protocol):
    """A source of prompts. ``num_prompts`` is None where it is endless."""

    num_prompts: int | None

    def batch(self, step: int, batch_size: int) -> tuple[list[Tensor], list[Record]]:
        """Token ids [length] int64 and records of every sample of a step."""
        ...


class MockPrompts:
    """Random token ids of random lengths in [prompt_len / 2, prompt_len]: for benchmarks."""

    def __init__(self, *, vocab: int, prompt_len: int, seed: int) -> None:
        self.num_prompts: int | None = None
        self.vocab, self.prompt_len, self.seed = vocab, prompt_len, seed

    def batch(self, step: int, batch_size: int) -> tuple[list[Tensor], list[Record]]:
        rng = _generator(self.seed, step)
        shortest = max(1, self.prompt_len // 2)
        lengths = torch.randint(shortest, self.prompt_len + 1, (batch_size,), generator=rng)
        prompts = [
            torch.randint(0, self.vocab, (int(length),), generator=rng) for length in lengths
        ]
        records = [{"id": f"{step}-{i}", "prompt": ""} for i in range(batch_size)]
        return prompts, list(records)


class PromptDataset:
    """JSONL prompts, checked when opened; shuffled anew in every pass over them."""

    def __init__(
        self, path: Path, *, seed: int, chat_template: bool, tokenizer: Any, max_prompt_tokens: int
    ) -> None:
        self.seed = seed
        self.records = read_records(path)
        self.num_prompts: int | None = len(self.records)
        self.prompts: list[Tensor] = []
        for line, record in self.records:
            ids = prompt_ids(tokenizer, record["prompt"], chat_template=chat_template)
            if not ids:
                raise ConfigError(
                    "the tokenizer makes no tokens of the prompt", where=f"{path}:{line}",
                    remedy="remove the line",
                )  # fmt: skip
            if len(ids) > max_prompt_tokens:
                raise ConfigError(
                    f"the prompt has {len(ids)} tokens, more than prompt_len={max_prompt_tokens}",
                    where=f"{path}:{line}",
                    remedy=f"shorten it or search a plan with prompt_len={len(ids)}",
                )
            self.prompts.append(torch.tensor(ids, dtype=torch.int64))

    def batch(self, step: int, batch_size: int) -> tuple[list[Tensor], list[Record]]:
        count = len(self.records)
        places = range(step * batch_size, (step + 1) * batch_size)
        order = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        chosen = [order[place // count][place % count] for place in places]
        return [self.prompts[i] for i in chosen], [self.records[i][1] for i in chosen]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(
            len(self.records), generator=_generator(self.seed, epoch)
        ).tolist()
        return order


def _generator(seed: int, counter: int) -> torch.Generator:
    """A generator of its own for every pair: torch's on the CPU keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {counter}").getrandbits(32))


def prompt_ids(tokenizer: Any, prompt: str, *, chat_template: bool) -> list[int]:
    """Token ids of a prompt, as the user's turn of a chat where the tokenizer has a template."""
    if chat_template and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def read_records(path: Path) -> list[tuple[int, Record]]:
    """(line number, record) of a JSONL file whose lines have a ``prompt``.

    A record without an ``id`` gets its line number as one.

    Raises:
        ConfigError: no path or file, not UTF-8, no records, or a line that is not a JSON object
            with a non-empty ``prompt``; names file and line.
    """
    if str(path) in ("", "."):
        raise ConfigError("no prompts", where="data.path", remedy="give data.path=prompts.jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # without a byte order mark, if there is one
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="give data.path=FILE"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8", where=f"{path}:{line}", remedy="save as UTF-8") from None
    records: list[tuple[int, Record]] = [
        (number, {"id": number, **_record(line, f"{path}:{number}")})
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not records:
        raise ConfigError("no prompts in it", where=str(path), remedy='write {"prompt": "…"} lines')
    return records


def _record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not JSON ({error.msg})", where=where, remedy='write one {"prompt": "…"} a line'
        ) from None
    if not isinstance(record, dict):
        raise ConfigError("not a JSON object", where=where, remedy='write {"prompt": "…"}')
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(
            f"prompt is {prompt!r}", where=where, remedy="every line needs a text under prompt"
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            "the prompt has half of a surrogate pair", where=where, remedy="repair its \\u escapes"
        ) from None
    return record
