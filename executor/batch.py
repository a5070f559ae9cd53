"""``SequenceBatch``: packed sequences of unequal lengths, without padding.

Values of tokens are concatenated over the batch's sequences, [tokens]; values of sequences are
[num_sequences]. ``samples`` are the sequences' numbers in the step's whole batch (group times
``group_size`` plus place in the group): they key the sampling noise and the transfers, so that a
result does not depend on who computed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """``num_sequences`` sequences; ``per_token[key]`` [tokens], ``per_sequence[key]`` [n].

    ``per_token["sequences"]`` holds the token ids (int64) wherever a model reads them.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.samples) == len(self.lengths), (len(self.samples), len(self.lengths))
        for name, value in self.per_token.items():
            assert value.shape[0] == self.num_tokens, (name, value.shape, self.num_tokens)
        for name, value in self.per_sequence.items():
            assert value.shape[0] == self.num_sequences, (name, value.shape)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each sequence and the end of the last, [num_sequences + 1]."""
        return (0, *accumulate(self.lengths))

    @property
    def token_ids(self) -> Tensor:
        """[tokens], int64."""
        return self.per_token["sequences"]

    def get(self, key: str) -> Tensor:
        """A value by name, whichever kind it is."""
        return self.per_token[key] if key in self.per_token else self.per_sequence[key]

    def with_values(
        self,
        *,
        per_token: Mapping[str, Tensor] | None = None,
        per_sequence: Mapping[str, Tensor] | None = None,
    ) -> SequenceBatch:
        """The same sequences with values added or replaced."""
        return replace(
            self,
            per_token={**self.per_token, **(per_token or {})},
            per_sequence={**self.per_sequence, **(per_sequence or {})},
        )

    def select(self, indices: Sequence[int]) -> SequenceBatch:
        """The sequences at ``indices`` of this batch, in that order."""
        offsets = self.offsets

        def tokens(value: Tensor) -> Tensor:
            parts = [value[offsets[i] : offsets[i + 1]] for i in indices]
            return torch.cat(parts) if parts else value[:0]

        rows = torch.tensor(list(indices), dtype=torch.long)
        return SequenceBatch(
            samples=tuple(self.samples[i] for i in indices),
            lengths=tuple(self.lengths[i] for i in indices),
            per_token={name: tokens(value) for name, value in self.per_token.items()},
            per_sequence={
                name: value[rows.to(value.device)] for name, value in self.per_sequence.items()
            },
        )

    def to(self, device: torch.device) -> SequenceBatch:
        return replace(
            self,
            per_token={name: value.to(device) for name, value in self.per_token.items()},
            per_sequence={name: value.to(device) for name, value in self.per_sequence.items()},
        )


def concatenate(batches: Sequence[SequenceBatch]) -> SequenceBatch:
    """One batch of all sequences, in order; every batch has the same keys."""
    first = batches[0]
    return SequenceBatch(
        samples=tuple(s for b in batches for s in b.samples),
        lengths=tuple(n for b in batches for n in b.lengths),
        per_token={k: torch.cat([b.per_token[k] for b in batches]) for k in first.per_token},
        per_sequence={
            k: torch.cat([b.per_sequence[k] for b in batches]) for k in first.per_sequence
        },
    )


def balanced_parts(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of ``lengths`` in ``num_parts`` lists of nearly equal sums, each sorted.

    Longest first onto the lightest part (Graham 1969, LPT: at most 4/3 of the best). Parts may
    be empty where there are fewer sequences than parts; ties go to the lower index.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_parts), key=lambda p: (loads[p], len(parts[p]), p))
        parts[lightest].append(index)
        loads[lightest] += lengths[index]
    return [sorted(part) for part in parts]


def balanced_groups(lengths: Sequence[int], group_size: int, num_parts: int) -> list[list[int]]:
    """As ``balanced_parts``, but runs of ``group_size`` sequences stay together, in order.

    >>> balanced_groups([1, 2, 8, 9, 3, 3], 2, 2)
    [[2, 3], [0, 1, 4, 5]]
    """
    starts = range(0, len(lengths), group_size)
    sums = [sum(lengths[start : start + group_size]) for start in starts]
    return [
        [group * group_size + k for group in part for k in range(group_size)]
        for part in balanced_parts(sums, num_parts)
    ]
