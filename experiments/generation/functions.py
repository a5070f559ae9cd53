"""Batch inference (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from executor.batch import SequenceBatch
from executor.calls import Records
from experiments.answers import Generate
from experiments.generation.config import GenerationExperiment


def make_functions(config: GenerationExperiment) -> dict[str, Any]:
    return {
        "actor_gen": Generate(config=config),
        "write": Write(Path(config.output) / "answers", config.samples_per_prompt),
    }


class Write:
    """Every rank appends its answers to a file of its own, one JSON object a line.

    The record of the prompt with ``answer``, ``sample`` (its place among the prompt's answers)
    and ``finished`` (false: cut off at ``response_len``). With ``total_epochs`` what only fills
    the last batch is left out.
    """

    def __init__(self, folder: Path, samples_per_prompt: int) -> None:
        self.folder = folder
        self.samples_per_prompt = samples_per_prompt

    def run(self, batch: SequenceBatch, records: Records) -> Mapping[str, Tensor]:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = batch.samples[0] // self.samples_per_prompt  # of a rank the same in every step
        finished = batch.get("finished").tolist()
        with (self.folder / f"from{first}.jsonl").open("a", encoding="utf-8") as file:
            for sample, record, ended in zip(batch.samples, records, finished, strict=True):
                if record["fills_batch"]:
                    continue
                line = {
                    name: value
                    for name, value in record.items()
                    if name not in ("answer_ids", "where", "fills_batch")
                }
                line |= {"sample": sample % self.samples_per_prompt, "finished": bool(ended)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return {}
