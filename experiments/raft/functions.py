"""RAFT: the choice of the best answers (the torch half; ``graph.py`` names the calls)."""

from __future__ import annotations

from typing import Any

from executor.batch import SequenceBatch
from executor.calls import Records
from experiments.answers import sampling_functions
from experiments.raft.config import RAFTExperiment
from experiments.sft.functions import TrainOnAnswers


def make_functions(config: RAFTExperiment) -> dict[str, Any]:
    return {
        **sampling_functions(config),
        "select": Select(config.samples_per_prompt),
        "actor_train": TrainOnAnswers(),
    }


class Select:
    """The answer of highest reward of each group; of equal ones the first."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def run(self, batch: SequenceBatch, records: Records) -> SequenceBatch:
        """The best sequences, each under the number of its group's first."""
        size = self.group_size
        rewards = batch.get("rewards").reshape(-1, size).tolist()
        places = [g * size + own.index(max(own)) for g, own in enumerate(rewards)]
        best = batch.select(places)
        return SequenceBatch(
            samples=tuple(batch.samples[place - place % size] for place in places),
            lengths=best.lengths,
            per_token={"best_sequences": best.token_ids},
            per_sequence={"best_prompt_lengths": best.get("prompt_lengths")},
        )
