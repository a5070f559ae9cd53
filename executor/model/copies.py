"""``Copies``: rows of a short tensor that a longer one has several times, and their gradients.

The order in which gradients of copies are added up is fixed: results do not change from run to
run, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Row i of the long tensor is row ``index[i]`` of the short one; ``copies_of`` makes it.

    ``first`` [short rows]: a place of each row in the long one. ``others``: its other places, in
    rounds of (places in the long one, rows), no row twice in a round.
    """

    index: Tensor
    first: Tensor
    others: tuple[tuple[Tensor, Tensor], ...]

    def expand(self, x: Tensor) -> Tensor:
        """[short rows, …] -> [long rows, …]; differentiable."""
        expanded: Tensor = _Expand.apply(x, self)
        return expanded


def copies_of(index: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> Copies:
    """``index`` [long rows]: every number from 0 to the largest at least once."""

    def tensor(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    counts = np.bincount(index)
    assert counts.min(initial=1) > 0, "a row that is nowhere in the long tensor"
    order = np.argsort(index, kind="stable")  # places, by row
    starts = np.cumsum(counts) - counts
    round_of = np.arange(len(index)) - np.repeat(starts, counts)
    by_round = order[np.argsort(round_of, kind="stable")]
    first, *others = np.split(by_round, np.cumsum(np.bincount(round_of))[:-1])
    rounds = tuple((tensor(places), tensor(index[places])) for places in others)
    return Copies(index=tensor(index), first=tensor(first), others=rounds)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        copies: Copies = ctx.copies
        wide = torch.promote_types(grad.dtype, torch.float32)  # many copies are not added in bf16
        total = grad.index_select(0, copies.first).to(wide)
        for places, rows in copies.others:
            # No row twice: also on a GPU, whose index_add has no order, one value to a row.
            total.index_add_(0, rows, grad.index_select(0, places).to(wide))
        return total.to(grad.dtype), None
