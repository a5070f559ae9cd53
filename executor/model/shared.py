"""A packed batch in which tokens that sequences have in common at their beginning are once.

Read ``whole_or_shared``. The answers to one prompt, a pair, prompts that begin with one text: every
token sees the same before it, so it has the same hidden states, keys and values in each of the
sequences, and gradients of what all of them read of it add up. Each sequence is compared with the
one before it, so nothing needs to be known of groups:

    sequences   p p a a   p p b   p p b c        (the second and third begin alike by 3)
    computed    p p a a       b         c
    keys        p p a a   p p b   p p b c        of computed tokens, whole sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor.model.attention import PackedLengths, SharedKeys, pack
from executor.model.copies import Copies, copies_of
from planner.sharing import LEAST_SHARED, spares_enough

Ints = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The tokens of a batch that are computed, and how the batch's are made of them.

    ``packed``: those tokens; ``places`` [computed]: each one's in the batch; ``copies``: the
    batch's tokens. The last two are None where all are computed, in their order.
    """

    packed: PackedLengths
    places: Tensor | None = None
    copies: Copies | None = None

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens

    def select(self, values: Tensor) -> Tensor:
        """[tokens] of the batch -> [computed]."""
        return values if self.places is None else values[self.places.to(values.device)]

    def expand(self, values: Tensor) -> Tensor:
        """[computed, …] -> [tokens, …] of the batch; differentiable."""
        return values if self.copies is None else self.copies.expand(values)


def whole_or_shared(
    token_ids: Tensor, lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Computed:
    """What is computed of sequences of ``lengths``, of ``token_ids`` [tokens] one after another.

    Tokens that a sequence has in common with the one before it, if they are ``LEAST_SHARED`` or
    more and all of these spare enough (``planner.sharing``), are not computed again. It follows
    from the batch alone, so all who hold it agree.
    """
    alike = _alike(token_ids.cpu().numpy(), lengths)
    if not spares_enough(sum(alike), sum(lengths)):
        return Computed(packed=pack(lengths, device))
    return _shared(lengths, alike, device)


def _alike(ids: Ints, lengths: Sequence[int]) -> list[int]:
    """Of every sequence the tokens that it shares with the one before it."""
    starts = (0, *accumulate(lengths))
    found = [0] * len(lengths)
    for i in range(1, len(lengths)):
        most = min(lengths[i - 1], lengths[i])
        if most < LEAST_SHARED:
            continue
        one, other = (ids[start : start + most] for start in starts[i - 1 : i + 1])
        if not np.array_equal(one[:LEAST_SHARED], other[:LEAST_SHARED]):
            continue
        unlike = one != other
        found[i] = int(unlike.argmax()) if unlike.any() else most
    return found


def _shared(lengths: Sequence[int], alike: Sequence[int], device: torch.device | str) -> Computed:
    """Computed tokens by the lengths of what they are of: equals are one call of attention."""
    own = [length - before for length, before in zip(lengths, alike, strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: (own[i], lengths[i]))
    starts = dict(zip(order, accumulate((own[i] for i in order), initial=0)))
    rows: list[Ints] = []  # of each sequence: the computed tokens that are its tokens
    for i, before in enumerate(alike):
        others = rows[i - 1][:before] if before else np.zeros(0, dtype=np.int64)
        rows.append(np.concatenate((others, starts[i] + np.arange(own[i]))))
    first = (0, *accumulate(lengths))
    positions = np.concatenate([np.arange(alike[i], lengths[i]) for i in order])
    places = np.concatenate([first[i] + np.arange(alike[i], lengths[i]) for i in order])
    keys = SharedKeys(
        packed=pack([lengths[i] for i in order], device),
        copies=copies_of(np.concatenate([rows[i] for i in order]), device),
    )
    return Computed(
        packed=pack([own[i] for i in order], device, positions=torch.from_numpy(positions),
                    shared=keys),
        places=torch.from_numpy(places).to(device),
        copies=copies_of(np.concatenate(rows), device),
    )  # fmt: skip
