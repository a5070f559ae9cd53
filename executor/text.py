"""Between tokens and text: the run's tokenizer, its end tokens, and answers as people read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.batch import SequenceBatch
from executor.dataset import Item
from profiles.errors import CheckpointError


class TextCodec:
    """A tokenizer with the model's end tokens; without a folder, token ids stand for words."""

    def __init__(self, folder: Path | None) -> None:
        self.tokenizer: Any = None
        self.stop_token_ids: tuple[int, ...] = ()
        if folder is None:
            return
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of a damaged file the packages raise no kind of their own
            raise CheckpointError(
                f"no tokenizer ({str(error).partition(chr(10))[0]})", where=str(folder),
                remedy="copy tokenizer.json and tokenizer_config.json into the folder",
            ) from None  # fmt: skip
        self.stop_token_ids = stop_tokens(folder, self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(str(i) for i in ids)
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def with_answers(self, items: Sequence[Item], batch: SequenceBatch) -> list[dict[str, Any]]:
        """The records of the batch's samples with ``answer``, ``answer_ids``, ``where`` they stand
        (file:line) and whether the item only ``fills_batch``."""
        offsets, prompts = batch.offsets, batch.get("prompt_lengths").tolist()
        ids = batch.token_ids.tolist()
        found = []
        for i, item in enumerate(items):
            answer = ids[offsets[i] + prompts[i] : offsets[i + 1]]
            said = {
                "answer": self.decode(answer), "answer_ids": answer, "where": item.where,
                "fills_batch": item.fills_batch,
            }  # fmt: skip
            found.append({**item.record, **said})
        return found


def stop_tokens(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """End tokens of a Hugging Face folder: of its generation config, config and tokenizer."""
    found: list[int] = [] if tokenizer_eos is None else [tokenizer_eos]
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found += value if isinstance(value, list) else [value] if value is not None else []
    return tuple(dict.fromkeys(found))
