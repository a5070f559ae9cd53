"""``StepData``: what a rank has of a step's data, and of the next where generation works ahead.

The data set's items, the samples that calls have made of them or other ranks have sent, and the
answers that were made for the step that follows. What a call does with it is ``worker.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from executor.batch import SequenceBatch
from executor.dataset import Item, Prompts
from executor.metrics import REWARDS
from executor.text import TextCodec
from executor.transfer import SampleStore
from planner.graph import ModelFunctionCall
from planner.plan import Problem
from profiles.errors import ConfigError


class StepData:
    """``samples`` of the step under way; ``coming``: those of step ``works_for``, None: none."""

    def __init__(self, problem: Problem, data: Prompts, device: torch.device) -> None:
        self.problem = problem
        self.data = data
        group_size = problem.workload.group_size
        self.samples = SampleStore(problem.graph, device, group_size)
        self.coming = SampleStore(problem.graph, device, group_size)
        self.works_for: int | None = None
        self.items: Sequence[Item] = ()  # the data of the step, a group each
        self.coming_items: Sequence[Item] = ()

    # ---- from step to step --------------------------------------------------------------------

    def begin(self, step: int, data: Prompts | None = None) -> None:
        """The items of ``step``, of the run's data or of other ``data``."""
        self.items = (data or self.data).batch(step, self.problem.workload.batch_size)

    def look_ahead(self, step: int) -> None:
        """What is made from now on is for ``step``, of its items."""
        self.works_for = step
        self.coming_items = self.data.batch(step, self.problem.workload.batch_size)

    def take_coming(self) -> None:
        """What was made ahead is what the step that begins has."""
        self.samples.values, self.coming.values = self.coming.values, {}
        self.works_for = None

    def item(self, sample: int) -> Item:
        return self.items[sample // self.problem.workload.group_size]

    # ---- what calls read ----------------------------------------------------------------------

    def group_size(self, call: ModelFunctionCall) -> int:
        """Sequences of a group that the call works on."""
        return self.problem.workload_of(call.name).group_size

    def gather(self, call: ModelFunctionCall, groups: Sequence[int]) -> SequenceBatch:
        """The call's inputs of these groups, those of the data set among them."""
        names = [k for k in call.inputs if k in self.problem.graph.source_keys and k != "prompts"]
        if names:
            self._read_data(names, groups)
        return self.samples.gather(groups, call, self.group_size(call))

    def _read_data(self, names: Sequence[str], groups: Sequence[int]) -> None:
        """Keep ``sequences`` and ``prompt_lengths`` of these groups of the data set."""
        items = self.items
        sequences = self.samples.sequences(groups, self.problem.workload.group_size)
        rows = [
            (items[group].prompt, answer) for group in groups for answer in items[group].answers
        ]
        batch = SequenceBatch(
            samples=tuple(sequences),
            lengths=tuple(len(prompt) + len(answer) for prompt, answer in rows),
            per_token={"sequences": torch.cat([part for row in rows for part in row])},
            per_sequence={"prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows])},
        )
        for name in names:
            self.samples.put_key(batch, name, batch.get(name))

    # ---- what they make -----------------------------------------------------------------------

    def with_outputs(
        self, call: ModelFunctionCall, batch: SequenceBatch, values: Mapping[str, Tensor]
    ) -> SequenceBatch:
        """``batch`` with what the call's function found of it.

        Raises:
            ConfigError: a value of a sequence is not finite; names the prompt's line.
        """
        per = {call.inner_name(k): self.problem.graph.key(k).per for k in call.outputs}
        for name, value in values.items():
            if per[name] == "sequence" and not torch.isfinite(value).all():
                place = int((~torch.isfinite(value)).nonzero()[0])
                item = self.item(batch.samples[place])
                raise ConfigError(
                    f"{call.name} finds {name} {float(value[place])} for an answer to this prompt",
                    where=item.where or f"sample {batch.samples[place]}",
                    remedy=f"mend the line, or the weights of {call.role or call.name}",
                )
        return batch.with_values(
            per_token={k: v for k, v in values.items() if per[k] == "token"},
            per_sequence={k: v for k, v in values.items() if per[k] == "sequence"},
        )

    def rewarded(self, step: int, most: int, text: TextCodec) -> list[dict[str, Any]]:
        """The first ``most`` answers and their rewards, a row each, as a step's table has them."""
        held, table = self.samples.values, []
        for sample in sorted(held[REWARDS])[:most]:
            ids = held["sequences"][sample].tolist()
            start, item = int(held["prompt_lengths"][sample]), self.item(sample)
            prompt = item.record.get("prompt") or text.decode(ids[:start])
            table.append(
                {"step": step, "sample": sample, "where": item.where, "prompt": prompt,
                 "answer": text.decode(ids[start:]), "reward": float(held[REWARDS][sample])}
            )  # fmt: skip
        return table
